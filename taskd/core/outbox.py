"""Group commit: effects wait behind the rows they promise.

While one commit is in flight, the next collects: idle, a commit holds one step; busy, it holds all that came meanwhile.
The one ordering rule of taskd lives here: no effect leaves before the rows of its own and of all earlier steps are
durable.
"""

from __future__ import annotations

from taskd.core.effects import Announce, Change, Commit, Effect
from taskd.core.task import Task
from taskd.protocol.messages import NodeRow, Term

NO_TERM = Term(0, 0, 0)


class Outbox:
    """Rows not yet durable, and the effects that wait for them."""

    def __init__(self) -> None:
        self.term = NO_TERM  # under which rows are written
        self.lsn = 1  # of the commit that is collecting; counts the commits of this term
        self._seq = 0
        self._inserted: dict[bytes, Task] = {}
        self._updated: dict[bytes, Task] = {}
        self._nodes: dict[int, NodeRow] = {}
        self._greatest: Term | None = None
        self._effects: list[Effect] = []
        self._in_flight: list[Effect] | None = None
        self._in_flight_ids: frozenset[bytes] = frozenset()
        self._is_broken = False  # a commit failed: this process decides nothing any more

    def begin(self, term: Term) -> None:
        """Write under a new term from now on, and make it durable with the next commit."""
        self.term = term
        self.lsn = 1
        self._greatest = term

    def note(self, term: Term) -> None:
        """Make the greatest term seen durable with the next commit."""
        self._greatest = term

    def insert(self, task: Task) -> None:
        """Write a new task."""
        self._inserted[task.id] = task

    def update(self, task: Task) -> None:
        """Write a task that has changed; its state when the commit leaves is what counts."""
        if task.id not in self._inserted:
            self._updated[task.id] = task

    def node(self, row: NodeRow) -> None:
        """Write what is to be remembered of a node."""
        self._nodes[row.node_id] = row

    def then(self, effect: Effect) -> None:
        """Have this done once everything written so far is durable."""
        self._effects.append(effect)

    def __contains__(self, task_id: bytes) -> bool:
        """Whether a task's row is on its way to the disk."""
        return task_id in self._inserted or task_id in self._updated or task_id in self._in_flight_ids

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits to become durable."""
        return self._in_flight is None and not self._has_rows

    @property
    def _has_rows(self) -> bool:
        return bool(self._inserted or self._updated or self._nodes or self._greatest is not None)

    def release(self) -> list[Effect]:
        """What may be done now: effects that wait for nothing, or the next commit."""
        if self._in_flight is not None or self._is_broken:
            return []
        if not self._has_rows:
            effects, self._effects = self._effects, []
            return effects
        return [self._next_commit()]

    def committed(self, seq: int) -> list[Effect]:
        """The commit in flight is durable: what waited for it."""
        assert self._in_flight is not None
        assert seq == self._seq, (seq, self._seq)
        effects, self._in_flight = self._in_flight, None
        self._in_flight_ids = frozenset()
        return effects

    def drop(self) -> list[Effect]:
        """A commit failed: nothing that waits may be done any more, and nothing that would come after it. Returns what
        was not done, for the clients' sake."""
        self._is_broken = True
        dropped = (self._in_flight or []) + self._effects
        self._effects, self._in_flight = [], None
        self._inserted, self._updated, self._nodes, self._greatest = {}, {}, {}, None
        return dropped

    def _next_commit(self) -> Commit:
        self._seq += 1
        term, lsn = self.term, self.lsn
        self.lsn += 1
        inserted, updated = self._inserted, self._updated
        changes = [_change(task) for task in inserted.values()]
        changes += [_change(task) for task in updated.values()]
        commit = Commit(
            self._seq,
            self._greatest,
            [task.row(term, lsn) for task in inserted.values()],
            [task.row(term, lsn) for task in updated.values()],
            list(self._nodes.values()),
        )
        self._in_flight = self._effects
        if changes:
            self._in_flight.append(Announce(changes))
        self._in_flight_ids = frozenset(inserted) | frozenset(updated)
        self._effects = []
        self._inserted, self._updated, self._nodes, self._greatest = {}, {}, {}, None
        return commit


def _change(task: Task) -> Change:
    attempts = task.record.attempts
    if not attempts:
        return Change(task.id, task.state, task.changed_s, 0, 0, b"", task.record.reason)
    last = attempts[-1]
    report = last.report if task.finished_s else b""
    reason = task.record.reason or last.reason
    return Change(task.id, task.state, task.changed_s, last.number, last.worker, report, reason)
