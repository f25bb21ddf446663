"""PART=train: forward and backward of whole models in bfloat16, batch 8."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu import e2e
from benchmarks.gpu.journal import Journal


def main(journal: Journal, out: Path, dry: bool) -> bool:
    """Measure what is left; true when everything was measured, and nothing was wrong."""
    return e2e.main(journal, out, dry, direction="train")
