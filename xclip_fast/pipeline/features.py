"""Feature files: one row for each video, as safetensors, NumPy or Parquet."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xclip_fast.errors import InputError
from xclip_fast.files import check_writable, replacing

Array = NDArray[np.float32]
FORMATS = (".safetensors", ".npz", ".parquet")


def check_features_path(path: str | Path) -> None:
    """Find out whether features can be written there before any work is done.

    Raises:
        InputError: the ending is unknown, its library is missing, or the folder cannot be written.

    Example:
        >>> from xclip_fast.pipeline import check_features_path
        >>> check_features_path("features.txt")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        xclip_fast.errors.InputError: cannot write features to features.txt: the name must end in ...
    """
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        raise InputError(f"cannot write features to {path}: the name must end in {', '.join(FORMATS)}")
    if ending == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise InputError(f"cannot write {path}: Parquet needs pyarrow: pip install pyarrow, or choose .safetensors")
    check_writable(path)


def save_features(path: str | Path, names: Sequence[str], video: Array, patches: Array | None = None) -> None:
    """Write features in the format of the path's ending; the file appears whole or not at all.

    Args:
        path: ``.safetensors`` (tensors ``video`` and ``patches``, the names as a JSON list in the metadata), ``.npz``
            (arrays ``names``, ``video``, ``patches``) or ``.parquet`` (columns of these names, one row a video; the
            shape of a patch row is in the metadata of its column).
        names: one for each video; what UTF-8 cannot hold is spelled out.
        video: float32 (F, E).
        patches: float32 (F, N, E), or None.

    Raises:
        InputError: the file cannot be written, see ``check_features_path``.
        ValueError: names and rows do not match.

    Example:
        >>> import numpy as np
        >>> from xclip_fast.pipeline import save_features
        >>> save_features("features.npz", ["a.mp4", "b.mp4"], np.ones((2, 64), np.float32))
        >>> np.load("features.npz")["video"].shape
        (2, 64)
    """
    check_features_path(path)
    arrays = {"video": video} if patches is None else {"video": video, "patches": patches}
    for key, array in arrays.items():
        if len(array) != len(names):
            raise ValueError(f"{len(names)} names do not fit {key} of shape {array.shape}")
    names = [name.encode("utf-8", "backslashreplace").decode() for name in names]
    write = {".safetensors": _write_safetensors, ".npz": _write_npz, ".parquet": _write_parquet}
    with replacing(Path(os.path.realpath(path))) as temporary:
        write[Path(path).suffix.lower()](temporary, names, arrays)


def _write_safetensors(path: Path, names: list[str], arrays: dict[str, Array]) -> None:
    from safetensors.numpy import save_file

    save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, path, {"names": json.dumps(names)})


def _write_npz(path: Path, names: list[str], arrays: dict[str, Array]) -> None:
    with path.open("wb") as file:
        np.savez(file, names=np.array(names, dtype=np.str_), **arrays)  # type: ignore[arg-type]


def _write_parquet(path: Path, names: list[str], arrays: dict[str, Array]) -> None:
    import pyarrow
    from pyarrow import parquet

    fields, columns = [pyarrow.field("names", pyarrow.string())], [pyarrow.array(names, pyarrow.string())]
    for key, array in arrays.items():
        row = array.shape[1:]
        column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(array.reshape(-1)), int(np.prod(row)))
        fields.append(pyarrow.field(key, column.type, metadata={"shape": json.dumps(row)}))
        columns.append(column)
    parquet.write_table(pyarrow.table(columns, schema=pyarrow.schema(fields)), path, compression="zstd")
