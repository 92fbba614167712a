"""Python handlers, run by a pool of persistent processes, so that user code never runs in the daemon's own.

Calls go to processes in batches, and come back so. A process makes one call at a time; short ones may queue behind it,
and are taken back when it is held up while another process idles. A process that dies costs the call it was making one
attempt and nothing else: what waited behind it goes to another one, and a new process takes its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from taskd.core.effects import Begin
from taskd.core.task import Outcome, Report, encode
from taskd.protocol.messages import AttemptEnded, AttemptKey, HandlerInfo
from taskd.runner.base import OnProgress, Place, Progress, ended, error_info, fence, task_id_text
from taskd.runner.handler_messages import (
    HEAD_BYTES,
    Call,
    Calls,
    CancelCall,
    Ended,
    FromProcess,
    Ready,
    Setup,
    TakeBack,
    TakenBack,
)
from taskd.runner.reaper import Reaper

LOOK_S = 0.05  # How often held-up calls, memory and output are looked at while something runs.
FRAME_BYTES_MAX = 64 << 20
OUTPUT_KEPT_BYTES_MAX = 16 << 20  # Of what a call prints, before its beginning is dropped.
START_BACKOFF_S_MAX = 30.0
READY_TIMEOUT_S = 60.0

_from_process: msgspec.msgpack.Decoder[Ready | Ended | TakenBack] = msgspec.msgpack.Decoder(FromProcess)


def start_command(calls_descriptor: int, control_descriptor: int) -> list[str]:
    """How a handler process is started."""
    return [
        sys.executable, "-P", "-m", "taskd.runner.handler_process", str(calls_descriptor), str(control_descriptor),
        str(os.getpid()),
    ]  # fmt: skip


class _Process:
    """One handler process, as the pool sees it."""

    def __init__(self, process: subprocess.Popen[bytes], calls: socket.socket, control: socket.socket) -> None:
        self.process = process
        self.pidfd = os.pidfd_open(process.pid)
        self.calls = calls
        self.control = control
        self.is_ready = False
        self.is_due = False  # to be replaced; makes calls until its successor is ready
        self.is_retiring = False
        self.made = 0
        self.outstanding: dict[int, Begin] = {}  # in the order given: the first one is being made
        self.to_send: list[Call] = []
        self.buffer = bytearray()
        self.unsent = bytearray()
        self.head_since = 0.0
        self.head_looked_at: int | None = None
        self.asked_back = False

    @property
    def takes_calls(self) -> bool:
        """Whether it may be given calls."""
        return self.is_ready and not self.is_retiring

    @property
    def head(self) -> int | None:
        """The number of the call that is being made."""
        return next(iter(self.outstanding), None)


class HandlerPool:
    """See `Kind` in base.py. `handlers` is what the processes can run, known once the first is ready."""

    def __init__(
        self,
        place: Place,
        on_progress: OnProgress,
        reaper: Reaper,
        *,
        processes: int,
        modules: Sequence[str] = (),
        path: Sequence[str] = (),
        calls_max: int = 10_000,
        memory_max: int = 1 << 30,
    ) -> None:
        self.handlers: tuple[HandlerInfo, ...] = ()
        self.problems: tuple[str, ...] = ()
        self._place = place
        self._progress = Progress(on_progress)
        self._reaper = reaper
        self._setup = Setup(tuple(modules), tuple(path))
        self._count = processes
        self._calls_max = calls_max
        self._memory_max = memory_max
        self._async_types: frozenset[str] = frozenset()
        self._processes: list[_Process] = []
        self._numbers: dict[AttemptKey, tuple[int, _Process]] = {}
        self._waiting: list[Begin] = []  # for a process to be ready
        self._ending: dict[AttemptKey, signal.Signals] = {}  # wanted ended while it waits behind another
        self._last_number = 0
        self._send_handle: asyncio.Handle | None = None
        self._look_handle: asyncio.TimerHandle | None = None
        self._restart_handle: asyncio.TimerHandle | None = None
        self._failed_starts = 0
        self._is_closing = False
        self._first_ready: asyncio.Future[None] | None = None
        self._all_gone: asyncio.Future[None] | None = None

    # -- Life ----------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Start the first process, learn from it what there is to run, and start the others if there is anything."""
        self._loop = asyncio.get_running_loop()
        self._first_ready = self._loop.create_future()
        self._start_process()
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await self._first_ready
        except TimeoutError:
            self.problems = (*self.problems, f"handler modules were not imported within {READY_TIMEOUT_S:g} s")
        if not self.handlers:
            await self._end_all()  # Nothing to run: no process, no memory.
            return
        self._fill_up()

    async def close(self) -> None:
        """End all processes by force and tell of their calls."""
        self._is_closing = True
        for handle in (self._send_handle, self._look_handle, self._restart_handle):
            if handle is not None:
                handle.cancel()
        await self._end_all()
        for begin in self._waiting:
            self._progress.ended(_unbegun(begin.key))
        self._waiting.clear()
        self._progress.close()

    async def _end_all(self) -> None:
        was_closing, self._is_closing = self._is_closing, True
        self._all_gone = self._loop.create_future()
        for process in self._processes:
            _signal_group(process.process.pid, signal.SIGKILL)
        if self._processes:
            await self._all_gone
        self._all_gone = None
        self._is_closing = was_closing

    def _fill_up(self) -> None:
        """Have as many processes as there should be."""
        self._restart_handle = None
        while sum(not process.is_due for process in self._processes) < self._count:
            self._start_process()

    def _start_process(self) -> None:
        ours, theirs = socket.socketpair()
        our_control, their_control = socket.socketpair()
        ours.setblocking(False)
        our_control.setblocking(False)
        root = str(Path(__file__).parents[2])
        inherited = os.environ.get("PYTHONPATH")
        environment = {**os.environ, **{"PYTHONPATH": f"{root}{os.pathsep}{inherited}" if inherited else root}}
        environment |= {"TASKD_WORKER": self._place.worker, "TASKD_SOCKET": self._place.socket}
        try:
            process = subprocess.Popen(
                start_command(theirs.fileno(), their_control.fileno()),
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), their_control.fileno()),
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            our_control.close()
            self._start_later(str(error))
            return
        finally:
            theirs.close()
            their_control.close()
        self._reaper.own(process.pid)
        made = _Process(process, ours, our_control)
        self._processes.append(made)
        self._loop.add_reader(ours.fileno(), self._on_readable, made)
        self._loop.add_reader(made.pidfd, self._on_exit, made)
        self._send(made, encode(self._setup))

    def _start_later(self, problem: str) -> None:
        self.problems = (problem,)
        self._failed_starts += 1
        if self._first_ready is not None and not self._first_ready.done():
            self._first_ready.set_result(None)
        if self._restart_handle is None and not self._is_closing:
            delay_s = min(0.1 * 2**self._failed_starts, START_BACKOFF_S_MAX)
            self._restart_handle = self._loop.call_later(delay_s, self._fill_up)

    # -- Calls ---------------------------------------------------------------------------------------------------------

    def start(self, begins: list[Begin]) -> None:
        """Make these calls."""
        ready = [process for process in self._processes if process.takes_calls]
        if ready:
            self._give(begins, ready)
        else:
            self._waiting += begins

    def _give(self, begins: list[Begin], ready: list[_Process]) -> None:
        for begin in begins:
            process = ready[0] if len(ready) == 1 else min(ready, key=_load)
            self._last_number += 1
            number = self._last_number
            if not process.outstanding:
                self._becomes_head(process, begin)
            process.outstanding[number] = begin
            self._numbers[begin.key] = (number, process)
            key, spec = begin.key, begin.spec
            process.to_send.append(
                Call(number, spec.type, spec.params, task_id_text(key.task_id), key.number, fence(key))
            )
        if self._send_handle is None:
            self._send_handle = self._loop.call_soon(self._send_calls)
        if self._look_handle is None:
            self._look_handle = self._loop.call_later(LOOK_S, self._look)

    def _becomes_head(self, process: _Process, begin: Begin) -> None:
        process.head_since = self._loop.time()
        process.asked_back = False
        self._progress.began(begin.key, ended(begin.key, Outcome.OK, _EMPTY).ended_s)

    def _send_calls(self) -> None:
        self._send_handle = None
        for process in self._processes:
            if process.to_send:
                calls, process.to_send = process.to_send, []
                process.made += len(calls)
                self._send(process, encode(Calls(calls)))

    def _send(self, process: _Process, body: bytes) -> None:
        frame = len(body).to_bytes(HEAD_BYTES, "big") + body
        if process.unsent:
            process.unsent += frame
            return
        try:
            sent = process.calls.send(frame)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # It has died; its end is about to be noticed.
        if sent < len(frame):
            process.unsent += frame[sent:]
            self._loop.add_writer(process.calls.fileno(), self._on_writable, process)

    def _on_writable(self, process: _Process) -> None:
        try:
            sent = process.calls.send(process.unsent)
        except BlockingIOError:
            return
        except OSError:
            sent = len(process.unsent)
        del process.unsent[:sent]
        if not process.unsent:
            self._loop.remove_writer(process.calls.fileno())

    def _tell_control(self, process: _Process, message: TakeBack | CancelCall) -> None:
        body = encode(message)
        with contextlib.suppress(OSError):  # Full or dead: asked again at the next look, or noticed.
            process.control.send(len(body).to_bytes(HEAD_BYTES, "big") + body)

    # -- Answers -------------------------------------------------------------------------------------------------------

    def _on_readable(self, process: _Process) -> None:
        try:
            data = process.calls.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(process.calls.fileno())  # The end itself is told by the pidfd.
            return
        buffer = process.buffer
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
                self._on_message(process, message)
        except (msgspec.DecodeError, ValueError):
            # User code shares that process and may have written into its sockets.
            _signal_group(process.process.pid, signal.SIGKILL)
            self._loop.remove_reader(process.calls.fileno())
            return
        del buffer[:start]

    def _on_message(self, process: _Process, message: Ready | Ended | TakenBack) -> None:
        if isinstance(message, Ended):
            outstanding, numbers, report = process.outstanding, self._numbers, self._progress.ended
            for call in message.calls:
                begin = outstanding.pop(call.number, None)
                if begin is not None:
                    numbers.pop(begin.key, None)
                    self._ending.pop(begin.key, None)
                    report(AttemptEnded(begin.key, call.outcome, call.started_s, call.ended_s, call.report))
            head = process.head
            if head is not None:
                self._becomes_head(process, outstanding[head])
            elif process.is_retiring:
                self._let_go(process)
            if process.made >= self._calls_max and not self._is_closing:
                self._retire(process)
        elif isinstance(message, TakenBack):
            self._on_taken_back(process, message.numbers)
        else:
            self._on_ready(process, message)

    def _on_ready(self, process: _Process, message: Ready) -> None:
        process.is_ready = True
        self._failed_starts = 0
        self.handlers, self.problems = message.handlers, message.problems
        self._async_types = frozenset(message.is_async)
        if self._first_ready is not None and not self._first_ready.done():
            self._first_ready.set_result(None)
        due = next((other for other in self._processes if other.is_due and not other.is_retiring), None)
        if due is not None:
            due.is_retiring = True
            if not due.outstanding:
                self._let_go(due)
        self._start_waiting()

    def _start_waiting(self) -> None:
        if self._waiting:
            begins, self._waiting = self._waiting, []
            self.start(begins)

    def _on_taken_back(self, process: _Process, numbers: list[int]) -> None:
        process.asked_back = False
        again: list[Begin] = []
        for number in sorted(numbers):
            begin = process.outstanding.pop(number, None)
            if begin is None:
                continue
            del self._numbers[begin.key]
            if self._ending.pop(begin.key, None) is not None:
                self._progress.ended(_unbegun(begin.key))
            else:
                again.append(begin)
        if process.is_retiring and not process.outstanding:
            self._let_go(process)
        others = [other for other in self._processes if other is not process and other.takes_calls]
        if again:
            self._give(again, others) if others else self.start(again)
        # What was to be ended and has become the head in the meantime.
        head = process.head
        if head is not None and (wanted := self._ending.pop(process.outstanding[head].key, None)) is not None:
            self._end_head(process, head, wanted)

    # -- Ends ----------------------------------------------------------------------------------------------------------

    def terminate(self, key: AttemptKey) -> None:
        """Ask a call to end: an async one is cancelled, otherwise its process gets TERM."""
        self._end(key, signal.SIGTERM)

    def kill(self, key: AttemptKey) -> None:
        """End a call with its process and all that this has started."""
        self._end(key, signal.SIGKILL)

    def _end(self, key: AttemptKey, number: signal.Signals) -> None:
        found = self._numbers.get(key)
        if found is None:
            for begin in self._waiting:
                if begin.key == key:
                    self._waiting.remove(begin)
                    self._progress.ended(_unbegun(key))
                    return
            return
        call, process = found
        if process.head == call:
            self._end_head(process, call, number)
        else:
            self._ending[key] = number
            self._tell_control(process, TakeBack())

    def _end_head(self, process: _Process, call: int, number: signal.Signals) -> None:
        if number is signal.SIGTERM and process.outstanding[call].spec.type in self._async_types:
            self._tell_control(process, CancelCall(call))
        else:
            _signal_group(process.process.pid, number)

    def _on_exit(self, process: _Process) -> None:
        """A process has ended: what it said before counts, then its call pays, and the others move on."""
        if process.calls.fileno() >= 0:
            with contextlib.suppress(OSError):
                process.calls.setblocking(False)
                while self._has_more(process):
                    self._on_readable(process)
        status = process.process.wait()
        self._reaper.disown(process.process.pid)
        _signal_group(process.process.pid, signal.SIGKILL)  # What it has started and left.
        self._loop.remove_reader(process.pidfd)
        os.close(process.pidfd)
        self._loop.remove_reader(process.calls.fileno())
        self._loop.remove_writer(process.calls.fileno())
        process.calls.close()
        process.control.close()
        self._processes.remove(process)
        begins = list(process.outstanding.values())
        for begin in begins:
            del self._numbers[begin.key]
        if begins:
            head_since_s = self._loop.time() - process.head_since
            self._progress.ended(_ended_with(begins[0].key, status, head_since_s))
        for begin in begins[1:]:
            if self._is_closing or self._ending.pop(begin.key, None) is not None:
                self._progress.ended(_unbegun(begin.key))
            else:
                self._waiting.append(begin)
        if self._is_closing:
            if not self._processes and self._all_gone is not None and not self._all_gone.done():
                self._all_gone.set_result(None)
        elif not process.is_ready:
            self._start_later(f"a handler process ended with status {status} before it was ready")
        else:
            self._fill_up()
            self._start_waiting()

    @staticmethod
    def _has_more(process: _Process) -> bool:
        try:
            return bool(process.calls.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    # -- Looking after ----------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """While something runs: move calls that are held up, replace processes that grew too large."""
        self._look_handle = None
        now = self._loop.time()
        has_idle = any(other.takes_calls and not other.outstanding for other in self._processes)
        is_busy = False
        for process in self._processes:
            if not process.outstanding:
                continue
            is_busy = True
            # The same head at two looks in a row: what it may have said in between has been read.
            head = process.head
            is_held_up, process.head_looked_at = head == process.head_looked_at, head
            if is_held_up and has_idle and len(process.outstanding) > 1 and not process.asked_back:
                process.asked_back = True
                self._tell_control(process, TakeBack())
            if self._memory_max and _memory_bytes(process.process.pid) > self._memory_max:
                self._retire(process)
            if now - process.head_since > 1.0:
                _bound_output(process.process.pid)
        if is_busy:
            self._look_handle = self._loop.call_later(LOOK_S, self._look)

    def _retire(self, process: _Process) -> None:
        """Replace a process: it goes on until another one is ready."""
        if not process.is_due:
            process.is_due = True
            self._fill_up()

    def _let_go(self, process: _Process) -> None:
        """Close its sockets' other end: it ends by itself."""
        with contextlib.suppress(OSError):
            process.calls.shutdown(socket.SHUT_WR)


_EMPTY = Report()


def _load(process: _Process) -> int:
    return len(process.outstanding)


def _unbegun(key: AttemptKey) -> AttemptEnded:
    return ended(key, Outcome.PREEMPTED, _EMPTY)


def _ended_with(key: AttemptKey, status: int, ran_s: float) -> AttemptEnded:
    """The end of the call that a process was making when it ended."""
    if status < 0:
        name = signal.Signals(-status).name if -status in signal.valid_signals() else str(-status)
        error = error_info("ProcessEnded", f"the handler's process was ended by signal {name}")
        found = ended(key, Outcome.SIGNAL, Report(signal=-status, error=error))
    else:
        error = error_info("ProcessEnded", f"the handler's process exited with status {status} during the call")
        found = ended(key, Outcome.EXIT_NONZERO, Report(exit_code=status, error=error))
    return AttemptEnded(key, found.outcome, found.ended_s - ran_s, found.ended_s, found.report)


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _memory_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def _bound_output(pid: int) -> None:
    """A call that prints without end must not fill the memory: drop the beginning."""
    for descriptor in (1, 2):
        path = f"/proc/{pid}/fd/{descriptor}"
        with contextlib.suppress(OSError):
            if os.stat(path).st_blocks * 512 > OUTPUT_KEPT_BYTES_MAX:
                os.truncate(path, 0)
