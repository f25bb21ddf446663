"""What the choice of a backend says of the libraries that are installed."""

from __future__ import annotations

import numpy
import pytest
import torch

from xclip_fast.ops import layer_norm
from xclip_fast.ops._backends import kernel_refusal

triton = pytest.importorskip("triton", reason="triton has wheels for Linux alone")


@pytest.mark.parametrize(
    ("of_triton", "of_numpy", "fails"),
    [
        ("3.6.0", "2.4.0", True),
        ("3.6.0+git1", "3.0.0rc1", True),
        ("3.6.0", "2.3.5", False),
        ("3.6.0", "1.26.4", False),
        ("3.7.0", "2.4.6", False),
        ("3.10.1", "2.5.0", False),
        ("4.0", "2.4.0", False),
    ],
)
def test_an_interpreter_that_fails_with_this_numpy_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, of_triton: str, of_numpy: str, fails: bool
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "__version__", of_triton)
    monkeypatch.setattr(numpy, "__version__", of_numpy)
    assert (kernel_refusal(torch.ones(2)) is not None) is fails
    if fails:
        x, ones = torch.ones(2, 8), torch.ones(8)
        words = f"triton {of_triton} fails with numpy {of_numpy}: pip install 'numpy<2.4', or a newer triton"
        with pytest.raises(ValueError, match=words.replace("+", r"\+")):
            layer_norm(x, ones, ones, backend="triton")
        # without being asked for it is passed over
        assert layer_norm(x, ones, ones)[0].equal(torch.ones(2, 8))
