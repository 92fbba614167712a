"""One heap of (due, key): what has to happen at a certain time. Changing or clearing a deadline is cheap."""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Deadlines(Generic[Key]):
    """At most one deadline a key. All times on one clock, which is the caller's choice."""

    def __init__(self) -> None:
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._count = 0  # Breaks ties in the order of setting, so that keys are never compared.

    def __len__(self) -> int:
        return len(self._due)

    def set(self, key: Key, due: float) -> None:
        """Set or move the deadline of `key`."""
        self._due[key] = due
        self._count += 1
        heappush(self._heap, (due, self._count, key))
        # Cleared and moved entries stay in the heap until they come up; keep them from outnumbering the live ones.
        if len(self._heap) > 64 and len(self._heap) > 4 * len(self._due):
            self._heap = [(due, count, key) for due, count, key in self._heap if self._due.get(key) == due]
            heapify(self._heap)

    def clear(self, key: Key) -> None:
        """Forget the deadline of `key`, if it has one."""
        self._due.pop(key, None)

    def get(self, key: Key) -> float | None:
        """When `key` is due, or None."""
        return self._due.get(key)

    def next(self) -> float | None:
        """When the earliest deadline is due, or None."""
        heap = self._heap
        while heap and self._due.get(heap[0][2]) != heap[0][0]:
            heappop(heap)
        return heap[0][0] if heap else None

    def pop_due(self, now: float) -> list[Key]:
        """Remove and return the keys that are due, earliest first."""
        keys: list[Key] = []
        while (due := self.next()) is not None and due <= now:
            key = heappop(self._heap)[2]
            del self._due[key]
            keys.append(key)
        return keys
