"""The inference engine: a model's weights packed once, the exact rewrites, low precision, CUDA graphs."""

from xclip_fast.engine.api import Engine, Report
from xclip_fast.engine.texts import EncodedTexts

__all__ = ["EncodedTexts", "Engine", "Report"]
