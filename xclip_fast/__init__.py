"""X-CLIP for video recognition: a reference, fused kernels, and the tools around them."""

from xclip_fast.config import VARIANTS, XCLIPConfig
from xclip_fast.errors import InputError
from xclip_fast.model import create_model

__version__ = "0.1.0"

__all__ = ["VARIANTS", "InputError", "XCLIPConfig", "create_model"]
