"""A tiny trained X-CLIP, synthetic clips in which only time tells, and the proof that it sees time.

``run`` is what ``xclip-fast demo`` does. Figures, recipe and seed: README.md beside this file.
"""

from xclip_fast.demo.scores import Score
from xclip_fast.demo.show import DemoResult, RealVideo, run

__all__ = ["DemoResult", "RealVideo", "Score", "run"]
