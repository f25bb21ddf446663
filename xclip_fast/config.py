"""Sizes of an X-CLIP model and the four named variants (Ni et al., ECCV 2022, section 4.1)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from numbers import Integral
from typing import Any

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

HEAD_DIM = 64  # of every attention in the published models
ACTIVATIONS = ("quick_gelu", "gelu")


@dataclass(frozen=True)
class XCLIPConfig:
    """Every size that shapes an X-CLIP model; immutable and checked when it is made.

    The head counts default to ``width / 64`` and ``vision_mlp_width`` to ``4 * vision_width``: 0 asks for that default.
    ``embed_heads`` are the heads of the multiframe integration transformer and of the video-specific prompts.
    ``activation`` is the one of the CLIP towers; the modules X-CLIP adds always use QuickGELU.
    ``frames`` is the length of the temporal position table: other clip lengths run with interpolated positions.
    ``pixel_mean`` and ``pixel_std`` normalise uint8 frames, on a scale from 0 to 1.

    Raises:
        ValueError: a size is out of range, or two sizes do not fit each other.

    Example:
        >>> from xclip_fast import XCLIPConfig
        >>> config = XCLIPConfig(image_size=64, patch_size=16, frames=16)
        >>> config.patches, config.vision_heads
        (16, 12)
    """

    image_size: int = 224
    patch_size: int = 32
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 0
    vision_mlp_width: int = 0
    embed_dim: int = 512
    embed_heads: int = 0
    context_length: int = 77
    vocab_size: int = 49408
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 0
    frames: int = 8
    mit_layers: int = 1
    prompt_layers: int = 2
    prompt_alpha: float = 0.1
    activation: str = "quick_gelu"
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN
    pixel_std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        self._check_integers(least=0)
        defaults = {
            "vision_heads": self.vision_width // HEAD_DIM,
            "text_heads": self.text_width // HEAD_DIM,
            "embed_heads": self.embed_dim // HEAD_DIM,
            "vision_mlp_width": 4 * self.vision_width,
        }
        for name, value in defaults.items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)
        for name in ("pixel_mean", "pixel_std"):
            try:
                object.__setattr__(self, name, tuple(map(_as_float, getattr(self, name))))
            except (TypeError, ValueError, RuntimeError, OverflowError):
                raise ValueError(f"{name} must hold three numbers, found {getattr(self, name)!r}") from None
        try:
            object.__setattr__(self, "prompt_alpha", _as_float(self.prompt_alpha))
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise ValueError(f"prompt_alpha must be a finite number, found {self.prompt_alpha!r}") from None
        self._check_integers(least=1)
        self._check()

    def _check_integers(self, least: int) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type != "int":
                continue
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                raise ValueError(f"{field.name} must be a positive integer, found {value!r}")
            object.__setattr__(self, field.name, int(value))  # NumPy's integers are no JSON

    def _check(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size, found {self.image_size} and {self.patch_size}"
            )
        for width, heads in (
            ("vision_width", "vision_heads"),
            ("text_width", "text_heads"),
            ("embed_dim", "embed_heads"),
        ):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"{width} must be a multiple of {heads}, found {getattr(self, width)} and {getattr(self, heads)}"
                )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, found {self.activation!r}")
        if not isfinite(self.prompt_alpha):
            raise ValueError(f"prompt_alpha must be a finite number, found {self.prompt_alpha!r}")
        finite = all(map(isfinite, self.pixel_mean + self.pixel_std))
        if len(self.pixel_mean) != 3 or len(self.pixel_std) != 3 or min(self.pixel_std) <= 0 or not finite:
            raise ValueError("pixel_mean and pixel_std must hold three numbers each, the latter positive")

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patch tokens of one frame, N; a frame has N + 1 tokens with its class token."""
        return self.grid**2

    def with_frames(self, frames: int) -> XCLIPConfig:
        """The same sizes for clips of another length."""
        return replace(self, frames=frames)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; ``from_dict`` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, sizes: dict[str, Any]) -> XCLIPConfig:
        """The configuration that ``to_dict`` wrote.

        Raises:
            ValueError: a key is not a field of XCLIPConfig, or a value is out of range.
        """
        unknown = sorted(set(sizes) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown configuration keys: {', '.join(unknown)}")
        return cls(**sizes)


def _as_float(value: Any) -> float:
    """A number of any type but bool, or a tensor of one."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, (bool, str, bytes)):
        raise TypeError
    return float(value)


VARIANTS: dict[str, XCLIPConfig] = {
    "B/32": XCLIPConfig(patch_size=32),
    "B/16": XCLIPConfig(patch_size=16),
    "L/14": XCLIPConfig(patch_size=14, vision_width=1024, vision_layers=24, embed_dim=768, text_width=768),
    "L/14-336": XCLIPConfig(
        image_size=336, patch_size=14, vision_width=1024, vision_layers=24, embed_dim=768, text_width=768
    ),
}


def resolve_config(variant_or_config: str | XCLIPConfig, frames: int | None = None) -> XCLIPConfig:
    """The configuration a name stands for, or the one given; ``frames`` replaces its clip length.

    Raises:
        ValueError: no variant has this name.
    """
    if isinstance(variant_or_config, XCLIPConfig):
        config = variant_or_config
    elif variant_or_config in VARIANTS:
        config = VARIANTS[variant_or_config]
    else:
        raise ValueError(f"unknown variant {variant_or_config!r}: choose one of {', '.join(VARIANTS)}")
    return config if frames is None else config.with_frames(frames)
