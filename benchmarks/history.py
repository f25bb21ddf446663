"""``python -m benchmarks against BASE``: this commit beside another, in turns, from a worktree of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import compare
from xclip_fast.bench.record import Run

ROOT = Path(__file__).parents[1]


def main(base: str, suite: str, rounds: int) -> int:
    """Measure base and this tree in turns, and compare the best round of each; 1 when something became slower."""
    with TemporaryDirectory() as folder:
        tree, results = Path(folder) / "base", Path(folder)
        _git("worktree", "add", "--detach", "--quiet", str(tree), base)
        try:
            _complete(tree, base)
            runs: dict[str, list[Run]] = {"base": [], "here": []}
            for index in range(rounds):
                for name, root in (("base", tree), ("here", ROOT)):
                    path = results / f"{name}{index}.json"
                    _measure(root, suite, path)
                    runs[name].append(Run.load(path))
        finally:
            _git("worktree", "remove", "--force", str(tree))
        for name, found in runs.items():
            _best(found).save(results / f"{name}.json")
        return compare.main(results / "base.json", results / "here.json")


def _complete(tree: Path, base: str) -> None:
    """Make the checkout what an install would be: kernels in the package, and the extension where it is the same."""
    link = tree / "xclip_fast" / "kernels"
    if not link.exists():
        link.symlink_to(Path("..") / "kernels", target_is_directory=True)
    same = subprocess.run(["git", "-C", str(ROOT), "diff", "--quiet", base, "--", "csrc"], check=False).returncode == 0
    for library in (ROOT / "xclip_fast").glob("*.so"):
        if same:
            shutil.copy(library, tree / "xclip_fast" / library.name)
        else:
            print(f"not the same: {base} has other sources in csrc, and runs without {library.name}")


def _measure(root: Path, suite: str, path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "run", "--suite", suite, "--json", str(path)]
    # a failed row is a row: the comparison says what both have
    subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, check=False)


def _best(runs: list[Run]) -> Run:
    """The fastest round of each row: what disturbs a run makes it slower, never faster."""
    rows = []
    for same in zip(*(run.rows for run in runs), strict=True):
        timed = [row for row in same if row.timing is not None]
        rows.append(min(timed, key=lambda row: row.timing.median_ms) if timed else same[0])  # type: ignore[union-attr]
    return Run(runs[0].facts, runs[0].ceilings, rows)


def _git(*arguments: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *arguments], check=True)
