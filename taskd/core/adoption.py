"""What workers already run when they come to a new leader: some of it for leaders that this one knows nothing of yet.

Nobody's work is thrown away for not being known: an attempt whose making we have not seen waits until its leader's
rows are here. One whose making we have seen and that is not the task's open attempt is not wanted any more.
"""

from __future__ import annotations

from collections.abc import Callable

from taskd.core.ledger import Ledger
from taskd.core.outbox import Outbox
from taskd.core.roster import Roster, Worker
from taskd.core.task import Task, TaskState
from taskd.protocol.messages import AttemptKey, Dot, TaskRow


class Adoption:
    """The leader's tasks and workers, where other leaders have had a hand in them. A merger's Target."""

    def __init__(self, ledger: Ledger, roster: Roster, outbox: Outbox, utc: Callable[[float], float]) -> None:
        self._ledger = ledger
        self._roster = roster
        self._outbox = outbox
        self._utc = utc

    # -- Attempts that a worker holds ----------------------------------------------------------------------------------

    def sort_out(self, worker: Worker, held: tuple[AttemptKey, ...], now: float) -> list[AttemptKey]:
        """Which of the attempts held at a worker are not wanted. Those of tasks that only wait for somebody to run them
        become theirs; those that we cannot judge yet are kept in `worker.foreign`."""
        unwanted = []
        worker.foreign = {}
        for key in held:
            if self._ledger.current(key) is not None:
                if self._ledger.tasks[key.task_id].state is TaskState.CANCELLING:
                    unwanted.append(key)
            elif self._outbox.seen.covers(Dot(key.term, key.lsn)):
                unwanted.append(key)
            else:
                task = self._ledger.tasks.get(key.task_id)
                if task is not None and task.attempt(key) is not None:
                    unwanted.append(key)  # Given up, when the history of its leader was joined to ours.
                elif task is not None and task.state is TaskState.QUEUED and not task.record.cancel_wanted:
                    self._ledger.resume(task, key, worker.node_id, self._utc(now))
                    assert task.shape is not None
                    worker.give(task, task.shape)
                else:
                    worker.foreign[key] = None
        return unwanted

    # -- Rows that another scheduler gives us --------------------------------------------------------------------------

    def has(self, task_id: bytes) -> bool:
        """Whether a task is in memory."""
        return task_id in self._ledger.tasks

    def current(self, task_id: bytes) -> TaskRow:
        """A task in memory as a row."""
        return self._ledger.tasks[task_id].row(Dot(self._outbox.term, self._outbox.lsn))

    def adopt(self, row: TaskRow, mine: TaskRow | None, now: float) -> None:
        """Take over what a merge has found out about a task, which was `mine` here: it goes on from there."""
        now_s = self._utc(now)
        if mine is not None:
            self._ledger.warm(mine)
        before = self._released(row.id)
        given = before.key if before is not None else None
        task = self._ledger.adopt(row, is_new=mine is None, now_s=now_s)
        if task.key is not None:
            self._give(task, task.key, now_s, is_ours=task.key == given)

    def drop(self, row: TaskRow) -> None:
        """Another scheduler has purged a task after all that we know of it: nothing is to be done for it any more."""
        self._ledger.warm(row)
        task = self._released(row.id)
        if task is not None:
            self._ledger.take_out(task)

    def _released(self, task_id: bytes) -> Task | None:
        """A task in memory, which no worker has any more as far as we count."""
        task = self._ledger.tasks.get(task_id)
        if task is not None and task.key is not None:
            self._roster.known(task.record.attempts[-1].worker).release(task)
        return task

    def _give(self, task: Task, key: AttemptKey, now_s: float, *, is_ours: bool) -> None:
        """Count an attempt as given to its worker. `is_ours`: so it was before, and may be only on its way there."""
        worker = self._roster.known(task.record.attempts[-1].worker)
        assert task.shape is not None
        worker.give(task, task.shape)
        if worker.is_here and key not in worker.foreign and not is_ours:
            # It has told us everything that it holds.
            worker.release(task)
            self._ledger.lose(task, "its worker no longer has it", "worker_forgot", now_s)
