"""A decoder that crashes or hangs as a file's name asks for, and the processes that decode."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

# stands before the real decoder, and does to a file what its name says
HOSTILE = """
import ctypes, os, signal, sys, time
here = os.path.dirname(os.path.dirname(__file__))
sys.path.remove(here)
del sys.modules["av"]
import av
sys.path.insert(0, here)
original = av.open

def open(path, *arguments, **settings):
    kind = os.path.basename(path).partition("-")[0]
    if kind == "hang":
        time.sleep(1000)
    elif kind == "clutch":
        ctypes.PyDLL(None).sleep(1000)  # never lets other threads run
    elif kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif kind == "babble":
        os.write(1, b"nonsense" * 1000)
        os.write(2, b"nonsense" * 1000)
    elif kind == "starve":
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    elif kind == "fault":
        raise ZeroDivisionError("a fault of the program")
    elif kind == "late":
        time.sleep(0.3)
    return original(path, *arguments, **settings)

av.open = open
"""


def put_hostile_decoder(folder: Path) -> Path:
    """Write it there. Processes find it when that folder comes first; this one has loaded the real decoder already."""
    (folder / "av").mkdir(parents=True)
    (folder / "av" / "__init__.py").write_text(HOSTILE)
    return folder


def children(parent: int) -> dict[int, str]:
    """The state of each child of a process; Z is one that died and nobody waited for."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        # a process may end at any time
        with suppress(OSError):
            state, above = entry.read_text().rpartition(")")[2].split()[:2]
            if int(above) == parent:
                found[int(entry.parent.name)] = state
    return found
