"""Who computes a model: ours, Hugging Face's in several ways, the plain definition; looked up when it is asked for.

Every provider has the same weights and classifies the same frames against the same encoded class texts. Frames are
normalised or bytes; providers that take no bytes normalise them first, inside of their time. One that cannot run here
raises ``UnavailableError`` with the reason, which becomes its row.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from xclip_fast.bench.cases import config_of
from xclip_fast.bench.inputs import OUTLIER_SCALE, OUTLIERS
from xclip_fast.bench.record import Case
from xclip_fast.config import XCLIPConfig
from xclip_fast.errors import InputError

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


@dataclass(frozen=True)
class Provider:
    """One way to compute the model.

    Attributes:
        what: a line for a table.
        build: takes frames, normalised (B, T, 3, H, W) or uint8 (B, T, H, W, 3), and encoded texts (K, E) to logits
            (B, K); a module can be trained.
        limit: what it may err instead of twice plain torch's error, where it rounds more on purpose.
        same: it computes X-CLIP; a floor computes something cheaper, and passes no gate.
        own_graph: it replays CUDA graphs by itself; none can be captured around it.
        compiled: its memory is not filled with NaN at the gate: the compiler would start anew for that.
    """

    what: str
    build: Callable[[Setting], Classify]
    limit: float | None = None
    same: bool = True
    own_graph: bool = False
    compiled: bool = False


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


class _Ours(nn.Module):
    """A model of this library as a classifier."""

    def __init__(self, model: Any, setting: Setting) -> None:
        super().__init__()
        weights = {name: tensor.to(setting.case.device, setting.dtype) for name, tensor in setting.state.items()}
        model.load_state_dict(weights, assign=True)
        self.model = model

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        logits: Tensor = self.model.logits(self.model.encode_video(video), text)
        return logits


class _Frames(nn.Module):
    """Frames as a model takes them that takes no bytes: what its user has to do first is part of its time."""

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


class _HuggingFace(nn.Module):
    """``XCLIPModel`` without its text tower, which is spent once for a set of classes."""

    def __init__(self, model: Any, setting: Setting) -> None:
        super().__init__()
        self.model = model.to(setting.case.device, setting.dtype)
        self.frames = _Frames(setting).to(setting.case.device)

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


def _reference(setting: Setting) -> Classify:
    from xclip_fast.reference import XCLIP

    with torch.device("meta"):
        model = XCLIP(setting.config).eval()
    return _Ours(model, setting)


def _layers(setting: Setting) -> Classify:
    from xclip_fast.model import XCLIP

    with torch.device("meta"):
        model = XCLIP(setting.config).eval()
    return _Ours(model, setting)


def _layers_compiled(setting: Setting) -> Classify:
    return _compiled(_layers(setting))


def _huggingface(attention: str) -> Callable[[Setting], Classify]:
    def build(setting: Setting) -> Classify:
        try:
            import transformers
        except ImportError as error:
            raise UnavailableError(f"transformers does not import: {error}") from error
        from xclip_fast.checkpoints.huggingface import configs_of
        from xclip_fast.checkpoints.saving import huggingface_state

        if not hasattr(transformers, "XCLIPModel"):
            raise UnavailableError(f"transformers {transformers.__version__} has no XCLIPModel")
        settings = transformers.XCLIPConfig(**configs_of(setting.config, "float32")[0], attn_implementation=attention)
        # first values drawn on a GPU are there at once
        with torch.device(setting.case.device), torch.random.fork_rng(devices=[]):
            model = transformers.XCLIPModel(settings).eval()
        lacking = model.load_state_dict(huggingface_state(setting.state), strict=False)
        if lost := [name for name in lacking.missing_keys if not name.endswith("position_ids")]:
            raise UnavailableError(f"this version of transformers has other weights: {', '.join(lost[:3])}")
        return _HuggingFace(model, setting)

    return build


def _optimized(setting: Setting) -> Classify:
    from xclip_fast.patch import optimize

    found: Any = _huggingface("sdpa")(setting)
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


def _compiled(inner: Any, settings: dict[str, Any] | None = None, attention: str | None = None) -> Classify:
    torch.compiler.reset()
    return _Compiled(inner, settings or {}, attention)


def _huggingface_compiled(tuned: bool = False, attention: str | None = None) -> Callable[[Setting], Classify]:
    def build(setting: Setting) -> Classify:
        on_gpu = setting.case.device.startswith("cuda")
        if attention and not on_gpu:
            raise UnavailableError("this attention backend needs a GPU")
        settings: dict[str, Any] = {}
        if tuned:
            # a graph of its own is captured around it, so the compiler makes none
            settings |= torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
            settings |= {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}
            # on a CPU it tunes products with constants alone
            settings["freezing"] = not on_gpu and setting.case.direction == "forward"
        return _compiled(_huggingface("sdpa")(setting), settings, attention)

    return build


class _Engine:
    """An engine that keeps the class set of the text features it was given last, as its users do."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.text: Tensor | None = None
        self.texts: Any = None

    def __call__(self, video: Tensor, text: Tensor) -> Tensor:
        if text is not self.text:
            self.text, self.texts = text, self.engine.texts_of(text)
        logits: Tensor = self.engine(video, self.texts)
        return logits


def _engine(dtype: str | None = None) -> Callable[[Setting], Classify]:
    def build(setting: Setting) -> Classify:
        if setting.case.direction == "train":
            raise UnavailableError("the engine is for inference")
        try:
            from xclip_fast.engine import Engine
        except ImportError as error:
            raise UnavailableError(f"this version has no engine: {error}") from error
        model: Any = _layers(replace(setting, case=replace(setting.case, dtype="float32")))
        asked: Any = getattr(torch, dtype or setting.case.dtype)
        try:
            engine = Engine(model.model, asked, setting.case.device)
        except InputError as error:
            raise UnavailableError(str(error)) from error

        return _Engine(engine)

    return build


