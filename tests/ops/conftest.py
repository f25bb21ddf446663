"""Where the interpreter stands in for a GPU, every op test runs under the pointer check, and in a right bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness import ON_GPU
from interpreted_bfloat16 import interpreted_bfloat16
from pointer_check import Launches, checked_pointers


@pytest.fixture(autouse=True)
def launches() -> Iterator[Launches | None]:
    """The kernels launched so far in this test; none on a GPU, where compute-sanitizer checks the pointers."""
    if ON_GPU:
        yield None
        return
    with interpreted_bfloat16(), checked_pointers() as found:
        yield found
