"""The daemon's end of a socket to its store's process: requests go out in order, answers come back in order."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable

from msgspec import Struct

from taskd.errors import Overloaded, StoreError
from taskd.store import wire

RECEIVE_BYTES = 1 << 18
WAITING_MAX = 1000  # Requests not answered yet: far more than people ask, so more of them are refused.


class Channel:
    """Asks on a connected, non-blocking socket. Belongs to the loop on which it is first used."""

    def __init__(self, stream: socket.socket, why_ended: Callable[[], str]) -> None:
        """`why_ended` says in words why the other end closed the socket."""
        self._socket = stream
        self._why_ended = why_ended
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: deque[asyncio.Future[wire.Answer]] = deque()
        self._outgoing: deque[memoryview] = deque()
        self._incoming = bytearray()
        self._ended = ""  # why, once it has

    async def ask(self, request: Struct) -> wire.Answer:
        """The answer. Raises StoreError where the request could not be said or met, or the other end is gone;
        Overloaded."""
        if self._ended:
            raise StoreError(self._ended)
        if len(self._waiting) >= WAITING_MAX:
            raise Overloaded()
        try:
            data = memoryview(wire.frame(request))
        except (TypeError, ValueError, OverflowError) as error:  # A value that is in no message.
            raise StoreError(f"a request to the database cannot be made: {error}") from error
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._socket, self._on_readable)
        future: asyncio.Future[wire.Answer] = self._loop.create_future()
        self._waiting.append(future)
        self._send(data)
        answer = await future
        if isinstance(answer, wire.Failed):
            raise StoreError(answer.reason)
        return answer

    def _send(self, data: memoryview) -> None:
        assert self._loop is not None
        if not self._outgoing:
            try:
                data = data[self._socket.send(data) :]
            except BlockingIOError:
                pass
            except OSError:
                self._end(self._why_ended())
                return
            if not data:
                return
            self._loop.add_writer(self._socket, self._on_writable)
        self._outgoing.append(data)

    def _on_writable(self) -> None:
        assert self._loop is not None
        try:
            while self._outgoing:
                data = self._outgoing[0]
                sent = self._socket.send(data)
                if sent < len(data):
                    self._outgoing[0] = data[sent:]
                else:
                    self._outgoing.popleft()
        except BlockingIOError:
            return
        except OSError:
            self._end(self._why_ended())
            return
        self._loop.remove_writer(self._socket)

    def _on_readable(self) -> None:
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._incoming += data
            self._take_answers()
        else:
            self._end(self._why_ended())

    def _take_answers(self) -> None:
        incoming, start = self._incoming, 0
        while len(incoming) - start >= wire.LENGTH.size:
            (length,) = wire.LENGTH.unpack_from(incoming, start)
            end = start + wire.LENGTH.size + length
            if len(incoming) < end:
                break
            with memoryview(incoming) as view:
                answer = wire.decode_answer(view[start + wire.LENGTH.size : end])
            future = self._waiting.popleft()
            if not future.done():  # Whoever asked may have been cancelled.
                future.set_result(answer)
            start = end
        del incoming[:start]

    def _end(self, reason: str) -> None:
        """Nothing is answered any more."""
        if self._ended:
            return
        self._ended = reason
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
        self._socket.close()
        for future in self._waiting:
            if not future.done():
                future.set_exception(StoreError(reason))
        self._waiting.clear()
        self._outgoing.clear()

    def close(self) -> None:
        """Ask nothing any more; whoever waits gets a StoreError."""
        self._end("the database is closed")