def _rival(runtime: str, precision: str, dtype: str | None = None) -> Callable[[Setting], Classify]:
    """Hugging Face's model in another runtime, which takes and gives float32; with ``dtype``, for its cases alone."""

    def build(setting: Setting) -> Classify:
        if setting.case.direction == "train" or setting.case.device != "cpu":
            raise UnavailableError("it is for inference on the CPU")
        if dtype not in (None, setting.case.dtype):
            raise UnavailableError(f"it computes in {dtype}")
        from xclip_fast.bench import rivals

        exact = replace(setting, case=replace(setting.case, dtype="float32"))
        frames = _Frames(exact)

        def draw(seed: int) -> tuple[Tensor, Tensor]:
            video, text = inputs_of(exact, seed)
            return frames(video), text

        def model() -> nn.Module:
            found: Any = _huggingface("sdpa")(exact)
            return found.requires_grad_(False)

        with nullcontext(setting.folder) if setting.folder else TemporaryDirectory() as folder:
            try:
                run = rivals.RUNTIMES[runtime](rivals.Source(model, draw, Path(folder)), precision)
            except ModuleNotFoundError as error:
                raise UnavailableError(f"{error.name} is not installed: pip install 'xclip-fast[rivals]'") from error
            except NotImplementedError as error:
                raise UnavailableError(str(error)) from error
        return lambda video, text: run(frames(video).float(), text.float())

    return build


def _open_clip_frames(setting: Setting) -> Classify:
    """CLIP's image tower on every frame by itself: what a video model costs over an image model."""
    try:
        import open_clip
    except ImportError as error:
        raise UnavailableError(f"open_clip does not import: {error}") from error
    names = {"B/32": "ViT-B-32-quickgelu", "B/16": "ViT-B-16-quickgelu", "L/14": "ViT-L-14-quickgelu"}
    names["L/14-336"] = "ViT-L-14-336-quickgelu"
    if setting.case.variant not in names:
        raise UnavailableError("open_clip has no image model of these sizes")
    # random weights: nothing is fetched
    model = open_clip.create_model(names[setting.case.variant], pretrained=None, load_weights=False)
    return _ImageModel(model.visual, setting)


class _ImageModel(nn.Module):
    def __init__(self, visual: nn.Module, setting: Setting) -> None:
        super().__init__()
        self.visual = visual.to(setting.case.device, setting.dtype)
        self.frames = _Frames(setting).to(setting.case.device)

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        video = self.frames(video)
        features = self.visual(video.flatten(0, 1)).unflatten(0, video.shape[:2]).mean(1)
        return normalize(features, dim=-1) @ normalize(text, dim=-1).T


# the cosines of quantised models stay above 0.999, which is an error of 0.045
QUANTISED = 0.05

PROVIDERS: dict[str, Provider] = {
    "hf-sdpa": Provider("Hugging Face, eager, PyTorch's fused attention", _huggingface("sdpa")),
    "hf-eager": Provider("Hugging Face, eager, plain attention", _huggingface("eager")),
    "reference": Provider("the definition, plain PyTorch in the official order", _reference),
    "layers": Provider("xclip_fast.create_model, the fused layers", _layers),
    "optimized": Provider("Hugging Face after xclip_fast.optimize", _optimized),
    "engine": Provider("xclip_fast.Engine in the case's dtype", _engine(), own_graph=True),
    "engine-int8": Provider("xclip_fast.Engine, int8", _engine("int8"), QUANTISED, own_graph=True),
    "engine-float8": Provider("xclip_fast.Engine, float8_e4m3fn", _engine("float8_e4m3fn"), QUANTISED, own_graph=True),
    "hf-compile": Provider("Hugging Face, torch.compile", _huggingface_compiled(), compiled=True),
    "torch-compile-max": Provider(
        "Hugging Face, torch.compile max-autotune, on a CPU with constant weights",
        _huggingface_compiled(tuned=True),
        compiled=True,
    ),
    "hf-compile-max-flash": Provider(
        "max-autotune with flash attention", _huggingface_compiled(True, "FLASH_ATTENTION"), compiled=True
    ),
    "hf-compile-max-cudnn": Provider(
        "max-autotune with cuDNN's attention", _huggingface_compiled(True, "CUDNN_ATTENTION"), compiled=True
    ),
    "onnxruntime": Provider("Hugging Face, exported to onnxruntime", _rival("onnxruntime", "float32", "float32")),
    "onnxruntime-int8": Provider("the same, quantised dynamically", _rival("onnxruntime", "int8"), QUANTISED),
    "openvino": Provider("Hugging Face, exported to OpenVINO", _rival("openvino", "float32", "float32")),
    "openvino-bf16": Provider("the same in bfloat16", _rival("openvino", "bfloat16", "bfloat16")),
    "openvino-int8": Provider("the same, quantised by NNCF", _rival("openvino", "int8"), QUANTISED),
    "layers-compile": Provider("the fused layers, torch.compile", _layers_compiled, compiled=True),
    "open_clip-frames": Provider("CLIP's image tower on single frames, a floor", _open_clip_frames, same=False),
}

QUICK = ("hf-sdpa", "layers", "engine", "engine-int8", "engine-float8")
BASELINES = ("hf-sdpa", "reference")  # the first that runs here


def check_names(names: list[str]) -> None:
    """Refuse what is no provider.

    Raises:
        InputError: with the names that there are.
    """
    for name in names:
        if name not in PROVIDERS:
            raise InputError(f"unknown provider {name!r}: choose one of {', '.join(PROVIDERS)}")
