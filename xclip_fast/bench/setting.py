"""A case made concrete: its weights, frames and texts, and the step of a provider that is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from xclip_fast.bench.record import Case
from xclip_fast.config import XCLIPConfig
from xclip_fast.ops.cases import config_of
from xclip_fast.ops.inputs import OUTLIER_SCALE, OUTLIERS

INPUTS = ("normalised", "uint8")
State = dict[str, Tensor]
Classify = Callable[[Tensor, Tensor], Tensor]


class UnavailableError(Exception):
    """Why a provider cannot run here."""


@dataclass(frozen=True)
class Setting:
    """What a provider is built for.

    Attributes:
        case: what it computes.
        config: the sizes.
        state: the weights in float32 on the CPU.
        folder: where a provider keeps the files it makes of the weights, for the next one who builds it; without, they
            are gone when it is built.
    """

    case: Case
    config: XCLIPConfig
    state: State
    folder: Path | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and frames."""
        found: torch.dtype = getattr(torch, self.case.dtype)
        return found


def setting_of(case: Case, folder: Path | None = None) -> Setting:
    """Sizes and weights of a case: random, with outlier channels in the residual stream as trained models have them."""
    return Setting(case, config_of(case.variant, case.frames), _state(case.variant, case.frames), folder)


@lru_cache(maxsize=4)
def _state(variant: str, frames: int) -> State:
    from xclip_fast.model import create_model

    model = create_model(config_of(variant, frames), seed=0)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    state["visual.ln_pre.weight"][list(OUTLIERS)] *= OUTLIER_SCALE
    return state


def forget() -> None:
    """Free the weights kept for the next setting: those who measure memory hold nothing else."""
    _state.cache_clear()


def inputs_of(setting: Setting, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random frames, bytes or in the dtype of the case, and encoded class texts, on the device of the case."""
    case, config = setting.case, setting.config
    generator = torch.Generator().manual_seed(seed)
    size = config.image_size
    if case.input == "uint8":
        shape = case.batch, case.frames, size, size, 3
        video = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    else:
        video = torch.randn(case.batch, case.frames, 3, size, size, generator=generator).to(setting.dtype)
    text = torch.randn(case.classes, config.embed_dim, generator=generator)
    return video.to(case.device), text.to(case.device, setting.dtype)


def step(classify: Classify, inputs: tuple[Tensor, Tensor], train: bool) -> Callable[[], Tensor]:
    """One call as it is timed: logits, or forward and backward of all parameters.

    A training step begins without gradients, so that one that is captured into a graph makes them in the graph's own
    memory, and writes all of them at each replay.
    """
    video, text = inputs
    if not train:

        def forward() -> Tensor:
            with torch.inference_mode():
                return classify(video, text)

        return forward
    assert isinstance(classify, nn.Module)
    module = classify

    def train_step() -> Tensor:
        module.zero_grad(set_to_none=True)
        logits = classify(video, text)
        logits.float().square().mean().backward()
        return logits

    return train_step


def prepared(classify: Classify, case: Case) -> Classify:
    """The classifier in the mode of the case.

    Raises:
        UnavailableError: it cannot be trained, and is asked to.
    """
    if case.direction == "train" and not isinstance(classify, nn.Module):
        raise UnavailableError("it does not train")
    if isinstance(classify, nn.Module):
        classify.train(case.direction == "train").requires_grad_(case.direction == "train")
    return classify


class Frames(nn.Module):
    """Normalises uint8 frames for a model that does not take them; its user would have to, so this is in its time."""

    scale: Tensor
    shift: Tensor

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (setting.config.pixel_mean, setting.config.pixel_std))
        self.dtype = setting.dtype
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, video: Tensor) -> Tensor:
        if video.dtype != torch.uint8:
            return video
        numbers = video.movedim(-1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return torch.addcmul(self.shift, numbers, self.scale).to(self.dtype)
