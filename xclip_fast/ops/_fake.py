"""``torch.library.register_fake`` for the ops, and what compilers before PyTorch 2.14 have to be spared."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

_WRITES_ALL_DOWN = torch.__version__ < "2.14"


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the function that makes the results of an op without computing them; see ``torch.library``."""

    def register(shapes: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(shapes)
        def fake(*args: Any, **kwargs: Any) -> Any:
            if _WRITES_ALL_DOWN:
                _name_ops_briefly()
            return shapes(*args, **kwargs)

        registered: Callable[..., Any] = torch.library.register_fake(name)(fake)
        return registered

    return register


def _name_ops_briefly() -> None:
    """Inductor writes down an op that it meets first, with its arguments, theirs and so on: twice as much a layer.

    The text is for a log that is rarely read, and of a model of twelve blocks it is never finished. The compiler is
    there when it asks for shapes, and nothing imports it here.
    """
    issues = sys.modules.get("torch._inductor.exc")
    if issues is None or getattr(issues, "_xclip_fast_ops_are_brief", False):
        return
    whole = issues.OperatorIssue.operator_str

    def operator_str(target: Any, args: Any, kwargs: Any) -> str:
        text: str = f"  target: {target}" if str(target).startswith("xclip_fast.") else whole(target, args, kwargs)
        return text

    issues.OperatorIssue.operator_str = staticmethod(operator_str)
    issues._xclip_fast_ops_are_brief = True  # type: ignore[attr-defined]
