"""``python -m benchmarks``: what can be measured or counted, a command each."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    """Run the command given on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    launches = commands.add_parser("launches", help="kernel launches of one forward pass, counted on meta tensors")
    launches.add_argument("--batch", type=int, default=1, help="videos in the batch")
    launches.add_argument("--json", action="store_true", help="variant to launches of the fused model, as JSON")
    eager = commands.add_parser("eager", help="the fused model beside Hugging Face's on this CPU, interleaved")
    eager.add_argument("--variant", action="append", help="may be given several times; B/32 without")
    eager.add_argument("--batch", type=int, action="append", help="may be given several times; 1 and 4 without")
    eager.add_argument("--blocks", type=int, default=8, help="blocks of eager, ours, ours, eager")
    eager.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.command == "launches":
        _launches(arguments.batch, arguments.json)
    else:
        from benchmarks.against_eager import run

        run(arguments.variant or ["B/32"], arguments.batch or [1, 4], arguments.blocks, arguments.out)


def _launches(batch: int, as_json: bool) -> None:
    from xclip_fast.bench.launches import CLASSES, table

    rows = table(batch)
    if as_json:
        print(json.dumps({variant: row["xclip_fast"] for variant, row in rows.items()}))
        return
    print(f"kernel launches of one forward pass: batch {batch}, {CLASSES} encoded class texts")
    providers = list(next(iter(rows.values())))
    print(f"{'variant':10}" + "".join(f"{provider:>14}" for provider in providers))
    for variant, row in rows.items():
        print(f"{variant:10}" + "".join(f"{row[provider]:14}" for provider in providers))


if __name__ == "__main__":
    main()
