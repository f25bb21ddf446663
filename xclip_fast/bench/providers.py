"""Who computes a model: ours, Hugging Face's in several ways, the plain definition; looked up when it is asked for.

Every provider has the same weights and classifies the same frames against the same encoded class texts. Frames are
normalised or bytes; providers that take no bytes normalise them first, inside of their time. One that cannot run here
raises ``UnavailableError`` with the reason, which becomes its row.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from xclip_fast.bench.huggingface import compiled, huggingface, huggingface_compiled, optimized
from xclip_fast.bench.setting import Classify, Frames, Setting, UnavailableError, inputs_of
from xclip_fast.errors import InputError


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
        fused: of eager batches that a GPU waits for the host with, it makes plain modules; to be captured it is asked
            for its kernels.
        compiled: its memory is not filled with NaN at the gate: the compiler would start anew for that. Nor is that of
            graphs of its own: they would fill it at each replay.
    """

    what: str
    build: Callable[[Setting], Classify]
    limit: float | None = None
    same: bool = True
    own_graph: bool = False
    compiled: bool = False
    fused: bool = False


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
    return compiled(_layers(setting))


class _Engine:
    """An engine as its user calls it: a class set is prepared once, when its texts are first seen, then named."""

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
        frames = Frames(exact)

        def draw(seed: int) -> tuple[Tensor, Tensor]:
            video, text = inputs_of(exact, seed)
            return frames(video), text

        def model() -> nn.Module:
            found: Any = huggingface("sdpa")(exact)
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
        self.frames = Frames(setting).to(setting.case.device)

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        video = self.frames(video)
        features = self.visual(video.flatten(0, 1)).unflatten(0, video.shape[:2]).mean(1)
        return normalize(features, dim=-1) @ normalize(text, dim=-1).T


# the cosines of quantised models stay above 0.999, which is an error of 0.045
QUANTISED = 0.05

PROVIDERS: dict[str, Provider] = {
    "hf-sdpa": Provider("Hugging Face, eager, PyTorch's fused attention", huggingface("sdpa")),
    "hf-eager": Provider("Hugging Face, eager, plain attention", huggingface("eager")),
    "reference": Provider("the definition, plain PyTorch in the official order", _reference),
    "layers": Provider("xclip_fast.create_model, the fused layers", _layers, fused=True),
    "optimized": Provider("Hugging Face after xclip_fast.optimize", optimized, fused=True),
    "engine": Provider("xclip_fast.Engine in the case's dtype", _engine(), own_graph=True),
    "engine-int8": Provider("xclip_fast.Engine, int8", _engine("int8"), QUANTISED, own_graph=True),
    "engine-float8": Provider("xclip_fast.Engine, float8_e4m3fn", _engine("float8_e4m3fn"), QUANTISED, own_graph=True),
    "hf-compile": Provider("Hugging Face, torch.compile", huggingface_compiled(), compiled=True),
    "torch-compile-max": Provider(
        "Hugging Face, torch.compile max-autotune, on a CPU with constant weights",
        huggingface_compiled(tuned=True),
        compiled=True,
    ),
    "hf-compile-max-flash": Provider(
        "max-autotune with flash attention", huggingface_compiled(True, "FLASH_ATTENTION"), compiled=True
    ),
    "hf-compile-max-cudnn": Provider(
        "max-autotune with cuDNN's attention", huggingface_compiled(True, "CUDNN_ATTENTION"), compiled=True
    ),
    "hf-compile-max-cublas": Provider(
        "max-autotune with flash attention and GEMMs by cuBLAS, which compiles in a fraction of the time",
        huggingface_compiled(True, "FLASH_ATTENTION", "ATEN"),
        compiled=True,
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
