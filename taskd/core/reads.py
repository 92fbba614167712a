"""Readings of our own disk that the core has asked for: each answer goes to whoever asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from taskd.core.effects import Effect
from taskd.core.events import BacklogRead, IdsRead, RowsRead

ReadEffect = Callable[[int], Effect]  # makes the effect for a call number
Then = Callable[[Any, float], None]  # is told the answer, and the time


class Reads:
    """Readings under way, by call number."""

    def __init__(self, say: Callable[[Effect], None]) -> None:
        self._say = say
        self._waiting: dict[int, Then] = {}
        self._count = 0

    def ask(self, make: ReadEffect, then: Then) -> None:
        """Have something read; what is durable now is in the answer."""
        self._count += 1
        self._waiting[self._count] = then
        self._say(make(self._count))

    def answered(self, event: BacklogRead | RowsRead | IdsRead, now: float) -> None:
        """An answer came."""
        self._waiting.pop(event.call)(event, now)
