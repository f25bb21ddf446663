"""What the paper and the official code publish, beside which the miniature's figures stand: real videos, real sizes.

Top-1 accuracy in percent. Of the ladder on Kinetics-400 (B/16, 8 frames, one view) the two ends are known here, not
the rungs between them.
"""

from __future__ import annotations

LADDER = {"mean": 80.0, "full": 82.3}
# the official README, X-CLIP-B/16 with 32 frames
FEW_SHOT = {
    "HMDB-51": {2: 53.0, 4: 57.3, 8: 62.8, 16: 64.0},
    "UCF-101": {2: 76.4, 4: 83.4, 8: 88.3, 16: 91.4},
}
ZERO_SHOT = {"HMDB-51": 44.6, "UCF-101": 72.0, "Kinetics-600": 65.2}
SOURCE = (
    "Ni et al., ECCV 2022 (the ends of the component ablation) and the README of microsoft/VideoX, X-CLIP "
    "(few-shot, zero-shot)"
)
