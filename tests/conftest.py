"""What every test shares: the environment, seeds, golden files, and the parity table at the end."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it: the tensors of tests are small

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton reads it

import random
from collections.abc import Iterator
from dataclasses import astuple

import numpy
import pytest
from golden import DATA, Golden, read_golden
from interpreter_patches import language_patched_once
from numerics import ROWS, ParityRow, parity_table

from xclip_fast import _extension
from xclip_fast.ops._backends import interpreter_refusal, interpreting

PARITY = "parity"
# they build, measure, or need what a developer's machine has not
NOT_QUICK = ("benchmarks", "csrc", "gpu")

# float32 means float32 on a GPU too
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False


def pytest_sessionstart() -> None:
    if interpreting() and (reason := interpreter_refusal()):
        pytest.exit(f"the kernels cannot be tested: {reason}", returncode=4)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help=f"of each test its first case, without the slow ones and the rooms {', '.join(NOT_QUICK)}",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.quick:
        return
    firsts: dict[str, pytest.Item] = {}
    for item in items:
        room = item.path.relative_to(DATA.parent).parts[0]
        if room not in NOT_QUICK and item.get_closest_marker("slow") is None:
            firsts.setdefault(item.nodeid.split("[")[0], item)
    config.hook.pytest_deselected(items=[item for item in items if firsts.get(item.nodeid.split("[")[0]) is not item])
    items[:] = firsts.values()


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random numbers in every run of a test, whichever tests ran before."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _fast_interpreter() -> Iterator[None]:
    with language_patched_once():
        yield


@pytest.fixture
def by_extension() -> None:
    """The attention of the compiled extension."""
    if reason := _extension.attention_refusal():
        pytest.skip(reason)


@pytest.fixture(scope="session", params=sorted(DATA.glob("tiny_*.safetensors")), ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    """Each golden file in turn."""
    return read_golden(request.param)


@pytest.fixture(autouse=True)
def _parity_rows(request: pytest.FixtureRequest) -> Iterator[None]:
    # rows travel in the test's report, so that they also arrive from the workers of pytest-xdist
    ROWS.clear()
    yield
    request.node.user_properties.extend((PARITY, astuple(row)) for row in ROWS)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the parity table when output is asked for (``-s`` or ``-v``)."""
    if config.option.capture != "no" and config.option.verbose < 0:
        return
    reports = [report for group in terminalreporter.stats.values() for report in group]
    rows = [
        ParityRow(*values)
        for report in reports
        if getattr(report, "when", None) == "teardown"
        for name, values in report.user_properties
        if name == PARITY
    ]
    if rows:
        terminalreporter.section("parity")
        for line in parity_table(rows):
            terminalreporter.write_line(line)
