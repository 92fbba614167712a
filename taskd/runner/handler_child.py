"""One handler process as the pool sees it: how it is started, what it was given, what it says, and its end.

Its end is told when nothing of it is left: its process group is killed, and so are processes that left the group but
still carry its mark in their environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import deque
from typing import Protocol

import msgspec

from taskd.core.effects import Begin
from taskd.runner.handler_messages import (
    PACKET_BYTES_MAX,
    Call,
    Done,
    Dropped,
    Frames,
    Ready,
    Setup,
    TakeBack,
    Taken,
    Terminate,
    Tired,
    ToProcess,
    decode_done,
    decode_ready,
    decode_to_pool,
    encode,
    framed,
)
from taskd.runner.handler_output import Written, read_written
from taskd.runner.handler_spawn import Joint

FRAME_CALLS_BYTES = 256 << 10  # Of params in one frame, unless a single call has more: the first can begin early.
READ_BYTES = 256 << 10
LEAVE_S_MAX = 5.0  # For what handlers do at exit, when a process is no longer needed.
LAST_WORDS_BYTES = 2000
LINGER_POLL_S = 0.005
LINGER_S_MAX = 10.0  # Killed processes that the kernel holds for longer are left to it.


class Owner(Protocol):
    """Hears of a process what the pool has to know."""

    def on_ready(self, child: Child, ready: Ready) -> None:
        """It has loaded its modules."""

    def on_done(self, child: Child, done: list[Done]) -> None:
        """Calls have ended; some may have been told before."""

    def on_taken(self, child: Child, begins: list[Begin]) -> None:
        """These calls have not begun there and never will."""

    def on_dropped(self, child: Child, begin: Begin) -> None:
        """This call was to end, and had not begun."""

    def on_tired(self, child: Child, is_urgent: bool) -> None:
        """It wants to be replaced."""

    def on_exit(self, child: Child) -> None:
        """Nothing of it is left. `outstanding` has what it leaves behind."""


class Child:
    """A handler process that was started."""

    def __init__(self, owner: Owner, process: Joint, setup: Setup) -> None:
        self.outstanding: dict[int, Begin] = {}  # in the order given: the first one runs
        self.is_ready = False
        self.is_proved = False  # It has ended a call.
        self.is_tired = False
        self.is_leaving = False  # gets no more calls
        self.is_stuck = False  # its call has been running for a while: see the pool
        self.told_as_started = 0  # the number of the last call that was
        self.killed_for: int | None = None  # the number of the call that had to be ended
        # Known at its end: exit code, or minus its signal; the step of loading it was taking; its last line on stderr.
        self.status = 0
        self.step = ""
        self.last_words = ""
        self.started_at = time.monotonic()
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._frames = Frames()
        self._last = 0  # the number of the last call given
        self._queued: deque[Call] = deque()  # given, and not put into a frame yet
        self._unsent = memoryview(b"")  # the rest of a frame
        self._leave_timer: asyncio.TimerHandle | None = None
        self._give_up_at = 0.0
        self._process = process
        self.pid = process.pid
        self.page = process.page
        self._stream = process.stream
        self._control = process.control
        self._loop.add_reader(self._stream.fileno(), self._on_readable)
        self._loop.add_reader(self._control.fileno(), self._on_control)
        process.when_ended(self._on_exit)
        self._write(framed(encode(setup)))

    @property
    def takes_calls(self) -> bool:
        """Whether it may be given calls."""
        return self.is_ready and not self.is_leaving

    # -- What it is told -----------------------------------------------------------------------------------------------

    def send(self, begins: list[Begin]) -> None:
        """Give it calls to make, after those that it has."""
        number = self._last
        outstanding, queued = self.outstanding, self._queued
        for begin in begins:
            number += 1
            spec = begin.spec
            outstanding[number] = begin
            queued.append(Call(number, spec.type, spec.params, begin.key, spec.env, spec.cwd, spec.secrets))
        self._last = number
        if not self._unsent:
            self._send_queued()

    def take_back(self) -> None:
        """Ask for all calls that it has not begun."""
        self._tell(TakeBack(self._last))

    def terminate(self, number: int) -> None:
        """Ask a call to end."""
        self._tell(Terminate(number))

    def kill(self, number: int | None = None) -> None:
        """End the process and its group by force, for the sake of a call, or for no call's."""
        if self.killed_for is None:
            self.killed_for = number or 0
        self._process.kill()

    def leave(self) -> None:
        """Let it finish what it has, and then end."""
        if not self.is_leaving:
            self.is_leaving = True
            self._shut_down_when_sent()
        if not self.outstanding and self._leave_timer is None:
            self._leave_timer = self._loop.call_later(LEAVE_S_MAX, self.kill)

    def written(self) -> Written:
        """What the call that it has begun last has printed."""
        return read_written(self._process.stdout_fd, self._process.stderr_fd, *self.page.output_from)

    def _tell(self, message: ToProcess) -> None:
        with contextlib.suppress(OSError):  # Full, so it does not listen; or dead, which is told by itself.
            self._control.send(encode(message))

    def _send_queued(self) -> None:
        queued = self._queued
        while queued and not self._unsent:
            calls: list[Call] = []
            size = 0
            while queued and size < FRAME_CALLS_BYTES:
                call = queued.popleft()
                calls.append(call)
                size += len(call.params)
            self._write(framed(encode(calls)))
        if self.is_leaving:
            self._shut_down_when_sent()

    def _write(self, frame: bytes) -> None:
        """Send a frame, or what of it goes now; the rest when there is room."""
        try:
            sent = self._stream.send(frame)
        except BlockingIOError:
            sent = 0
        except OSError:
            sent = len(frame)  # It is dead, and that is told by itself.
        if sent < len(frame):
            self._unsent = memoryview(frame)[sent:]
            self._loop.add_writer(self._stream.fileno(), self._on_writable)

    def _on_writable(self) -> None:
        try:
            self._unsent = self._unsent[self._stream.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError:
            self._unsent = memoryview(b"")
        if not self._unsent:
            self._loop.remove_writer(self._stream.fileno())
            self._send_queued()

    def _shut_down_when_sent(self) -> None:
        if not self._unsent and not self._queued:
            with contextlib.suppress(OSError):
                self._stream.shutdown(socket.SHUT_WR)

    # -- What it says --------------------------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        try:
            data = self._stream.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._stream.fileno())
            return
        try:
            for body in self._frames.feed(data):
                if self.is_ready:
                    self._owner.on_done(self, decode_done(body))
                else:
                    self.is_ready = True
                    self._owner.on_ready(self, decode_ready(body))
        except (msgspec.DecodeError, ValueError):
            # A handler has written to descriptors that are not its own: nothing it says can be believed.
            self._loop.remove_reader(self._stream.fileno())
            self.kill(self.page.begun)

    def _on_control(self) -> None:
        try:
            packet = self._control.recv(PACKET_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self._loop.remove_reader(self._control.fileno())
            return
        try:
            message = decode_to_pool.decode(packet)
        except (msgspec.DecodeError, ValueError):
            self.kill(self.page.begun)
            return
        if isinstance(message, Taken):
            self._on_taken(message)
        elif isinstance(message, Dropped):
            begin = self.outstanding.pop(message.number, None)
            if begin is not None:
                self._owner.on_dropped(self, begin)
        elif isinstance(message, Tired):
            self.is_tired = True
            self._owner.on_tired(self, message.is_urgent)

    def _on_taken(self, taken: Taken) -> None:
        numbers = [number for number in self.outstanding if taken.first <= number <= taken.last]
        begins = [self.outstanding.pop(number) for number in numbers]
        self._queued = deque(call for call in self._queued if call.number > taken.last)
        if begins:
            self._owner.on_taken(self, begins)

    # -- Its end -------------------------------------------------------------------------------------------------------

    def _on_exit(self) -> None:
        """The process is dead: hear its last words, and see that nothing of it is left."""
        self._read_rest()
        self.status = self._process.reap()
        self.step = self.page.step
        self.last_words = self.written().stderr_tail[-LAST_WORDS_BYTES:].decode(errors="replace").strip()
        self._give_up_at = time.monotonic() + LINGER_S_MAX
        self._linger()

    def _read_rest(self) -> None:
        """What is still in the sockets, and then what it has not sent any more."""
        while self._has_more(self._stream):
            self._on_readable()
        while self._has_more(self._control):
            self._on_control()
        if results := self.page.results():
            self._owner.on_done(self, results)

    @staticmethod
    def _has_more(of: socket.socket) -> bool:
        try:
            return bool(of.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def _linger(self) -> None:
        if self._process.has_left_something() and time.monotonic() < self._give_up_at:
            self._loop.call_later(LINGER_POLL_S, self._linger)
            return
        self._owner.on_exit(self)
        self._close()

    def _close(self) -> None:
        if self._leave_timer is not None:
            self._leave_timer.cancel()
        for descriptor in (self._stream.fileno(), self._control.fileno()):
            self._loop.remove_reader(descriptor)
            self._loop.remove_writer(descriptor)
        self._process.close()
