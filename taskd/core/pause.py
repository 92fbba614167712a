"""A leader that may not decide at the moment: it looks around after standing still, or hands over to another.

What comes meanwhile waits here, and is done when the leader goes on, or answered by whoever leads then.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

HAND_OVER_S = 1.0  # To let everything become durable, and again for the other to claim; then the leader goes on.


class Why(Enum):
    """What a leader waits for."""

    LOOKING_AROUND = "it stood still and looks around"
    FINISHING = "it hands over once the other has everything"
    HANDING_OVER = "another is about to claim"


class Pause:
    """At most one at a time."""

    def __init__(self) -> None:
        self.why: Why | None = None
        self.heir: int | None = None  # the node id of who is to lead
        self.until: float | None = None
        self._deferred: list[Callable[[float], None]] = []

    def __bool__(self) -> bool:
        return self.why is not None

    def begin(self, why: Why, until: float, heir: int | None = None) -> None:
        """Decide nothing from now on, or go on to the next step of a hand-over."""
        self.why, self.until = why, until
        self.heir = heir if heir is not None else self.heir

    def defer(self, event: Callable[[float], None]) -> None:
        """Have something done later."""
        self._deferred.append(event)

    def end(self, now: float) -> None:
        """Do what has waited."""
        deferred, self._deferred = self._deferred, []
        self.why = self.heir = self.until = None
        for event in deferred:
            event(now)
