"""Runs handlers: Python functions of the user's, in a pool of persistent processes, so that none of them ever runs in
the daemon.

Each process makes one call at a time. Where more calls come than there are processes, they wait in the processes, so
that short ones follow each other without waking the daemon; they are taken back from a process whose call turns out to
be long while another idles. A process that dies costs the one call that it was making an attempt: what had ended is
known (handler_page.py), what had not begun is begun elsewhere, and another process takes its place.

What a handler can do wrong, and what becomes of its call: it raises, or returns what is no JSON: `exception`. It ends
its process: `exit_nonzero`. It crashes it: `signal`, with the traceback in stderr. The kernel kills it for its memory:
`oom`. It does not end: TERM breaks it off where it is, and ends the process; an async one is cancelled. KILL ends the
process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Sequence
from heapq import heapify, heapreplace

from taskd.core.effects import Begin
from taskd.core.task import Outcome, Report
from taskd.protocol.messages import AttemptEnded, AttemptKey, AttemptStarted, HandlerInfo, Term
from taskd.runner.base import (
    STARTED_AFTER_S,
    OnProgress,
    Place,
    Progress,
    base_environment,
    ended,
    error_info,
    not_started,
)
from taskd.runner.capture import Trash, remove_tree
from taskd.runner.handler_calls import report_with
from taskd.runner.handler_child import Child
from taskd.runner.handler_fleet import Fleet, end_of, status_words
from taskd.runner.handler_messages import Done, Ready, Setup
from taskd.runner.handler_spawn import Joint, Launched, Spawned
from taskd.runner.launched import Launches
from taskd.runner.limits import OomCounter
from taskd.runner.reaper import Reaper

CHECK_S = STARTED_AFTER_S  # Between two looks at what processes do, while they do anything.
STUCK_S = 0.05  # A call that runs for so long is no reason to keep others waiting behind it.
STUCK_LOAD = 1000  # What it weighs, in calls, where a process is chosen.
START_SHARE_MAX = 0.01

_logger = logging.getLogger("taskd")


class HandlerPool:
    """The handlers of one worker; see `Kind` in base.py. `handlers` is known when it is open.

    `modules` are imported by each process, after the directories of `path` were put before its search path. A process
    is replaced after `calls_max` calls, but not while starting it took more than `start_share_max` of its life, so that
    replacing costs little however short the calls are; and when it takes more than `memory_max` bytes (0: no limit).
    With `launches` a launcher starts them, as another user.
    """

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
        start_share_max: float = START_SHARE_MAX,
        launches: Launches | None = None,
    ) -> None:
        self._place = place
        self._on_progress = on_progress
        self._progress = Progress(on_progress)  # of ends
        self._reaper = reaper
        self._launches = launches
        setup = Setup(tuple(modules), tuple(path), (), calls_max, memory_max, start_share_max)
        self._fleet = Fleet(self._start_child, setup, processes)
        self._oom = OomCounter()
        self._children_started = 0
        self._waiting: list[Begin] = []  # for a process that takes calls
        # Of the calls that processes have: those that are to end, and among them those that are to end by force.
        self._unwanted: set[AttemptKey] = set()
        self._doomed: set[AttemptKey] = set()
        self._checker: asyncio.TimerHandle | None = None
        self._is_closing = False

    @property
    def handlers(self) -> tuple[HandlerInfo, ...]:
        """What the processes can run."""
        return self._fleet.handlers

    @property
    def problems(self) -> tuple[str, ...]:
        """What could not be loaded, and why; logged, too."""
        return tuple(self._fleet.problems)

    async def open(self) -> None:
        """Load the modules, in processes. Those that cannot be loaded are left out. Raises OSError."""
        self._loop = asyncio.get_running_loop()
        self._directory = self._place.directory / "handlers"
        await asyncio.to_thread(remove_tree, str(self._directory))
        self._directory.mkdir(mode=0o700, parents=True)
        self._trash = Trash(f"{self._directory}/trash")
        os.mkdir(self._trash.directory, 0o700)
        self._environment = {
            **base_environment(self._place.inherited),
            "TASKD_SOCKET": self._place.socket,
            "TASKD_WORKER": self._place.worker,
        }
        try:
            await self._fleet.open()
        except BaseException:
            await self._fleet.close()
            await self._trash.close()
            raise
        for problem in self.problems:
            _say(logging.ERROR, "handlers are missing", reason=problem)

    async def close(self) -> None:
        """End by force what still runs, tell of it, and let go of everything."""
        self._is_closing = True
        waiting, self._waiting = self._waiting, []
        for begin in waiting:
            self._end_unbegun(begin)
        await self._fleet.close()
        await self._trash.close()
        for child in self._fleet.children:  # Killed, and held by the kernel.
            for begin in child.outstanding.values():
                problem = error_info("Unkillable", f"process {child.pid} was killed and does not end")
                self._progress.ended(ended(begin.key, Outcome.SIGNAL, Report(signal=signal.SIGKILL, error=problem)))
        if self._checker is not None:
            self._checker.cancel()
        self._progress.close()

    # -- Calls ---------------------------------------------------------------------------------------------------------

    def start(self, begins: list[Begin]) -> None:
        """Make these calls, or have them wait their turn: only when it begins is an attempt told as started."""
        children = [child for child in self._fleet.children if child.takes_calls]
        if not children:
            self._waiting += begins
            self._end_hopeless()
            return
        if self._checker is None:
            self._oom.look(time.monotonic())
            self._checker = self._loop.call_later(CHECK_S, self._check)
        lots: dict[Child, list[Begin]] = {child: [] for child in children}
        loads = [
            (len(child.outstanding) + child.is_stuck * STUCK_LOAD, place, lots[child])
            for place, child in enumerate(children)
        ]
        heapify(loads)
        for begin in begins:
            load, place, lot = loads[0]
            lot.append(begin)
            heapreplace(loads, (load + 1, place, lot))
        for child, lot in lots.items():
            if lot:
                child.send(lot)

    def terminate(self, key: AttemptKey) -> None:
        """Break a call off. One that has not begun never will."""
        found = self._find(key)
        if found is None:
            self._forget_waiting(key)
        else:
            child, number = found
            self._unwanted.add(key)
            child.terminate(number)

    def kill(self, key: AttemptKey) -> None:
        """End a call's process by force, with all that it has started. One that has not begun never will."""
        found = self._find(key)
        if found is None:
            self._forget_waiting(key)
            return
        child, number = found
        self._unwanted.add(key)
        if child.page.begun == number:
            child.kill(number)
        else:
            child.terminate(number)
            self._doomed.add(key)  # It may begin before the process hears of it.

    def _find(self, key: AttemptKey) -> tuple[Child, int] | None:
        for child in self._fleet.children:
            for number, begin in child.outstanding.items():
                if begin.key.task_id == key.task_id and begin.key == key:
                    return child, number
        return None

    def _forget_waiting(self, key: AttemptKey) -> None:
        for place, begin in enumerate(self._waiting):
            if begin.key == key:
                del self._waiting[place]
                self._end_unbegun(begin)
                return

    def _start_again(self, begins: list[Begin]) -> None:
        """Calls that a process has given back or left behind, unbegun."""
        wanted: list[Begin] = []
        for begin in begins:
            if self._is_closing or begin.key in self._unwanted:
                self._end_unbegun(begin)
            else:
                wanted.append(begin)
        if wanted:
            self.start(wanted)

    def _start_waiting(self) -> None:
        if self._waiting:
            begins, self._waiting = self._waiting, []
            self.start(begins)

    # -- What processes say --------------------------------------------------------------------------------------------

    def on_done(self, child: Child, done: list[Done]) -> None:
        """Calls have ended."""
        child.is_proved = True
        outstanding, tell, unwanted = child.outstanding, self._progress.ended, self._unwanted
        for it in done:
            begin = outstanding.pop(it.number, None)
            if begin is not None:
                if unwanted:
                    self._forget_wishes(begin.key)
                tell(AttemptEnded(begin.key, it.outcome, it.started_s, it.ended_s, it.report))
        if child.is_leaving and not outstanding:
            child.leave()

    def on_ready(self, child: Child, ready: Ready) -> None:
        """A process can be given calls."""
        if self.handlers and {it.type for it in ready.handlers} != {it.type for it in self.handlers}:
            why = "; ".join(ready.problems) or "modules have changed: restart the worker"
            _say(logging.WARNING, "a new handler process has other handlers than the first", reason=why)
        self._fleet.on_ready(child, ready)
        self._start_waiting()

    def on_taken(self, child: Child, begins: list[Begin]) -> None:
        """A process has given calls back."""
        self._start_again(begins)
        if child.is_leaving and not child.outstanding:
            child.leave()

    def on_dropped(self, child: Child, begin: Begin) -> None:
        """A call ended before it began, as wanted."""
        self._end_unbegun(begin)

    def on_tired(self, child: Child, is_urgent: bool) -> None:
        """A process wants to be replaced."""
        self._fleet.on_tired(child, is_urgent)

    def on_exit(self, child: Child) -> None:
        """A process is gone: the call that it was making has ended with it, those behind it go to others."""
        begun = child.page.begun
        culprit = child.outstanding.pop(begun, None)
        if culprit is not None:
            child.is_proved = True  # It is the call that took it down.
            self._forget_wishes(culprit.key)
            self._progress.ended(self._ended_with(child, begun, culprit))
        elif child.status != 0 and child.is_ready and not self._is_closing:
            _say(logging.WARNING, "an idle handler process has ended", process=child.pid, reason=end_of(child))
        self._fleet.on_exit(child)
        begins = list(child.outstanding.values())
        child.outstanding.clear()
        if begins:
            self._start_again(begins)
        self._end_hopeless()

    # -- Ends ----------------------------------------------------------------------------------------------------------

    def _ended_with(self, child: Child, number: int, begin: Begin) -> AttemptEnded:
        """The end of the call that a process was making when it died."""
        status = child.status
        written = child.written()
        if child.killed_for is not None and child.killed_for != number and not self._is_closing:
            problem = error_info("ProcessKilled", "its process was ended for the sake of a call that had just ended")
            return ended(begin.key, Outcome.LOST, report_with(written, error=problem), child.page.started_s)
        problem = error_info("ProcessEnded", f"the process that ran the handler is gone: {status_words(status)}")
        report = report_with(
            written,
            error=problem,
            exit_code=status if status >= 0 else None,
            signal=-status if status < 0 else None,
        )
        if status >= 0:
            outcome = Outcome.EXIT_NONZERO  # Also 0: whatever it says, it returned nothing.
        else:
            is_for_memory = status == -signal.SIGKILL and child.killed_for is None and self._oom.has_risen()
            outcome = Outcome.OOM if is_for_memory else Outcome.SIGNAL
        return ended(begin.key, outcome, report, child.page.started_s)

    def _end_unbegun(self, begin: Begin) -> None:
        self._forget_wishes(begin.key)
        self._progress.ended(ended(begin.key, Outcome.PREEMPTED, Report()))

    def _end_hopeless(self) -> None:
        """Where no process can be started, whoever waits for one is told."""
        if not self.handlers:
            why = "this worker has no handlers"
        elif self._fleet.is_hopeless:
            why = self._fleet.last_failure
        else:
            return
        waiting, self._waiting = self._waiting, []
        for begin in waiting:
            self._progress.ended(not_started(begin.key, error_info("NoHandler", why)))

    def _forget_wishes(self, key: AttemptKey) -> None:
        self._unwanted.discard(key)
        self._doomed.discard(key)

    # -- Looking after -------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """While calls run: tell of those that have begun, take back what waits behind long ones, and end what would not
        end."""
        now_s = time.time()
        self._oom.look(time.monotonic())
        has_idle = any(child.takes_calls and not child.outstanding for child in self._fleet.children)
        started: list[AttemptStarted] = []
        is_busy = False
        for child in self._fleet.children:
            number = child.page.begun
            begin = child.outstanding.get(number)
            is_busy |= bool(child.outstanding)
            child.is_stuck = False
            if begin is None:
                continue  # Nothing was begun that is not known to have ended.
            began_s = child.page.started_s
            if number != child.told_as_started and now_s - began_s >= STARTED_AFTER_S:
                child.told_as_started = number
                started.append(AttemptStarted(begin.key, began_s))
            if now_s - began_s >= STUCK_S:
                child.is_stuck = True
                if has_idle and len(child.outstanding) > 1:
                    child.take_back()
        for key in tuple(self._doomed):
            self.kill(key)
        self._checker = self._loop.call_later(CHECK_S, self._check) if is_busy else None
        if started:
            self._on_progress(started, [])

    def _start_child(self, setup: Setup) -> Child:
        self._children_started += 1
        mark = f"{self._place.worker}.{self._children_started}"
        process: Joint
        if self._launches is None:
            process = Spawned(self._directory, self._environment, mark, self._reaper, self._trash)
        else:
            # Named like an attempt, since that is what a launcher knows: no task has such an id.
            key = AttemptKey(self._children_started.to_bytes(16, "big"), 1, Term(0, 0, 0), 0)
            process = Launched(self._launches, self._environment, mark, key)
        return Child(self, process, setup)


def _say(level: int, event: str, **fields: object) -> None:
    _logger.log(level, event, extra={"fields": fields})
