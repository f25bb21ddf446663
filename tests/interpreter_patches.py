"""Half of the interpreter's time was spent on patching: Triton's language once for each call of a helper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


@contextmanager
def language_patched_once() -> Iterator[None]:
    """Inside, the interpreter patches ``triton.language`` at the first launch of a module, and leaves it patched.

    It would patch anew, with the same functions, at each launch and inside of one at each ``tl.sum``, ``tl.zeros`` or
    helper of our own. It would also make its table of dtypes anew for each tensor.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        yield
        return

    patch_language, numpy_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    patched: set[str] = set()
    dtypes: dict[str, Any] = {}

    def patch_once(function: Callable[..., Any]) -> Any:
        # what a function sees of the language depends on its module
        module = function.__globals__["__name__"]
        if module not in patched:
            patch_language(function)
            patched.add(module)
        return interpreter._LangPatchScope()

    def known_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = numpy_dtype(dtype)
        return dtypes[name]

    with patch.multiple(interpreter, _patch_lang=patch_once, _get_np_dtype=known_dtype):
        yield
