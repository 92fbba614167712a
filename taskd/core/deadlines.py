"""One heap of (due, key): what has to happen at a certain time. Changing or clearing a deadline is cheap."""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


def earliest(*times: float | None) -> float | None:
    """The least of those times that there are. Written out, for each turn asks a dozen times."""
    least = None
    for time in times:
        if time is not None and (least is None or time < least):
            least = time
    return least


GARBAGE_MIN = 64  # Cleared and moved entries stay in the heap until they come up, or outnumber the others and these.


class Deadlines(Generic[Key]):
    """At most one deadline a key. All times on one clock, which is the caller's choice."""

    def __init__(self) -> None:
        self._entries: dict[Key, tuple[float, int, Key]] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._count = 0  # Breaks ties in the order of setting, so that keys are never compared.

    def __len__(self) -> int:
        return len(self._entries)

    def set(self, key: Key, due: float) -> None:
        """Set or move the deadline of `key`."""
        entry = self._entries.get(key)
        if entry is not None and entry[0] == due:
            return
        self._count += 1
        entry = self._entries[key] = (due, self._count, key)
        heappush(self._heap, entry)
        self._drop_garbage()

    def clear(self, key: Key) -> None:
        """Forget the deadline of `key`, if it has one."""
        if self._entries.pop(key, None) is not None:
            self._drop_garbage()

    def get(self, key: Key) -> float | None:
        """When `key` is due, or None."""
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def next(self) -> float | None:
        """When the earliest deadline is due, or None."""
        heap = self._heap
        while heap and self._entries.get(heap[0][2]) is not heap[0]:
            heappop(heap)
        return heap[0][0] if heap else None

    def latest(self, count: int) -> list[tuple[Key, float]]:
        """The keys that are due last, with their times, at most so many."""
        entries = sorted(self._entries.values(), key=lambda entry: entry[:2])
        return [(key, due) for due, _, key in entries[max(0, len(entries) - count) :]]

    def pop_due(self, now: float) -> list[Key]:
        """Remove and return the keys that are due, earliest first."""
        keys: list[Key] = []
        while (due := self.next()) is not None and due <= now:
            key = heappop(self._heap)[2]
            del self._entries[key]
            keys.append(key)
        return keys

    def _drop_garbage(self) -> None:
        if len(self._heap) > GARBAGE_MIN + 2 * len(self._entries):
            self._heap = list(self._entries.values())
            heapify(self._heap)
