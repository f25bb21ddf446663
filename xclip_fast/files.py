"""Files that are never half there; nothing heavy is imported for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from xclip_fast.errors import InputError, one_line


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of ``path`` that takes its place when the block ends without an exception.

    Raises:
        InputError: the file can't be written.
    """
    temporary = path.with_name(f".{uuid4().hex}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors makes files that only their owner can read
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save and safetensors report a full disk by exceptions of their own
        raise InputError(f"cannot write {str(path)!r}: {one_line(error)}: make room or choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)
