"""The planted faults still fit the sources, and what plants them tells caught from survived."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.mutants.fault import Fault, FaultError
from benchmarks.mutants.faults import FAULTS
from benchmarks.mutants.run import ROOT, Outcome, digest, read, write


def test_there_are_enough_of_each_room() -> None:
    rooms = Counter(fault.place.removeprefix("xclip_fast/").split("/")[0] for fault in FAULTS)
    assert rooms["engine"] >= 60
    assert rooms["ops"] >= 50
    assert rooms["kernels"] >= 30
    assert rooms["csrc"] >= 10
    assert max(Counter(fault.name for fault in FAULTS).values()) == 1


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_it_fits_the_sources(fault: Fault) -> None:
    path, text = fault.planted(ROOT)
    assert text != (ROOT / path).read_text()
    if path.suffix == ".py":
        compile(text, path, "exec")
    files = [test for test in fault.tests if test.startswith("tests/")]
    assert files
    assert all((ROOT / file.split("::")[0]).exists() for file in files)


@pytest.mark.parametrize("old", ["x = 2", "x = ", "x = 1"])
def test_what_is_not_there_once_is_an_error(old: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\nx = 3\n")
    # gone, twice, or no change
    with pytest.raises(FaultError, match=r"a fault: .* must be in \. once"):
        Fault("a fault", ".", old, "x = 1", ()).planted(tmp_path)


def test_a_fault_is_found_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "b.py").write_text("y = 1\n")
    (tmp_path / "room" / "notes.txt").write_text("y = 1\n")
    path, text = Fault("a fault", "room", "y = 1", "y = 2", ()).planted(tmp_path)
    assert (path, text) == (Path("room/b.py"), "y = 2\n")


def test_outcomes_are_read_as_they_were_written(tmp_path: Path) -> None:
    outcomes = [
        Outcome("one", "ab", "caught", "tests/test_a.py::test_b", 1.5),
        Outcome("two", "cd", "survived", "", 2.0),
    ]
    assert read(tmp_path / "file.json") == {}
    write(tmp_path / "file.json", outcomes)
    assert list(read(tmp_path / "file.json").values()) == outcomes


def test_another_text_or_another_test_is_another_outcome() -> None:
    fault = FAULTS[0]
    same, other = (Fault(fault.name, fault.place, fault.old, new, fault.tests) for new in (fault.new, fault.new + " "))
    fewer = Fault(fault.name, fault.place, fault.old, fault.new, fault.tests[:1])
    assert digest(fault) == digest(same)
    assert len({digest(fault), digest(other), digest(fewer)}) == 3
