"""The shell around the pure node: tells it what happened, and does what it asks for, once a turn of the event loop.

Everything that happens in one turn is told first and acted on together: one commit, one write a peer, one wake-up.
A bug in the node, or in the doing, ends the process before anything else leaves it: the next one reads the truth.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, Protocol

from msgspec import Struct

from taskd import failpoints
from taskd.core import effects as fx
from taskd.core import events as ev
from taskd.core.node import Node
from taskd.core.stats import Histogram
from taskd.daemon.hub import Hub
from taskd.daemon.ids import NO_ID
from taskd.daemon.logs import log, log_bug
from taskd.daemon.reading import READS, Readings
from taskd.errors import Overloaded, Stopping, StoreError, TaskdError
from taskd.protocol.messages import AttemptEnded, AttemptKey, AttemptStarted, Message, TaskRow, Term
from taskd.store.base import Store

CLOCK_CHECK_S = 0.5
CLOCK_STEP_S = 0.05  # UTC that moved further than this against the monotonic clock was set by somebody.
STALL_S = 1.25  # By default.
JOURNAL_SYNC_S = 0.5  # Outcomes that no leader has taken for so long are made safe against a crash of the machine.

_id_of: Callable[[TaskRow], bytes] = attrgetter("id")


def monotonic() -> float:
    """Seconds on a clock that never goes back and counts suspend."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Sender(Protocol):
    """The way to other nodes."""

    def send(self, node_id: int, message: Message) -> bool: ...
    def disconnect(self, node_id: int, reason: str) -> None: ...


class TaskRunner(Protocol):
    """The way to task processes."""

    def start(self, begins: list[fx.Begin]) -> None: ...
    def terminate(self, key: AttemptKey) -> None: ...
    def kill(self, key: AttemptKey) -> None: ...


class OutcomeJournal(Protocol):
    """The worker's memory of outcomes."""

    def append(self, records: fx.Journal) -> None: ...
    async def sync(self) -> None: ...


class Answered(Struct, frozen=True):
    """The answer to a call, and how what it promises is kept: "local", "replicated", or nothing where it promises
    nothing."""

    value: Any
    durability: str


