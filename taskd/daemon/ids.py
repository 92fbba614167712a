"""Task ids: UUIDv7 (RFC 9562), time-ordered so that new rows land at the end of the database's tree."""

from __future__ import annotations

from random import Random, SystemRandom
from uuid import UUID

NO_ID = bytes(16)  # Below every id.
_COUNTER_BITS = 42  # Below the millisecond: a random start, then counting up, so that ids of one source stay in order.
# The lowest 32 bits begin below the middle: a request counts its tasks from its own id on, and never meets the next id.
_RANDOM_BITS = 31


class IdSource:
    """Makes ids in strictly increasing order."""

    def __init__(self) -> None:
        # Ids have to differ, not to be secret: the system is asked for randomness once.
        self._random = Random(SystemRandom().getrandbits(256))  # noqa: S311
        self._last_ms = 0
        self._counter = 0

    def next(self, now_s: float) -> bytes:
        """A fresh id, 16 bytes, for the UTC time `now_s`."""
        now_ms = int(now_s * 1000)
        if now_ms > self._last_ms:
            self._last_ms = now_ms
            self._counter = self._random.getrandbits(_COUNTER_BITS - 1)  # The top bit is left free to count into.
        else:
            self._counter += 1
        counter = self._counter
        # 48 bits of time, version 7, 12 bits, variant 2, 30 bits of the counter, a zero, and 31 random ones.
        high = self._last_ms << 16 | 0x7000 | counter >> 30
        low = 0b10 << 62 | (counter & 0x3FFF_FFFF) << 32 | self._random.getrandbits(_RANDOM_BITS)
        return high.to_bytes(8, "big") + low.to_bytes(8, "big")


def text_of(task_id: bytes) -> str:
    """As users see it."""
    return str(UUID(bytes=task_id))
