"""When a worker tells the leader what has ended, and in which messages.

While it has enough to begin, outcomes are told together: nothing stands still meanwhile, and several in one message
cost the leader and the worker a fraction of what they cost one by one.
"""

from __future__ import annotations

from collections.abc import Iterator

from taskd.protocol.messages import AttemptEnded, Finished

TELL_S = 0.02  # The least time between two messages.
TELL_FACTOR = 2  # Enough to begin is so many times what has ended since, and one for each slot.
FINISHED_BYTES_MAX = 4 << 20  # Of reports in one message, well below a frame.


class OutcomeBatch:
    """Outcomes of the last moment, for the leader to hear of."""

    def __init__(self) -> None:
        self._untold: list[AttemptEnded] = []
        self._told_at = -TELL_S

    def add(self, ended: list[AttemptEnded]) -> None:
        """These have ended."""
        self._untold += ended

    def hurry(self, now: float) -> None:
        """The leader waits for one of them."""
        self._told_at = now - TELL_S

    def forget(self) -> None:
        """It is told of all that it does not know in another way."""
        self._untold = []

    def due(self, waiting: int, slots: int) -> float | None:
        """When the leader is to be told, by what waits here to begin; None where there is nothing to tell."""
        if not self._untold:
            return None
        is_enough = waiting > TELL_FACTOR * len(self._untold) + slots
        return self._told_at + TELL_S if is_enough else 0.0

    def take(self, now: float) -> list[AttemptEnded]:
        """What it is told now."""
        told, self._untold = self._untold, []
        self._told_at = now
        return told


def finished_messages(ended: list[AttemptEnded]) -> Iterator[Finished]:
    """Outcomes as messages, none much larger than FINISHED_BYTES_MAX."""
    batch: list[AttemptEnded] = []
    size = 0
    for attempt in ended:
        if batch and size + len(attempt.report) > FINISHED_BYTES_MAX:
            yield Finished(tuple(batch))
            batch, size = [], 0
        batch.append(attempt)
        size += len(attempt.report)
    if batch:
        yield Finished(tuple(batch))
