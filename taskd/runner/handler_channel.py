"""One handler process as its worker sees it: how it is started, its sockets, frames both ways, and how it ends.

Nothing here knows what is called, or what becomes of a call: that is the pool's (handlers.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from taskd.core.task import encode
from taskd.runner.handler_messages import (
    HEAD_BYTES,
    CallEnded,
    CancelCall,
    Ended,
    FromProcess,
    Ready,
    TakeBack,
    TakenBack,
    ToProcess,
)
from taskd.runner.handler_results import shared_memory, unsent

FRAME_BYTES_MAX = 64 << 20
READ_BYTES = 1 << 20
OUTPUT_KEPT_BYTES_MAX = 16 << 20  # Of what a call prints, before its beginning is dropped.

_from_process: msgspec.msgpack.Decoder[Ready | Ended | TakenBack] = msgspec.msgpack.Decoder(FromProcess)


class Channel:
    """A started process. Its words are told by `on_message`, and its end, once, by `on_exit` with its status: what it
    had said before comes first."""

    def __init__(
        self,
        environment: Mapping[str, str],
        on_message: Callable[[Ready | Ended | TakenBack], None],
        on_exit: Callable[[int], None],
    ) -> None:
        """Start the process. Raises OSError."""
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._on_exit = on_exit
        self._buffer = bytearray()
        self._unsent = bytearray()
        with contextlib.ExitStack() as made, contextlib.ExitStack() as lent:
            self._calls, theirs = socket.socketpair()
            made.callback(self._calls.close)
            lent.callback(theirs.close)
            self._control, their_control = socket.socketpair()
            made.callback(self._control.close)
            lent.callback(their_control.close)
            self._results = shared_memory()
            made.callback(os.close, self._results)
            descriptors = (theirs.fileno(), their_control.fileno(), self._results)
            self._process = subprocess.Popen(
                start_command(*descriptors),
                stdin=subprocess.DEVNULL,
                pass_fds=descriptors,
                env={**environment, "PYTHONPATH": _python_path(environment)},
                start_new_session=True,
            )
            try:
                self._pidfd = os.pidfd_open(self._process.pid)
            except OSError:
                self._process.kill()
                self._process.wait()
                raise
            made.pop_all()
        self.pid = self._process.pid
        self._calls.setblocking(False)
        self._control.setblocking(False)
        self._loop.add_reader(self._calls.fileno(), self._on_readable)
        self._loop.add_reader(self._pidfd, self._on_ended)

    # -- To the process ------------------------------------------------------------------------------------------------

    def send(self, message: ToProcess) -> None:
        """Send it, or keep it until the process reads: what it is given is bounded by the slots."""
        body = encode(message)
        frame = len(body).to_bytes(HEAD_BYTES, "big") + body
        if self._unsent:
            self._unsent += frame
            return
        try:
            sent = self._calls.send(frame)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # It has died; its end is about to be noticed.
        if sent < len(frame):
            self._unsent += frame[sent:]
            self._loop.add_writer(self._calls.fileno(), self._on_writable)

    def tell(self, message: TakeBack | CancelCall) -> bool:
        """Interrupt it with a word about its calls; False where it is dead, or has not listened for long."""
        body = encode(message)
        try:
            self._control.send(len(body).to_bytes(HEAD_BYTES, "big") + body)
        except OSError:
            return False
        return True

    def finish(self) -> None:
        """Say that nothing more will come: it ends by itself."""
        with contextlib.suppress(OSError):
            self._calls.shutdown(socket.SHUT_WR)

    def signal(self, number: signal.Signals) -> None:
        """Signal the process and all that it has started in its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def memory_bytes(self) -> int:
        """What it holds resident; 0 where that cannot be said."""
        try:
            with open(f"/proc/{self.pid}/statm", "rb") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError, ValueError):
            return 0

    def bound_output(self) -> None:
        """A call that prints without end must not fill the memory: drop the beginning."""
        for descriptor in (1, 2):
            path = f"/proc/{self.pid}/fd/{descriptor}"
            with contextlib.suppress(OSError):
                if os.stat(path).st_blocks * 512 > OUTPUT_KEPT_BYTES_MAX:
                    os.truncate(path, 0)

    def _on_writable(self) -> None:
        try:
            sent = self._calls.send(self._unsent)
        except BlockingIOError:
            return
        except OSError:
            sent = len(self._unsent)
        del self._unsent[:sent]
        if not self._unsent:
            self._loop.remove_writer(self._calls.fileno())

    # -- From the process ----------------------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        if not self._read():
            self._loop.remove_reader(self._calls.fileno())  # The end itself is told by the pidfd.

    def _read(self) -> bool:
        """Read what is there; False at the end, and where there will be nothing more to believe."""
        try:
            data = self._calls.recv(READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= HEAD_BYTES:
                size = int.from_bytes(buffer[start : start + HEAD_BYTES], "big")
                if size > FRAME_BYTES_MAX:
                    raise ValueError(size)
                stop = start + HEAD_BYTES + size
                if stop > len(buffer):
                    break
                message = _from_process.decode(bytes(buffer[start + HEAD_BYTES : stop]))
                start = stop
                self._on_message(message)
        except (msgspec.DecodeError, ValueError):
            self.signal(signal.SIGKILL)  # Handlers share that process and may have written into its sockets.
            return False
        del buffer[:start]
        return bool(data)

    def _on_ended(self) -> None:
        self._loop.remove_reader(self._pidfd)
        while self._has_more() and self._read():
            pass
        self._loop.remove_reader(self._calls.fileno())
        self._loop.remove_writer(self._calls.fileno())
        left: list[CallEnded] = unsent(self._results)
        if left:
            self._on_message(Ended(left))
        self.signal(signal.SIGKILL)  # What it has started and left; before its number is free for others.
        status = self._process.wait()
        os.close(self._pidfd)
        os.close(self._results)
        self._calls.close()
        self._control.close()
        self._on_exit(status)

    def _has_more(self) -> bool:
        try:
            return bool(self._calls.recv(1, socket.MSG_PEEK))
        except OSError:
            return False


def start_command(*descriptors: int) -> list[str]:
    """How a handler process is started."""
    return [
        sys.executable, "-P", "-m", "taskd.runner.handler_process", *map(str, descriptors), str(os.getpid())
    ]  # fmt: skip


def _python_path(environment: Mapping[str, Any]) -> str:
    root = str(Path(__file__).parents[2])  # So that the process runs this very code.
    inherited = environment.get("PYTHONPATH")
    return f"{root}{os.pathsep}{inherited}" if inherited else root
