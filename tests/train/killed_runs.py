"""Starts a run again and again, and kills it each time: at a random step, or amid the writing of a checkpoint.

A process that imports everything once and forks for each try, so that twenty kills take seconds. Arguments: the
settings as JSON, the folder of the run, and the number of kills. Prints where each try ended.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# loaded once, before the forks
import accelerate  # noqa: F401

import xclip_fast.data.clips  # noqa: F401
from xclip_fast.train import state, train
from xclip_fast.train.state import newest_checkpoint

_WRITING: list[tuple[Any, str]] = [(state, "save_file"), (os, "fsync"), (Path, "rename"), (state.shutil, "rmtree")]


def kill() -> None:
    """End this process as a machine that goes down does."""
    os.kill(os.getpid(), signal.SIGKILL)


def _killing(function: Callable[..., Any], ticks: list[int], after: bool) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        ticks[0] -= 1
        if not ticks[0] and not after:
            kill()
        found = function(*arguments, **options)
        if not ticks[0]:
            kill()
        return found

    return run


def try_once(settings: dict[str, Any], out: Path, rng: random.Random) -> str:
    """A try in a process of its own, and where it was killed."""
    amid = rng.random() < 0.5
    count = rng.randint(1, 12 if amid else 5)
    after = rng.random() < 0.5
    child = os.fork()
    if not child:
        if amid:
            ticks = [count]
            for owner, name in _WRITING:
                setattr(owner, name, _killing(getattr(owner, name), ticks, after))
        steps = 0

        def progress(line: dict[str, Any]) -> None:
            nonlocal steps
            steps += 1
            if not amid and steps == count:
                kill()

        train(settings, out, resume=True, progress=progress)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        return f"not killed: {status}"
    return f"killed {'amid writing' if amid else 'at step'} {count}"


def main() -> None:
    settings, out, kills = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(0)
    done = []
    while sum(found.startswith("killed") for found in done) < kills:
        saved = newest_checkpoint(out / "checkpoints")
        found = try_once(settings, out, rng)
        done.append(f"{found}, from {saved.step if saved else 0}")
        if not found.startswith("killed"):
            break
    print(json.dumps(done))


if __name__ == "__main__":
    main()
