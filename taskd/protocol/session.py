"""One connection's life: hello, heartbeats, silence, goodbye. Pure: bytes and `now` in, messages and bytes out.

    GREETING ──their hello is good──▶ OPEN ──goodbye──▶ CLOSED

A peer counts only once its hello has been checked against what its certificate says. Whatever does not fit raises
ProtocolError (it breaks the rules) or Refused (it may not come in), and the connection is to be closed.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

from taskd.errors import ProtocolError, Refused
from taskd.protocol.budget import GREETING_BYTES_MAX, Budget
from taskd.protocol.frames import FrameReader, encode
from taskd.protocol.messages import MAY_SEND, PROTOCOL_VERSION, Goodbye, Hello, Message, NodeInfo, Ping, Pong, Role
from taskd.protocol.versions import Encode, common_version, encode_for_older, encoder

HELLO_TIMEOUT_S = 5.0
LATE_HEARTBEATS = 1.5  # After so many without a question the other one is late.
MEASURE_HEARTBEATS = 8  # At the latest after so many a node asks itself, to know the round trip and the peer's clock.
ROUND_TRIPS_KEPT = 8  # The shortest of these tells the clocks' offset best: the least time for it to be wrong.


class State(Enum):
    """Where a session stands."""

    GREETING = auto()
    OPEN = auto()
    CLOSED = auto()


class Session:
    """Our end of one connection. `certified_id` and `certified_roles` come from the peer's certificate."""

    def __init__(
        self,
        node: NodeInfo,
        cluster: str,
        certified_id: int,
        certified_roles: tuple[Role, ...],
        *,
        now: float,
        utc: Callable[[], float],
        heartbeat_s: float = 0.5,
        timeout_s: float = 2.5,
    ) -> None:
        self.state = State.GREETING
        self.peer: NodeInfo | None = None
        self.goodbye: str | None = None
        self.taken_by = ""  # the name of another node that has our node id: the peer itself, or one that it has met
        self.is_copy = False  # that one runs from a copy of our own disk
        self.answered = 0  # the greatest number of our pings that came back
        self.round_trip_s: float | None = None
        self.clock_offset_s: float | None = None
        self._node = node
        self._cluster = cluster
        self.certified_id = certified_id
        self.certified_roles = frozenset(certified_roles)
        self._utc = utc
        self._heartbeat_s = heartbeat_s
        self._timeout_s = timeout_s
        self._reader = FrameReader(GREETING_BYTES_MAX)
        self._budget = Budget(now)
        self.rest_s = 0.0  # for so long no more is to be read: the peer has said much in this second
        self._heard = now
        self._hello_due = now + HELLO_TIMEOUT_S
        self._ping_due = now + heartbeat_s
        self._ping_number = 0
        self._pinged = now
        self._ping_sent: tuple[int, float, float] | None = None  # number, now, UTC
        self._round_trips: list[tuple[float, float]] = []  # seconds, offset of the peer's clock
        self.encode: Encode = encode_for_older  # makes frames as the peer knows them; until it has said hello, for all
        self._outgoing: list[bytes] = [encode(Hello(PROTOCOL_VERSION, cluster, node))]

    def to_send(self) -> list[bytes]:
        """Frames of the session's own to be sent now."""
        frames, self._outgoing = self._outgoing, []
        return frames

    def receive(self, data: bytes, now: float) -> list[Message]:
        """The messages for others in what came in. Raises ProtocolError, Refused."""
        self._heard = now
        received: list[Message] = []
        self.rest_s = self._budget.take(len(data), now)
        spend = self._budget.spend
        for message in self._reader.feed(data):
            if self.state is State.GREETING:
                self._greet(message, now)
            elif self.state is State.OPEN:
                kind = type(message)
                spend(kind)
                if not MAY_SEND[kind] & self.certified_roles:
                    roles = ",".join(sorted(self.certified_roles))
                    raise ProtocolError(f"a {roles} may not send {kind.__name__}")
                if kind is Ping or kind is Pong or kind is Goodbye or kind is Hello:
                    self._own(message, now)
                else:
                    received.append(message)
        return received

    def _greet(self, message: Message, now: float) -> None:
        if isinstance(message, Goodbye):
            self.taken_by, self.is_copy = message.taken_by, message.is_copy
            raise Refused(f"does not take us in: {message.reason}")
        if not isinstance(message, Hello):
            raise ProtocolError(f"the first message must be Hello, not {type(message).__name__}")
        node = message.node
        version = common_version(message.version)
        if message.cluster != self._cluster:
            raise Refused(f"belongs to the cluster {message.cluster!r}, we to {self._cluster!r}")
        if node.node_id != self.certified_id or not frozenset(node.roles) <= self.certified_roles:
            raise Refused(f"says it is node {node.node_id}, and its certificate says {self.certified_id}")
        if node.store_id == self._node.store_id and node.boot == self._node.boot:
            raise Refused("is this node itself")
        if node.store_id == self._node.store_id:
            self.taken_by, self.is_copy = node.name, True
            raise Refused("runs from a copy of our own disk: stop one of us")
        if node.node_id == self._node.node_id:
            self.taken_by = node.name
            raise Refused(f"has our node id {node.node_id} and another store: give one of us another --node-id")
        self.peer = node
        self.encode = encoder(version)
        self.state = State.OPEN
        self._ping(now)

    def _own(self, message: Message, now: float) -> None:
        if isinstance(message, Ping):
            self._outgoing.append(encode(Pong(message.number, self._utc())))
            self._spare_ping(now)
        elif isinstance(message, Pong):
            self._on_pong(message, now)
        elif isinstance(message, Goodbye):
            self.goodbye = message.reason
            self.taken_by, self.is_copy = message.taken_by, message.is_copy
            self.state = State.CLOSED
        else:
            raise ProtocolError("a second Hello")

    def _spare_ping(self, now: float) -> None:
        """We have been asked: the answer shows that we live as well as a ping of our own. One of two nodes makes use of
        that, or both would. It asks all the same when the other one is late, and now and then for the round trip."""
        assert self.peer is not None
        if self._node.node_id > self.peer.node_id and now < self._pinged + MEASURE_HEARTBEATS * self._heartbeat_s:
            self._ping_due = max(self._ping_due, now + LATE_HEARTBEATS * self._heartbeat_s)

    def _on_pong(self, message: Pong, now: float) -> None:
        if message.number <= self._ping_number:
            self.answered = max(self.answered, message.number)
        if self._ping_sent is None or message.number != self._ping_sent[0]:
            return
        _, sent, sent_utc = self._ping_sent
        self._ping_sent = None
        round_trip_s = now - sent
        # The peer read its clock somewhere between: half-way is the best guess (RFC 5905, without its filters).
        self._round_trips.append((round_trip_s, message.sent_s - (sent_utc + round_trip_s / 2)))
        del self._round_trips[:-ROUND_TRIPS_KEPT]
        self.round_trip_s, self.clock_offset_s = min(self._round_trips)

    def _ping(self, now: float) -> None:
        self._ping_number += 1
        self._pinged = now
        sent_utc = self._utc()
        if self._ping_sent is None or now - self._ping_sent[1] > self._timeout_s:
            self._ping_sent = (self._ping_number, now, sent_utc)
        self._outgoing.append(encode(Ping(self._ping_number, sent_utc)))
        self._ping_due = now + self._heartbeat_s

    def probe(self, now: float) -> int:
        """Ask the peer at once whether it lives: `answered` reaches the number that is returned when it does."""
        self._ping(now)
        return self._ping_number

    def next_deadline(self) -> float:
        """When on_deadline has something to do."""
        if self.state is State.GREETING:
            return self._hello_due
        return min(self._ping_due, self._heard + self._timeout_s)

    def on_deadline(self, now: float) -> None:
        """Send a heartbeat, or give the peer up. Raises ProtocolError when it has been silent for too long."""
        if self.state is State.GREETING and now >= self._hello_due:
            raise ProtocolError(f"no hello within {HELLO_TIMEOUT_S:g} s")
        if self.state is State.OPEN:
            if now >= self._heard + self._timeout_s:
                raise ProtocolError(f"silent for {now - self._heard:.1f} s")
            if now >= self._ping_due:
                self._ping(now)
