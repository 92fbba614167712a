"""A process that runs handlers: reads calls, makes them one after the other, and sends results many at a time.

The main thread reads the stream and makes the calls, so that handlers run where Python, signals and libraries expect
code to run. A second thread, the watcher, answers the control socket while a call runs, sends results that a slow call
would hold up, and keeps what handlers print within its bounds. It sleeps while the process idles.

A result is sent when nothing is left to do, when FLUSH_S have passed since the last ones, before a call of a type that
is not known to be short, and by the watcher otherwise. In the meantime it is safe in the page (handler_page.py).
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from types import FrameType

from taskd import interpreter
from taskd.handler import load
from taskd.protocol.messages import HandlerInfo
from taskd.runner.handler_calls import Caller, Terminated, encodable
from taskd.runner.handler_messages import (
    PACKET_BYTES_MAX,
    Call,
    Control,
    Done,
    Dropped,
    Frames,
    Ready,
    Setup,
    TakeBack,
    Taken,
    Tired,
    decode_calls,
    decode_setup,
    decode_to_process,
    encode,
    framed,
)
from taskd.runner.handler_output import Printed
from taskd.runner.handler_page import Page

FLUSH_S = 0.002  # Between two lots of results: waking the daemon costs as much as ten short calls.
SHORT_S = 0.0005  # Calls of types that take longer than this never keep results waiting.
UNKNOWN_S = 0.01  # What a type is taken for before its first calls.
TICK_S = 0.003  # Of the watcher: a call that is still the same one after so long holds up results.
TICKS_AWAKE = 30  # The watcher goes to sleep when nothing has happened for so many ticks.
TICKS_PRINTED = 30  # Between two looks at how much a call has printed.
TERMINATE_TRIES = 5  # To meet a call that is about to begin.
WORN_S = 0.1  # Between two looks at the memory that the process takes.
READ_BYTES = 256 << 10
LEFT_STATUS = 70  # A handler forked, and its child came back to where only the parent belongs.
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_STATM = "/proc/self/statm"

_libc = ctypes.CDLL(None, use_errno=True)


class HandlerProcess:
    """One process, from its setup to its end."""

    def __init__(self, stream: socket.socket, control: socket.socket, page: Page) -> None:
        self._began_at = time.monotonic()
        self._stream = stream
        self._control = control
        self._page = page
        self._calls: deque[Call] = deque()  # not begun
        # The main thread puts calls in while it holds `_taking`, the watcher takes them out; `popleft` needs no lock.
        self._taking = threading.Lock()
        self._read = 0  # The number of the last call that was read.
        self._taken = 0  # Calls up to this number were given back, those not read yet too.
        self._dropped: set[int] = set()  # Not read yet, and not to be made.
        self._flushing = threading.Lock()
        self._flushed_s = 0.0
        self._usual_s: dict[str, float] = {}  # How long calls take, by type.
        self._is_busy = False
        self._watcher_sleeps = False
        self._kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._is_forked = False
        self._terminated = 0  # The number of the call that TERM is meant for.

    def run(self) -> None:
        """Until the pool closes the stream. Raises SystemExit where a call was broken off."""
        bodies = self._read_frames()
        for body in bodies:
            self._prepare(decode_setup(body))
            break
        else:
            return
        threading.Thread(target=self._watch, name="taskd-watcher", daemon=True).start()
        os.register_at_fork(after_in_child=self._on_fork)
        signal.signal(signal.SIGTERM, self._on_term)
        for body in bodies:
            self._take_in(decode_calls(body))
            self._is_busy = True
            if self._watcher_sleeps:
                self._watcher_sleeps = False
                os.eventfd_write(self._kick_fd, 1)
            self._make_calls()
            self._is_busy = False
            self._flush(time.time())
        self._caller.close()

    def _prepare(self, setup: Setup) -> None:
        sys.path[:0] = setup.path
        loaded, problems = load(setup.modules, setup.skipped, self._page.enter)
        self._printed = Printed()
        self._caller = Caller(loaded, problems, self._printed)
        self._printed.take()  # What modules printed while they were loaded belongs to no call.
        # All this lives as long as the process: no need to look through it again and again.
        gc.collect()
        gc.freeze()
        started_s = time.monotonic() - self._began_at
        self._calls_made = 0
        self._calls_max = setup.calls_max
        self._old_at = self._began_at + started_s / setup.start_share_max
        self._statm_fd = os.open(_STATM, os.O_RDONLY | os.O_CLOEXEC)
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        self._worn_look_s = 0.0
        self._is_tired = self._is_urgent = False
        self._memory_bytes_max = setup.memory_bytes_max
        if setup.memory_bytes_max and (memory_bytes := self._memory_bytes()) >= setup.memory_bytes_max:
            self._memory_bytes_max = 2 * memory_bytes
            problems.append(
                f"handler processes take {memory_bytes} bytes when they have loaded their modules, and may take"
                f" {setup.memory_bytes_max}: they are replaced when they take twice as much as in the beginning"
            )
        self._page.enter("")
        handlers = tuple(
            HandlerInfo(it.type, it.schema, encodable(it.summary), encodable(it.version), it.retries, it.timeout_s)
            for _, it in sorted(loaded.items())
        )
        self._stream.sendall(framed(encode(Ready(handlers, tuple(map(encodable, problems))))))

    # -- Calls ---------------------------------------------------------------------------------------------------------

    def _read_frames(self) -> Iterator[bytes]:
        frames = Frames()
        while data := self._stream.recv(READ_BYTES):
            yield from frames.feed(data)

    def _take_in(self, calls: list[Call]) -> None:
        with self._taking:
            self._read = calls[-1].number
            if self._dropped or calls[0].number <= self._taken:
                calls = [call for call in calls if call.number > self._taken and call.number not in self._dropped]
                self._dropped = {number for number in self._dropped if number > self._read}
            self._calls.extend(calls)

    def _make_calls(self) -> None:
        """Make all calls that were read."""
        next_call, page, printed, make = self._calls.popleft, self._page, self._printed, self._caller.make
        usual_s = self._usual_s
        ended_s = time.time()
        while True:
            try:
                call = next_call()
            except IndexError:
                return
            usually_s = usual_s.get(call.type, UNKNOWN_S)
            if usually_s > SHORT_S and page.has_results:
                self._flush(ended_s)
            started_s = time.time()
            page.begin(call.number, started_s, printed.stdout_from, printed.stderr_from)
            outcome, report = make(call)
            ended_s = time.time()
            took_s = ended_s - started_s
            usual_s[call.type] = took_s if took_s > usually_s else usually_s * 0.8 + took_s * 0.2
            if self._is_forked:
                os._exit(LEFT_STATUS)
            self._keep(encode(Done(call.number, outcome, started_s, ended_s, report)))
            self._calls_made += 1
            if self._caller.must_leave:
                # What is in the page is found there, when the process is dead: not before is the call over.
                raise SystemExit(0)
            if ended_s - self._flushed_s > FLUSH_S or ended_s < self._flushed_s:
                self._flush(ended_s)

    def _keep(self, item: bytes) -> None:
        with self._flushing:
            if not self._page.add(item):
                self._send_results()
                self._page.add(item)  # An empty page has room for the longest report.

    def _flush(self, now_s: float) -> None:
        """Send what has ended; by the main thread, between calls."""
        with self._flushing:
            self._flushed_s = now_s
            if self._page.has_results:
                self._send_results()
        if self._calls_made >= self._calls_max or not 0 <= now_s - self._worn_look_s < WORN_S:
            self._look_for_wear(now_s)

    def _send_results(self) -> None:
        try:
            self._stream.sendall(self._page.frame())
        except OSError:
            os._exit(0)  # The pool is gone.
        self._page.forget()

    def _look_for_wear(self, now_s: float) -> None:
        self._worn_look_s = now_s
        if not self._is_urgent and self._memory_bytes_max and self._memory_bytes() > self._memory_bytes_max:
            self._is_tired = self._is_urgent = True
            self._tell(Tired(True))
        elif not self._is_tired and self._calls_made >= self._calls_max and time.monotonic() >= self._old_at:
            self._is_tired = True
            self._tell(Tired(False))

    def _memory_bytes(self) -> int:
        return int(os.pread(self._statm_fd, 200, 0).split()[1]) * self._page_bytes

    def _tell(self, message: Control) -> None:
        try:
            self._control.send(encode(message))
        except OSError:
            os._exit(0)  # The pool is gone.

    # -- Signals, forks ------------------------------------------------------------------------------------------------

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        """In the main thread: from the watcher, for one call, or from outside, for whatever is going on."""
        wanted, self._terminated = self._terminated, 0
        running = self._caller.running
        if wanted and wanted != running:
            return  # It has ended in the meantime.
        if not running:
            raise SystemExit(0)
        raise Terminated

    def _on_fork(self) -> None:
        """In a child that a handler has forked: it is not the process that the pool knows."""
        self._is_forked = True
        self._stream.close()
        self._control.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    # -- The watcher ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._kick_fd, select.POLLIN)
        begun = ticks = quiet_ticks = 0
        while True:
            for descriptor, _ in poll.poll(None if self._watcher_sleeps else TICK_S * 1000):
                if descriptor == self._kick_fd:
                    os.eventfd_read(self._kick_fd)
                elif not self._obey():
                    return
            if not self._is_busy:
                quiet_ticks += 1
                if quiet_ticks > TICKS_AWAKE:
                    self._watcher_sleeps = True
                    if self._is_busy:  # Since just now: then nobody kicks.
                        self._watcher_sleeps = False
                continue
            quiet_ticks = 0
            begun, before = self._page.begun, begun
            if begun == before:  # For the length of a tick: it holds others up.
                self._watch_slow_call(ticks := ticks + 1)

    def _watch_slow_call(self, tick: int) -> None:
        if self._page.has_results:
            with self._flushing:
                if self._page.has_results:
                    self._send_results()
        if tick % TICKS_PRINTED == 0:
            self._printed.bound()

    def _obey(self) -> bool:
        """Do what the pool wants; False when it is gone."""
        packet = self._control.recv(PACKET_BYTES_MAX)
        if not packet:
            return False
        message = decode_to_process.decode(packet)
        if isinstance(message, TakeBack):
            self._tell(self._give_back(message.last))
        else:
            self._terminate(message.number)
        return True

    def _give_back(self, last: int) -> Taken:
        with self._taking:
            self._taken = last
            first = self._read + 1
            try:
                while True:  # From the right: the main thread goes on taking from the left.
                    first = self._calls.pop().number
            except IndexError:
                return Taken(first, last)

    def _terminate(self, number: int) -> None:
        with self._taking:
            is_unread = number > self._read
            waiting = [call for call in tuple(self._calls) if call.number == number]
            if is_unread:
                self._dropped.add(number)
            for call in waiting:
                try:
                    self._calls.remove(call)
                except ValueError:  # The main thread was quicker.
                    waiting = []
        if is_unread or waiting:
            self._tell(Dropped(number))
            return
        for _ in range(TERMINATE_TRIES):
            if self._caller.running == number:
                if not self._caller.cancel(number):
                    self._terminated = number
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
                return
            if self._page.begun > number:
                return  # It has ended.
            time.sleep(TICK_S)  # It has just been taken from the queue, or it is the last one that ended.


def main(arguments: list[str]) -> None:
    """The program: the descriptors of stream, control socket and page, and the id of the process that must be ours."""
    stream_fd, control_fd, page_fd, parent = map(int, arguments)
    # Handlers must not outlive their daemon: nobody would take their results.
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent not in interpreter.parents():
        return
    _libc.prctl(_PR_SET_NAME, b"taskd-handlers", 0, 0, 0)
    for descriptor in (stream_fd, control_fd, page_fd):
        os.set_inheritable(descriptor, False)
    faulthandler.enable(all_threads=False)  # A crash in C code leaves a traceback among what the call has printed.
    page = Page(page_fd)
    os.close(page_fd)
    HandlerProcess(socket.socket(fileno=stream_fd), socket.socket(fileno=control_fd), page).run()
