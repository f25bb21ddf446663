"""A window whose cases go wrong in every way: what ``benchmarks.gpu.window`` makes of them is tested with it."""

from __future__ import annotations

import os
import time

from benchmarks.gpu.lane import PASSED, WRONG, Desk, Found, Task


def tasks(lane: str, desk: Desk) -> dict[str, Task]:
    if lane == "never begins":
        raise RuntimeError("this lane cannot begin")

    def crash() -> Found:
        os._exit(11)

    def hang() -> Found:
        with desk.turns.alone():
            time.sleep(60)
        return {"status": PASSED}

    def fail() -> Found:
        raise ValueError("the first line\n\n  the last one\n")

    def alone() -> Found:
        with desk.turns.alone():
            return {"status": PASSED}

    wrong = {"what": "output 0", "error": 0.5, "allowance": 0.01, "passed": False}
    return {
        "good": Task(30, lambda: {"status": PASSED}),
        "crashes": Task(30, crash),
        "fails": Task(30, fail),
        "hangs": Task(1, hang),
        "wrong": Task(30, lambda: {"status": WRONG, "checks": [wrong]}),
        # the lock of the one that was ended is free again
        "measures": Task(30, alone),
    }
