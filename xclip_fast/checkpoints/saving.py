"""A model to a checkpoint: ``save_model``."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from xclip_fast.checkpoints import huggingface
from xclip_fast.checkpoints.files import state_dict_of
from xclip_fast.checkpoints.loading import OWN_FORMAT, OWN_VERSION
from xclip_fast.checkpoints.names import TRANSPOSED, hf_names
from xclip_fast.checkpoints.sizes import check_tensors, shapes_of
from xclip_fast.checkpoints.skeleton import skeleton
from xclip_fast.config import HEAD_DIM, IMAGENET_MEAN, IMAGENET_STD, XCLIPConfig
from xclip_fast.errors import InputError
from xclip_fast.files import replacing
from xclip_fast.reference import XCLIP

_log = logging.getLogger("xclip_fast")

State = dict[str, Tensor]


def save_model(model: XCLIP, path: str | os.PathLike[str], format: str = OWN_FORMAT) -> None:
    """Write a model so that ``load_model`` gives back the same bits.

    Files appear whole or not at all. An existing folder of the hf format keeps its other files; weights and
    configuration are then replaced one after the other.

    Args:
        model: its weights are float32, float16, bfloat16 or float64.
        path: a file; for the hf format a folder. Its parent must exist.
        format: "xclip_fast", one safetensors file with the configuration inside; "official", a ``.pth`` for the
            authors' code; "hf", a folder for transformers' ``XCLIPModel.from_pretrained``.

    Raises:
        InputError: the format is unknown or can't express the model, or the path can't be written.

    Example:
        >>> from xclip_fast import XCLIPConfig, create_model, load_model, save_model
        >>> config = XCLIPConfig(image_size=32, patch_size=16, vision_width=64, vision_layers=1, embed_dim=64)
        >>> save_model(create_model(config), "model.safetensors")
        >>> load_model("model.safetensors").config == config
        True
    """
    if format not in _WRITERS:
        raise InputError(f"unknown checkpoint format {format!r}: choose one of {', '.join(_WRITERS)}")
    config = getattr(model, "config", None)
    if not isinstance(config, XCLIPConfig):
        raise InputError(f"save_model writes X-CLIP models, found {type(model).__name__}: unwrap it first")
    place = Path(os.path.expanduser(os.fspath(path)))
    if not place.parent.is_dir():
        raise InputError(f"cannot write {str(place)!r}: its folder does not exist: create it first")
    state = {name: _own(tensor) for name, tensor in state_dict_of(model.state_dict(), "the model").items()}
    # a checkpoint that could not be loaded again is noticed now
    check_tensors(shapes_of(state), shapes_of(skeleton(config).state_dict()), (), "the model")
    _WRITERS[format](state, config, place)


def _write_own(state: State, config: XCLIPConfig, path: Path) -> None:
    _refuse(path, path.is_dir() or path.suffix in (".pth", ".pt", ".bin"), "a .safetensors file")
    # one key: safetensors writes several in any order, and the same model should be the same bytes
    with replacing(path) as temporary:
        save_file(state, temporary, {OWN_FORMAT: _settings(config)})


def _write_official(state: State, config: XCLIPConfig, path: Path) -> None:
    _refuse(path, path.is_dir() or path.suffix == ".safetensors", "a .pth file")
    for field, fixed in (
        ("vision_heads", config.vision_width // HEAD_DIM),
        ("text_heads", config.text_width // HEAD_DIM),
        ("embed_heads", config.embed_dim // HEAD_DIM),
        ("vision_mlp_width", 4 * config.vision_width),
        ("activation", "quick_gelu"),
    ):
        if (value := getattr(config, field)) != fixed:
            raise InputError(
                f"the official format cannot hold {field} {value!r}: the authors' code always has {fixed!r} at these "
                "sizes: use format='xclip_fast'"
            )
    if (config.pixel_mean, config.pixel_std) != (IMAGENET_MEAN, IMAGENET_STD):
        _log.warning("%s: the authors' code will normalise frames by ImageNet's statistics, not the model's", path)
    # given a path torch.save would put its random name into the file
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save({"model": state, OWN_FORMAT: _settings(config)}, file)


def _write_hf(state: State, config: XCLIPConfig, folder: Path) -> None:
    _refuse(folder, folder.exists() and not folder.is_dir(), "a folder")
    renamed = huggingface_state(state)
    dtype = str(state["visual.conv1.weight"].dtype).removeprefix("torch.")
    settings, preprocessor = huggingface.configs_of(config, dtype)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {str(folder)!r}: {error.strerror}") from error
    with replacing(folder / huggingface.WEIGHTS_FILE) as temporary:
        save_file(renamed, temporary, {"format": "pt"})
    for file, content in ((huggingface.CONFIG_FILE, settings), (huggingface.PREPROCESSOR_FILE, preprocessor)):
        with replacing(folder / file) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def huggingface_state(state: State) -> State:
    """The same tensors under Hugging Face's names and in its shapes, each in memory of its own."""
    renamed: State = {}
    for name, tensor in state.items():
        names = hf_names(name)
        tensor = tensor.T if name in TRANSPOSED else tensor
        # chunks and transposes are views, which safetensors does not write
        renamed |= {theirs: part.clone(memory_format=torch.contiguous_format) for theirs, part in _pairs(names, tensor)}
    return renamed


_WRITERS: dict[str, Callable[[State, XCLIPConfig, Path], None]] = {
    OWN_FORMAT: _write_own,
    "official": _write_official,
    "hf": _write_hf,
}


def _settings(config: XCLIPConfig) -> str:
    return json.dumps({"version": OWN_VERSION, "config": config.to_dict()})


def _pairs(names: tuple[str, ...], tensor: Tensor) -> zip[tuple[str, Tensor]]:
    return zip(names, tensor.chunk(len(names)) if len(names) > 1 else (tensor,), strict=True)


def _own(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, dense, and alone in its memory: views would drag their base into the file."""
    dense = tensor.detach().cpu().contiguous()
    return dense if dense.untyped_storage().nbytes() == dense.nbytes else dense.clone()


def _refuse(path: Path, unfit: bool, wanted: str) -> None:
    if unfit:
        raise InputError(f"cannot write {str(path)!r}: this format is {wanted}: choose another path or format")
