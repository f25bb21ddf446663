"""A process that decodes, as the pool sees it: asked over pipes, ended at a deadline, never waited for in vain."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from xclip_fast.errors import InputError

_START_SECONDS = 120.0
_WORKER = Path(__file__).with_name("worker.py")


class Process:
    """A process that decodes, with whatever processes it starts itself."""

    def __init__(self, memory: int, timeout: float) -> None:
        self.timeout, self.late, self.lock = timeout, False, threading.Lock()
        self.process = subprocess.Popen(
            [sys.executable, str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=[memory],
            # its own group: ctrl-c in a terminal is the parent's to handle, and decoders are ended with it
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )

    def prepare(self, work: dict[str, Any]) -> None:
        """Describe the work, and wait until the process is ready."""
        answer = self._ask({"path": sys.path, "seconds": self.timeout, **work}, _START_SECONDS)
        if answer is None or "fault" in answer:
            self.end()
            reason = answer["fault"].strip().splitlines()[-1] if answer else _status(self.process.returncode)
            raise InputError(f"a process that decodes videos does not start ({reason}): decode in this one, 0 workers")

    def decode(self, job: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a job, or None when the process ended or was ended."""
        return self._ask(job, self.timeout)

    def kill(self) -> None:
        """End the process and those it started."""
        with self.lock, suppress(ProcessLookupError):
            # a process that is not yet waited for keeps its number
            if self.process.returncode is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> str:
        """Make sure that the process is gone; what happened to it, for a message about the file it had."""
        # one that died by itself keeps its status
        self.kill()
        with self.lock:
            self.process.wait()
        pipes: Any = self.process.stdin, self.process.stdout
        for pipe in pipes:
            with suppress(OSError):
                pipe.close()
        if self.late:
            return f"decoding was stopped after {self.timeout:g} seconds: give another file, or more time"
        return f"the decoder crashed ({_status(self.process.returncode)}): the file is damaged, give another"

    def _ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        pipes: Any = self.process.stdin, self.process.stdout
        timer = threading.Timer(seconds, self._stop)
        timer.daemon = True
        timer.start()
        try:
            pipes[0].write(json.dumps(question).encode() + b"\n")
            pipes[0].flush()
            answer: dict[str, Any] = json.loads(pipes[1].readline())
            return answer
        except (OSError, ValueError):
            return None
        finally:
            timer.cancel()

    def _stop(self) -> None:
        self.late = True
        self.kill()


def _status(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit status {code}"
