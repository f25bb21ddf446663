"""What the examples share: a tiny model, a handful of clips in memory, and the check that the loss has fallen."""

import argparse

import numpy as np
import torch
from torch.utils.data import Dataset

from xclip_fast.demo.clips import CLASSES, FRAMES, SAMPLED, make_clip
from xclip_fast.demo.models import CONFIG
from xclip_fast.text import get_tokenizer

CLIPS = 16
TOKENS = get_tokenizer(CONFIG)(CLASSES)  # (K, L), the class texts


class Clips(Dataset):
    """Of each class the same number of clips, uint8 (T, H, W, 3) as decoders give them, and their labels."""

    def __len__(self) -> int:
        return CLIPS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        seed, label = divmod(index, len(CLASSES))
        frames = np.linspace(0, FRAMES - 1, SAMPLED).round().astype(int)
        return torch.from_numpy(make_clip(label, seed, frames=frames)), label


def arguments(about: str) -> argparse.ArgumentParser:
    """The options of every example."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--steps", type=int, default=40, help="updates of the weights")
    parser.add_argument("--batch", type=int, default=8, help="clips in a batch, of each process")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def finish(losses: list[float], least: float = 0.1) -> None:
    """Say how the loss went, and end with code 1 if it did not fall by ``least`` of its first value."""
    first, last = np.mean(losses[:5]), np.mean(losses[-5:])
    print(f"loss {first:.3f} -> {last:.3f} in {len(losses)} steps")
    if not last < (1 - least) * first:
        raise SystemExit("the loss has not fallen")
