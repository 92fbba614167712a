"""Where the leader's unfinished tasks are: in memory, which queue or calendar knows them, or on the disk alone.

Of many tasks that wait, for a worker or for their time, most are on the disk alone. They come back when it is their
turn, or when somebody wants something of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

from msgspec import Struct

from taskd.core.backlog import ENTRY_BYTES, Backlog, due_of
from taskd.core.calendar import Calendar, Due
from taskd.core.counts import Counts
from taskd.core.outbox import Outbox
from taskd.core.queue import PAGE_TASKS, ReadyQueue, Shape
from taskd.core.task import CANCELLED, QUEUED, RETRYING, SCHEDULED, SUCCEEDED, Task, TaskState, decode_spec
from taskd.protocol.messages import TaskRow

PAGES_AT_ONCE = 4  # Readings of pages under way; of more shapes than these hold, the others wait for the next ones.

_DELAYED = (SCHEDULED, RETRYING)


class Wanted(Struct, frozen=True):
    """Rows that are to be read, by ids; `then` is told those that exist, and UTC."""

    ids: list[bytes]
    then: Callable[[list[TaskRow], float], None]


class Holdings(ABC):
    """All unfinished tasks. `window`: how many of those that wait are in memory, of each shape, and of those that wait
    for their time."""

    def __init__(self, outbox: Outbox, window: int) -> None:
        self.tasks: dict[bytes, Task] = {}  # those in memory
        self.counts = Counts()  # of all
        self.queue = ReadyQueue(window)
        self._calendar = Calendar(window)
        self._outbox = outbox
        self._pages_coming = 0  # readings

    @abstractmethod
    def _on_due(self, kind: Due, task_id: bytes, now_s: float) -> None:
        """The time of a task has come, which may have ended meanwhile."""

    @abstractmethod
    def _finish(self, task: Task, state: TaskState, now_s: float, reason: str = "") -> None:
        """A task has ended."""

    def __len__(self) -> int:
        """How many tasks are unfinished."""
        return self.counts.total

    def load(self, backlog: Backlog, now_s: float) -> list[Task]:
        """Take in unfinished tasks from the store; returns those with an attempt still open."""
        open_tasks = []
        for row in backlog.rows:
            task = Task.from_row(row)
            self._take_in(task, now_s)
            if task.key is not None:
                open_tasks.append(task)
        for ready in backlog.ready:
            self.queue.load(decode_spec(ready.spec), ready.entries)
            self.counts.add(QUEUED, ready.queue, len(ready.entries) // ENTRY_BYTES)
        for delayed in backlog.delayed:
            self._calendar.load(Due.READY, delayed.entries)
            self.counts.add(TaskState(delayed.state), delayed.queue, len(delayed.entries) // ENTRY_BYTES)
        self._calendar.load(Due.TOO_LATE, backlog.deadlines)
        return open_tasks

    def _take_in(self, task: Task, now_s: float) -> None:
        """Have an unfinished task in memory, where its state belongs: the queue, or the calendar."""
        self.tasks[task.id] = task
        self.counts.add(task.state, task.spec.queue)
        self._index(task)
        if task.key is not None:
            task.shape = self.queue.shape_of(task.spec)
        elif task.record.cancel_wanted:
            # One leader wanted it cancelled while the attempt of another ended: nothing is open any more.
            self._finish(task, CANCELLED, now_s)

    def _index(self, task: Task) -> None:
        if task.state is QUEUED:
            self.queue.push(task)
        elif task.state in _DELAYED:
            self._calendar.set(Due.READY, task.id, task.record.due_s)
        self._set_deadline(task)

    # -- On the disk alone ---------------------------------------------------------------------------------------------

    @property
    def has_cold(self) -> bool:
        """Whether some of the tasks are not in memory."""
        return len(self) > len(self.tasks)

    @property
    def could_chill(self) -> bool:
        """Whether tasks are in memory that could be on the disk alone, once they are durable."""
        return bool(self.queue.spilling) or self._calendar.is_crowded

    def chill(self) -> None:
        """Let go of tasks that are durable and whose turn is far off."""
        for task in self.queue.chill(self._is_durable):
            self._calendar.chill(task.id)
            del self.tasks[task.id]
        for task_id in self._calendar.pop_far(self._may_chill):
            del self.tasks[task_id]

    def _is_durable(self, task_id: bytes) -> bool:
        return task_id not in self._outbox

    def _may_chill(self, task_id: bytes) -> bool:
        return task_id not in self._outbox and self.tasks[task_id].state in _DELAYED

    def warm(self, row: TaskRow) -> Task | None:
        """Have a task in memory that is on the disk alone, as it is there; None where it is not one of those."""
        if row.id in self.tasks or row.state >= SUCCEEDED:
            return None
        task = Task.from_row(row)
        if not self._is_taken_from_disk(task):
            return None
        self.tasks[task.id] = task
        self._index(task)
        return task

    def _is_taken_from_disk(self, task: Task) -> bool:
        """Nothing of a task is left where those on the disk alone are remembered; False where it was not there."""
        if task.state is QUEUED:
            was_cold = self.queue.warm(task.spec, task.id)
        else:
            was_cold = task.state in _DELAYED and self._calendar.warm(Due.READY, task.id, task.record.due_s)
        if was_cold and task.spec.deadline_s:
            self._calendar.warm(Due.TOO_LATE, task.id, task.spec.deadline_s)
        return was_cold

    def looked_up(self, row: TaskRow) -> Task:
        """A task that is on the disk alone, to be looked at only."""
        task = Task.from_row(row)
        task.shape = self.queue.shape_of(task.spec)
        return task

    def wanted(self, now_s: float) -> list[Wanted]:
        """What is to be read from the disk now, however many shapes there are no more than a few readings at a time;
        `then` is told the rows, and UTC."""
        if not self.queue.hungry and not self._calendar.has_far:
            return []
        wanted = []
        while self.queue.hungry and self._pages_coming < PAGES_AT_ONCE:
            pages = self.queue.next_pages(PAGE_TASKS)
            if pages:  # Otherwise the next tasks of those shapes were in memory yet.
                self._pages_coming += 1
                ids = [due_of(entry)[1] for _, page in pages for entry in page]
                wanted.append(Wanted(ids, partial(self._arrived, pages)))
        due = self._calendar.take_far(now_s)
        if due:
            ids = sorted({task_id for _, task_id in due})
            wanted.append(Wanted(ids, partial(self._came_due, due)))
        return wanted

    def _arrived(self, pages: list[tuple[Shape, list[bytes]]], rows: list[TaskRow], now_s: float) -> None:
        """The next pages of some shapes were read."""
        self._pages_coming -= 1
        tasks = {row.id: Task.from_row(row) for row in rows}
        for shape, page in pages:
            found = [tasks[task_id] for entry in page if (task_id := due_of(entry)[1]) in tasks]
            for task in self.queue.arrived(shape, page, found):
                self.tasks[task.id] = task
                if task.spec.deadline_s:
                    self._calendar.warm(Due.TOO_LATE, task.id, task.spec.deadline_s)
                self._set_deadline(task)

    def _came_due(self, due: list[tuple[Due, bytes]], rows: list[TaskRow], now_s: float) -> None:
        """Tasks were read whose time has come."""
        found = {row.id: row for row in rows}
        for kind, task_id in due:
            # One that was wanted in memory meanwhile is in the calendar as such.
            if not self._calendar.came(kind, task_id) or task_id not in found:
                continue
            if kind is Due.READY:
                task = self.tasks[task_id] = Task.from_row(found[task_id])
                self._calendar.warm(Due.TOO_LATE, task_id, task.spec.deadline_s)
                self._set_deadline(task)
            else:
                self.warm(found[task_id])
            self._on_due(kind, task_id, now_s)

    def adopt(self, row: TaskRow, *, is_new: bool, now_s: float) -> Task:
        """Go on from what several leaders have made of a task: it is written as it stands in `row`."""
        task = self.tasks.get(row.id)
        fresh = Task.from_row(row)
        if task is None:
            task = fresh
        else:
            self.take_out(task)
            task.state, task.record, task.key = fresh.state, fresh.record, fresh.key
            task.changed_s, task.finished_s = fresh.changed_s, fresh.finished_s
        if is_new:
            self._outbox.insert(task)
        else:
            self._outbox.update(task)
        if task.state < SUCCEEDED:
            self._take_in(task, now_s)
        return task

    def take_out(self, task: Task) -> None:
        """Forget where a task is."""
        if task.state is QUEUED:
            self.queue.remove(task)
        self._calendar.clear(Due.READY, task.id)
        self._calendar.clear(Due.TOO_LATE, task.id)
        del self.tasks[task.id]
        self.counts.add(task.state, task.spec.queue, -1)

    def _move(self, task: Task, state: TaskState, now_s: float) -> None:
        """Change a task's state, and count it there."""
        before = task.state
        task.move(state, now_s)
        counts = self.counts.of(task.spec.queue)
        counts[before] -= 1
        if state < SUCCEEDED:
            counts[state] += 1
        else:
            self.counts.total -= 1

    def _set_deadline(self, task: Task) -> None:
        """Only a task that has not begun can be too late; one that was given back unstarted still can."""
        deadline_s = task.spec.deadline_s
        if deadline_s and not task.record.may_have_begun:
            self._calendar.set(Due.TOO_LATE, task.id, deadline_s)

    # -- Time ----------------------------------------------------------------------------------------------------------

    def next_deadline_s(self) -> float | None:
        """When something is due next, UTC."""
        return self._calendar.next()

    def tick(self, now_s: float) -> None:
        """Do what is due."""
        for kind, task_id in self._calendar.pop_due(now_s):
            self._on_due(kind, task_id, now_s)
