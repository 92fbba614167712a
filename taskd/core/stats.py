"""What the leader counts as it goes: plain numbers, read by whoever asks, so that the hot path pays an addition."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from taskd.core.task import Outcome

NAMES_MAX = 1000  # Of pairs of type and queue that are counted by themselves: anybody may make up new ones.
OTHER = "(other)"
SECONDS_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 21600)


class Histogram:
    """Counts of observations by upper bound, and their sum; the last count is of those above every bound."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...] = SECONDS_BOUNDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Stats:
    """Since the start of the process."""

    def __init__(self) -> None:
        self.submitted: Counter[tuple[str, str]] = Counter()  # (type, queue)
        self.finished: Counter[tuple[str, str, Outcome]] = Counter()  # (type, queue, outcome of the deciding attempt)
        self._names: set[tuple[str, str]] = set()
        self.lost: Counter[str] = Counter()  # by cause
        self.retries = 0
        self.late_results = 0
        self.leader_changes = 0
        self.wait = Histogram()  # submission to the first dispatch
        self.duration = Histogram()  # of attempts, as the workers measured them

    def count_submitted(self, type: str, queue: str) -> None:
        """A task was accepted."""
        self.submitted[self._name(type, queue)] += 1

    def count_finished(self, type: str, queue: str, outcome: Outcome) -> None:
        """A task has ended."""
        self.finished[(*self._name(type, queue), outcome)] += 1

    def _name(self, type: str, queue: str) -> tuple[str, str]:
        name = (type, queue)
        if name in self._names:
            return name
        if len(self._names) >= NAMES_MAX:
            return (OTHER, OTHER)
        self._names.add(name)
        return name
