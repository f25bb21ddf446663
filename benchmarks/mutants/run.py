"""Plants faults in a copy of the tree and runs the tests that should catch them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

import pytest

from benchmarks.mutants.fault import Fault

ROOT = Path(__file__).parents[2]
SECONDS = 900  # of the tests of one fault: what hangs is caught


@dataclass(frozen=True)
class Outcome:
    """What became of a fault.

    name, digest: the fault, and the fault, its file and its tests as they were.
    outcome: "caught", "survived" or "equivalent" (survived, as its reason says).
    by: the test that failed first, or why no test could.
    seconds: of the tests.
    """

    name: str
    digest: str
    outcome: str
    by: str
    seconds: float


class Copy:
    """A copy of the tree in a folder of its own: faults are never planted in the tree itself."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "tree"
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
        names += [str(path.relative_to(ROOT)) for path in (ROOT / "xclip_fast").glob("*.so*")]
        for name in filter(None, names):
            if (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.root / name)
        # an editable installation finds the kernels by a map of its own, which is that of the tree
        link = self.root / "xclip_fast" / "kernels"
        if not link.is_symlink():
            link.symlink_to(Path("..", "kernels"))
        self.libraries = {path: path.read_bytes() for path in (self.root / "xclip_fast").glob("*.so*")}
        self.environment = os.environ | {
            "PYTHONPATH": str(self.root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "XCLIP_FAST_BUILD_EXT": "1",
            # the faults are in what runs on the CPU
            "TORCH_CUDA_ARCH_LIST": "9.0a",
            # ninja is beside the interpreter
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        where = "import xclip_fast.kernels, xclip_fast as x; print(x.__file__, x.kernels.__file__)"
        for path in self._run([sys.executable, "-c", where]).split():
            if not Path(path).absolute().is_relative_to(self.root):
                raise RuntimeError(f"the tests of a copy in {self.root} would import {path}")

    def _run(self, command: Sequence[str]) -> str:
        run = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {run.returncode}:\n{run.stderr[-2000:]}")
        return run.stdout

    def failing(self, tests: Sequence[str], *, all_of_them: bool = False) -> list[str]:
        """The tests that fail, without ``all_of_them`` the first alone.

        Raises:
            RuntimeError: the tests could not be run, or there are none.
        """
        cache = self.root.parent / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        log = self.root.parent / "log"
        options = ["-q", "-o", f"cache_dir={cache}", *tests]
        code = self._pytest(options if all_of_them else ["-x", *options], log)
        if code == 0:
            return []
        if code in (1, 2):
            return sorted(json.loads((cache / "v" / "cache" / "lastfailed").read_text()))
        if code in (3, 4, 5):
            raise RuntimeError(f"pytest {' '.join(tests)} ended with {code}:\n{log.read_text()[-2000:]}")
        # a fault that ends the interpreter is caught too
        return [f"the tests ended with {code}"]

    def _pytest(self, arguments: list[str], log: Path) -> int:
        """pytest's exit code in a fork of this process, which has the libraries imported, but nothing of the tree."""
        child = os.fork()
        if child == 0:
            code = 3
            try:
                output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(output, 1)
                os.dup2(output, 2)
                os.chdir(self.root)
                os.environ.update(self.environment)
                sys.path.insert(0, str(self.root))
                # of the tree that this command is of
                for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
                    del sys.modules[name]
                code = pytest.main(arguments)
                sys.stdout.flush()
            finally:
                os._exit(code)
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def plant(self, fault: Fault) -> list[str]:
        """The first test that a fault fails, if any; the copy is left as it was."""
        path, text = fault.planted(self.root)
        before = (self.root / path).read_text()
        (self.root / path).write_text(text)
        compiled = path.suffix != ".py"
        try:
            if compiled:
                self._run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--force"])
            return self.failing(fault.tests)
        finally:
            (self.root / path).write_text(before)
            if compiled:
                for library, content in self.libraries.items():
                    library.write_bytes(content)


def run_faults(
    faults: Sequence[Fault], folder: Path, known: dict[str, Outcome], say: Callable[[Outcome], None]
) -> list[Outcome]:
    """Run faults one after another; what is known of the same fault, file and tests is not run again.

    Raises:
        FaultError: a fault does not fit the sources.
        RuntimeError: a test that caught a fault fails without it too.
    """
    digests = {fault.name: digest(fault) for fault in faults}
    outcomes: list[Outcome] = []
    copy: Copy | None = None
    fresh: list[str] = []
    for fault in faults:
        found = known.get(fault.name)
        if found is None or found.digest != digests[fault.name]:
            copy = copy or Copy(folder)
            start = time.monotonic()
            failing = copy.plant(fault)
            seconds = round(time.monotonic() - start, 1)
            fresh += [test for test in failing[:1] if "::" in test]
            outcome = "caught" if failing else "equivalent" if fault.equivalent else "survived"
            by = failing[0] if failing else fault.equivalent
            found = Outcome(fault.name, digests[fault.name], outcome, by, seconds)
        outcomes.append(found)
        say(found)
    # what fails without a fault catches none
    if copy and fresh and (failing := copy.failing(sorted(set(fresh)), all_of_them=True)):
        raise RuntimeError(f"these tests fail without a fault too: {', '.join(failing)}")
    return outcomes


def digest(fault: Fault) -> str:
    """SHA-256 of a fault's file with the fault, its tests' names, and the texts of those that are files."""
    _, text = fault.planted(ROOT)
    parts = [text, *fault.tests]
    for test in takewhile(lambda test: test.startswith("tests/"), fault.tests):
        path = ROOT / test.split("::")[0]
        files = [path] if path.is_file() else sorted(path.rglob("test_*.py"))
        parts += [file.read_text() for file in files]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def read(path: Path) -> dict[str, Outcome]:
    """The outcomes of an earlier run, by the names of their faults."""
    if not path.exists():
        return {}
    return {row["name"]: Outcome(**row) for row in json.loads(path.read_text())["faults"]}


def write(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write outcomes as JSON."""
    counts = {kind: sum(x.outcome == kind for x in outcomes) for kind in ("caught", "survived", "equivalent")}
    rows = [asdict(outcome) for outcome in outcomes]
    path.write_text(json.dumps({**counts, "faults": rows}, indent=1) + "\n")
