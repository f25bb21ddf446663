"""The paper in miniature: a tiny CLIP, expanded to video part by part, on clips that need each part.

``reproduce`` is what ``xclip-fast reproduce`` does; docs/reproduce.md has the world, the recipe and what was found.
"""

from xclip_fast.reproduce.plan import FULL, QUICK, Recipe
from xclip_fast.reproduce.results import Claim, Interval, Summary
from xclip_fast.reproduce.run import reproduce

__all__ = ["FULL", "QUICK", "Claim", "Interval", "Recipe", "Summary", "reproduce"]
