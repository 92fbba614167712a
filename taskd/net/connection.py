"""One TCP connection to a peer: banner, TLS, hello, then messages both ways, one write a turn of the event loop."""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import Protocol, cast

from taskd.errors import ProtocolError, Refused
from taskd.net.gate import source_of
from taskd.net.keyring import Ring, server_name
from taskd.protocol.messages import Goodbye, Message, NodeInfo
from taskd.protocol.session import Session, State

# Said in plain text before TLS begins, with the public fingerprints of the keys that are accepted after it: a client of
# something else is told apart, and on uvloop the first bytes of a handshake that came in before `start_tls` was called
# would be lost.
BANNER = b"taskd1 "
BANNER_BYTES_MAX = 64
HANDSHAKE_TIMEOUT_S = 5.0
CLOSE_S = 1.0
GOODBYE_CHARS_MAX = 1000
BUFFERED_BYTES_MAX = 64 << 20  # Towards a peer that reads slower than we send; beyond that it is given up.
BUFFERED_BYTES_HIGH = 1 << 20  # Where bodies of relayed calls begin to wait.


class Owner(Protocol):
    """What a connection tells of itself."""

    def connection_open(self, connection: Connection) -> None: ...
    def connection_received(self, connection: Connection, messages: list[Message]) -> None: ...
    def connection_lost(self, connection: Connection, reason: str, is_refusal: bool) -> None: ...


class Settings(Protocol):
    """What all connections of one node share."""

    node: NodeInfo
    cluster: str

    @property
    def ring(self) -> Ring: ...

    heartbeat_s: float
    peer_timeout_s: float


