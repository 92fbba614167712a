"""Accepting connections at a bounded rate: what the gate refuses is closed before it costs anything.

The sockets are accepted here and not by asyncio's server, which makes a transport and a protocol of each one first. In
a flood the kernel keeps what waits, and then drops it: nothing of it reaches the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from collections.abc import Callable

from taskd.net.connection import monotonic, plain_host
from taskd.net.gate import Bucket

BACKLOG = 1024
ACCEPTS_A_TURN = 8  # Few: whoever submits meanwhile waits for a turn, and passes through several.
ACCEPTS_PER_S, ACCEPTS_BURST = 4000.0, 400.0  # Some 20 µs each where the gate refuses them.
PAUSE_S = 0.005  # Until the next ones are accepted, when that was used up.
TROUBLE_PAUSE_S = 0.5  # When this process may open no more files, or has no memory.
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing resets, so that nothing of it stays in the kernel.
_TROUBLES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Acceptor:
    """One listening socket. `admit` is asked of each address and says why not; `take` gets the sockets that may stay,
    with their address."""

    def __init__(
        self,
        listener: socket.socket,
        admit: Callable[[str, str], bool],
        take: Callable[[socket.socket], None],
        trouble: Callable[[OSError], None],
    ) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._admit = admit
        self._take = take
        self._trouble = trouble
        self._loop = asyncio.get_running_loop()
        self._bucket = Bucket(ACCEPTS_PER_S, ACCEPTS_BURST, monotonic())
        self._resume: asyncio.TimerHandle | None = None
        self._loop.add_reader(listener.fileno(), self._on_readable)

    def close(self) -> None:
        """Listen no more."""
        if self._resume is not None:
            self._resume.cancel()
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()

    def _on_readable(self) -> None:
        for _ in range(ACCEPTS_A_TURN):
            if not self._bucket.take(monotonic()):
                self._pause(PAUSE_S)
                return
            try:
                end, address = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:  # Of a connection that has gone already, mostly.
                if error.errno in _TROUBLES:
                    self._trouble(error)
                    self._pause(TROUBLE_PAUSE_S)
                    return
                continue
            if self._admit(plain_host(address[0]), str(address[1])):
                self._take(end)
            else:
                reset(end)

    def _pause(self, pause_s: float) -> None:
        self._loop.remove_reader(self._listener.fileno())
        self._resume = self._loop.call_later(pause_s, self._go_on)

    def _go_on(self) -> None:
        self._resume = None
        self._loop.add_reader(self._listener.fileno(), self._on_readable)


def reset(end: socket.socket) -> None:
    """Close a connection at once, without a word."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    end.close()


def listener(host: str, port: int) -> socket.socket:
    """A listening socket; for all addresses (an empty host) one that takes both IPv6 and IPv4, where the machine has
    both. Raises OSError."""
    if not host and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)
