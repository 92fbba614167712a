"""Calls that other nodes make of this one, while they come in and are answered: how many there are, and how much of our
memory their bodies take, by bounds of one body, of one peer, of all peers together, and in time.

Whoever holds a worker key can be any number of peers: only what holds for all of them together bounds the memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from taskd.api.incoming import BODY_TIMEOUT_S
from taskd.errors import Overloaded, TaskdError, TooLarge, TooSlow
from taskd.protocol import messages as msg

CALLS_PER_PEER_MAX = 1024  # Twice of what a node's socket takes.
CALLS_MAX = 16_384  # Of all peers together; each takes some kilobytes while it is answered.
BODY_BYTES_MAX = 64 << 20
BODIES_PER_PEER_BYTES_MAX = 128 << 20  # Of one peer's calls together, while they are answered.
BODIES_BYTES_MAX = 256 << 20  # Of all peers' calls together: in JSON, read, they take a few times as much.
# Of a body that has not ended. What nodes relay has come whole to them, and is here in a fraction of a second; a body
# older than that makes room for others.
BODY_STALE_S = 5.0


class Incoming:
    """A call that a peer makes: its body as it comes, then the task that answers."""

    def __init__(self, node_id: int, request: msg.Request) -> None:
        self.node_id = node_id
        self.request = request
        self.begun_s = asyncio.get_running_loop().time()
        self.body: bytes | bytearray = request.body  # In one piece: each of many tiny parts would take far more.
        self.size_bytes = 0
        self.timer: asyncio.TimerHandle | None = None  # while the end of its body is missing
        self.task: asyncio.Task[None] | None = None
        self.ahead_bytes = 0  # of the answer: sent and not yet taken
        self.may_go_on = asyncio.Event()


class Inbox:
    """The calls of all peers. `refuse` is told of those that are not answered, and why."""

    def __init__(self, refuse: Callable[[int, int, TaskdError], None]) -> None:
        self._refuse = refuse
        self._calls: dict[int, dict[int, Incoming]] = {}
        self._unfinished: dict[Incoming, None] = {}  # the oldest first
        self._open = 0
        self._size_bytes = 0

    @property
    def open(self) -> int:
        """How many calls are under way."""
        return self._open

    def get(self, node_id: int, call: int) -> Incoming | None:
        """A call that is under way."""
        return self._calls.get(node_id, {}).get(call)

    def begin(self, node_id: int, request: msg.Request) -> Incoming | None:
        """A new call, where it has come whole."""
        calls = self._calls.get(node_id, {})
        if request.call in calls:
            return None  # A number is used once: whatever this is, it has no answer.
        if len(calls) >= CALLS_PER_PEER_MAX:
            error = Overloaded(f"{CALLS_PER_PEER_MAX} calls of this node are under way")
            self._refuse(node_id, request.call, error)
            return None
        if self.open >= CALLS_MAX:
            self._refuse(node_id, request.call, Overloaded(f"{CALLS_MAX} calls of other nodes are under way"))
            return None
        incoming = Incoming(node_id, request)
        self._calls.setdefault(node_id, {})[request.call] = incoming
        self._open += 1
        if not request.last:
            loop = asyncio.get_running_loop()
            incoming.timer = loop.call_later(BODY_TIMEOUT_S, self._give_up, incoming, TooSlow())
            self._unfinished[incoming] = None
        return self._grown(incoming, len(request.body), is_whole=request.last)

    def go_on(self, node_id: int, part: msg.RequestPart) -> Incoming | None:
        """More of a call's body: the call, where it has come whole."""
        incoming = self.get(node_id, part.call)
        if incoming is None or incoming not in self._unfinished:
            return None
        if not isinstance(incoming.body, bytearray):
            incoming.body = bytearray(incoming.body)
        incoming.body += part.body
        return self._grown(incoming, len(part.body), is_whole=part.last)

    def _grown(self, incoming: Incoming, by_bytes: int, *, is_whole: bool) -> Incoming | None:
        incoming.size_bytes += by_bytes
        self._size_bytes += by_bytes
        error = self._too_much(incoming) if incoming.size_bytes else None
        if error is not None:
            self._give_up(incoming, error)
            return None
        if not is_whole:
            return None
        self._settle(incoming)
        return incoming

    def _too_much(self, incoming: Incoming) -> TaskdError | None:
        """Why this call has no room; makes some, where others have taken it for too long."""
        if incoming.size_bytes > BODY_BYTES_MAX:
            return TooLarge(f"a relayed body takes at most {BODY_BYTES_MAX} bytes")
        if sum(other.size_bytes for other in self._calls[incoming.node_id].values()) > BODIES_PER_PEER_BYTES_MAX:
            return Overloaded("the requests of this node that are under way are too large together; try again later")
        while self._size_bytes > BODIES_BYTES_MAX:
            oldest = next(iter(self._unfinished), incoming)
            age_s = asyncio.get_running_loop().time() - oldest.begun_s
            full = Overloaded("the requests that are under way are too large together; try again later")
            if oldest is incoming or age_s < BODY_STALE_S:
                return full
            self._give_up(oldest, full)
        return None

    def _give_up(self, incoming: Incoming, error: TaskdError) -> None:
        self.remove(incoming)
        self._refuse(incoming.node_id, incoming.request.call, error)

    def remove(self, incoming: Incoming) -> None:
        """A call is over, or is wanted no more; once more does no harm."""
        calls = self._calls.get(incoming.node_id, {})
        if calls.get(incoming.request.call) is not incoming:
            return
        del calls[incoming.request.call]
        if not calls:
            del self._calls[incoming.node_id]
        self._settle(incoming)
        self._open -= 1
        self._size_bytes -= incoming.size_bytes

    def _settle(self, incoming: Incoming) -> None:
        """Nothing more of its body is waited for."""
        self._unfinished.pop(incoming, None)
        if incoming.timer is not None:
            incoming.timer.cancel()
            incoming.timer = None

    def remove_peer(self, node_id: int) -> list[Incoming]:
        """All calls of a peer are over."""
        gone = list(self._calls.get(node_id, {}).values())
        for incoming in gone:
            self.remove(incoming)
        return gone
