"""Where the interpreter stands in for a GPU, it computes a right bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from interpreted_bfloat16 import interpreted_bfloat16


@pytest.fixture(autouse=True)
def bfloat16() -> Iterator[None]:
    with interpreted_bfloat16():
        yield
