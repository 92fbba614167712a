"""What survives a process: a scheduler's database as store.base promises it, and a worker's journal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from taskd.core import effects as fx
from taskd.core import events as ev
from taskd.core.backlog import sort_out
from taskd.core.task import TaskState
from taskd.protocol.messages import AttemptEnded, AttemptKey, Dot, NodeRow, TaskRow, Term

Read = fx.ReadBacklog | fx.ReadLacking | fx.ReadRows | fx.ReadIds | fx.ReadOld
T = TypeVar("T")


class Database:
    """The rows of one scheduler. `page` is how many a reading gives at a time: few, so that pages are turned often."""

    def __init__(self, store_id: bytes, page: int) -> None:
        self.store_id = store_id
        self.page = page
        self.term: Term | None = None
        self.rows: dict[bytes, TaskRow] = {}
        self.nodes: dict[int, NodeRow] = {}
        self.seen: dict[Term, int] = {}
        self.last_purge: Dot | None = None
        self.has_strays = False

    def copy(self) -> Database:
        """As a backup has it: the same store, as it is now."""
        twin = Database(self.store_id, self.page)
        twin.term, twin.last_purge = self.term, self.last_purge
        twin.has_strays = self.has_strays
        twin.rows, twin.nodes, twin.seen = self.rows.copy(), self.nodes.copy(), self.seen.copy()
        return twin

    def write(self, commit: fx.Commit) -> None:
        """Put a commit on the disk. What the database of the daemon would refuse raises AssertionError."""
        rows = self.rows
        if commit.term is not None:
            self.term = commit.term
        for row in commit.nodes:
            self.nodes[row.node_id] = row
        for new in commit.inserted:
            assert new.id not in rows, "a task is inserted twice"
            rows[new.id] = new
        for new in commit.updated:
            assert new.id in rows, "a task that does not exist is changed"
            rows[new.id] = new
        for new in commit.taken:
            old = rows.get(new.id)
            if old is None or new.dot.rank() > old.dot.rank():
                rows[new.id] = new
        for task_id in commit.purged:
            rows.pop(task_id, None)
        for purge in commit.purges:
            self._purge(purge)
        for dot in commit.seen:
            if dot.lsn > self.seen.get(dot.term, 0):
                self.seen[dot.term] = dot.lsn
        if commit.last_purge is not None:
            self.last_purge = commit.last_purge
        if commit.has_strays is not None:
            self.has_strays = commit.has_strays

    def _purge(self, purge: fx.Purge) -> None:
        present = set(purge.present)
        seen = {dot.term: dot.lsn for dot in purge.seen}
        for task_id in list(self.rows):
            if task_id <= purge.after or (purge.until and task_id > purge.until) or task_id in present:
                continue
            if covers(seen, self.rows[task_id].dot):
                del self.rows[task_id]

    def loaded(self) -> ev.Loaded:
        """What the daemon reads at start."""
        dots = [Dot(term, lsn) for term, lsn in self.seen.items()]
        is_empty = not self.seen and (self.has_strays or not self.rows)
        return ev.Loaded(self.term, dots, list(self.nodes.values()), self.last_purge, is_empty, self.has_strays)

    def read(self, effect: Read) -> ev.BacklogRead | ev.RowsRead | ev.IdsRead:
        """Answer a reading as of now."""
        match effect:
            case fx.ReadBacklog(call, after):
                unfinished = (row for row in self._above(after) if row.state < TaskState.SUCCEEDED)
                rows, after_page = _paged(unfinished, self.page, lambda row: row.id)
                return ev.BacklogRead(call, sort_out(rows), after_page)
            case fx.ReadLacking(call, seen, after):
                return self._read_lacking(call, seen, after)
            case fx.ReadRows(call, ids):
                return ev.RowsRead(call, [self.rows[task_id] for task_id in ids if task_id in self.rows])
            case fx.ReadIds(call, after):
                ids = (row.id for row in self._above(after))
                return ev.IdsRead(call, *_paged(ids, 4 * self.page, lambda task_id: task_id))
            case fx.ReadOld(call, before_s):
                old = [row.id for row in self._above(b"") if row.finished_s and row.finished_s < before_s]
                return ev.IdsRead(call, *_paged(old, 2 * self.page, lambda task_id: task_id))

    def _above(self, after: bytes) -> list[TaskRow]:
        return [self.rows[task_id] for task_id in sorted(self.rows) if task_id > after]

    def _read_lacking(self, call: int, seen: Sequence[Dot], after: bytes) -> ev.RowsRead:
        """A part of the table at a time, whether or not there is a row in it that lacks."""
        covered = {dot.term: dot.lsn for dot in seen}
        part = self._above(after)
        rest = part[2 * self.page :]
        part = part[: 2 * self.page]
        lacking = [row for row in part if not covers(covered, row.dot)]
        if len(lacking) > self.page:
            return ev.RowsRead(call, lacking[: self.page], lacking[self.page - 1].id)
        return ev.RowsRead(call, lacking, part[-1].id if rest else None)


def _paged(items: Iterable[T], size: int, id_of) -> tuple[list[T], bytes | None]:  # type: ignore[no-untyped-def]
    """The first so many, and where to go on."""
    page = []
    for item in items:
        if len(page) == size:
            return page, id_of(page[-1])
        page.append(item)
    return page, None


def covers(seen: dict[Term, int], dot: Dot) -> bool:
    """Whether a history that has `seen` so much has this commit."""
    return seen.get(dot.term, 0) >= dot.lsn


class JournalFile:
    """A worker's journal: what was appended, and how much of that outlives a crash of the machine."""

    def __init__(self) -> None:
        self.entries: list[fx.Journal] = []
        self.synced = 0
        self.unsynced_since: float | None = None

    def loaded(self) -> ev.JournalLoaded:
        """What the daemon reads at start."""
        term, begun, ended = self.replay()
        proof = next(
            (entry.proof for entry in reversed(self.entries) if entry.term is not None and entry.term == term), b""
        )
        return ev.JournalLoaded(term, list(begun), list(ended.values()), proof)

    def replay(self) -> tuple[Term | None, dict[AttemptKey, None], dict[AttemptKey, AttemptEnded]]:
        """All entries taken together: the greatest term, attempts open, outcomes that nobody acknowledged."""
        term: Term | None = None
        begun: dict[AttemptKey, None] = {}
        ended: dict[AttemptKey, AttemptEnded] = {}
        for entry in self.entries:
            if entry.term is not None and (term is None or entry.term.rank() > term.rank()):
                term = entry.term
            for key in entry.begun:
                begun[key] = None
            for outcome in entry.ended:
                begun.pop(outcome.key, None)
                ended[outcome.key] = outcome
            for key in entry.acknowledged:
                begun.pop(key, None)
                ended.pop(key, None)
        return term, begun, ended

    def keep(self, count: int) -> None:
        """Lose what was appended after the first `count` entries."""
        del self.entries[count:]
        self.synced = min(self.synced, len(self.entries))
        self.unsynced_since = None
