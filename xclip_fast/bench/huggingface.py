"""Hugging Face's model as a provider: eager, after ``optimize``, and under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from xclip_fast.bench.setting import Classify, Frames, Setting, UnavailableError
from xclip_fast.config import XCLIPConfig


class HuggingFace(nn.Module):
    """``XCLIPModel`` without its text tower, which is spent once for a set of classes."""

    def __init__(self, model: Any, setting: Setting) -> None:
        super().__init__()
        self.model = model.to(setting.case.device, setting.dtype)
        self.frames = Frames(setting).to(setting.case.device)

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        model: Any = self.model
        video = self.frames(video)
        batch, frames = video.shape[:2]
        seen = model.vision_model(pixel_values=video.flatten(0, 1))
        features = model.visual_projection(seen[1]).unflatten(0, (batch, frames))
        embedding = model.mit(features)[1]
        patches = model.prompts_visual_layernorm(seen[0][:, 1:]) @ model.prompts_visual_projection
        patches = patches.unflatten(0, (batch, frames)).mean(1)
        texts = text.expand(batch, -1, -1)
        texts = texts + model.prompts_generator(texts, patches)
        cosine = torch.einsum("be,bke->bk", normalize(embedding, dim=-1), normalize(texts, dim=-1))
        return model.logit_scale.exp() * cosine


def model_of(config: XCLIPConfig, attention: str) -> Any:
    """``XCLIPModel`` with its first values, on the default device.

    Raises:
        UnavailableError: transformers is not installed, or has no such model.
    """
    try:
        import transformers
    except ImportError as error:
        raise UnavailableError(f"transformers does not import: {error}") from error
    from xclip_fast.checkpoints.huggingface import configs_of

    if not hasattr(transformers, "XCLIPModel"):
        raise UnavailableError(f"transformers {transformers.__version__} has no XCLIPModel")
    settings = transformers.XCLIPConfig(**configs_of(config, "float32")[0], attn_implementation=attention)
    return transformers.XCLIPModel(settings).eval()


def huggingface(attention: str) -> Callable[[Setting], Classify]:
    """Builds the model with this of its attentions."""

    def build(setting: Setting) -> Classify:
        from xclip_fast.checkpoints.saving import huggingface_state

        # first values drawn on a GPU are there at once
        with torch.device(setting.case.device), torch.random.fork_rng(devices=[]):
            model = model_of(setting.config, attention)
        keys = model.load_state_dict(huggingface_state(setting.state), strict=False)
        if lost := [name for name in keys.missing_keys if not name.endswith("position_ids")]:
            raise UnavailableError(f"this version of transformers has other weights: {', '.join(lost[:3])}")
        return HuggingFace(model, setting)

    return build


def optimized(setting: Setting) -> Classify:
    """The model after ``xclip_fast.optimize``."""
    from xclip_fast.patch import optimize

    found: Any = huggingface("sdpa")(setting)
    optimize(found.model)
    classify: Classify = found
    return classify


class _Compiled(nn.Module):
    """A compiled module, with settings of the compiler, that runs with one backend of PyTorch's attention."""

    def __init__(self, inner: nn.Module, settings: dict[str, Any], attention: str | None) -> None:
        super().__init__()
        self.inner = torch.compile(inner)
        self.settings, self.attention = settings, attention

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        from torch._inductor import config
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = getattr(SDPBackend, self.attention) if self.attention else None
        with sdpa_kernel(chosen) if chosen is not None else nullcontext(), config.patch(self.settings):
            found: Tensor = self.inner(video, text)
        return found


def compiled(inner: Any, settings: dict[str, Any] | None = None, attention: str | None = None) -> Classify:
    torch.compiler.reset()
    return _Compiled(inner, settings or {}, attention)


def huggingface_compiled(
    tuned: bool = False, attention: str | None = None, gemms: str | None = None
) -> Callable[[Setting], Classify]:
    """The model by torch.compile.

    Args:
        tuned: by max-autotune.
        attention: the one backend of PyTorch's attention that is allowed, on a GPU.
        gemms: the backends that tuned GEMMs are chosen from, such as "ATEN", which is cuBLAS; all by default.
    """

    def build(setting: Setting) -> Classify:
        on_gpu = setting.case.device.startswith("cuda")
        if attention and not on_gpu:
            raise UnavailableError("this attention backend needs a GPU")
        settings: dict[str, Any] = {}
        if tuned:
            # a graph of its own is captured around it, so the compiler makes none
            settings |= torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
            settings |= {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}
            settings |= {} if gemms is None else {"max_autotune_gemm_backends": gemms}
            # on a CPU it tunes GEMMs only with constant weights
            settings["freezing"] = not on_gpu and setting.case.direction == "forward"
        return compiled(huggingface("sdpa")(setting), settings, attention)

    return build
