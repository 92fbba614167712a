"""Who waits for what: tells waiters when their tasks end, and event streams of every change.

Nothing here decides; it passes on what the node announces, which is durable by then.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from uuid import UUID

from taskd.api.cluster_types import EventView
from taskd.core.effects import AnnounceNode, Change, Superseded
from taskd.core.task import SUCCEEDED, TaskState, deciding_attempt, decode_record
from taskd.protocol.messages import TaskRow

BACKLOG_MAX = 10_000  # Events that a slow reader may be behind before it is let go.


class TaskWatch:
    """Waits for a set of tasks to end."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._open: set[bytes] = set()
        self._ended: list[Change] = []
        self._waiter: asyncio.Future[None] | None = None

    @property
    def open(self) -> int:
        """How many have not ended yet."""
        return len(self._open)

    def add_open(self, task_id: bytes) -> None:
        """Wait for a task that has not ended."""
        if task_id not in self._open:
            self._open.add(task_id)
            self._hub.subscribe(task_id, self)

    def add_ended(self, change: Change) -> None:
        """Report a task that has ended already."""
        self._ended.append(change)

    def on_ended(self, change: Change) -> None:
        """Called by the hub."""
        self._open.discard(change.id)
        self._ended.append(change)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self, timeout_s: float) -> list[Change]:
        """Those that ended since the last call, at least one; empty when the time is up or none is open."""
        if not self._ended and self._open and timeout_s > 0:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(timeout_s, _resolve, self._waiter)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Stop waiting."""
        for task_id in self._open:
            self._hub.unsubscribe(task_id, self)
        self._open.clear()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _Stream:
    """One reader of events."""

    def __init__(self) -> None:
        self.events: deque[EventView] = deque()
        self.wake = asyncio.Event()
        self.is_closed = False


class Hub:
    """All watches and streams of one daemon."""

    def __init__(self) -> None:
        self._watches: dict[bytes, list[TaskWatch]] = {}
        self._streams: set[_Stream] = set()
        self._leader_waiters: list[asyncio.Future[None]] = []

    def subscribe(self, task_id: bytes, watch: TaskWatch) -> None:
        """Have a watch told when this task ends."""
        self._watches.setdefault(task_id, []).append(watch)

    def unsubscribe(self, task_id: bytes, watch: TaskWatch) -> None:
        """Undo subscribe."""
        watches = self._watches.get(task_id)
        if watches is not None and watch in watches:
            watches.remove(watch)
            if not watches:
                del self._watches[task_id]

    def announce(self, changes: list[Change]) -> None:
        """Tell everyone concerned."""
        if self._watches:
            for change in changes:
                if change.state >= SUCCEEDED:
                    for watch in self._watches.pop(change.id, ()):
                        watch.on_ended(change)
        if self._streams:
            self._publish([_event(change) for change in changes])

    def announce_rows(self, rows: list[TaskRow]) -> None:
        """Tell everyone concerned of rows that another scheduler decided on."""
        watches = self._watches
        if self._streams:
            self.announce([change_of(row) for row in rows])
        elif watches:
            self.announce([change_of(row) for row in rows if row.id in watches])

    def announce_superseded(self, effect: Superseded, now_s: float) -> None:
        """Tell the streams that a task has ended otherwise than was told before."""
        if self._streams:
            detail = f"{_words(effect.after)}, not {_words(effect.before)} as was told before"
            self._publish([EventView("task.superseded", now_s, str(UUID(bytes=effect.id)), detail=detail)])

    def announce_node(self, effect: AnnounceNode, now_s: float) -> None:
        """Tell the streams of a node."""
        if self._streams:
            self._publish([EventView(effect.kind, now_s, node_id=effect.node_id, detail=effect.detail)])

    def _publish(self, events: list[EventView]) -> None:
        for stream in self._streams:
            stream.events.extend(events)
            if len(stream.events) > BACKLOG_MAX:
                stream.is_closed = True
                stream.events.clear()
            stream.wake.set()

    async def stream(self) -> AsyncIterator[EventView]:
        """Everything from now on. Ends when the reader is too far behind, or the hub closes."""
        stream = _Stream()
        self._streams.add(stream)
        try:
            while not stream.is_closed:
                await stream.wake.wait()
                stream.wake.clear()
                while stream.events:
                    yield stream.events.popleft()
        finally:
            self._streams.discard(stream)

    def end_streams(self) -> None:
        """End all streams, once what has happened is read."""
        for stream in self._streams:
            stream.is_closed = True
            stream.wake.set()

    def leader_changed(self) -> None:
        """Wake those who wait for a leader."""
        waiters, self._leader_waiters = self._leader_waiters, []
        for waiter in waiters:
            _resolve(waiter)

    async def wait_for_leader(self, timeout_s: float) -> None:
        """Until the leader has changed, or the time is up."""
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._leader_waiters.append(waiter)
        timer = loop.call_later(timeout_s, _resolve, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            if waiter in self._leader_waiters:
                self._leader_waiters.remove(waiter)

    def close(self) -> None:
        """End all streams and let the waiters go with what they have."""
        self.end_streams()
        for watches in list(self._watches.values()):
            for watch in list(watches):
                watch.close()
                if watch._waiter is not None:
                    _resolve(watch._waiter)
        self.leader_changed()


def change_of(row: TaskRow) -> Change:
    """What is to be told of a task, from its row."""
    record = decode_record(row.record)
    last = deciding_attempt(record)
    reason = record.reason
    if last is None:
        return Change(row.id, TaskState(row.state), row.changed_s, 0, 0, b"", reason)
    return Change(
        row.id, TaskState(row.state), row.changed_s, last.number, last.worker, last.report, reason or last.reason
    )  # fmt: skip


def _words(state: TaskState) -> str:
    return state.word.replace("_", " ")


def _event(change: Change) -> EventView:
    worker = change.worker or None
    return EventView(f"task.{change.state.word}", change.at_s, str(UUID(bytes=change.id)), worker, change.reason)