class Shell:
    """Joins one Node to its worlds. Owns the clock, the commit in flight, and the calls that wait for an answer."""

    def __init__(
        self,
        node: Node,
        hub: Hub,
        store: Store | None,
        journal: OutcomeJournal | None,
        newest_id: bytes = NO_ID,
        stall_s: float = STALL_S,
    ) -> None:
        """`newest_id`: no task that the store has comes after it. `stall_s`: who stood still for longer looks around
        before deciding anything; half of the time after which peers take a silent one for dead."""
        self.node = node
        self.hub = hub
        self.store = store
        self.journal = journal
        self.mesh: Sender | None = None
        self.runner: TaskRunner | None = None
        self.leader: int | None = None
        self.term: Term | None = None
        self.leaderless_since = monotonic()  # of use while nobody leads
        self.is_stopping = False
        self.newest_id = newest_id
        self._stall_s = stall_s
        self.loop_lag = Histogram()
        self.commit_seconds = Histogram()
        self.exited: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self._alive_at = float("inf")  # when the loop last showed that it turns; it is watched once it runs
        self._is_broken = False
        self._turn_is_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._commits: asyncio.Queue[fx.Commit] = asyncio.Queue(1)
        self._readings = Readings(store, self.tell) if store is not None else None
        self._calls: dict[int, asyncio.Future[Answered]] = {}
        self._last_call = 0
        self._commit_begun: float | None = None  # of the one under way
        self._journal_fails = False
        self._unsynced_since: float | None = None
        self._utc_offset_s = 0.0
        self._do: dict[type[fx.Effect], Callable[[Any], None]] = {
            fx.Send: self._send_watched if os.environ.get(failpoints.VARIABLE) else self._send,
            fx.Disconnect: self._disconnect,
            fx.Commit: self._commit,
            fx.Reply: self._reply,
            fx.Announce: lambda effect: hub.announce(effect.changes),
            fx.AnnounceRows: lambda effect: hub.announce_rows(effect.rows),
            fx.AnnounceNode: lambda effect: hub.announce_node(effect, self.utc()),
            fx.Superseded: lambda effect: hub.announce_superseded(effect, self.utc()),
            fx.Start: self._start,
            fx.Terminate: self._terminate,
            fx.Kill: self._kill,
            fx.Journal: self._write_journal,
            fx.Log: lambda effect: log(effect.level, effect.event, **effect.fields),
            fx.Follow: self._follow,
            fx.Exit: lambda effect: self._exit(effect.status, effect.reason),
        }
        if self._readings is not None:
            self._do.update(dict.fromkeys(READS, self._readings.want))
        self._read_clock()

    # -- In ------------------------------------------------------------------------------------------------------------

    def tell(self, event: ev.Event) -> None:
        """Tell the node what happened; what follows is done before the loop waits again."""
        if self._is_broken:
            return
        now = monotonic()
        stood_still_s = now - self._alive_at
        if stood_still_s >= 0:
            self._alive_at = now
        try:
            if stood_still_s > self._stall_s:
                self.node.handle(ev.Stalled(stood_still_s), now)
            self.node.handle(event, now)
        except Exception as error:
            self._break(error)
            return
        if not self._turn_is_due:
            self._turn_is_due = True
            self._loop.call_soon(self._turn)

    def progressed(self, started: list[AttemptStarted], ended: list[AttemptEnded]) -> None:
        """The runners' word."""
        self.tell(ev.Progressed(started, ended))

    def store_lost(self, reason: str) -> None:
        """The store writes no more: nothing can be promised."""
        self._exit(1, reason)

    def stop(self, grace_s: float) -> None:
        """Stop in good order; `exited` tells when that is done."""
        self.is_stopping = True
        self.tell(ev.StopWanted(grace_s))

    async def ask(self, make: Callable[[int], ev.Event]) -> Answered:
        """Tell the node of a client's wish and wait for the Reply. Raises the TaskdError it answers with, Stopping."""
        if self.exited.done():
            raise Stopping()
        self._last_call += 1
        call = self._last_call
        future: asyncio.Future[Answered] = self._loop.create_future()
        self._calls[call] = future
        try:
            self.tell(make(call))
            return await future
        finally:
            self._calls.pop(call, None)

    def utc(self) -> float:
        """UTC as the node counts it."""
        return monotonic() + self._utc_offset_s

    def commit_age_s(self) -> float:
        """Since when the commit under way is: 0 where none is."""
        return monotonic() - self._commit_begun if self._commit_begun is not None else 0.0

    # -- Out -----------------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        self._turn_is_due = False
        if self._is_broken:
            return
        now = monotonic()
        do = self._do
        try:
            for effect in self.node.take_effects(now):
                do[type(effect)](effect)
            self._set_timer(now)
        except Exception as error:
            self._break(error)

    def _break(self, error: Exception) -> None:
        self._is_broken = True
        log_bug("a bug ends this process: please report it", error)
        self._exit(1, f"a bug: {error!r}")

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

    def _send_watched(self, effect: fx.Send) -> None:
        name = type(effect.message).__name__
        failpoints.hit(f"send.before.{name}")
        self._send(effect)
        # The mesh writes at the end of this turn of the loop, and uvloop at the end of the next.
        after = partial(failpoints.hit, f"send.after.{name}")
        self._loop.call_soon(lambda: self._loop.call_soon(lambda: self._loop.call_soon(after)))

    def _disconnect(self, effect: fx.Disconnect) -> None:
        assert self.mesh is not None
        self.mesh.disconnect(effect.node_id, effect.reason)

    def _commit(self, effect: fx.Commit) -> None:
        for rows in (effect.inserted, effect.taken):
            if rows:
                self.newest_id = max(self.newest_id, *map(_id_of, rows))
        self._commits.put_nowait(effect)

    def _reply(self, effect: fx.Reply) -> None:
        future = self._calls.get(effect.call)
        if future is None or future.done():
            return  # The client has gone.
        if isinstance(effect.answer, TaskdError):
            future.set_exception(effect.answer)
        else:
            future.set_result(Answered(effect.answer, effect.durability))

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
        failpoints.hit("journal.before")
        try:
            self.journal.append(effect)
        except (OSError, StoreError) as error:
            # Outcomes are in memory and on their way to the leader; only a crash right now would cost a second run.
            if not self._journal_fails:
                log("error", "the journal cannot be written", reason=str(error))
            self._journal_fails = True
        else:
            if self._journal_fails:
                log("info", "the journal can be written again")
            self._journal_fails = False
        failpoints.hit("journal.after")
        if effect.ended and self._unsynced_since is None:
            self._unsynced_since = monotonic()

    def _follow(self, effect: fx.Follow) -> None:
        has_led = self.leader == self.node.info.node_id != effect.leader
        if effect.leader is None and self.leader is not None:
            self.leaderless_since = monotonic()
        self.leader, self.term = effect.leader, effect.term
        self.hub.leader_changed()
        if has_led:
            self.hub.end_streams()  # The next leader has the news from now on.

    def _exit(self, status: int, reason: str) -> None:
        if not self.exited.done():
            self.exited.set_result((status, reason))

    # -- Long-lived work -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Write commits, read what is asked for, watch the clock, keep the journal safe; until cancelled."""
        self._alive_at = monotonic()
        async with asyncio.TaskGroup() as group:
            if self.store is not None:
                assert self._readings is not None
                group.create_task(self._write_commits(self.store))
                group.create_task(self._readings.run())
            if self.journal is not None:
                group.create_task(self._keep_journal_safe(self.journal))
            group.create_task(self._watch_clock())

    async def _write_commits(self, store: Store) -> None:
        while True:
            commit = await self._commits.get()
            begun = time.perf_counter()
            self._commit_begun = monotonic()
            failpoints.hit("commit.before")
            try:
                await store.commit(commit)
            except (StoreError, Overloaded) as error:
                self.tell(ev.CommitFailed(commit.seq, error.message))
            else:
                failpoints.hit("commit.after")
                self.commit_seconds.observe(time.perf_counter() - begun)
                self.tell(ev.Committed(commit.seq))
            self._commit_begun = None

    async def _watch_clock(self) -> None:
        while True:
            due = self._loop.time() + CLOCK_CHECK_S
            await asyncio.sleep(CLOCK_CHECK_S)
            self.loop_lag.observe(max(0.0, self._loop.time() - due))
            if monotonic() - self._alive_at > self._stall_s:
                self.tell(ev.Ticked())  # Which tells that it stood still.
            self._alive_at = monotonic()
            self._read_clock()

    def _read_clock(self) -> None:
        offset_s = time.time() - monotonic()
        if abs(offset_s - self._utc_offset_s) > CLOCK_STEP_S:
            self._utc_offset_s = offset_s
            self.tell(ev.ClockRead(offset_s))

    async def _keep_journal_safe(self, journal: OutcomeJournal) -> None:
        worker = self.node.worker
        assert worker is not None
        while True:
            await asyncio.sleep(CLOCK_CHECK_S)
            if self._unsynced_since is None:
                continue
            if not worker.unacknowledged_count:
                self._unsynced_since = None
            elif monotonic() - self._unsynced_since > JOURNAL_SYNC_S:
                self._unsynced_since = None
                failpoints.hit("journal.sync.before")
                try:
                    await journal.sync()
                except (OSError, StoreError) as error:
                    log("error", "the journal cannot be made safe", reason=str(error))
                failpoints.hit("journal.sync.after")

    def close(self) -> None:
        """Whoever still waits for an answer gets one."""
        for future in self._calls.values():
            if not future.done():
                future.set_exception(Stopping())
        if self._timer is not None:
            self._timer.cancel()
