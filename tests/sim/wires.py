"""Ends of connections that play every byte: real sessions, real frames, heartbeats, and cuts anywhere in a frame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from taskd.errors import ProtocolError, Refused
from taskd.protocol import messages as msg
from taskd.protocol.frames import encode
from taskd.protocol.session import Session, State
from tests.sim.engine import Engine
from tests.sim.network import HEARTBEAT_S, SILENCE_S, End

if TYPE_CHECKING:
    from tests.sim.peers import Peers

TIMER_S = 0.0001  # By which a timer is late: clocks of different origins are rounded differently.


class WireEnd(End):
    """One node's end of a connection, payloads being bytes."""

    def __init__(self, engine: Engine, peers: Peers, is_dialled: bool) -> None:
        super().__init__(engine, peers, is_dialled)
        self._session: Session
        self._heard_at = engine.now
        self._timer_at = float("inf")
        self._has_come_in = False

    def begin(self) -> None:
        """The connection is made: say who we are."""
        host, theirs = self.peers.host, self.other.peers.host.info
        self._session = Session(
            host.info, "sim", theirs.node_id, theirs.roles, now=host.monotonic(), utc=host.utc,
            heartbeat_s=HEARTBEAT_S, timeout_s=SILENCE_S,
        )  # fmt: skip
        self._send_own()

    # -- In ----------------------------------------------------------------------------------------------------------

    def arrived(self, payload: Any) -> None:
        """Bytes, or None: the other side has closed."""
        if not self.is_open:
            return
        if payload is None:
            self.close("the connection was closed", tells_other=False)
            return
        data: bytes = payload
        random = self._engine.random
        cuts = sorted(random.randint(0, len(data)) for _ in range(random.choice((0, 0, 1, 3))))
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            if start < end and self.is_open:
                self._feed(data[start:end])

    def _feed(self, data: bytes) -> None:
        self._heard_at = self._engine.now
        try:
            received = self._session.receive(data, self.peers.host.monotonic())
        except (ProtocolError, Refused) as error:
            self.pipe.write(encode(msg.Goodbye(f"refused: {error.message}")))
            self.close(error.message)
            return
        self._send_own()
        if self._session.peer is not None and not self._has_come_in:
            self._has_come_in = True
            self.peer = self._session.peer
            self.peers.connection_open(self)
        if received and self.is_open:
            self.peers.connection_received(self, tuple(received))
        if self._session.goodbye is not None:
            self.close(self._session.goodbye, tells_other=False, is_orderly=True)

    def torn(self, payload: Any) -> Any:
        """What is left of a packet where its connection broke in the middle of it."""
        return payload if payload is None else payload[: self._engine.random.randint(1, len(payload))]

    def heard_ago_s(self) -> float:
        """How long ago something came."""
        return self._engine.now - self._heard_at

    def expect_silence(self, is_silent: Any, *arguments: Any) -> None:
        """The session finds out by itself."""

    # -- Out ---------------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """The turn is over."""
        if self._queue and self.is_open:
            self.pipe.write(b"".join(map(encode, self._queue)))
        self._queue.clear()

    def goodbye(self, reason: str) -> None:
        """Tell the peer that we close, and do."""
        if self.is_open:
            self.flush()
            if self._session.state is State.OPEN:
                self.pipe.write(encode(msg.Goodbye(reason)))
            self.close(reason)

    def _send_own(self) -> None:
        frames = self._session.to_send()
        if frames:
            self.pipe.write(b"".join(frames))
        self._set_timer()

    def _set_timer(self) -> None:
        due = self._session.next_deadline() - self.peers.host.base_s
        if due < self._timer_at:
            self._timer_at = due
            self._engine.at(max(due, self._engine.now) + TIMER_S, self.peers.host.hear, self._on_timer)

    def _on_timer(self) -> None:
        self._timer_at = float("inf")
        if not self.is_open:
            return
        try:
            self._session.on_deadline(self.peers.host.monotonic())
        except ProtocolError as error:
            self.close(error.message)
            return
        self._send_own()
