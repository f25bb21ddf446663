"""The fused model beside Hugging Face's eager one on this machine: same weights and inputs, interleaved."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import xclip_fast
from xclip_fast.config import VARIANTS

CLASSES = 5
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One comparison; the ratio is eager's time over ours, block by block.

    The errors are of the video embedding, relative to the eager model in float32.
    """

    variant: str
    frames: int
    batch: int
    dtype: str
    error: float
    eager_error: float
    ours_ms: float
    eager_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    noise: float
    blocks: int


def compare(variant: str, batch: int, dtype: torch.dtype, blocks: int, report: Callable[[Case], None]) -> Case:
    """Check that the two models agree, then time them in blocks of eager, ours, ours, eager.

    Raises:
        RuntimeError: the models do not agree; nothing is timed.
        ImportError: transformers is not installed.
    """
    ours, eager = _models(variant)
    config = ours.config
    size = config.image_size
    video = torch.randn(batch, config.frames, 3, size, size)
    tokens = torch.randint(1, config.vocab_size - 2, (CLASSES, 8))
    tokens[:, -1] = config.vocab_size - 1

    def run_ours() -> Tensor:
        return ours(video, tokens)

    def run_eager() -> Tensor:
        return eager(input_ids=tokens, pixel_values=video).logits_per_video

    with torch.inference_mode():
        truth = eager.get_video_features(pixel_values=video).pooler_output
        ours, eager, video = ours.to(dtype), eager.to(dtype), video.to(dtype)
        error = _distance(ours.encode_video(video).video, truth)
        eager_error = _distance(eager.get_video_features(pixel_values=video).pooler_output, truth)
        if not error <= 2 * eager_error + 1e-5:
            raise RuntimeError(f"{variant} {dtype}: error {error:.1e}, eager {eager_error:.1e}; nothing is timed")
        run_ours(), run_eager()
        times: dict[str, list[float]] = {"ours": [], "eager": []}
        ratios, noise = [], []
        for _ in range(blocks):
            first, one, two, last = (_seconds(run) for run in (run_eager, run_ours, run_ours, run_eager))
            times["ours"] += [one, two]
            times["eager"] += [first, last]
            ratios.append((first + last) / (one + two))
            noise.append(abs(one - two) / (one + two))
    ratios.sort()
    case = Case(
        variant=variant,
        frames=config.frames,
        batch=batch,
        dtype=str(dtype).removeprefix("torch."),
        error=error,
        eager_error=eager_error,
        ours_ms=1e3 * statistics.median(times["ours"]),
        eager_ms=1e3 * statistics.median(times["eager"]),
        ratio=statistics.median(ratios),
        ratio_low=ratios[len(ratios) // 10],
        ratio_high=ratios[-1 - len(ratios) // 10],
        noise=statistics.median(noise),
        blocks=blocks,
    )
    report(case)
    return case


def run(variants: list[str], batches: list[int], blocks: int, out: Path | None) -> None:
    """Compare every variant, batch and dtype; print a line each, and write all of them as JSON."""
    heads = f"{'variant':9}{'batch':>6}{'dtype':>10}{'error':>9}{'eager':>9}{'ours ms':>10}{'eager ms':>10}{'ratio':>8}"
    print(f"{heads}  {'p10 - p90':13}{'noise':>7}")
    cases = [
        compare(variant, batch, dtype, blocks, _print_case)
        for variant in variants
        for dtype in DTYPES
        for batch in batches
    ]
    if out is not None:
        out.write_text(json.dumps({"machine": machine(), "cases": [asdict(case) for case in cases]}, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """Where and with what the figures were measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "commit": commit,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _models(variant: str) -> tuple[Any, Any]:
    import transformers

    from xclip_fast.checkpoints.huggingface import configs_of

    settings = transformers.XCLIPConfig(**configs_of(VARIANTS[variant], "float32")[0])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        eager = transformers.XCLIPModel(settings).eval()
    return xclip_fast.load_model(eager), eager


def _distance(found: Tensor, truth: Tensor) -> float:
    return ((found.float() - truth).norm() / truth.norm()).item()


def _seconds(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _print_case(case: Case) -> None:
    print(
        f"{case.variant:9}{case.batch:6}{case.dtype:>10}{case.error:9.1e}{case.eager_error:9.1e}{case.ours_ms:10.1f}{case.eager_ms:10.1f}"
        f"{case.ratio:8.3f}  {case.ratio_low:.3f} - {case.ratio_high:.3f}{case.noise:7.3f}",
        flush=True,
    )
