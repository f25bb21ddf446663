"""Video in: decode a file, sample clips from it, and prepare their frames for the model."""

from xclip_fast.video.backends import available_backends
from xclip_fast.video.backends.base import VideoInfo
from xclip_fast.video.load import load_video, probe, read_frames
from xclip_fast.video.members import Member
from xclip_fast.video.preprocess import PRESETS, Preset, normalise, preprocess
from xclip_fast.video.sampling import Sampling

__all__ = [
    "PRESETS",
    "Member",
    "Preset",
    "Sampling",
    "VideoInfo",
    "available_backends",
    "load_video",
    "normalise",
    "preprocess",
    "probe",
    "read_frames",
]
