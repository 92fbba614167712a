"""Calls to a daemon over its Unix socket or HTTPS for asyncio: connections are kept, and made anew when they break."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from taskd.client.call import (
    ANSWER_S,
    CALLS_MAX,
    CLOSED,
    ENDLESS,
    ERROR_BYTES_MAX,
    FINISH_S,
    IDLE_MAX,
    TIMEOUT_S,
    Call,
    Deadline,
    Patience,
    error_from,
    is_worth_repeating,
    trouble_connecting,
)
from taskd.client.errors import ApiError, ConnectionLost, NoDaemon, ProtocolError
from taskd.client.http1 import READ_BYTES, ResponseReader, encode_request
from taskd.client.transport import connect_s, find_daemon

if TYPE_CHECKING:
    from taskd.client.remote import Remote

Answer = TypeVar("Answer")


class Connection:
    """One connection, used by one call at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        """Send everything. A daemon that refuses a body may stop reading it: its answer says why."""
        self._writer.write(data)
        with suppress(BrokenPipeError, ConnectionResetError):
            await self._writer.drain()

    async def receive(self, response: ResponseReader) -> list[bytes]:
        """Wait for bytes and read them. Raises ConnectionLost, ProtocolError."""
        try:
            data = await self._reader.read(READ_BYTES)
        except OSError as error:
            raise ConnectionLost() from error
        return response.feed(data)

    def close(self) -> None:
        """Let go of it, at once."""
        self._writer.transport.abort()


