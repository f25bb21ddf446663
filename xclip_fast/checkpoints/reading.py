"""Reading checkpoint files that may be damaged or hostile: nothing in them is executed."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xclip_fast.checkpoints.names import listing
from xclip_fast.errors import InputError, one_line
from xclip_fast.files import parse_json

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_MAX_HEADER = 16 << 20
_MAX_PICKLE = 64 << 20
_TO_SAFETENSORS = "save its state dict as safetensors"


def read_checkpoint(path: Path) -> tuple[Mapping[str, Any], dict[str, str]]:
    """What a checkpoint file holds, and its safetensors metadata; tensors stay mapped to the file where possible.

    The content decides the format, not the name of the file. Nothing in it is executed.

    Raises:
        InputError: the file is missing, damaged, of another format, or holds more than tensors and plain values.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {str(path)!r}: {one_line(error)}") from error
    where = repr(str(path))
    if not size:
        raise InputError(f"{where} is empty: copy or download the checkpoint again")
    if start[8:9] == b"{":
        return _read_safetensors(path, size, where)
    if path.suffix == ".safetensors" and start.startswith((b"PK\x03\x04", b"\x80")):
        # torch.load goes by this suffix, so the content has to fit it
        raise InputError(f"{where} is a PyTorch file under the name of a safetensors file: rename it to .pth")
    if start.startswith(b"PK\x03\x04"):
        _check_archive(path, size, where)
        return _torch_load(path, where, mmap=True), {}
    if start.startswith(b"\x80"):
        return _torch_load(path, where, mmap=False), {}
    raise InputError(f"{where} is no checkpoint: its first bytes are neither safetensors nor a PyTorch file")


def state_dict_of(content: Mapping[str, Any], where: str, size: int | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint, without the wrapping of trainers: ``{"model": …}``, ``module.`` and the like.

    Args:
        content: the tensors, or a dictionary with them under "model" or "state_dict".
        where: the source, for messages.
        size: bytes of the file they come from, which the tensors can't exceed.

    Raises:
        InputError: there are no tensors, or ones that are sparse, quantised, of another dtype or have no data.
    """
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not content or not all(isinstance(name, str) for name in content):
        raise InputError(f"{where} holds no tensors by name: expected a state dict, by itself or under 'model'")
    tensors = dict(content)
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: value for name, value in tensors.items()}
    tensors = {name: value for name, value in tensors.items() if not _HARMLESS.fullmatch(name)}
    if bad := [name for name, value in tensors.items() if not _is_plain(value)]:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise InputError(f"{where}: {listing(bad)}: {_describe(tensors[min(bad)])}, but weights are dense {allowed}")
    total = sum(value.numel() * value.element_size() for value in tensors.values())
    if size is not None and total > size:
        raise InputError(f"{where} claims {total} bytes of tensors in a file of {size}: the file is damaged or hostile")
    return tensors


# buffers and notes that say nothing a shape does not say
_HARMLESS = re.compile(r"input_resolution|context_length|vocab_size|(vision|text)_model\.embeddings\.position_ids")


def _is_plain(value: Any) -> bool:
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.dtype in DTYPES
        and value.layout == torch.strided
        and not value.is_meta
    )


def _describe(value: Any) -> str:
    if type(value) not in (Tensor, torch.nn.Parameter):
        return f"found {type(value).__name__}"
    if value.is_meta:
        return "found a tensor on the meta device, without data"
    return f"found {str(value.dtype).removeprefix('torch.')}, {str(value.layout).removeprefix('torch.')}"


def _read_safetensors(path: Path, size: int, where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _MAX_HEADER):
            raise InputError(f"{where} is damaged: its header claims {length} bytes of a file of {size}")
        header = parse_json(file.read(length), f"the header of {where}")
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
            return {name: opened.get_tensor(name) for name in header if name != "__metadata__"}, metadata
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{where} is a damaged safetensors file: {one_line(error)}: copy it again") from error


def _check_archive(path: Path, size: int, where: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{where} is truncated or damaged: {one_line(error)}: copy or download it again") from error
    names = [entry.filename.partition("/")[2] for entry in entries]
    if "constants.pkl" in names:
        raise InputError(
            f"{where} is a TorchScript archive, and loading one runs its code: if you trust it, write "
            "torch.save(torch.jit.load(FILE).state_dict(), 'clip.pt') and load that, or load 'NAME/openai' by open_clip"
        )
    if "data.pkl" not in names:
        raise InputError(f"{where} is a zip archive, but not one that torch.save wrote")
    inflated = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if inflated or sum(entry.file_size for entry in entries) > size:
        raise InputError(f"{where} is compressed or claims more than its {size} bytes: torch.save writes no such file")
    if any(entry.filename.endswith("data.pkl") and entry.file_size > _MAX_PICKLE for entry in entries):
        raise InputError(f"{where} holds more than {_MAX_PICKLE} bytes of plain values: {_TO_SAFETENSORS}")


def _torch_load(path: Path, where: str, *, mmap: bool) -> Mapping[str, Any]:
    # the official trainer puts its yacs configuration beside the weights: read it as the plain dictionary it is
    plain_config: list[Any] = [(OrderedDict, "yacs.config.CfgNode")]
    try:
        with torch.serialization.safe_globals(plain_config), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a refusal is one line
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # hostile bytes can make the reader raise anything
        if code := re.search(r"GLOBAL ([^\s,]+)", str(error)):
            raise InputError(
                f"{where} was refused: the file contains Python code or objects ({one_line(code[1])!r}), "
                f"and only tensors and plain values are loaded: {_TO_SAFETENSORS}"
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            raise InputError(
                f"{where} was refused: the file is damaged, or a Python pickle of more than tensors and plain values: "
                f"{_TO_SAFETENSORS}"
            ) from error
        raise InputError(f"{where} is damaged: {one_line(error)}: copy or download it again") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{where} holds {type(content).__name__}, not a state dict: {_TO_SAFETENSORS}")
    return content
