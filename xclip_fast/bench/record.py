"""What a run is made of, and its one JSON form; ``benchmarks/schema.json`` describes the same."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xclip_fast.errors import InputError
from xclip_fast.files import replacing

SCHEMA = 1

TIMED, WRONG, FAILED, UNAVAILABLE = "timed", "wrong", "failed", "unavailable"


@dataclass(frozen=True)
class Case:
    """What is computed.

    Attributes:
        name: "model", from frames and encoded class texts to logits, or the stem of an op.
        variant, frames, batch, classes: of the model, or of the one that gives the op its shape.
        dtype: of weights and activations.
        direction: "forward", or "train": forward and backward.
        input: "normalised" frames in ``dtype``, "uint8" frames, or "activations".
        device: "cpu" or "cuda".
    """

    name: str
    variant: str
    frames: int
    batch: int
    classes: int
    dtype: str
    direction: str
    input: str
    device: str


@dataclass(frozen=True)
class Check:
    """The gate before any timing: errors relative to ``reference``.

    Attributes:
        error: None where it is not finite, or nothing was compared.
        torch_error: that of plain torch in the same dtype.
        allowance: what the provider may err.
        passed: whether it did not err more.
        bit_repeat: whether two runs on the same inputs gave the same bits, None where that was not looked at; no
            provider is wrong for it.
    """

    reference: str
    error: float | None
    torch_error: float
    allowance: float
    passed: bool
    bit_repeat: bool | None = None


@dataclass(frozen=True)
class Timing:
    """Blocks of baseline, provider, provider, baseline.

    Attributes:
        method: "wall" (as a user sees it), "events" (between GPU events) or "graph" (replays of a CUDA graph).
        cache: "warm", the same buffers again and again, or "cold", caches overwritten before each sample.
        median_ms, p10_ms, p90_ms, mad_ms: of one call, over blocks.
        baseline: the provider it alternates with.
        ratio, ratio_p10, ratio_p90: the baseline's time over this one's, block by block.
        noise: how far the same ratio of the baseline against itself strays from 1, its 90th percentile.
        verdict: "faster", "slower", or "no difference" where the ratio does not leave the noise.
        blocks, dropped: blocks kept, and dropped because the clock had moved.
        clock_mhz, power_w, temperature_c: lowest and highest of the GPU before and after the blocks; None where they
            cannot be read.
    """

    method: str
    cache: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    mad_ms: float
    baseline: str
    ratio: float
    ratio_p10: float
    ratio_p90: float
    noise: float
    verdict: str
    blocks: int
    dropped: int = 0
    clock_mhz: tuple[float, float] | None = None
    power_w: tuple[float, float] | None = None
    temperature_c: tuple[float, float] | None = None


@dataclass(frozen=True)
class Roof:
    """The roofline: the least time of this work here, GEMMs and bytes moved once at their measured rates."""

    flops: int
    bytes: int
    floor_ms: float
    achieved: float


@dataclass(frozen=True)
class Amdahl:
    """What an op's speed-up is worth: its share of the baseline's model, the model's gain, and the most it could be."""

    share: float
    gain: float
    bound: float


@dataclass(frozen=True)
class Row:
    """One provider in one case.

    ``reason`` says why there is no timing; ``launches`` is what one call launches on a GPU where
    ``launches.launches_of`` counts it; ``memory_mb`` is the peak of a step, as ``memory.peak_memory`` says.
    """

    case: Case
    provider: str
    status: str
    reason: str | None = None
    check: Check | None = None
    timing: Timing | None = None
    roof: Roof | None = None
    amdahl: Amdahl | None = None
    launches: int | None = None
    memory_mb: float | None = None


@dataclass
class Run:
    """All rows measured in one go on one machine.

    Attributes:
        facts: machine, versions, commit and time; see ``machine.facts``.
        ceilings: GEMM rate by dtype in TFLOP/s, and the rate of a copy in GB/s, measured in the same run.
    """

    facts: dict[str, Any]
    ceilings: dict[str, float]
    rows: list[Row] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        rows = [asdict(row) for row in self.rows]
        return {"schema": SCHEMA, "facts": self.facts, "ceilings": self.ceilings, "rows": rows}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Run:
        """The inverse of ``to_dict``.

        Raises:
            InputError: the content is not such a run.
        """
        try:
            if content["schema"] != SCHEMA:
                raise InputError(f"results of schema {content['schema']!r}, this version reads {SCHEMA}")
            rows = [_row(row) for row in content["rows"]]
            return cls(dict(content["facts"]), dict(content["ceilings"]), rows)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"these are no results of a benchmark: {type(error).__name__}: {error}") from error

    def save(self, path: Path) -> None:
        """Write the JSON form in one step; numbers that are not finite have no place in it."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read what ``save`` wrote.

        Raises:
            InputError: there is no such file, or it holds something else.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read {str(path)!r}: {error.strerror}") from error
        except ValueError as error:
            raise InputError(f"{str(path)!r} is not JSON: {error}") from error
        return cls.from_dict(content)

    @property
    def sound(self) -> bool:
        """Whether every provider that can run here ran and was right."""
        return all(row.status in (TIMED, UNAVAILABLE) for row in self.rows)


def _row(row: Mapping[str, Any]) -> Row:
    kinds = {"check": Check, "timing": Timing, "roof": Roof, "amdahl": Amdahl}
    parts: dict[str, Any] = {name: row[name] and kind(**row[name]) for name, kind in kinds.items()}
    rest = {name: value for name, value in row.items() if name not in kinds and name != "case"}
    return Row(case=Case(**row["case"]), **parts, **rest)


def to_csv(rows: Iterable[Row]) -> str:
    """A line a row; the parts of a row are columns such as ``timing.median_ms``."""
    flat = [_flat(asdict(row)) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    # a part missing from one row is a column of its own there
    columns = [name for name in columns if not any(other.startswith(f"{name}.") for other in columns)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in flat)
    return text.getvalue()


def _flat(row: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name}.")
        else:
            found[before + name] = value
    return found


def _cell(value: Any) -> Any:
    # a spreadsheet runs a text that begins like a formula
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return "'" + value
    return "" if value is None else value


def finite(value: float) -> float | None:
    """The number, or None where it has no JSON form."""
    return value if math.isfinite(value) else None
