"""The one place where a device is chosen by name, or refused with the reason."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from xclip_fast.devices import find_device
from xclip_fast.errors import InputError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs, as far as torch is asked."""
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *size, device=None: empty(*size))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("auto", "cuda"),
        ("cpu", "cpu"),
        ("cpu:0", "cpu"),
        ("cuda", "cuda"),
        ("cuda:1", "cuda:1"),
        (torch.device("cuda", 1), "cuda:1"),
    ],
)
def test_a_device_is_found_by_its_name(asked: str | torch.device, found: str) -> None:
    assert find_device(asked) == torch.device(found)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_auto_is_the_cpu() -> None:
    assert find_device("auto") == torch.device("cpu")


@pytest.mark.usefixtures("gpus")
def test_a_gpu_beyond_the_last_is_refused_with_their_number() -> None:
    with pytest.raises(InputError, match=r"^device 'cuda:2' was asked for: .* has 2 GPUs, the last is cuda:1$"):
        find_device("cuda:2")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("version", "reason"),
    [(None, "this torch is built for CPUs"), ("13.0", "built for CUDA 13.0, no usable GPU found")],
)
def test_cuda_without_a_gpu_says_why(version: str | None, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    with pytest.raises(InputError) as refused:
        find_device("cuda")
    assert str(refused.value) == f"device 'cuda' was asked for: {reason}: use cpu"


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("asked", ["", "gpu", "CPU", "cpu:x", "cuda:", "cuda:-1", "cuda:300", "meta", "mps"])
def test_unknown_names_are_refused(asked: str) -> None:
    with pytest.raises(InputError) as refused:
        find_device(asked)
    assert str(refused.value) == f"unknown device {asked!r}: choose auto, cpu, cuda or cuda:N"


def test_other_kinds_are_taken_where_they_can_be_used() -> None:
    assert find_device("meta", kinds=None) == torch.device("meta")
    with pytest.raises(InputError, match=r"^device 'vulkan' was asked for: torch cannot use it: "):
        find_device("vulkan", kinds=None)


def test_the_model_of_a_command_needs_no_benchmark() -> None:
    program = (
        "import sys; from xclip_fast.cli.batch import open_model; open_model('demo', None, 'auto', 'float32'); "
        "print(sorted(name for name in sys.modules if name.startswith('xclip_fast.bench')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
