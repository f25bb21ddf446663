"""``python -m benchmarks``: what can be measured or counted, a command each."""

from __future__ import annotations

import argparse
import json


def main() -> None:
    """Run the command given on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    launches = commands.add_parser("launches", help="kernel launches of one forward pass, counted on meta tensors")
    launches.add_argument("--batch", type=int, default=1, help="videos in the batch")
    launches.add_argument("--json", action="store_true", help="variant to launches of the fused model, as JSON")
    arguments = parser.parse_args()
    _launches(arguments.batch, arguments.json)


def _launches(batch: int, as_json: bool) -> None:
    from benchmarks.launches import CLASSES, table

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
