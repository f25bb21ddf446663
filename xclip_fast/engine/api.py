"""``Engine``: a trained model packed for inference on one device in one precision."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from xclip_fast import processor
from xclip_fast.devices import find_device
from xclip_fast.engine.budget import GemmError, check_gemms
from xclip_fast.engine.cpu import CpuTower
from xclip_fast.engine.cuda import CudaTower, SideStream
from xclip_fast.engine.graphs import GraphCache, Pass
from xclip_fast.engine.heads import Heads
from xclip_fast.engine.models import check_model
from xclip_fast.engine.packing import CPU_REWRITES, CUDA_REWRITES, Packing
from xclip_fast.engine.precision import precision_of
from xclip_fast.engine.texts import EncodedTexts, KeptTexts, TextTower, encoder_digest
from xclip_fast.errors import InputError
from xclip_fast.numerics import exact_float32
from xclip_fast.reference.model import VideoFeatures, check_tokens, check_video
from xclip_fast.text import apply_template, clean_labels, get_tokenizer
from xclip_fast.text.folder import TextFolder

if TYPE_CHECKING:
    from xclip_fast.pipeline import FileFeatures

_PROBE_FRAMES = 2  # of the random clip that a new engine is checked with

_log = logging.getLogger("xclip_fast")

Encoded = TypeVar("Encoded")


@dataclass(frozen=True)
class Report:
    """What an engine computes in, and how far that is from float32.

    The last three compare with the model as it is now, and are None once it is gone.

    Attributes:
        dtype, device: of the engine.
        processor: the features of the CPU, as ``processor.features`` has them; none for another device.
        stored: what weights are kept in where the GEMMs are in float32 because the processor has no others, else None.
        rewrites: the exact rewrites in force.
        products: the error of each large GEMM of the blocks; none for float32.
        video_error: relative error of the video features against the model in float32.
        video_cosine: the smallest cosine of a video feature with the model's.
        top1_agreement: share of clips whose best class is the model's, among 100 random directions or the texts given.

    Example:
        >>> import xclip_fast
        >>> from xclip_fast.demo.models import load_trained
        >>> model = load_trained("xclip")  # held: the report compares with it
        >>> engine = xclip_fast.Engine(model)
        >>> report = engine.report()
        >>> report.dtype, report.top1_agreement
        ('float32', 1.0)
    """

    dtype: str
    device: str
    processor: tuple[str, ...]
    stored: str | None
    rewrites: tuple[str, ...]
    products: tuple[GemmError, ...]
    video_error: float | None
    video_cosine: float | None
    top1_agreement: float | None

    def __str__(self) -> str:
        place = f"{self.device} ({', '.join(self.processor)})" if self.processor else self.device
        lines = [f"engine in {self.dtype} on {place}; exact rewrites: {', '.join(self.rewrites)}"]
        if self.stored:
            lines.append(f"weights in {self.stored}, GEMMs in float32: this processor has no {self.stored} GEMM")
        if self.products:
            lines.append(f"{'GEMM':24}{'precision':15}{'error':>10}{'budget':>10}")
            lines += map(str, self.products)
        if self.video_error is not None:
            lines.append(
                f"against float32: error {self.video_error:.2e}, cosine {self.video_cosine:.6f}, "
                f"top-1 agreement {self.top1_agreement:.1%}"
            )
        return "\n".join(lines)


class Engine:
    """A model packed once for inference: the same answers, faster. Safe in several threads, not pickled, not copied.

    The model given is read, never changed and never kept: later changes of its weights do not reach the engine, and
    where nobody else holds it its memory is free.

    Args:
        model: what ``create_model`` or ``load_model`` returns.
        dtype: torch.float32, bfloat16 or float16; int8 (on the CPU: the blocks' GEMMs in int8, the rest in
            bfloat16, or float32 where that is faster); float8_e4m3fn (on NVIDIA Hopper and newer: the same, but for the
            first and last block). By default the model's. A CPU that multiplies no bfloat16 or float16 keeps the
            weights in it and multiplies in float32.
        device: "cpu", "cuda" or one of several; by default the model's.
        clips: uint8 (B, T, H, W, 3) that show what the engine will see: GEMMs are calibrated on them, and those
            beyond their budget fall back to a higher precision, as log and ``report`` say. By default a clip of noise.
        text_cache: a folder that keeps encoded class texts for later runs, by SHA-256 of text weights, precision and
            tokens: see ``TextFolder``.

    Raises:
        InputError: there is no such dtype, it cannot be computed on this device, the model is no whole X-CLIP or has
            adapters, hooks or the like on it, or there can be no such folder.
        ValueError: the clips have another shape or dtype.

    Example:
        >>> import xclip_fast
        >>> from xclip_fast.demo.models import load_trained
        >>> engine = xclip_fast.Engine(load_trained("xclip"))
        >>> video = xclip_fast.video.load_video("moving_right.mp4", size=64, preset="hf")
        >>> engine.classify(video, ["a shape moving right", "a shape moving left"]).argmax().item()
        0
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        *,
        clips: Tensor | None = None,
        text_cache: str | os.PathLike[str] | None = None,
        _rewrites: frozenset[str] | None = None,
    ) -> None:
        check_model(model)
        weight = model.visual.conv1.weight
        self.device = find_device(weight.device if device is None else device)
        self.dtype = weight.dtype if dtype is None else dtype
        self.config = model.config
        residual, narrow, stored = precision_of(self.dtype, self.device)
        if self.device == torch.device("cuda"):
            self.device = torch.device("cuda", torch.cuda.current_device())
        if narrow == "float8_e4m3fn" and (self.config.vision_width % 16 or self.config.vision_mlp_width % 16):
            raise InputError("an engine in float8_e4m3fn was asked for: widths must be multiples of 16; use bfloat16")
        rewrites = CUDA_REWRITES if self.device.type == "cuda" else CPU_REWRITES
        rewrites = rewrites if _rewrites is None else _rewrites
        if residual == torch.float16:
            # what waits for the division is as large as the message times its weights: it overflows float16
            rewrites -= {"message_product"}
        self._packing = Packing(self.device, residual, rewrites, narrow, stored)
        self._model = weakref.ref(model)
        folder = None if text_cache is None else TextFolder(text_cache)
        with torch.no_grad(), self._quiet():
            probe = self._probe(_PROBE_FRAMES) if clips is None else self._checked(clips)
            errors, blocks = check_gemms(model, self._packing, probe)
            self._products = tuple(errors)
            self._tower: CpuTower | CudaTower
            if self.device.type == "cuda":
                self._tower = CudaTower(model.visual, self.config, self._packing)
                # the tower joins its side stream before anything else begins
                self._side = self._tower.side
            else:
                self._tower = CpuTower(model.visual, self.config, self._packing, blocks=blocks)
                self._side = SideStream(self.device)
            self._heads = Heads(model, self._packing)
            tower = TextTower(model, self._packing)
            encoder = b"" if folder is None else encoder_digest(model, self._packing)
            self._texts = KeptTexts(tower, self._heads.prepare, folder, encoder)
        self._graphs = self._by_graphs() if self.device.type == "cuda" else None
        for gemm in self._products:
            if gemm.fell_back:
                _log.warning("%s: error %.1e in %s, computed in %s", gemm.place, gemm.error, gemm.asked, gemm.used)

    def encode_video(self, video: Tensor) -> VideoFeatures:
        """Features of videos, as the model's ``encode_video``.

        Args:
            video: uint8 (B, T, H, W, 3), or floating point (B, T, 3, H, W) already normalised, on any device. H and W
                are multiples of the patch size; T and the resolution may differ from the configuration.

        Returns:
            ``video`` (B, E) and ``patches`` (B, N, E), in the engine's dtype (bfloat16 for int8 and float8).

        Raises:
            ValueError: the video has another shape or dtype.
        """
        with torch.inference_mode(), self._quiet():
            video = self._checked(video)
            return VideoFeatures(*self._run(self._features, video))

    def embed_video(self, video: Tensor) -> Tensor:
        """``encode_video(video).video`` (B, E) alone: the last block computes nothing but its class rows."""
        with torch.inference_mode(), self._quiet():
            video = self._checked(video)
            return self._run(self._embedding, video)[0]

    def embed_files(self, paths: Iterable[str | os.PathLike[str]], **options: Any) -> Iterator[FileFeatures]:
        """Features of video files in their order, decoded in processes of their own; see ``pipeline.embed_files``.

        Args:
            paths: local video files.
            options: batch_size, patches, clips, crops, preset, backend, workers and timeout.
        """
        from xclip_fast.pipeline import embed_files

        return embed_files(self, paths, **options)

    def encode_texts(self, classes: Sequence[str] | Tensor, template: str = "{}") -> EncodedTexts:
        """A class set for ``classify`` and ``logits`` of this engine; the sets used last are kept in memory.

        Args:
            classes: labels, or token ids (K, L) as for the model's ``encode_text``.
            template: a sentence with ``{}`` in a label's place.

        Raises:
            InputError: labels or template cannot be used, or the model's tokenizer is missing.
            ValueError: the tokens have another shape or dtype, or an id is not in the vocabulary.
        """
        if isinstance(classes, Tensor):
            tokens = classes.cpu()
        else:
            labels = apply_template(clean_labels(classes), template)
            tokens = get_tokenizer(self.config)(labels, self.config.context_length)
        check_tokens(tokens, self.config)
        with torch.inference_mode(), self._quiet():
            return self._texts.get(tokens)

    def texts_of(self, features: Tensor) -> EncodedTexts:
        """A class set for this engine of text features (K, E) that are known already, such as the model's own."""
        if features.ndim != 2 or features.shape[1] != self.config.embed_dim or not features.is_floating_point():
            raise ValueError(
                f"features must be floating point (K, {self.config.embed_dim}), "
                f"found {features.dtype} {tuple(features.shape)}"
            )
        with torch.inference_mode(), self._quiet():
            return self._heads.prepare(features)

    def classify(self, video: Tensor, classes: EncodedTexts | Sequence[str] | Tensor) -> Tensor:
        """Class probabilities, float32 (B, K): the softmax of the logits.

        On a GPU, a class set that comes again with videos of the same shape is one CUDA graph with them.

        Args:
            video: as for ``encode_video``.
            classes: what ``encode_texts`` returns or takes, or ``texts_of`` returns.

        Raises:
            InputError: another engine made the class set, or as ``encode_texts``.
            ValueError: as ``encode_video`` and ``encode_texts``.
        """
        return self._scored(self._probabilities, video, classes)

    def __call__(self, video: Tensor, classes: EncodedTexts | Sequence[str] | Tensor) -> Tensor:
        """Logits, float32 (B, K), as the model gives them for videos and class texts; all else as ``classify``."""
        return self._scored(self._logits, video, classes)

    def logits(self, features: VideoFeatures, texts: EncodedTexts) -> Tensor:
        """Scaled cosine similarities, float32 (B, K), of encoded videos and an encoded class set.

        Raises:
            InputError: another engine made the class set.
        """
        self._check_own(texts)
        with torch.inference_mode(), self._quiet():
            return self._heads.logits(lambda: features.video.to(texts.features.dtype), features.patches, texts)

    def report(self, clips: Tensor | None = None, classes: Sequence[str] | Tensor | None = None) -> Report:
        """How far the engine is from its model in float32, GEMM by GEMM and as a whole.

        Args:
            clips: as for ``encode_video``; by default one of noise.
            classes: labels or token ids, whose best is compared; by default 100 random directions of the embedding.

        Raises:
            InputError, ValueError: as ``encode_video`` and ``encode_texts``.
        """
        model = self._model()
        error = cosine = agreement = None
        if model is not None:
            with torch.inference_mode(), self._quiet():
                clips = self._probe(self.config.frames) if clips is None else self._checked(clips)
            error, cosine, agreement = self._compare(model, clips, classes)
        return Report(
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            processor=processor.features() if self.device.type == "cpu" else (),
            stored=None if self._packing.stored is None else str(self._packing.stored).removeprefix("torch."),
            rewrites=tuple(sorted(self._packing.rewrites)),
            products=self._products,
            video_error=error,
            video_cosine=cosine,
            top1_agreement=agreement,
        )

    def _compare(self, model: Any, clips: Tensor, classes: Any) -> tuple[float, float, float]:
        found = self.encode_video(clips)
        with exact_float32():
            exact = Engine(model, torch.float32, self.device)
            truth = exact.encode_video(clips)
        error = (found.video.float() - truth.video).norm() / truth.video.norm()
        cosine = cosine_similarity(found.video.float(), truth.video, dim=-1).min()
        if classes is None:
            generator = torch.Generator().manual_seed(0)
            directions = torch.randn(truth.video.shape[1], 100, generator=generator).to(self.device)
            best = (truth.video @ directions).argmax(-1), (found.video.float() @ directions).argmax(-1)
        else:
            with exact_float32():
                wanted = exact.logits(truth, exact.encode_texts(classes))
            best = wanted.argmax(-1), self.logits(found, self.encode_texts(classes)).argmax(-1)
        return error.item(), cosine.item(), (best[0] == best[1]).float().mean().item()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "an Engine is packed for this process, and is neither pickled nor copied: its threads may share it; "
            "elsewhere, build one of the model or of its checkpoint"
        )

    def _check_own(self, texts: EncodedTexts) -> None:
        if texts.engine != self._heads.name:
            raise InputError(
                "logits of a class set were asked for, and another engine made it: "
                "make it with encode_texts or texts_of of this one"
            )

    def _scored(self, score: Pass, video: Tensor, classes: EncodedTexts | Sequence[str] | Tensor) -> Tensor:
        texts = classes if isinstance(classes, EncodedTexts) else self.encode_texts(classes)
        self._check_own(texts)
        with torch.inference_mode(), self._quiet():
            return self._run(score, self._checked(video), texts.features, texts.query)[0]

    def _run(self, forward: Pass, video: Tensor, *texts: Tensor) -> list[Tensor]:
        """One of the passes below, by its CUDA graphs where there are any."""
        return forward(video, *texts) if self._graphs is None else self._graphs[forward.__name__](video, *texts)

    def _by_graphs(self) -> dict[str, GraphCache]:
        features = GraphCache(self._features)
        graphs = {"_features": features, "_embedding": GraphCache(self._embedding)}
        for score in (self._logits, self._probabilities):
            graphs[score.__name__] = GraphCache(score, uncaptured=partial(score, encode=features))
        return graphs

    def _features(self, video: Tensor) -> list[Tensor]:
        return self._encoded(video, lambda integrated, patches: [integrated(), patches])

    def _embedding(self, video: Tensor) -> list[Tensor]:
        classes, _ = self._tower(video, patches=False)
        return [self._given(self._integrated(classes, video))]

    def _logits(self, video: Tensor, *texts: Tensor, encode: Pass | None = None) -> list[Tensor]:
        features, query = texts
        scored = partial(self._heads.logits, texts=EncodedTexts(features, query, self._heads.name))
        if encode is None:
            return [self._encoded(video, scored)]
        integrated, patches = encode(video)
        return [scored(lambda: integrated, patches)]

    def _probabilities(self, video: Tensor, *texts: Tensor, encode: Pass | None = None) -> list[Tensor]:
        return [logits.softmax(dim=-1) for logits in self._logits(video, *texts, encode=encode)]

    def _encoded(self, video: Tensor, then: Callable[[Callable[[], Tensor], Tensor], Encoded]) -> Encoded:
        """What ``then`` makes of the video features, which it asks for when it needs them, and the patch features."""
        classes, tokens = self._tower(video, patches=True)
        # MIT has few rows and meets the patches at the logits. what the side stream reads lives as long as this call
        with self._side.beside(lambda: self._integrated(classes, video)) as joined:
            patches = self._heads.project_patches(tokens, video.shape[1], self._tower.missing_bias)
            return then(lambda: self._given(joined()), self._given(patches))

    def _integrated(self, classes: Tensor, video: Tensor) -> Tensor:
        features = self._tower.project(classes)
        return self._heads.integrate(features.view(-1, video.shape[1], features.shape[1]))

    def _given(self, features: Tensor) -> Tensor:
        return features if self._packing.stored is None else features.to(self._packing.stored)

    def _checked(self, video: Tensor) -> Tensor:
        check_video(video)
        side = self.config.patch_size
        height, width = video.shape[2:4] if video.dtype == torch.uint8 else video.shape[3:5]
        if height % side or width % side:
            raise ValueError(f"height and width of the frames must be multiples of {side}, found {height}x{width}")
        return video.to(self.device)

    def _probe(self, frames: int) -> Tensor:
        size = self.config.image_size
        generator = torch.Generator().manual_seed(0)
        shape = 1, frames, size, size, 3
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(self.device)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        # the engine's precision is its own, whatever autocast says
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with torch.autocast(self.device.type, enabled=False), on_device:
            yield
