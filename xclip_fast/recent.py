"""A thread-safe LRU cache bounded by size."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """An LRU cache: the least recently used values are evicted first. It is safe to use from several threads.

    Args:
        room: the largest sum of the sizes of all values; a larger value is not kept.
        size: of a value; one each by default.
    """

    def __init__(self, room: int, size: Callable[[Value], int] = lambda value: 1) -> None:
        self.room, self.size, self.taken = room, size, 0
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> Value | None:
        """The value of a key, if it is still there."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: Key, value: Value) -> None:
        """Keep a value, in the place of the key's older one."""
        if self.size(value) > self.room:
            return
        with self._lock:
            if key in self._values:
                self.taken -= self.size(self._values.pop(key))
            self._values[key] = value
            self.taken += self.size(value)
            while self.taken > self.room:
                self.taken -= self.size(self._values.popitem(last=False)[1])
