"""Trained weights into a model: ``load_model``."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xclip_fast.checkpoints import clip, huggingface
from xclip_fast.checkpoints.files import DTYPES, parse_json, read_checkpoint, state_dict_of
from xclip_fast.checkpoints.names import added_to_clip, listing
from xclip_fast.checkpoints.sizes import Claim, check_tensors, claims_of, infer_sizes, resolve, shapes_of
from xclip_fast.checkpoints.skeleton import skeleton
from xclip_fast.checkpoints.stored import Checkpoint, from_official
from xclip_fast.config import VARIANTS, XCLIPConfig
from xclip_fast.errors import InputError, one_line
from xclip_fast.model import XCLIP, create_model
from xclip_fast.reference.positions import temporal_positions

_log = logging.getLogger("xclip_fast")

# settings, as JSON: the one key in the metadata of our safetensors files, and a key beside "model" in our .pth files
OWN_FORMAT, OWN_VERSION = "xclip_fast", 1
_TEMPORAL = "mit.positional_embedding"

# a name that can only be a path
_LOCAL = re.compile(r"^[./~]|\\|/.*/|\.(pth?|bin|ckpt|safetensors)$")
_HUB = re.compile(r"[\w.-]+/[\w.-]+")

# beginnings of tensor names that tell a model X-CLIP can't start from
_FOREIGN = (
    ("visual.trunk.", "its image tower is a timm model"),
    ("visual.layer1.", "its image tower is a ResNet"),
    ("text_decoder.", "it is CoCa"),
    ("text.", "it has a text tower of its own kind: give the open_clip model itself"),
)


@dataclass(frozen=True)
class LoadReport:
    """What ``load_model`` did; a loaded model carries it as ``model.load_report``.

    format: "xclip_fast", "official", "hf", "clip" or "open_clip".
    loaded: tensors of the model that came from the checkpoint.
    initialised: names of those that started random, since the checkpoint is CLIP's.
    repairs: what was put right, resized or assumed, a sentence each.

    Example:
        >>> from xclip_fast import XCLIPConfig, create_model, load_model
        >>> config = XCLIPConfig(image_size=32, patch_size=16, vision_width=64, vision_layers=1, embed_dim=64)
        >>> load_model(create_model(config).state_dict()).load_report.format
        'official'
    """

    format: str
    loaded: int
    initialised: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()


def load_model(
    source: str | os.PathLike[str] | Mapping[str, Any] | nn.Module,
    *,
    frames: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> XCLIP:
    """An X-CLIP model with trained weights, in evaluation mode.

    Every tensor is loaded, or the call fails: names, shapes, dtypes and finite values are checked. What was loaded,
    initialised and repaired is in ``model.load_report`` and in one line of the log. Files are never executed.

    Sizes come from the shapes of the tensors. A state dict does not tell head counts, which are then width / 64, nor
    the pixel statistics, which are then ImageNet's for X-CLIP weights and CLIP's for CLIP weights.

    Args:
        source: one of
            - a file: xclip_fast's safetensors, an official ``.pth``, Hugging Face weights (with its config.json beside
              it, if there), or a CLIP state dict;
            - a folder of a Hugging Face X-CLIP model, or the id of one on the hub, which is downloaded;
            - the name of an open_clip model, alone or as "name/tag"; its weights are downloaded;
            - a state dict, a transformers ``XCLIPModel`` or an open_clip model.
            CLIP weights fill the two towers, and the modules that X-CLIP adds start random (``torch.manual_seed``).
        frames: length of the clips; temporal positions trained at another length are interpolated. By default the
            checkpoint's, and 8 from CLIP weights.
        dtype: of all weights. By default the checkpoint's; where it mixes several, the one that holds them all, so
            OpenAI's half precision files with norms in float32 become float32.
        device: by default the CPU for files, and where the source is for anything in memory.

    Raises:
        InputError: the source can't be found, read, trusted or understood; the message says which and what to do.
        ValueError: ``frames`` or ``dtype`` is out of range.

    Example:
        >>> import torch, xclip_fast
        >>> model = xclip_fast.load_model("model.pth", frames=16, dtype=torch.bfloat16)  # doctest: +SKIP
        >>> config = xclip_fast.XCLIPConfig(image_size=32, vision_width=64, vision_layers=1, embed_dim=64)
        >>> weights = xclip_fast.create_model(config).state_dict()
        >>> xclip_fast.load_model(weights).config.image_size
        32
    """
    if frames is not None:
        XCLIPConfig(frames=frames)  # refuses what is no number of frames before anything is read
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, found {dtype!r}")
    target = None if device is None else _usable_device(device)
    checkpoint = _open(source)
    config = _configure(checkpoint)
    wanted = config.with_frames(frames or config.frames)
    model = skeleton(wanted)
    names = list(model.state_dict())
    initialised = tuple(name for name in names if checkpoint.is_clip and added_to_clip(name))
    _check(checkpoint, config, model, initialised)
    dtype = dtype or _widest_dtype(checkpoint)
    state = _read(checkpoint, dtype)
    if initialised:
        fresh = create_model(wanted).state_dict()
        state |= {name: fresh[name].to(dtype) for name in initialised}
    elif wanted.frames != config.frames:
        exact = state[_TEMPORAL].to(torch.promote_types(dtype, torch.float32))
        state[_TEMPORAL] = temporal_positions(exact, wanted.frames).to(dtype)
        checkpoint.repairs.append(f"temporal positions interpolated from {config.frames} to {wanted.frames} frames")
    target = target or next(iter(checkpoint.tensors.values())).parts[0].device
    model.load_state_dict({name: state.pop(name).to(target) for name in names}, assign=True)
    report = LoadReport(checkpoint.format, len(names) - len(initialised), initialised, tuple(checkpoint.repairs))
    model.__dict__["load_report"] = report  # not setattr: modules admit only tensors and modules by type
    _log.info(
        "loaded %s as %s: %d tensors in %s, %d initialised%s",
        checkpoint.where,
        report.format,
        report.loaded,
        _name(dtype),
        len(initialised),
        "".join(f"; {repair}" for repair in report.repairs),
    )
    return model.eval()


def _open(source: object) -> Checkpoint:
    if isinstance(source, nn.Module):
        return _from_module(source)
    if isinstance(source, Mapping):
        where = "the state dict"
        return _by_names(state_dict_of(source, where), where, source.get(OWN_FORMAT))
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
        by_path = True
    else:
        by_path = False
    if not isinstance(source, str):
        raise InputError(f"cannot load a model from a {type(source).__name__}: give a path, a name or a state dict")
    place = os.path.expanduser(source)
    if os.path.isdir(place):
        return huggingface.from_folder(Path(place))
    if os.path.isfile(place):
        return _from_file(Path(place))
    if os.path.exists(place):
        raise InputError(f"{source!r} is neither a file nor a folder")
    return _from_name(source, by_path)


def _from_name(name: str, by_path: bool) -> Checkpoint:
    if name in VARIANTS:
        raise InputError(
            f"{name!r} is a variant, not a checkpoint: create_model makes it with random weights, "
            "and 'microsoft/xclip-base-patch32' is one of the trained ones"
        )
    if not by_path and not _LOCAL.search(name):
        if "/" not in name or name.startswith("ViT-"):
            return clip.from_name(name)
        if _HUB.fullmatch(name):
            return huggingface.from_folder(huggingface.download(name))
    raise InputError(f"{name!r} does not exist: give a checkpoint file, a folder, a hub id or an open_clip name")


def _from_file(path: Path) -> Checkpoint:
    where = repr(str(path))
    content, metadata = read_checkpoint(path)
    tensors = state_dict_of(content, where, path.stat().st_size)
    if OWN_FORMAT in metadata:
        return Checkpoint(where, OWN_FORMAT, from_official(tensors), _read_settings(metadata[OWN_FORMAT], where))
    return _by_names(tensors, where, content.get(OWN_FORMAT), path.parent)


def _read_settings(text: object, where: str) -> list[Claim]:
    if not isinstance(text, str):
        raise InputError(f"{where}: its settings must be text, found {type(text).__name__}")
    settings = parse_json(text, f"the configuration in {where}")
    if settings.get("version") != OWN_VERSION:
        raise InputError(f"{where} is of version {settings.get('version')!r:.60} of the format: update xclip_fast")
    return claims_of(settings.get("config"), where)


def _by_names(tensors: dict[str, Tensor], where: str, settings: object, folder: Path | None = None) -> Checkpoint:
    """A checkpoint of the format that the names of its tensors show."""
    if _has(tensors, "vision_model.", "text_model."):
        if not _has(tensors, "mit."):
            raise InputError(f"{where} is a Hugging Face model without the modules of X-CLIP: give its CLIP weights")
        return huggingface.from_tensors(tensors, where, *(huggingface.read_configs(folder) if folder else (None, {})))
    if any(added_to_clip(name) for name in tensors):
        claims = [] if settings is None else _read_settings(settings, where)
        return Checkpoint(where, "official", from_official(tensors), claims)
    for beginning, reason in _FOREIGN:
        if _has(tensors, beginning):
            raise InputError(f"{where} cannot be the base of X-CLIP: {reason}")
    if _has(tensors, "visual."):
        return clip.from_tensors(tensors, where)
    raise InputError(f"{where} is neither X-CLIP nor CLIP: it holds {listing(tensors)}")


def _has(tensors: Mapping[str, Tensor], *beginnings: str) -> bool:
    return any(name.startswith(beginnings) for name in tensors)


def _from_module(module: nn.Module) -> Checkpoint:
    # by name: neither library is imported for this
    bases = {(base.__module__.partition(".")[0], base.__name__) for base in type(module).__mro__}
    if ("transformers", "XCLIPModel") in bases:
        return huggingface.from_instance(module)
    if "open_clip" in {package for package, _ in bases}:
        return clip.from_instance(module)
    raise InputError(
        f"cannot load a model from a {type(module).__name__}: give a transformers XCLIPModel, an open_clip model, "
        "or the state_dict() of an X-CLIP"
    )


def _configure(checkpoint: Checkpoint) -> XCLIPConfig:
    sizes = infer_sizes(shapes_of(checkpoint.tensors), checkpoint.where, clip_only=checkpoint.is_clip)
    return resolve(sizes, checkpoint.claims, checkpoint.where)


def _check(checkpoint: Checkpoint, config: XCLIPConfig, model: XCLIP, initialised: tuple[str, ...]) -> None:
    # the model has the frames that were asked for
    expected = {**shapes_of(model.state_dict()), _TEMPORAL: (1, config.frames, config.embed_dim)}
    check_tensors(shapes_of(checkpoint.tensors), expected, initialised, checkpoint.where)


def _widest_dtype(checkpoint: Checkpoint) -> torch.dtype:
    dtypes = {part.dtype for stored in checkpoint.tensors.values() for part in stored.parts}
    widest = reduce(torch.promote_types, dtypes)
    if len(dtypes) > 1:
        names = " and ".join(sorted(_name(dtype) for dtype in dtypes))
        checkpoint.repairs.append(f"{names} tensors all became {_name(widest)}")
    return widest


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    state = {name: stored.read(dtype) for name, stored in checkpoint.tensors.items()}
    if bad := [name for name, tensor in state.items() if not _is_finite(tensor)]:
        if all(_is_finite(part) for name in bad for part in checkpoint.tensors[name].parts):
            raise InputError(
                f"{checkpoint.where} does not fit {_name(dtype)}: {listing(bad)} overflow: choose a wider dtype"
            )
        raise InputError(f"{checkpoint.where} holds NaN or infinity in {listing(bad)}: use a checkpoint from before")
    return state


def _is_finite(tensor: Tensor) -> bool:
    # NaN travels through aminmax, which needs no second tensor
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def _usable_device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"device {str(device)!r} cannot be used: {one_line(error)}") from error