def monotonic() -> float:
    """Seconds on a clock that counts suspend: a laptop that wakes up knows that its peers have given it up."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Connection(asyncio.Protocol):
    """One connection, dialled by us or accepted."""

    def __init__(self, settings: Settings, owner: Owner, is_dialled: bool) -> None:
        self.is_dialled = is_dialled
        self.address = ""
        self.session: Session | None = None
        self.fingerprint = ""  # of the cluster key that the two have shown each other
        self.opened_at = 0.0
        self.bytes_in = self.bytes_out = 0
        self.heard_at = 0.0
        self.greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._settings = settings
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._early = bytearray()  # what came before the session could take it
        self._banner: asyncio.Future[tuple[str, ...]] = self._loop.create_future()
        self._is_encrypted = False
        self._frames: list[bytes] = []
        self._frames_bytes = 0
        self._flush_is_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._is_paused = False
        self._resumed: list[asyncio.Future[None]] = []
        self._reason: tuple[str, bool] | None = None

    @property
    def peer(self) -> NodeInfo | None:
        """Who is at the other end, once its hello was good."""
        return self.session.peer if self.session is not None else None

    @property
    def host(self) -> str:
        """The other end's address, without its port."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def source(self) -> str:
        """What its refusals are counted by: an address, or the node there where one has shown its certificate."""
        source = source_of(self.host)
        return f"{source} node {self.session.certified_id}" if self.session is not None else source

    @property
    def buffered_bytes(self) -> int:
        """Bytes that wait to be sent."""
        waiting = self._transport.get_write_buffer_size() if self._transport is not None else 0
        return waiting + self._frames_bytes

    # -- Opening -------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop: plain TCP is there."""
        if self._is_encrypted:
            return
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self.address = address_text(peer[0], peer[1]) if peer else "?"
        if not self.is_dialled:
            self._transport.pause_reading()  # Until TLS can take what comes.

    async def secure(self) -> None:
        """Exchange banner and TLS, and begin the session. Never raises: the owner hears of what goes wrong."""
        assert self._transport is not None
        if self._reason is not None:
            return
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                context, name = await self._greet_plainly(self._transport)
                if self._reason is not None:
                    return
                self._is_encrypted = True
                transport = await self._loop.start_tls(
                    self._transport, self, context, server_side=not self.is_dialled, server_hostname=name,
                    ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
                )  # fmt: skip
            tls = transport.get_extra_info("ssl_object") if transport is not None else None
            if transport is None or tls is None:  # On uvloop: it has gone in the very moment.
                raise Refused("broke off the handshake: perhaps it has another cluster key")
            self._transport = transport
            transport.set_write_buffer_limits(high=BUFFERED_BYTES_HIGH)
            credentials = self._settings.ring.of(tls.context)
            node_id, roles = credentials.identify(tls.getpeercert(True))
            self.fingerprint = credentials.fingerprint
        except TimeoutError:
            self.close("did not finish the handshake in time", is_refusal=True)
        except ssl.SSLError as error:
            self.close(_tls_words(error), is_refusal=True)
        except (ProtocolError, Refused) as error:
            self.close(error.message, is_refusal=True)
        except OSError:
            self.close("broke off the handshake: perhaps it has another cluster key", is_refusal=True)
        else:
            settings = self._settings
            self.session = Session(
                settings.node, settings.cluster, node_id, roles, now=monotonic(), utc=time.time,
                heartbeat_s=settings.heartbeat_s, timeout_s=settings.peer_timeout_s,
            )  # fmt: skip
            early, self._early = bytes(self._early), bytearray()
            self._receive(early)

    async def _greet_plainly(self, transport: asyncio.Transport) -> tuple[ssl.SSLContext, str | None]:
        """Say or hear which keys are accepted. Returns the context of the handshake, and what a client asks for in it.
        Raises Refused."""
        ring = self._settings.ring
        if self.is_dialled:
            credentials = ring.to_dial(await self._banner)
            return credentials.client, server_name(credentials)
        assert ring.current.server is not None
        transport.write(BANNER + ",".join(ring.fingerprints).encode() + b"\n")
        return ring.current.server, None

    # -- Receiving -----------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        self.bytes_in += len(data)
        if self.session is not None:
            self._receive(data)
            return
        self._early += data
        if not self._is_encrypted:
            self._receive_plain()
        elif len(self._early) > BUFFERED_BYTES_HIGH:
            self.close("sent too much before its hello", is_refusal=True)

    def _receive_plain(self) -> None:
        """Before TLS the banner is taken and nothing else: whoever sits on the line could have put in more, and it must
        never be read as if the peer had said it."""
        if not self.is_dialled or self._banner.done():
            self.close("does not wait for its turn, as a node of ours would", is_refusal=True)
        elif not (self._early.startswith(BANNER) or BANNER.startswith(self._early)):
            self.close("is no taskd scheduler", is_refusal=True)
        elif self._early.endswith(b"\n"):
            offered = self._early[len(BANNER) : -1].decode(errors="replace").split(",")
            self._early.clear()
            self._banner.set_result(tuple(offered))
        elif b"\n" in self._early or len(self._early) > BANNER_BYTES_MAX:
            self.close("does not wait for its turn, as a node of ours would", is_refusal=True)

    def _receive(self, data: bytes) -> None:
        session = self.session
        assert session is not None
        was_open = session.state is State.OPEN
        self.heard_at = monotonic()
        try:
            messages = session.receive(data, self.heard_at) if data else []
        except (ProtocolError, Refused) as error:
            # The peer has shown a key of this cluster: it may know why.
            self._queue(session.encode(Goodbye(f"refused: {error.message}"[:GOODBYE_CHARS_MAX])))
            self._flush()
            self.close(error.message, is_refusal=True)
            return
        if session.rest_s > 0:
            self._rest(session.rest_s)
        self._send_own()
        if not was_open and session.peer is not None:
            self.opened_at = self.heard_at = monotonic()
            if not self.greeted.done():
                self.greeted.set_result(None)
            self._owner.connection_open(self)
        if messages and self._reason is None:
            self._owner.connection_received(self, messages)
        if session.goodbye is not None:
            self.close(session.goodbye)

    def _rest(self, rest_s: float) -> None:
        """Read no more for a while: a torrent of one peer is not to take the time of the others."""
        transport = self._transport
        if transport is not None and transport.is_reading():
            transport.pause_reading()
            self._loop.call_later(rest_s, self._read_on)

    def _read_on(self) -> None:
        if self._reason is None and self._transport is not None:
            self._transport.resume_reading()

    def _send_own(self) -> None:
        assert self.session is not None
        for frame in self.session.to_send():
            self._queue(frame)
        self._set_timer()

    def _set_timer(self) -> None:
        assert self.session is not None
        if self._reason is not None:
            return
        due = self.session.next_deadline()
        if self._timer is not None:
            if due >= self._timer_at:
                return  # It looks again when it fires: to move it with every message would cost more.
            self._timer.cancel()
        self._timer_at = due
        self._timer = self._loop.call_later(max(0.0, due - monotonic()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        assert self.session is not None
        try:
            self.session.on_deadline(monotonic())
        except ProtocolError as error:
            self.close(error.message)
            return
        self._send_own()

    # -- Sending -------------------------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Send with everything else of this turn."""
        if self._reason is None:
            assert self.session is not None
            self._queue(self.session.encode(message))

    def probe(self) -> int:
        """Ask the peer whether it lives; the session's `answered` reaches the number that is returned when it does."""
        assert self.session is not None
        number = self.session.probe(monotonic())
        self._send_own()
        return number

    def _queue(self, frame: bytes) -> None:
        self._frames.append(frame)
        self._frames_bytes += len(frame)
        if not self._flush_is_due:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        if not self._frames or self._transport is None or self._reason is not None:
            return
        frames, self._frames, self._frames_bytes = self._frames, [], 0
        data = frames[0] if len(frames) == 1 else b"".join(frames)
        self.bytes_out += len(data)
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > BUFFERED_BYTES_MAX:
            self.close("reads slower than we send")

    def pause_writing(self) -> None:
        """Called by the loop: much waits to be sent."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """Called by the loop: little waits to be sent."""
        self._is_paused = False
        for waiter in self._resumed:
            if not waiter.done():
                waiter.set_result(None)
        self._resumed.clear()

    async def drained(self) -> None:
        """Wait until little waits to be sent, or the connection is gone."""
        if self._is_paused and self._reason is None:
            waiter = self._loop.create_future()
            self._resumed.append(waiter)
            await waiter

    # -- Closing -------------------------------------------------------------------------------------------------------

    def goodbye(self, reason: str, taken_by: str = "", *, is_copy: bool = False) -> None:
        """Tell the peer that we close, and do. `taken_by`: who else has its node id; `is_copy`: and its disk."""
        if self.session is not None and self.session.state is State.OPEN and self._reason is None:
            self._queue(self.session.encode(Goodbye(reason, taken_by, is_copy)))
            self._flush()
        self.close(reason)

    def close(self, reason: str, is_refusal: bool = False) -> None:
        """Close at once; the owner hears of it once, with the first reason."""
        if self._reason is not None:
            return
        self._reason = (reason, is_refusal)
        if self._timer is not None:
            self._timer.cancel()
        self._give_up_banner(reason)
        self.resume_writing()
        if self._transport is not None:
            if self.session is None:
                self._transport.abort()  # Nothing was promised to a stranger.
            else:
                self._transport.close()
                # Against a peer that does not read: what is not gone soon never goes.
                self._loop.call_later(CLOSE_S, self._transport.abort)
        self._owner.connection_lost(self, reason, is_refusal)
        if not self.ended.done():
            self.ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the loop."""
        self._give_up_banner("closed the connection")
        self.close(str(error) if error else "the connection was closed")

    def _give_up_banner(self, reason: str) -> None:
        if not self._banner.done():
            self._banner.set_exception(Refused(reason))
            self._banner.exception()  # Perhaps nobody waits for it.


def _tls_words(error: ssl.SSLError) -> str:
    """What a failed handshake means."""
    reason = error.reason or str(error)
    words: dict[str, str] = {
        "CERTIFICATE_VERIFY_FAILED": "has another cluster key",
        "PEER_DID_NOT_RETURN_A_CERTIFICATE": "shows no certificate",
        "TLSV1_ALERT_UNKNOWN_CA": "does not accept our cluster key",
        "TLSV13_ALERT_CERTIFICATE_REQUIRED": "wants a certificate",
        "UNSUPPORTED_PROTOCOL": "does not speak TLS 1.3",
        "WRONG_VERSION_NUMBER": "does not speak TLS",
        "CALLBACK_FAILED": "asks for a cluster key that is not ours",
        "HTTP_REQUEST": "speaks HTTP and not TLS",
    }
    return words.get(reason, f"failed the TLS handshake ({reason})")


def plain_host(host: str) -> str:
    """An address as it is, without the form that IPv4 takes on an IPv6 socket."""
    return host.removeprefix("::ffff:")


def address_text(host: str, port: int) -> str:
    """As it is written in settings."""
    host = plain_host(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
