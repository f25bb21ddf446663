"""Checkpoints in and out: official, Hugging Face, CLIP and our own safetensors."""

from xclip_fast.checkpoints.loading import LoadReport, load_model
from xclip_fast.checkpoints.saving import save_model

__all__ = ["LoadReport", "load_model", "save_model"]
