"""What the ops spare the compiler."""

from __future__ import annotations

import pytest
import torch

from xclip_fast.ops import _fake


class Deep:
    """An argument that is made of others: its text doubles with every one of them."""

    def __str__(self) -> str:
        raise RecursionError

    __repr__ = __str__


def test_an_op_is_named_without_all_that_its_arguments_are_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    issues = pytest.importorskip("torch._inductor.exc")
    monkeypatch.setattr(_fake, "_WRITES_ALL_DOWN", True)
    whole = issues.OperatorIssue.operator_str
    monkeypatch.setattr(issues.OperatorIssue, "operator_str", staticmethod(whole))
    monkeypatch.setattr(issues, "_xclip_fast_ops_are_brief", False, raising=False)
    with torch.device("meta"):
        for _ in range(2):
            torch.ops.xclip_fast.layer_norm(torch.empty(2, 8), torch.empty(8), torch.empty(8), None, None, 1e-5)
    op = torch.ops.xclip_fast.layer_norm.default
    for issue in (issues.OperatorIssue, issues.MissingOperatorWithoutDecomp):
        assert issue.operator_str(op, [Deep()], {}) == "  target: xclip_fast.layer_norm.default"
    # of all others it says what it did
    with pytest.raises(RecursionError):
        issues.OperatorIssue.operator_str(torch.ops.aten.relu.default, [Deep()], {})
    assert "args[0]: 5" in issues.OperatorIssue.operator_str(torch.ops.aten.relu.default, [5], {})


def test_every_op_says_its_shapes_by_this_decorator() -> None:
    from pathlib import Path

    folder = Path(_fake.__file__).parent
    for path in folder.glob("*.py"):
        assert path.name == "_fake.py" or "library.register_fake" not in path.read_text(), path.name
        assert "import custom_op, register_autograd, register_fake" not in path.read_text(), path.name
