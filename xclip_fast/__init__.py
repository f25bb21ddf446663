"""X-CLIP for video recognition: a reference, fused kernels, and the tools around them.

Names that need torch are imported on first use: ``xclip-fast --help`` answers at once, and ``xclip-fast info`` can
explain a broken torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from xclip_fast.config import VARIANTS, XCLIPConfig
from xclip_fast.errors import InputError

if TYPE_CHECKING:
    from xclip_fast.checkpoints import load_model, save_model
    from xclip_fast.engine import Engine
    from xclip_fast.model import create_model
    from xclip_fast.ops import backend, explain
    from xclip_fast.patch import optimize, restore

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "Engine",
    "InputError",
    "XCLIPConfig",
    "backend",
    "create_model",
    "explain",
    "load_model",
    "optimize",
    "restore",
    "save_model",
]

# lazy public name -> the module it lives in
_HOME = {
    "Engine": "engine",
    "backend": "ops",
    "create_model": "model",
    "explain": "ops",
    "load_model": "checkpoints",
    "optimize": "patch",
    "restore": "patch",
    "save_model": "checkpoints",
}
_ROOMS = (
    "checkpoints",
    "data",
    "demo",
    "engine",
    "evaluate",
    "flops",
    "layers",
    "model",
    "ops",
    "parallel",
    "pipeline",
    "reference",
    "text",
    "train",
    "video",
)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"xclip_fast.{_HOME[name]}"), name)
    if name in _ROOMS:
        return import_module(f"xclip_fast.{name}")
    raise AttributeError(f"module 'xclip_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
