"""The decode backends and the choice between them; each is loaded only when it is asked for."""

from __future__ import annotations

from xclip_fast.errors import InputError
from xclip_fast.video.backends.base import Backend
from xclip_fast.video.backends.decord import Decord
from xclip_fast.video.backends.pyav import PyAV
from xclip_fast.video.backends.torchcodec import TorchCodec
from xclip_fast.video.source import CheckedFile

# in the order "auto" tries them
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (PyAV(), TorchCodec(), Decord())}


def available_backends() -> dict[str, str | None]:
    """For each decode backend None when it can be used here, else one line that says why not.

    Example:
        >>> from xclip_fast.video import available_backends
        >>> sorted(available_backends())
        ['decord', 'pyav', 'torchcodec']
    """
    return {name: backend.unavailable() for name, backend in BACKENDS.items()}


def select_backend(name: str, source: CheckedFile) -> Backend:
    """The backend of this name, or for "auto" the first that can be used and reads the container of ``source``.

    Raises:
        InputError: no such backend, it can't be used here, or it does not read this kind of file.
    """
    if name == "auto":
        usable = []
        for backend in BACKENDS.values():
            if backend.unavailable() is None:
                if source.container in backend.containers:
                    return backend
                usable.append(backend.name)
        if not usable:
            raise InputError("no video decoder is installed, looked for av, torchcodec and decord; pip install av")
        names = " and ".join(usable)
        raise InputError(
            f"{source.name}: files in {source.container} format are not read exactly by {names}; pip install av"
        )
    if name not in BACKENDS:
        raise InputError(f"no decode backend {name!r}; choose auto, {', '.join(BACKENDS)}")
    backend = BACKENDS[name]
    reason = backend.unavailable()
    if reason is not None:
        raise InputError(f"the decode backend {name} can't be used here: {reason}")
    if source.container not in backend.containers:
        raise InputError(
            f"{source.name}: files in {source.container} format are not read exactly by {name}; use backend pyav"
        )
    return backend
