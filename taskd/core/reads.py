"""Readings of our own disk that the core has asked for: each answer goes to whoever asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from taskd.core.effects import Effect
from taskd.core.events import BacklogRead, IdsRead, RowsRead

ReadEffect = Callable[[int], Effect]  # makes the effect for a call number
Then = Callable[[Any, float], None]  # is told the answer, and the time

AT_ONCE_MAX = 64  # Said and not answered; whoever carries them out makes few at a time, and need not hold more.


class Reads:
    """Readings under way, by call number. More than may be said at once wait here, first come, first served: behind
    each is a client, a worker or a scheduler that waits for it, and those are bounded where they come in."""

    def __init__(self, say: Callable[[Effect], None]) -> None:
        self._say = say
        self._said: dict[int, Then] = {}
        self._waiting: deque[tuple[ReadEffect, Then]] = deque()
        self._count = 0

    def ask(self, make: ReadEffect, then: Then) -> None:
        """Have something read; what is durable now is in the answer."""
        self._waiting.append((make, then))
        self._say_on()

    def answered(self, event: BacklogRead | RowsRead | IdsRead, now: float) -> None:
        """An answer came."""
        then = self._said.pop(event.call)
        self._say_on()
        then(event, now)

    def _say_on(self) -> None:
        while self._waiting and len(self._said) < AT_ONCE_MAX:
            make, then = self._waiting.popleft()
            self._count += 1
            self._said[self._count] = then
            self._say(make(self._count))
