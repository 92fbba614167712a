"""The shell around the pure node: tells it what happened, and does what it asks for, once a turn of the event loop.

Everything that happens in one turn is told first and acted on together: one commit, one write a peer, one wake-up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

from taskd.core import effects as fx
from taskd.core import events as ev
from taskd.core.node import Node
from taskd.core.stats import Histogram
from taskd.daemon.hub import Hub
from taskd.daemon.logs import log
from taskd.errors import StoreError, TaskdError, Unavailable
from taskd.protocol.messages import AttemptEnded, AttemptKey, AttemptStarted, Message, Term
from taskd.store.base import Store

CLOCK_CHECK_S = 0.5
CLOCK_STEP_S = 0.05  # UTC that moved further than this against the monotonic clock was set by somebody.
JOURNAL_SYNC_S = 0.5  # Outcomes that no leader has taken for so long are made safe against a crash of the machine.


def monotonic() -> float:
    """Seconds on a clock that never goes back and counts suspend."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Sender(Protocol):
    """The way to other nodes."""

    def send(self, node_id: int, message: Message) -> bool: ...


class TaskRunner(Protocol):
    """The way to task processes."""

    def start(self, begins: list[fx.Begin]) -> None: ...
    def terminate(self, key: AttemptKey) -> None: ...
    def kill(self, key: AttemptKey) -> None: ...


class OutcomeJournal(Protocol):
    """The worker's memory of outcomes."""

    def append(self, records: fx.Journal) -> None: ...
    async def sync(self) -> None: ...


