"""Group commit: effects wait behind the rows they promise, and a leader's also behind a standby's copy of them.

While one commit is in flight, the next collects: idle, a commit holds one step; busy, it holds all that came meanwhile.
The one ordering rule of taskd lives here: no effect leaves before the rows of its own and of all earlier steps are
durable, here and, while a standby is in sync, at one of those too. Commits go on while earlier ones wait for standbys.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from taskd.core.effects import Announce, Change, Commit, Effect, Purge, Reply
from taskd.core.recent import Recent
from taskd.core.seen import Seen
from taskd.core.task import Task, deciding_attempt
from taskd.errors import Unavailable
from taskd.protocol.messages import Dot, NodeRow, TaskRow, Term

NO_TERM = Term(0, 0, 0)
NO_COPY = "no standby keeps a copy, and min_replicas asks for one: submit again when `taskd cluster status` shows one"


class Continue(Effect, frozen=True):
    """Go on inside the core: never leaves the node. `go_on` is told the time."""

    go_on: Callable[[float], None]


class Outbox:
    """Rows not yet durable, and the effects that wait for them. `seen` counts what is durable, `recent` names it."""

    def __init__(self) -> None:
        self.term = NO_TERM  # under which our own rows are written
        self.lsn = 0  # of the commit that is collecting, 1 and up; 0 while we do not lead
        self.seen = Seen()
        self.recent = Recent(self.seen)
        self.last_purge: Dot | None = None
        self.has_strays = False  # rows are held, or on their way to the disk, that `seen` does not cover
        self._has_old_strays = False  # since before this process began: `recent` does not know them
        self.needs_copy = False  # a standby is in sync, or was a moment ago: effects wait for its word
        self.refuses_local = False  # what no standby has is not promised
        self._seq = 0
        self._copied_lsn = 0  # of our term, at a standby
        self._open = _Batch()
        self._in_flight: _Batch | None = None
        self._waiting: deque[_Batch] = deque()  # durable here, no standby has said so yet
        self._is_broken = False  # a commit failed: this process decides nothing any more

    # -- Terms ---------------------------------------------------------------------------------------------------------

    def load(self, seen: Iterable[Dot], last_purge: Dot | None, *, has_strays: bool = False) -> None:
        """What the disk holds at start."""
        self.seen = Seen(seen)
        self.recent = Recent(self.seen)
        self.last_purge = last_purge
        self.has_strays = self._has_old_strays = has_strays

    def begin(self, term: Term) -> None:
        """Write under a new term from now on, and make it durable with the next commit."""
        self.term = term
        self.lsn = 1
        self._copied_lsn = 0
        self.needs_copy = False
        self._open.greatest = term

    def note(self, term: Term) -> None:
        """Make the greatest term seen durable with the next commit."""
        self._open.greatest = term

    def resign(self) -> list[Effect]:
        """Lead no more: rows that are not on their way to the disk yet are dropped, and so is everything that waits for
        a copy. Returns what was not done, for the clients' sake. A commit in flight goes on."""
        dropped: list[Effect] = []
        for batch in (*self._waiting, *((self._in_flight,) if self._in_flight is not None else ()), self._open):
            if batch.lsn or batch is self._open:
                dropped += batch.effects
                batch.effects = []
        self._waiting.clear()
        before, self._open = self._open, _Batch()
        self._open.greatest, self._open.nodes = before.greatest, before.nodes
        if before.has_strays is not None:  # What was to make up for them is dropped.
            self.has_strays = self._open.has_strays = True
        self.term, self.lsn, self.needs_copy = NO_TERM, 0, False
        return dropped

    # -- Writing -------------------------------------------------------------------------------------------------------

    def insert(self, task: Task) -> None:
        """Write a new task."""
        self._open.inserted[task.id] = task

    def update(self, task: Task) -> None:
        """Write a task that has changed; its state when the commit leaves is what counts."""
        if task.id not in self._open.inserted:
            self._open.updated[task.id] = task

    def node(self, row: NodeRow) -> None:
        """Write what is to be remembered of a node."""
        self._open.nodes[row.node_id] = row

    def purge(self, ids: list[bytes]) -> None:
        """Remove tasks."""
        self._open.purged += ids

    def take(self, rows: Iterable[TaskRow]) -> None:
        """Write rows of another scheduler, each unless we have it as new or newer."""
        self._open.taken += rows

    def follow_purge(self, purge: Purge) -> None:
        """Remove what another scheduler has purged."""
        self._open.purges.append(purge)

    def see(self, dots: Iterable[Dot]) -> None:
        """With the next commit we hold everything that these cover."""
        seen = self._open.seen
        for dot in dots:
            if dot.lsn > max(self.seen.lsn_of(dot.term), seen.get(dot.term, 0)):
                seen[dot.term] = dot.lsn

    def expect_strays(self, *, has_strays: bool) -> None:
        """From the next commit on we hold rows that `seen` does not cover, for some came and others did not; or, what
        came being whole now, no more."""
        if has_strays != self.has_strays:
            self.has_strays = self._open.has_strays = has_strays

    def remember_purge(self, dot: Dot) -> None:
        """The last purge that was followed."""
        self._open.last_purge = dot

    def then(self, effect: Effect) -> None:
        """Have this done once everything written so far is durable."""
        self._open.effects.append(effect)

    # -- Asking --------------------------------------------------------------------------------------------------------

    def __contains__(self, task_id: bytes) -> bool:
        """Whether a task's row is on its way to the disk."""
        in_flight = self._in_flight
        return task_id in self._open or (in_flight is not None and task_id in in_flight)

    def is_outdated(self, task_id: bytes, row: TaskRow | None) -> bool:
        """Whether a task is changing, or has changed since this row, or its absence, was read."""
        return task_id in self or self.recent.is_outdated(task_id, row)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits to become durable, here or at a standby."""
        return self.is_durable and not self._waiting

    @property
    def is_durable(self) -> bool:
        """Whether nothing waits to become durable here."""
        return self._in_flight is None and not self._open.has_rows

    @property
    def lag(self) -> int:
        """Commits that are durable here and at no standby yet."""
        return len(self._waiting)

    # -- The disk ------------------------------------------------------------------------------------------------------

    def release(self) -> list[Effect]:
        """What may be done now: effects that wait for nothing, or the next commit."""
        if self._in_flight is not None or self._is_broken:
            return []
        if self._open.has_rows:
            return [self._next_commit()]
        effects, self._open.effects = self._open.effects, []
        if effects and self._waiting:
            self._waiting[-1].effects += effects  # Behind what came first.
            return []
        # They promise nothing but what has left before, with our last commit.
        return self._answered(effects, is_copied=0 < self.lsn - 1 <= self._copied_lsn) if effects else effects

    def committed(self, seq: int) -> list[Effect]:
        """The commit in flight is durable here: what waited for it, unless that waits for a copy too."""
        batch = self._in_flight
        assert batch is not None
        assert seq == self._seq, (seq, self._seq)
        self._in_flight = None
        for dot in batch.dots():
            self.seen.advance(dot)
        batch.forget_rows()
        if not batch.lsn:
            if self._waiting:
                self._waiting[-1].effects += batch.effects
                return []
            return batch.effects
        self._waiting.append(batch)
        return self._take_released()

    def copied(self, lsn: int) -> list[Effect]:
        """A standby in sync holds everything up to `lsn` of our term: what waited for that."""
        self._copied_lsn = max(self._copied_lsn, lsn)
        return self._take_released()

    def do_without_copies(self) -> list[Effect]:
        """No standby is in sync any more: what waited for one."""
        self.needs_copy = False
        return self._take_released()

    def _take_released(self) -> list[Effect]:
        released: list[Effect] = []
        waiting = self._waiting
        while waiting and (not self.needs_copy or waiting[0].lsn <= self._copied_lsn):
            batch = waiting.popleft()
            released += self._answered(batch.effects, is_copied=batch.lsn <= self._copied_lsn)
        return released

    def _answered(self, effects: list[Effect], is_copied: bool) -> list[Effect]:
        """The effects, replies telling how durable is what they promise."""
        durability = "replicated" if is_copied else "local"
        return [
            effect
            if type(effect) is not Reply or not effect.promises
            else Reply(effect.call, Unavailable(NO_COPY), "", promises=True)
            if self.refuses_local and not is_copied
            else Reply(effect.call, effect.answer, durability, promises=True)
            for effect in effects
        ]

    def drop(self) -> list[Effect]:
        """A commit failed: nothing that waits may be done any more, and nothing that would come after it. Returns what
        was not done, for the clients' sake."""
        self._is_broken = True
        batches = (*self._waiting, *((self._in_flight,) if self._in_flight is not None else ()), self._open)
        dropped = [effect for batch in batches for effect in batch.effects]
        self._waiting.clear()
        self._open, self._in_flight = _Batch(), None
        return dropped

    def _next_commit(self) -> Commit:
        self._seq += 1
        batch, self._open = self._open, _Batch()
        self._in_flight = batch
        term, lsn = self.term, self.lsn
        changes: list[Change] = []
        inserted: list[TaskRow] = []
        updated: list[TaskRow] = []
        if lsn:
            self.lsn += 1
            batch.lsn = lsn
            dot = Dot(term, lsn)
            batch.seen[term] = lsn
            if batch.purged:
                self.last_purge = batch.last_purge = dot
            inserted = [task.row(dot) for task in batch.inserted.values()]
            updated = [task.row(dot) for task in batch.updated.values()]
            changes = [change_of(task) for task in (*batch.inserted.values(), *batch.updated.values())]
            self.recent.note(dot, [*batch.inserted, *batch.updated])
        else:
            assert not batch.inserted, "tasks are written by leaders alone"
            assert not batch.updated, "tasks are written by leaders alone"
        # Pages may have been overtaken by the commits they were read before.
        batch.seen = {term: lsn for term, lsn in batch.seen.items() if lsn > self.seen.lsn_of(term)}
        if batch.has_strays is False and self._has_old_strays:
            self._has_old_strays = False
            self.recent.forget_before([*self.seen.dots(), *batch.dots()])
        for row in batch.taken:
            if not self.recent.is_outdated(row.id, row):
                self.recent.note(row.dot, [row.id])
        self.recent.forget(batch.purged)
        if batch.purges:
            self.recent.forget_all()
        if batch.last_purge is not None:
            self.last_purge = batch.last_purge
        if changes:
            batch.effects.append(Announce(changes))
        return Commit(
            self._seq,
            batch.greatest,
            inserted,
            updated,
            list(batch.nodes.values()),
            batch.taken,
            batch.purged,
            batch.purges,
            batch.dots(),
            batch.last_purge,
            batch.has_strays,
        )