class AsyncStream:
    """An answer whose body is read as it comes. Close it, or read it to its end."""

    def __init__(
        self,
        connection: Connection,
        response: ResponseReader,
        parts: list[bytes],
        release: Callable[[Connection], None],
    ) -> None:
        self._connection: Connection | None = connection
        self._response = response
        self._parts = deque(parts)
        self._release = release
        self._is_cut_off = False
        self._settle()

    async def read(self) -> bytes:
        """The next part of the body; empty at its end. Raises ConnectionLost, and ValueError where the client was
        closed before the end."""
        while not self._parts:
            if self._is_cut_off:
                raise ValueError(CLOSED)
            if self._connection is None:
                return b""
            try:
                self._parts.extend(await self._connection.receive(self._response))
            except BaseException as error:
                self.close()
                if self._is_cut_off and isinstance(error, ConnectionLost):
                    raise ValueError(CLOSED) from None
                raise
            self._settle()
        return self._parts.popleft()

    async def read_all(self, timeout_s: float | None) -> bytes:
        """The whole body. Raises TimeoutError after a silence of `timeout_s`."""
        parts: list[bytes] = []
        while True:
            async with asyncio.timeout(timeout_s):
                part = await self.read()
            if not part:
                return parts[0] if len(parts) == 1 else b"".join(parts)
            parts.append(part)

    async def finish(self) -> None:
        """Stop reading an answer that has nothing more to say. Where it ends at once, its connection is kept."""
        try:
            async with asyncio.timeout(FINISH_S):
                while await self.read():
                    pass
        except (TimeoutError, NoDaemon, ProtocolError, ValueError):
            self.close()

    def close(self) -> None:
        """Stop reading. What has been received stays readable."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def cut_off(self) -> None:
        """Stop reading: the client is closed."""
        self._is_cut_off = self._connection is not None
        self.close()

    def _settle(self) -> None:
        if self._response.is_complete and self._connection is not None:
            connection, self._connection = self._connection, None
            if self._response.is_reusable:
                self._release(connection)
            else:
                connection.close()


class AsyncTransport:
    """Sends calls to one daemon, from one event loop. See Transport for the arguments."""

    def __init__(self, socket_path: str | None = None, *, access: str | None = None, patience_s: float = 0.0) -> None:
        self._told_path = socket_path
        self._access = access
        self._remote: Remote | None = None
        self._path: str | None = None
        self.patience_s = patience_s
        self._has_answered = False
        self._idle: list[Connection] = []
        self._streams: weakref.WeakSet[AsyncStream] = weakref.WeakSet()
        self._turns = asyncio.Semaphore(CALLS_MAX)  # Not of streams, which may last: they would keep calls out.
        self._is_closed = False

    @property
    def path(self) -> str:
        """The socket or the URL in use. Raises NoDaemon, ConfigError."""
        if self._path is None:
            self._path, self._remote = find_daemon(self._told_path, self._access)
        return self._path

    async def request(self, call: Call, deadline: Deadline = ENDLESS) -> bytes:
        """The whole body of the answer. Raises ApiError, NoDaemon, ConnectionLost, ProtocolError; TimeoutError where
        the deadline passes, which all attempts have in common."""

        async def attempt(call: Call) -> bytes:
            async with asyncio.timeout(deadline.silence_s(ANSWER_S)):
                await self._turns.acquire()
            try:
                return await self._read_all(deadline.bounded(call))
            finally:
                self._turns.release()

        return await self._with_patience(call, deadline, attempt)

    async def _read_all(self, call: Call) -> bytes:
        stream = await self._open(call)
        try:
            return await stream.read_all(call.timeout_s)
        finally:
            stream.close()

    async def open(self, call: Call, deadline: Deadline = ENDLESS) -> AsyncStream:
        """The answer as a stream, once its head is there. Raises as `request` does."""
        return await self._with_patience(call, deadline, self._open)

    def close(self) -> None:
        """Let go of all connections, those of open streams included. Calls from now on raise ValueError."""
        self._is_closed = True
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
        for stream in list(self._streams):
            stream.cut_off()

    async def _with_patience(
        self, call: Call, deadline: Deadline, attempt: Callable[[Call], Awaitable[Answer]]
    ) -> Answer:
        patience = Patience(self.patience_s)
        while True:
            try:
                return await attempt(deadline.bounded(call))
            except TimeoutError:
                deadline.left_s()  # Raises, where it was not the daemon's own time that is up.
                raise NoDaemon(
                    f"the daemon at {self.path} has not answered within {call.timeout_s or TIMEOUT_S:g} s"
                ) from None
            except (ApiError, NoDaemon) as error:
                if not is_worth_repeating(error, call.is_repeatable, self._has_answered):
                    raise
                delay_s = patience.next_delay_s(time.monotonic())
                if delay_s is None:
                    raise
            await asyncio.sleep(deadline.pause_s(delay_s))

    async def _open(self, call: Call) -> AsyncStream:
        if self._is_closed:
            raise ValueError(CLOSED)
        if call.is_repeatable:
            # A kept connection may have ended meanwhile without our seeing it: that costs nothing but the next one.
            while self._idle:
                try:
                    return await self._exchange(self._idle.pop(), call)
                except ConnectionLost:
                    continue
        return await self._exchange(await self._connect(connect_s(call)), call)

    async def _exchange(self, connection: Connection, call: Call) -> AsyncStream:
        """Send a call and read the head of its answer."""
        response = ResponseReader()
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(call.timeout_s):
                header = "" if self._remote is None else self._remote.header
                await connection.send(encode_request(call.method, call.target, call.body, header))
                while not response.status:
                    parts += await connection.receive(response)
        except BaseException:
            connection.close()
            raise
        self._has_answered = True
        stream = AsyncStream(connection, response, parts, self._keep)
        self._streams.add(stream)
        if self._is_closed:  # Meanwhile.
            stream.cut_off()
        if response.status >= 400:
            try:
                raise error_from(response.status, await _start_of(stream, call.timeout_s))
            finally:
                stream.close()
        return stream

    async def _connect(self, timeout_s: float) -> Connection:
        path = self.path
        if self._remote is not None:
            return await _connect_to(self._remote, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                return Connection(*await asyncio.open_unix_connection(path))
        except TimeoutError:
            raise
        except OSError as error:
            missing = NoDaemon(f"no daemon answers on {path} any more ({error.strerror or error})")
            raise trouble_connecting(error, missing) from None

    def _keep(self, connection: Connection) -> None:
        is_wanted = len(self._idle) < IDLE_MAX or self._turns.locked()  # Somebody waits for it perhaps.
        if self._is_closed or not is_wanted:
            connection.close()
        else:
            self._idle.append(connection)


async def _connect_to(remote: Remote, timeout_s: float) -> Connection:
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(
                remote.host, remote.port, ssl=remote.context, server_hostname=remote.host
            )
    except TimeoutError:
        raise
    except OSError as error:
        raise remote.missing(error) from None
    connection = Connection(reader, writer)
    try:
        remote.check(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
    except BaseException:
        connection.close()
        raise
    return connection


async def _start_of(stream: AsyncStream, timeout_s: float | None) -> bytes:
    body = b""
    async with asyncio.timeout(timeout_s):
        while len(body) < ERROR_BYTES_MAX and (part := await stream.read()):
            body += part
    return body
