"""Class texts: label lists, CLIP's tokenizer, and a cache of text features."""

from xclip_fast.text.cache import TextCache
from xclip_fast.text.labels import apply_template, clean_labels
from xclip_fast.text.tokenizer import Tokenizer, get_tokenizer

__all__ = ["TextCache", "Tokenizer", "apply_template", "clean_labels", "get_tokenizer"]