class _Batch:
    """What one commit holds, and what waits for it."""

    __slots__ = (
        "effects", "greatest", "has_strays", "inserted", "last_purge", "lsn", "nodes", "purged", "purges", "seen",
        "taken", "updated",
    )  # fmt: skip

    def __init__(self) -> None:
        self.lsn = 0  # of our term; 0: it holds no decisions of ours
        self.effects: list[Effect] = []
        self.greatest: Term | None = None
        self.inserted: dict[bytes, Task] = {}
        self.updated: dict[bytes, Task] = {}
        self.nodes: dict[int, NodeRow] = {}
        self.taken: list[TaskRow] = []
        self.purged: list[bytes] = []
        self.purges: list[Purge] = []
        self.seen: dict[Term, int] = {}
        self.last_purge: Dot | None = None
        self.has_strays: bool | None = None

    def __contains__(self, task_id: bytes) -> bool:
        return task_id in self.inserted or task_id in self.updated

    @property
    def has_rows(self) -> bool:
        return bool(
            self.inserted or self.updated or self.taken or self.nodes or self.purged or self.purges or self.seen
            or self.greatest is not None or self.has_strays is not None
        )  # fmt: skip

    def dots(self) -> list[Dot]:
        return [Dot(term, lsn) for term, lsn in self.seen.items()]

    def forget_rows(self) -> None:
        """They are durable; what waits for a copy needs the effects alone."""
        self.inserted, self.updated, self.taken = {}, {}, []


def change_of(task: Task) -> Change:
    """What waiters and streams are told of a task."""
    attempt = deciding_attempt(task.record)
    if attempt is None:
        return Change(task.id, task.state, task.changed_s, 0, 0, b"", task.record.reason)
    report = attempt.report if task.finished_s else b""
    reason = task.record.reason or attempt.reason
    return Change(task.id, task.state, task.changed_s, attempt.number, attempt.worker, report, reason)