class Shell:
    """Joins one Node to its worlds. Owns the clock, the commit in flight, and the calls that wait for an answer."""

    def __init__(self, node: Node, hub: Hub, store: Store | None, journal: OutcomeJournal | None) -> None:
        self.node = node
        self.hub = hub
        self.store = store
        self.journal = journal
        self.mesh: Sender | None = None
        self.runner: TaskRunner | None = None
        self.leader: int | None = None
        self.term: Term | None = None
        self.loop_lag = Histogram()
        self.commit_seconds = Histogram()
        self.exited: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self._turn_is_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._commits: asyncio.Queue[fx.Commit] = asyncio.Queue(1)
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._last_call = 0
        self._unsynced_since: float | None = None
        self._utc_offset_s = 0.0
        self._do: dict[type[fx.Effect], Callable[[Any], None]] = {
            fx.Send: self._send,
            fx.Commit: self._commits.put_nowait,
            fx.Reply: self._reply,
            fx.Announce: lambda effect: hub.announce(effect.changes),
            fx.AnnounceNode: lambda effect: hub.announce_node(effect, self.utc()),
            fx.Start: self._start,
            fx.Terminate: self._terminate,
            fx.Kill: self._kill,
            fx.Journal: self._write_journal,
            fx.Log: lambda effect: log(effect.level, effect.event, **effect.fields),
            fx.Follow: self._follow,
            fx.Exit: self._exit,
        }
        self._read_clock()

    # -- In ------------------------------------------------------------------------------------------------------------

    def tell(self, event: ev.Event) -> None:
        """Tell the node what happened; what follows is done before the loop waits again."""
        self.node.handle(event, monotonic())
        if not self._turn_is_due:
            self._turn_is_due = True
            self._loop.call_soon(self._turn)

    def progressed(self, started: list[AttemptStarted], ended: list[AttemptEnded]) -> None:
        """The runners' word."""
        self.tell(ev.Progressed(started, ended))

    async def ask(self, make: Callable[[int], ev.Event]) -> Any:
        """Tell the node of a client's wish and wait for the Reply. Raises the TaskdError it answers with."""
        if self.exited.done():
            raise Unavailable("this daemon is stopping")
        self._last_call += 1
        call = self._last_call
        future = self._calls[call] = self._loop.create_future()
        try:
            self.tell(make(call))
            return await future
        finally:
            self._calls.pop(call, None)

    def utc(self) -> float:
        """UTC as the node counts it."""
        return monotonic() + self._utc_offset_s

    # -- Out -----------------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        self._turn_is_due = False
        now = monotonic()
        do = self._do
        for effect in self.node.take_effects(now):
            do[type(effect)](effect)
        self._set_timer(now)

    def _set_timer(self, now: float) -> None:
        due = self.node.next_deadline(now)
        if due is None:
            due = float("inf")
        if due == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = due
        if due != float("inf"):
            self._timer = self._loop.call_later(max(0.0, due - now), self._on_timer)

    def _on_timer(self) -> None:
        self._timer, self._timer_at = None, float("inf")
        self.tell(ev.Ticked())

    def _send(self, effect: fx.Send) -> None:
        assert self.mesh is not None
        self.mesh.send(effect.node_id, effect.message)

    def _reply(self, effect: fx.Reply) -> None:
        future = self._calls.get(effect.call)
        if future is None or future.done():
            return  # The client has gone.
        if isinstance(effect.answer, TaskdError):
            future.set_exception(effect.answer)
        else:
            future.set_result(effect.answer)

    def _start(self, effect: fx.Start) -> None:
        assert self.runner is not None
        self.runner.start(effect.attempts)

    def _terminate(self, effect: fx.Terminate) -> None:
        assert self.runner is not None
        self.runner.terminate(effect.key)

    def _kill(self, effect: fx.Kill) -> None:
        assert self.runner is not None
        self.runner.kill(effect.key)

    def _write_journal(self, effect: fx.Journal) -> None:
        assert self.journal is not None
        try:
            self.journal.append(effect)
        except (OSError, StoreError) as error:
            # Outcomes are in memory and on their way to the leader; only a crash right now would cost a second run.
            log("error", "the journal cannot be written", reason=str(error))
        if effect.ended and self._unsynced_since is None:
            self._unsynced_since = monotonic()

    def _follow(self, effect: fx.Follow) -> None:
        self.leader, self.term = effect.leader, effect.term
        self.hub.leader_changed()

    def _exit(self, effect: fx.Exit) -> None:
        if not self.exited.done():
            self.exited.set_result((effect.status, effect.reason))

    # -- Long-lived work -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Write commits, watch the clock, keep the journal safe; until cancelled."""
        async with asyncio.TaskGroup() as group:
            if self.store is not None:
                group.create_task(self._write_commits(self.store))
            group.create_task(self._watch_clock())

    async def _write_commits(self, store: Store) -> None:
        while True:
            commit = await self._commits.get()
            begun = time.perf_counter()
            try:
                await store.commit(commit)
            except StoreError as error:
                self.tell(ev.CommitFailed(commit.seq, str(error)))
            else:
                self.commit_seconds.observe(time.perf_counter() - begun)
                self.tell(ev.Committed(commit.seq))

    async def _watch_clock(self) -> None:
        while True:
            due = self._loop.time() + CLOCK_CHECK_S
            await asyncio.sleep(CLOCK_CHECK_S)
            self.loop_lag.observe(max(0.0, self._loop.time() - due))
            self._read_clock()
            await self._sync_journal()

    def _read_clock(self) -> None:
        offset_s = time.time() - monotonic()
        if abs(offset_s - self._utc_offset_s) > CLOCK_STEP_S:
            self._utc_offset_s = offset_s
            self.tell(ev.ClockRead(offset_s))

    async def _sync_journal(self) -> None:
        worker = self.node.worker
        if self._unsynced_since is None or worker is None or self.journal is None:
            return
        if not worker.unacknowledged_count:
            self._unsynced_since = None
        elif monotonic() - self._unsynced_since > JOURNAL_SYNC_S:
            self._unsynced_since = None
            try:
                await self.journal.sync()
            except (OSError, StoreError) as error:
                log("error", "the journal cannot be made safe", reason=str(error))

    def close(self) -> None:
        """Whoever still waits for an answer gets one."""
        for future in self._calls.values():
            if not future.done():
                future.set_exception(Unavailable("this daemon is stopping"))
        if self._timer is not None:
            self._timer.cancel()
