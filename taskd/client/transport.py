"""Calls to a daemon over its Unix socket or HTTPS, blocking: connections are kept, shared by threads, and made anew."""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from taskd.client.call import (
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
from taskd.client.errors import ApiError, ConnectionLost, NoDaemon, ProtocolError, TaskdError
from taskd.client.http1 import READ_BYTES, ResponseReader, encode_request
from taskd.paths import find_access, find_socket

if TYPE_CHECKING:
    from taskd.client.remote import Remote

Answer = TypeVar("Answer")


Release = Callable[[socket.socket], None]


class Stream:
    """An answer whose body is read as it comes. Close it, or read it to its end."""

    def __init__(self, connection: socket.socket, reader: ResponseReader, parts: list[bytes], release: Release) -> None:
        self._connection: socket.socket | None = connection
        self._reader = reader
        self._parts = deque(parts)
        self._release = release
        self._lock = threading.Lock()  # of the two that follow: one thread may read while another closes the client
        self._is_reading = False
        self._is_cut_off = False
        self._settle()

    @property
    def has_data(self) -> bool:
        """Whether `read` would return at once: it has data, or has come to its end."""
        if self._parts or self._connection is None:
            return True
        pending = getattr(self._connection, "pending", None)  # What TLS has read already: no poll tells of it.
        return pending is not None and pending() > 0

    def fileno(self) -> int:
        """For select and poll; only of use while `has_data` is false."""
        connection = self._connection
        if connection is None:
            raise ValueError(CLOSED)
        return connection.fileno()

    def read(self, timeout_s: float | None = None) -> bytes:
        """The next part of the body; empty at its end. Raises TimeoutError after `timeout_s` without one,
        ConnectionLost, and ValueError where the client was closed before the end."""
        while not self._parts:
            connection = self._begin_to_read()
            if connection is None:
                return b""
            try:
                self._parts.extend(_receive(connection, self._reader, timeout_s))
            except TimeoutError:
                raise
            except BaseException as error:
                self.close()
                if self._is_cut_off and isinstance(error, ConnectionLost):
                    raise ValueError(CLOSED) from None
                raise
            finally:
                self._end_to_read()
            self._settle()
        return self._parts.popleft()

    def read_all(self, timeout_s: float | None) -> bytes:
        """The whole body."""
        parts = []
        while part := self.read(timeout_s):
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def finish(self) -> None:
        """Stop reading an answer that has nothing more to say. Where it ends at once, its connection is kept."""
        try:
            while self.read(FINISH_S):
                pass
        except (TimeoutError, NoDaemon, ProtocolError, ValueError):
            self.close()

    def close(self) -> None:
        """Stop reading. What has been received stays readable."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def cut_off(self) -> None:
        """Stop reading, also where another thread reads just now: the client is closed."""
        with self._lock:
            connection = self._connection
            if connection is None:
                return
            self._is_cut_off = True
            with suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)  # Wakes who reads. TLS's own would get in its way.
            if not self._is_reading:  # Else a new connection could get the number that is being read from.
                self.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()  # An iterator over results that was never begun has nobody else to do it.

    def _begin_to_read(self) -> socket.socket | None:
        """What to read from; None at the end of the body. Raises ValueError where the client is closed."""
        with self._lock:
            if self._is_cut_off and not (self._reader.is_complete and self._reader.is_reusable):
                raise ValueError(CLOSED)  # A body that ends with its connection is not known to be whole.
            self._is_reading = self._connection is not None
            return self._connection

    def _end_to_read(self) -> None:
        with self._lock:
            self._is_reading = False
            if self._is_cut_off:
                self.close()

    def _settle(self) -> None:
        if self._reader.is_complete and self._connection is not None:
            connection, self._connection = self._connection, None
            if self._reader.is_reusable:
                self._release(connection)
            else:
                connection.close()


class Transport:
    """Sends calls to one daemon. Any number of threads may use it at once.

    `socket_path`: which daemon; None for the one that is found. `access`: the file that leads to one on another
    machine, in the place of a socket. `patience_s`: how long to go on trying when a daemon
    that has answered before goes away, or nobody leads; only for calls that may be repeated. `on_trouble` hears of
    every such delay.
    """

    def __init__(
        self,
        socket_path: str | None = None,
        *,
        access: str | None = None,
        patience_s: float = 0.0,
        on_trouble: Callable[[TaskdError], None] | None = None,
    ) -> None:
        self._told_path = socket_path
        self._access = access
        self._remote: Remote | None = None
        self._path: str | None = None
        self.patience_s = patience_s
        self.on_trouble = on_trouble
        self._has_answered = False
        self._lock = threading.RLock()  # One that a signal's handler may take again: it may want to cancel something.
        self._idle: list[socket.socket] = []
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._pid = os.getpid()
        self._is_closed = False

    @property
    def path(self) -> str:
        """The socket or the URL in use. Raises NoDaemon, ConfigError."""
        if self._path is None:
            self._path, self._remote = find_daemon(self._told_path, self._access)
        return self._path

    @property
    def is_remote(self) -> bool:
        """Whether the daemon is one on another machine, named by an access file."""
        return find_access(self._access, self._told_path) is not None

    def request(self, call: Call, deadline: Deadline = ENDLESS) -> bytes:
        """The whole body of the answer. Raises ApiError, NoDaemon, ConnectionLost, ProtocolError; TimeoutError where
        the deadline passes, which all attempts have in common."""
        return self._with_patience(call, deadline, lambda call: self._open(call).read_all(call.timeout_s))

    def open(self, call: Call, deadline: Deadline = ENDLESS) -> Stream:
        """The answer as a stream, once its head is there. Raises as `request` does."""
        return self._with_patience(call, deadline, self._open)

    def close(self) -> None:
        """Let go of all connections, those of open streams included. Calls from now on raise ValueError."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
            streams = list(self._streams)
        for connection in idle:
            connection.close()
        for stream in streams:
            stream.cut_off()

    def __enter__(self) -> Transport:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _with_patience(self, call: Call, deadline: Deadline, attempt: Callable[[Call], Answer]) -> Answer:
        patience = Patience(self.patience_s)
        while True:
            try:
                return attempt(deadline.bounded(call))
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
                if self.on_trouble is not None:
                    self.on_trouble(error)
                time.sleep(deadline.pause_s(delay_s))

    def _open(self, call: Call) -> Stream:
        if self._is_closed:
            raise ValueError(CLOSED)
        if call.is_repeatable:
            # A kept connection may have ended meanwhile without our seeing it: that costs nothing but the next one.
            while (kept := self._take()) is not None:
                try:
                    return self._exchange(kept, call)
                except ConnectionLost:
                    continue
        return self._exchange(self._connect(connect_s(call)), call)

    def _exchange(self, connection: socket.socket, call: Call) -> Stream:
        """Send a call and read the head of its answer."""
        try:
            connection.settimeout(call.timeout_s)
            reader = ResponseReader()
            parts: list[bytes] = []
            header = "" if self._remote is None else self._remote.header
            try:
                connection.sendall(encode_request(call.method, call.target, call.body, header))
            except TimeoutError:
                raise
            except OSError:
                pass  # A daemon that refuses a body may stop reading it: its answer says why.
            while not reader.status:
                parts += _receive(connection, reader, call.timeout_s)
        except BaseException:
            connection.close()
            raise
        self._has_answered = True
        stream = Stream(connection, reader, parts, self._keep)
        with self._lock:
            self._streams.add(stream)
            is_closed = self._is_closed
        if is_closed:  # Meanwhile.
            stream.cut_off()
        if reader.status >= 400:
            with stream:
                raise error_from(reader.status, _start_of(stream, call.timeout_s))
        return stream

    def _connect(self, timeout_s: float) -> socket.socket:
        path = self.path
        if self._remote is not None:
            return self._remote.connect(timeout_s)
        try:
            connection = socket.socket(socket.AF_UNIX)
        except OSError as error:
            raise trouble_connecting(error, NoDaemon(f"no socket can be made ({error.strerror})")) from None
        try:
            connection.settimeout(timeout_s)
            connection.connect(path)
        except TimeoutError:
            connection.close()
            raise
        except OSError as error:
            connection.close()
            raise NoDaemon(f"no daemon answers on {path} any more ({error.strerror or error})") from None
        except BaseException:
            connection.close()
            raise
        return connection

    def _take(self) -> socket.socket | None:
        with self._lock:
            if self._pid != os.getpid():
                # In a forked child the kept connections are the parent's: two speakers would mix their calls.
                self._pid = os.getpid()
                self._idle = []
            return self._idle.pop() if self._idle else None

    def _keep(self, connection: socket.socket) -> None:
        with self._lock:
            if not self._is_closed and len(self._idle) < IDLE_MAX and self._pid == os.getpid():
                self._idle.append(connection)
                return
        connection.close()


def find_daemon(socket_path: str | None, access: str | None) -> tuple[str, Remote | None]:
    """The daemon to ask: the path of its socket, or its URL and how it is reached. Raises NoDaemon, ConfigError."""
    told = find_access(access, socket_path)
    if told is None:
        return find_socket(socket_path), None
    from taskd.client.remote import Remote  # noqa: PLC0415  # TLS takes a third of the command line's start

    remote = Remote(told)
    return remote.url, remote


def connect_s(call: Call) -> float:
    """For how long to try to connect."""
    return TIMEOUT_S if call.timeout_s is None else min(call.timeout_s, TIMEOUT_S)


def _receive(connection: socket.socket, reader: ResponseReader, timeout_s: float | None) -> list[bytes]:
    """Wait for bytes and read them. Raises TimeoutError, ConnectionLost, ProtocolError."""
    try:
        connection.settimeout(timeout_s)
        data = connection.recv(READ_BYTES)
    except TimeoutError:
        raise
    except OSError as error:
        raise ConnectionLost() from error
    return reader.feed(data)


def _start_of(stream: Stream, timeout_s: float | None) -> bytes:
    body = b""
    while len(body) < ERROR_BYTES_MAX and (part := stream.read(timeout_s)):
        body += part
    return body
