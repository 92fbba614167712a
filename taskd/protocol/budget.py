"""How much one peer may say: messages of each kind in a second, and bytes. Pure.

Even with a key of the cluster a node is only one of many: what a good one never comes near to ends the connection of a
bad one, before it takes the time of the others. What is data, and may come in torrents, is only held up.
"""

from __future__ import annotations

from taskd.errors import ProtocolError
from taskd.protocol import messages as msg

WINDOW_S = 1.0
GREETING_BYTES_MAX = 64 << 10  # Of everything up to the Hello.
BYTES_PER_S_MAX = 256 << 20  # From one peer; beyond it is read on in the next second.

_SELDOM, _NOW_AND_THEN, _OFTEN, _DATA = 50, 500, 10_000, 50_000
MESSAGES_PER_S_MAX: dict[type[msg.Message], int] = {
    # Heartbeats come twenty times a second at most, and more at once after a stall.
    msg.Hello: _SELDOM, msg.Ping: _NOW_AND_THEN, msg.Pong: _NOW_AND_THEN, msg.Goodbye: _SELDOM,
    msg.Leading: _NOW_AND_THEN, msg.Claim: _SELDOM, msg.Denied: _NOW_AND_THEN, msg.Attach: _SELDOM,
    msg.Wanted: _SELDOM, msg.HandOver: _SELDOM, msg.Page: _OFTEN, msg.PageTaken: _OFTEN,
    msg.Replicate: _DATA, msg.Replicated: _DATA,
    msg.Register: _SELDOM, msg.Registered: _SELDOM, msg.Inventory: _SELDOM, msg.Offering: _NOW_AND_THEN,
    msg.Started: _DATA, msg.Finished: _DATA, msg.Run: _DATA, msg.Cancel: _DATA, msg.Recall: _DATA,
    msg.Acknowledged: _DATA,
    msg.Request: _OFTEN, msg.RequestPart: _DATA, msg.Response: _OFTEN, msg.ResponsePart: _DATA, msg.Taken: _DATA,
    msg.Abandon: _OFTEN,
}  # fmt: skip
"""Messages of one kind that a peer may send in one second; more end its connection."""


class Budget:
    """What one peer has said in this second."""

    __slots__ = ("_begun", "_bytes", "_counts")

    def __init__(self, now: float) -> None:
        self._begun = now
        self._bytes = 0
        self._counts: dict[type[msg.Message], int] = {}

    def take(self, size_bytes: int, now: float) -> float:
        """Count bytes that have come; returns for how many seconds no more are to be read."""
        if now - self._begun >= WINDOW_S:
            self._begun, self._bytes = now, 0
            self._counts.clear()
        self._bytes += size_bytes
        return self._begun + WINDOW_S - now if self._bytes > BYTES_PER_S_MAX else 0.0

    def spend(self, kind: type[msg.Message]) -> None:
        """Count a message. Raises ProtocolError where it is one too many."""
        count = self._counts.get(kind, 0) + 1
        self._counts[kind] = count
        if count > MESSAGES_PER_S_MAX[kind]:
            raise ProtocolError(f"more than {MESSAGES_PER_S_MAX[kind]} {kind.__name__} in a second")
