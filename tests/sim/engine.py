"""Simulated time: what is due, in order, and the one source of chance."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from random import Random
from typing import Any

Action = Callable[..., None]


class Engine:
    """Runs actions at their time. Two that are due at the same time run in the order in which they were asked for."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.steps = 0
        self._count = 0
        self._heap: list[tuple[float, int, Action, tuple[Any, ...]]] = []

    def at(self, time: float, action: Action, *arguments: Any) -> None:
        """Have something done at a time that is not in the past."""
        self._count += 1
        heappush(self._heap, (time, self._count, action, arguments))

    def after(self, delay_s: float, action: Action, *arguments: Any) -> None:
        """Have something done so many seconds from now."""
        self._count += 1
        heappush(self._heap, (self.now + delay_s, self._count, action, arguments))

    def step(self) -> None:
        """Do what is due next; nothing where nothing is."""
        if self._heap:
            time, _, action, arguments = heappop(self._heap)
            self.now = max(self.now, time)
            self.steps += 1
            action(*arguments)

    def run_until(self, end: float) -> None:
        """Let time pass."""
        heap = self._heap
        while heap and heap[0][0] <= end:
            time, _, action, arguments = heappop(heap)
            self.now = max(self.now, time)
            self.steps += 1
            action(*arguments)
        self.now = max(self.now, end)
