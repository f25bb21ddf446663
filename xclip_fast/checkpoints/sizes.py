"""The sizes of a model, read from the shapes of its tensors and held against what a configuration file claims."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from math import isqrt
from typing import Any, NamedTuple

from xclip_fast.checkpoints.names import listing
from xclip_fast.config import XCLIPConfig
from xclip_fast.errors import InputError, one_line

Shapes = Mapping[str, tuple[int, ...]]

# field, the tensor that shows it, its dimensions, the one that counts
_AXES = (
    ("vision_width", "visual.conv1.weight", 4, 0),
    ("patch_size", "visual.conv1.weight", 4, 3),
    ("vision_mlp_width", "visual.transformer.resblocks.0.mlp.c_fc.weight", 2, 0),
    ("embed_dim", "text_projection", 2, 1),
    ("context_length", "positional_embedding", 2, 0),
    ("vocab_size", "token_embedding.weight", 2, 0),
    ("text_width", "ln_final.weight", 1, 0),
    ("frames", "mit.positional_embedding", 3, 1),
)
_POSITIONS = "visual.positional_embedding"
_STACKS = (
    ("vision_layers", "visual.transformer.resblocks."),
    ("text_layers", "transformer.resblocks."),
    ("mit_layers", "mit.resblocks."),
    ("prompt_layers", "prompts_generator.decoder."),
)
_ADDED = {"frames", "mit_layers", "prompt_layers"}  # a CLIP checkpoint does not show these

# far above any CLIP model: a small file must not ask for a huge one
_LARGEST = {
    **dict.fromkeys(("vision_width", "text_width", "embed_dim"), 2048),
    "frames": 4096,
    **dict.fromkeys(("vision_layers", "text_layers", "mit_layers", "prompt_layers"), 256),
}


class Claim(NamedTuple):
    """What a configuration says of one field of XCLIPConfig; ``label`` is where it says so."""

    label: str
    field: str
    value: Any


def shapes_of(tensors: Mapping[str, Any]) -> Shapes:
    """The shapes of tensors, or of anything that has one."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def infer_sizes(shapes: Shapes, where: str, *, clip_only: bool = False) -> dict[str, int]:
    """The fields of XCLIPConfig that shapes tell: all but heads, activation, alpha and pixel statistics.

    Args:
        shapes: of the tensors, by official name.
        where: the source, for messages.
        clip_only: the checkpoint is CLIP's: it has no MIT and no prompts.

    Raises:
        InputError: a tensor that shows a size is missing or has an odd shape, or a size is absurd.
    """
    axes = [row for row in _AXES if not (clip_only and row[0] in _ADDED)]
    needed = {_POSITIONS, *(name for _, name, _, _ in axes)}
    if missing := needed - set(shapes):
        raise InputError(f"{where} lacks tensors: {listing(missing)}: use a complete checkpoint")
    sizes = {}
    for field, name, dimensions, axis in axes:
        if len(shapes[name]) != dimensions:
            raise InputError(f"{where}: {name} must have {dimensions} dimensions, found shape {shapes[name]}")
        sizes[field] = shapes[name][axis]
    for field, prefix in _STACKS:
        if not (clip_only and field in _ADDED):
            sizes[field] = len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})
    tokens = shapes[_POSITIONS][0] if shapes[_POSITIONS] else 0
    grid = isqrt(max(tokens - 1, 0))
    if tokens < 2 or grid * grid != tokens - 1:
        raise InputError(
            f"{where}: {_POSITIONS} must have one row per patch of a square grid and one for the class token, "
            f"found shape {shapes[_POSITIONS]}"
        )
    sizes["image_size"] = grid * sizes["patch_size"]
    for field, value in sizes.items():
        if not 1 <= value <= _LARGEST.get(field, value):
            raise InputError(f"{where}: its shapes say {field} {value}: no X-CLIP model has that size")
    return sizes


def resolve(sizes: Mapping[str, int], claims: Iterable[Claim], where: str) -> XCLIPConfig:
    """The configuration of a checkpoint: what its shapes say, and from the claims what shapes can't say.

    Raises:
        InputError: a claim contradicts the shapes or another claim, or the sizes do not make a model.
    """
    values: dict[str, Any] = dict(sizes)
    for label, field, value in claims:
        known = values.setdefault(field, value)
        if known != value:
            raise InputError(
                f"{where}: {label} says {field} {_short(value)}, the rest of the checkpoint says {_short(known)}: "
                "use the configuration this checkpoint was saved with"
            )
        if field.endswith("_heads") and value == 0:
            raise InputError(f"{where}: {label} must be a positive number of heads, found 0")
    try:
        return XCLIPConfig(**values)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise InputError(f"{where} is no X-CLIP model: {one_line(error)}") from error


def claims_of(values: Any, where: str) -> list[Claim]:
    """The claims of a configuration that ``XCLIPConfig.to_dict`` wrote.

    Raises:
        InputError: it is no such configuration.
    """
    known = {field.name for field in fields(XCLIPConfig)}
    if not isinstance(values, Mapping) or not set(values) <= known:
        unknown = listing(map(str, set(values) - known)) if isinstance(values, Mapping) else type(values).__name__
        raise InputError(f"{where}: its configuration is not of this version of xclip_fast: found {unknown}: update")
    # json knows lists, the configuration has tuples
    return [
        Claim("its configuration", key, tuple(value) if isinstance(value, list) else value)
        for key, value in values.items()
    ]


def check_tensors(found: Shapes, expected: Shapes, optional: Collection[str], where: str) -> None:
    """Names and shapes must be the model's, all of them and no others; ``optional`` ones may be absent.

    Raises:
        InputError: the first few that are missing, unexpected or of another shape.
    """
    if missing := set(expected) - set(found) - set(optional):
        raise InputError(f"{where} lacks tensors: {listing(missing)}: use a complete checkpoint")
    if unexpected := set(found) - set(expected):
        raise InputError(f"{where} holds tensors no X-CLIP model has: {listing(unexpected)}: nothing is skipped")
    if wrong := [name for name, shape in found.items() if shape != expected[name]]:
        first = min(wrong)
        raise InputError(
            f"{where} has tensors of the wrong shape: {listing(wrong)}: "
            f"{first} is {found[first]} and must be {expected[first]}"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
