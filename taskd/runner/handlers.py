"""Python handlers, run by a pool of persistent processes, so that user code never runs in the daemon's own.

Calls go to processes in batches, and come back so. A process makes one call at a time; short ones may queue behind it,
and are taken back when it is held up while another process idles. A process that dies costs the call it was making one
attempt and nothing else: what waited behind it goes to another one, and a new process takes its place.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence

from taskd.core.effects import Begin
from taskd.core.task import Outcome, Report
from taskd.protocol.messages import AttemptEnded, AttemptKey, HandlerInfo
from taskd.runner.base import OnProgress, Place, Progress, ended, error_info, fence, task_id_text
from taskd.runner.handler_channel import Channel
from taskd.runner.handler_messages import Call, Calls, CancelCall, Ended, Ready, Setup, TakeBack, TakenBack
from taskd.runner.reaper import Reaper

LOOK_S = 0.05  # How often held-up calls, memory and output are looked at while something runs.
LONG_S = 1.0  # A call that runs for so long may be one that prints without end.
START_BACKOFF_S_MAX = 30.0
READY_TIMEOUT_S = 60.0


class _Process:
    """One handler process, as the pool sees it."""

    channel: Channel

    def __init__(self) -> None:
        self.is_ready = False
        self.is_due = False  # to be replaced; makes calls until its successor is ready
        self.is_retiring = False
        self.made = 0
        self.outstanding: dict[int, Begin] = {}  # in the order given: the first one is being made
        self.to_send: list[Call] = []
        self.head_since = 0.0
        self.head_looked_at: int | None = None
        self.asked_back = False
        self.signalled_for: int | None = None  # the call for whose sake it was last told to die

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
            if self._restart_handle is not None:
                self._restart_handle.cancel()
                self._restart_handle = None
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
            process.channel.signal(signal.SIGKILL)
        if self._processes:
            await self._all_gone
        self._all_gone = None
        self._is_closing = was_closing

    def _fill_up(self) -> None:
        """Have as many processes as there should be."""
        self._restart_handle = None
        while sum(not process.is_due for process in self._processes) < self._count and self._restart_handle is None:
            self._start_process()

    def _start_process(self) -> None:
        environment = {**os.environ, "TASKD_WORKER": self._place.worker, "TASKD_SOCKET": self._place.socket}
        process = _Process()
        try:
            process.channel = Channel(
                environment,
                lambda message: self._on_message(process, message),
                lambda status: self._on_exit(process, status),
            )
        except OSError as error:
            self._start_later(f"a handler process could not be started: {error}")
            return
        self._reaper.own(process.channel.pid)
        self._processes.append(process)
        process.channel.send(self._setup)

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
        self._progress.began(begin.key, time.time())

    def _send_calls(self) -> None:
        self._send_handle = None
        for process in self._processes:
            if process.to_send:
                calls, process.to_send = process.to_send, []
                process.made += len(calls)
                process.channel.send(Calls(calls))

    # -- Answers -------------------------------------------------------------------------------------------------------

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
                process.channel.finish()
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
                due.channel.finish()
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
            process.channel.finish()
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
            process.channel.tell(TakeBack())

    def _end_head(self, process: _Process, call: int, number: signal.Signals) -> None:
        if number is signal.SIGTERM and process.outstanding[call].spec.type in self._async_types:
            process.channel.tell(CancelCall(call))
        else:
            process.signalled_for = call
            process.channel.signal(number)

    def _on_exit(self, process: _Process, status: int) -> None:
        """A process has ended: the call that it was making pays, and the others move on."""
        self._reaper.disown(process.channel.pid)
        self._processes.remove(process)
        begins = list(process.outstanding.values())
        for begin in begins:
            del self._numbers[begin.key]
        if begins:
            wanted = self._ending.pop(begins[0].key, None)
            if wanted is None and process.signalled_for not in (None, process.head):
                # It was to die for the sake of a call that had just ended: this one is not to blame.
                self._progress.ended(_unbegun(begins[0].key))
            else:
                self._progress.ended(_ended_with(begins[0].key, status, self._loop.time() - process.head_since))
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

    # -- Looking after -------------------------------------------------------------------------------------------------

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
                process.asked_back = process.channel.tell(TakeBack())
            if self._memory_max and process.channel.memory_bytes() > self._memory_max:
                self._retire(process)
            if now - process.head_since > LONG_S:
                process.channel.bound_output()
        if is_busy:
            self._look_handle = self._loop.call_later(LOOK_S, self._look)

    def _retire(self, process: _Process) -> None:
        """Replace a process: it goes on until another one is ready."""
        if not process.is_due:
            process.is_due = True
            self._fill_up()


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
