"""On a GPU every tensor is on it: shapes and devices are followed on tensors without numbers, so none is needed."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from configs import SMALL
from engine_cases import small_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from xclip_fast.engine import Engine, api, cuda
from xclip_fast.engine.models import check_model
from xclip_fast.model import create_model
from xclip_fast.ops import _patch_extension

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PRECISIONS: dict[torch.dtype, tuple[torch.dtype, str | None]] = {
    torch.float32: (torch.float32, None),
    torch.bfloat16: (torch.bfloat16, None),
    torch.float16: (torch.float16, None),
    torch.float8_e4m3fn: (torch.bfloat16, "float8_e4m3fn"),
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """Tensors of this mode have a device and no numbers, and operators refuse to mix two devices."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(api, "find_device", torch.device)
    monkeypatch.setattr(api, "precision_of", lambda dtype, device: (*PRECISIONS[dtype], None))
    one_stream = cuda.SideStream(CPU)
    for module in (api, cuda):
        monkeypatch.setattr(module, "SideStream", lambda device: one_stream)
    # the registered op has a fake, the extension's own operator has none
    monkeypatch.setattr(_patch_extension, "takes_packed", lambda frames, weight: False)
    # asked once in a process, with numbers
    check_model(small_model())
    # graphs need the device, and errors of GEMMs need numbers
    monkeypatch.setattr(api, "GraphCache", lambda run, uncaptured=None: run)
    monkeypatch.setattr(api, "check_gemms", lambda model, packing, clips: ([], None))
    return FakeTensorMode()


def without_numbers(model: Any, mode: FakeTensorMode, device: torch.device) -> Any:
    """The model with parameters of the mode on a device."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                number_free = mode.from_tensor(parameter.detach())
                with mode:
                    module._parameters[name] = nn.Parameter(number_free.to(device), requires_grad=False)
    return model


def videos(device: torch.device) -> list[Tensor]:
    return [torch.empty(2, 4, 32, 32, 3, dtype=torch.uint8, device=device), torch.empty(2, 4, 3, 32, 32, device=device)]


def test_a_fake_refuses_to_mix_devices(fake: FakeTensorMode) -> None:
    with fake, pytest.raises(RuntimeError, match="device"):
        torch.empty(2, device=GPU) + torch.empty(2)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.slow
def test_engine_stays_on_its_gpu(fake: FakeTensorMode, dtype: torch.dtype) -> None:
    model = without_numbers(small_model(), fake, CPU)
    with fake:
        engine = Engine(model, dtype, GPU)
        texts = engine.texts_of(torch.empty(5, SMALL.embed_dim))
        for video in videos(CPU) + videos(GPU):
            features = engine.encode_video(video)
            logits = engine.logits(features, texts)
            assert logits.shape == (2, 5)
            scores = engine(video, texts), engine.classify(video, texts)
            assert [x.shape for x in scores] == [logits.shape] * 2
            assert {x.device for x in (*features, engine.embed_video(video), *texts[:2], logits, *scores)} == {GPU}


@pytest.mark.slow
def test_layers_stay_on_their_gpu(fake: FakeTensorMode) -> None:
    model = without_numbers(create_model(SMALL), fake, GPU)
    with fake:
        text = torch.empty(5, SMALL.embed_dim, device=GPU)
        for video in videos(GPU):
            features = model.encode_video(video)
            logits = model.logits(features, text)
            assert logits.shape == (2, 5)
            assert {x.device for x in (*features, logits)} == {GPU}
