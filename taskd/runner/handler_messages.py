"""What the pool and a handler process say to each other. Both run the same code, so there are no versions.

Two sockets join them. On the *stream*, frames of a four-byte length and msgpack go down as Setup, then lists of Call,
and come up as Ready, then lists of Done; the pool's end of file means "finish what you have, then leave". On the
*control* socket each packet is one message, and is answered even while a call runs. What a process has done and not yet
said is in memory that both share (handler_page.py).

Calls are numbered from 1 as they are sent to a process, and begun in that order.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from msgspec import Struct

from taskd.handler import Current
from taskd.protocol.messages import AttemptKey, HandlerInfo

HEAD_BYTES = 4  # Before each frame: the length of its body, big-endian.
PACKET_BYTES_MAX = 4096  # Of the control socket.
FRAME_BYTES_MAX = 64 << 20  # The handlers of 1,000 modules, or a page of results, take a tenth of it.


class Setup(Struct, array_like=True, frozen=True):
    """The first word to a process: what to load, from where, and when it is worn out."""

    modules: tuple[str, ...]
    path: tuple[str, ...]
    skipped: tuple[str, ...]  # Steps of loading that took earlier processes down.
    calls_max: int
    memory_bytes_max: int  # 0: no limit
    start_share_max: float  # It is not replaced for its calls while starting took more than this share of its life.


class Ready(Struct, array_like=True, frozen=True):
    """The first word of a process: what it can run, and what could not be loaded, in words."""

    handlers: tuple[HandlerInfo, ...]
    problems: tuple[str, ...]


class Call(Struct, array_like=True, frozen=True, gc=False):
    """One call to make."""

    number: int
    type: str
    params: bytes
    key: AttemptKey
    env: dict[str, str]
    cwd: str
    secrets: dict[str, str]

    def current(self) -> Current:
        """What the handler may know of it."""
        return Current(self.key.task_text, self.key.number, self.key.fence)


class Done(Struct, array_like=True, frozen=True, gc=False):
    """How a call ended. `outcome` is a core.task.Outcome, `report` the msgpack of a core.task.Report."""

    number: int
    outcome: int
    started_s: float
    ended_s: float
    report: bytes


class Control(Struct, array_like=True, frozen=True, tag=str.lower):
    """A message on the control socket."""


class TakeBack(Control, frozen=True):
    """Give back every call up to number `last` that has not begun, also those that are still on their way."""

    last: int


class Terminate(Control, frozen=True):
    """End this call if it runs: an async one is cancelled, any other by an exception that ends the process too. If it
    has not begun, drop it."""

    number: int


class Taken(Control, frozen=True):
    """The answer to TakeBack: from `first` to `last` no call has begun, or ever will here."""

    first: int
    last: int


class Dropped(Control, frozen=True):
    """The answer to Terminate for a call that had not begun, and never will."""

    number: int


class Tired(Control, frozen=True):
    """The process is worn out: replace it; at once where it takes too much memory."""

    is_urgent: bool


ToProcess = TakeBack | Terminate
ToPool = Taken | Dropped | Tired

encode = msgspec.msgpack.Encoder().encode
decode_setup = msgspec.msgpack.Decoder(Setup).decode
decode_ready = msgspec.msgpack.Decoder(Ready).decode
decode_calls = msgspec.msgpack.Decoder(list[Call]).decode
decode_done = msgspec.msgpack.Decoder(list[Done]).decode
decode_to_process: msgspec.msgpack.Decoder[TakeBack | Terminate] = msgspec.msgpack.Decoder(ToProcess)
decode_to_pool: msgspec.msgpack.Decoder[Taken | Dropped | Tired] = msgspec.msgpack.Decoder(ToPool)


def framed(body: bytes) -> bytes:
    """A body with its length before it."""
    return len(body).to_bytes(HEAD_BYTES, "big") + body


class Frames:
    """Bytes in, whole frames out."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies that are complete with these bytes. Raises ValueError for an impossible length."""
        rest = self._rest
        rest += data
        start, size = 0, len(rest)
        try:
            while size - start >= HEAD_BYTES:
                stop = start + HEAD_BYTES + int.from_bytes(rest[start : start + HEAD_BYTES], "big")
                if stop - start > FRAME_BYTES_MAX:
                    raise ValueError(f"a frame of {stop - start} bytes")
                if stop > size:
                    break
                body = bytes(rest[start + HEAD_BYTES : stop])
                start = stop
                yield body
        finally:
            del rest[:start]
