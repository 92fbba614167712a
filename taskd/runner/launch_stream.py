"""Frames with open files beside them, on a Unix stream socket: the one end of a worker, the other of its launcher.

Open files arrive with the first byte that they were sent with, or before: so those of a frame are there when the frame
is. Nothing is bounded but the size of a frame: the two trust each other to read.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence

HEAD_BYTES = 4  # Before each frame: the length of its body, big-endian.
FRAME_BYTES_MAX = 16 << 20
READ_BYTES = 256 << 10
_DESCRIPTORS_AT_ONCE = 64
_CREDENTIALS = struct.Struct("iII")


class LaunchStream:
    """One end. Used on one event loop."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._received = bytearray()
        self._descriptors: deque[int] = deque()
        self._has_ended = False
        self._arrived = asyncio.Event()
        self._loop.add_reader(connection.fileno(), self._on_readable)

    @property
    def peer_uid(self) -> int:
        """The user at the other end, when it connected."""
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        uid: int = _CREDENTIALS.unpack(raw)[1]
        return uid

    def send(self, body: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send a frame, now or when there is room. The descriptors are given away: they are closed when they are
        sent, or never will be."""
        if self._has_ended:
            _close_all(descriptors)
            return
        self._unsent.append((memoryview(len(body).to_bytes(HEAD_BYTES, "big") + body), descriptors))
        if len(self._unsent) == 1:
            self._send_some()

    async def receive(self) -> bytes:
        """The next frame. Raises EOFError at the end, ValueError for an impossible one."""
        while True:
            received = self._received
            if len(received) >= HEAD_BYTES:
                stop = HEAD_BYTES + int.from_bytes(received[:HEAD_BYTES], "big")
                if stop > FRAME_BYTES_MAX:
                    raise ValueError(f"a frame of {stop} bytes")
                if len(received) >= stop:
                    body = bytes(received[HEAD_BYTES:stop])
                    del received[:stop]
                    return body
            if self._has_ended:
                raise EOFError
            self._arrived.clear()
            await self._arrived.wait()

    def take_descriptors(self, count: int) -> list[int]:
        """The open files of the frame that was received last: the caller's from now on. Raises ValueError."""
        if len(self._descriptors) < count:
            raise ValueError("the files that were announced did not come")
        return [self._descriptors.popleft() for _ in range(count)]

    def close(self) -> None:
        """Close the socket, and all files that nobody has taken."""
        if self._socket.fileno() >= 0:
            self._end()
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
        _close_all(self._descriptors)
        self._descriptors.clear()

    def _on_readable(self) -> None:
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                READ_BYTES, socket.CMSG_SPACE(_DESCRIPTORS_AT_ONCE * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            data, ancillary, flags = b"", [], 0
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                found = array.array("i")
                found.frombytes(content[: len(content) - len(content) % found.itemsize])
                self._descriptors.extend(found)
        if flags & socket.MSG_CTRUNC:  # Out of descriptors: whose were lost, nobody can tell.
            data = b""
        self._received += data
        if not data:
            self._end()
        self._arrived.set()

    def _end(self) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            for _, descriptors in self._unsent:
                _close_all(descriptors)
            self._unsent.clear()
            self._arrived.set()

    def _send_some(self) -> None:
        while self._unsent:
            frame, descriptors = self._unsent[0]
            try:
                if descriptors:
                    sent = socket.send_fds(self._socket, [frame], list(descriptors))
                else:
                    sent = self._socket.send(frame)
            except BlockingIOError:
                self._loop.add_writer(self._socket.fileno(), self._send_some)
                return
            except OSError:
                self._end()
                return
            _close_all(descriptors)
            if sent < len(frame):
                self._unsent[0] = frame[sent:], ()
            else:
                self._unsent.popleft()
        self._loop.remove_writer(self._socket.fileno())


def _close_all(descriptors: Sequence[int] | deque[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
