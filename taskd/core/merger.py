"""Takes in the rows that another scheduler has and we lack: while we claim, and while we lead.

Histories are joined, never overwritten. A row that the other one made knowing ours replaces it; where each knows
something that the other does not, both are joined; one that we lack although we have seen how it was accepted was
purged and stays away. Pages are taken one at a time, so that each is compared with everything that came before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from taskd.core.effects import Log, Purge, ReadIds, ReadRows, Send, Superseded
from taskd.core.events import IdsRead, RowsRead
from taskd.core.join import Joined, join
from taskd.core.outbox import Continue, Outbox
from taskd.core.reads import Reads
from taskd.core.seen import Seen
from taskd.core.task import TaskState, decode_record, encode
from taskd.protocol.messages import Dot, NodeRow, Page, PageTaken, TaskRow, Term


class Target(Protocol):
    """Where the rows go while we lead: the tasks in memory, and our own commits."""

    def has(self, task_id: bytes) -> bool: ...
    def current(self, task_id: bytes) -> TaskRow: ...
    def adopt(self, row: TaskRow, mine: TaskRow | None, now: float) -> None: ...
    def drop(self, row: TaskRow) -> None: ...


class Merger:
    """Pages that come in from others, each sender's until its last one."""

    def __init__(
        self,
        outbox: Outbox,
        reads: Reads,
        learn_node: Callable[[NodeRow], None],
        target: Target | None = None,
    ) -> None:
        self._outbox = outbox
        self._reads = reads
        self._learn_node = learn_node
        self._target = target  # None: we do not lead yet, and rows go to the disk as they are
        self._expected: dict[int, tuple[Term, int, Callable[[float], None]]] = {}
        self._pages: deque[tuple[int, Page]] = deque()
        self._is_busy = False  # with a page of whoever this is to be told to:
        self._on_taken: Callable[[float], None] | None = None
        self._is_over = False
        self.leaves_strays = False  # some of the rows that were taken came without what belongs to them

    @property
    def is_busy(self) -> bool:
        """Whether somebody's pages are still to come."""
        return bool(self._expected)

    def expect(self, sender: int, term: Term, on_done: Callable[[float], None]) -> None:
        """Take pages of `term` from `sender`; when the last is durable, `on_done` is told."""
        self._expected[sender] = (term, 1, on_done)

    def forget(self, sender: int) -> None:
        """It is gone: what it gave stays, the rest does not come."""
        if self._expected.pop(sender, None) is not None:
            self.leaves_strays = True
            self._pages = deque(it for it in self._pages if it[0] != sender)

    def close(self) -> None:
        """Take nothing more."""
        self._is_over = True
        self._expected.clear()
        self._pages.clear()

    def page(self, sender: int, page: Page, now: float) -> bool:
        """A page came; False where none was expected."""
        expected = self._expected.get(sender)
        if expected is None or expected[0] != page.term or page.number != expected[1]:
            return False
        self._expected[sender] = (expected[0], page.number + 1, expected[2])
        self._pages.append((sender, page))
        self._next(now)
        return True

    def _next(self, now: float) -> None:
        if self._is_busy or not self._pages:
            return
        self._is_busy = True
        sender, page = self._pages.popleft()
        self._on_taken = self._expected[sender][2]
        self._compare(sender, page, list(page.rows), now)

    def _compare(self, sender: int, page: Page, rows: list[TaskRow], now: float) -> None:
        target = self._target
        ids = [row.id for row in rows if target is None or not target.has(row.id)]
        if not ids:
            self._take(sender, page, rows, {}, now)
            return

        def found(event: RowsRead, now: float) -> None:
            read: dict[bytes, TaskRow | None] = dict.fromkeys(ids)
            read.update((row.id, row) for row in event.rows)
            self._take(sender, page, rows, read, now)

        # Everything of ours first: only what is durable can be read.
        self._outbox.then(Continue(lambda now: self._reads.ask(lambda call: ReadRows(call, ids), found)))

    def _take(
        self, sender: int, page: Page, rows: list[TaskRow], found: dict[bytes, TaskRow | None], now: float
    ) -> None:
        if self._is_over:
            return
        if self._is_given_up(sender):
            # We have gone on without it: beside tasks that are in memory by now nothing may be written.
            self._is_busy = False
            self._next(now)
            return
        theirs = Seen(page.seen)
        target = self._target
        changed: list[TaskRow] = []
        for row in rows:
            if target is not None and target.has(row.id):
                self._merge(row, target.current(row.id), theirs, now)
            elif row.id not in found or self._outbox.is_outdated(row.id, found[row.id]):
                changed.append(row)  # It has left our memory, or changed, while we read: read again.
            else:
                self._merge(row, found[row.id], theirs, now)
        if changed:
            self._compare(sender, page, changed, now)
            return
        for node in page.nodes:
            self._learn_node(node)
        if target is None and rows:
            if any(not theirs.covers(row.dot) for row in page.rows):
                self.leaves_strays = True  # Of the other one, already.
            if self.leaves_strays or not page.is_last:
                self._outbox.expect_strays(has_strays=True)
        if page.present is not None:
            self._follow_purges(sender, page, now)
        else:
            self._end(sender, page, now)

    def _is_given_up(self, sender: int) -> bool:
        """Whether who gave the page that we are busy with is gone since; it may have come again, and begun anew."""
        expected = self._expected.get(sender)
        return expected is None or expected[2] is not self._on_taken

    def _follow_purges(self, sender: int, page: Page, now: float) -> None:
        """The sender has named all its tasks in a range: what it once had of ours and lacks now, it has purged."""
        outbox, target = self._outbox, self._target
        if target is None:
            assert page.present is not None
            outbox.follow_purge(Purge(page.after, page.until, page.present, page.seen))
            outbox.remember_purge(self._dot)
            self._end(sender, page, now)
            return
        present, theirs = frozenset(page.present or ()), Seen(page.seen)
        missing: list[bytes] = []

        def read(event: IdsRead, now: float) -> None:
            ids = [task_id for task_id in event.ids if not page.until or task_id <= page.until]
            missing.extend(task_id for task_id in ids if task_id not in present)
            if event.after is not None and len(ids) == len(event.ids):
                after = event.after
                self._reads.ask(lambda call: ReadIds(call, after), read)
            else:
                self._reads.ask(lambda call: ReadRows(call, missing), judge)

        def judge(event: RowsRead, now: float) -> None:
            if self._is_over:
                return
            ids = []
            for row in event.rows:
                if theirs.covers(row.dot) and not outbox.is_outdated(row.id, row):
                    target.drop(row)
                    ids.append(row.id)
            if ids:
                outbox.purge(ids)
            else:
                outbox.remember_purge(self._dot)  # Nothing is left of it here. Others may have missed it.
            self._end(sender, page, now)

        self._reads.ask(lambda call: ReadIds(call, page.after), read)

    def _end(self, sender: int, page: Page, now: float) -> None:
        """A page is taken."""
        if page.is_last:
            self._outbox.see(page.seen)
        self._outbox.then(Send(sender, PageTaken(page.term, page.number)))
        if page.is_last and (expected := self._expected.get(sender)) is not None:
            self._outbox.then(Continue(lambda now: self._done(sender, expected[2], now)))
        self._is_busy = False
        self._next(now)

    def _done(self, sender: int, on_done: Callable[[float], None], now: float) -> None:
        if not self._is_over and self._expected.pop(sender, None) is not None:
            on_done(now)

    # -- One row -------------------------------------------------------------------------------------------------------

    def _merge(self, row: TaskRow, mine: TaskRow | None, theirs: Seen, now: float) -> None:
        if mine is None:
            accepted = decode_record(row.record).accepted
            if accepted is None or not self._outbox.seen.covers(accepted):
                self._write(row, None, now)
        elif mine.dot == row.dot or self._outbox.seen.covers(row.dot):
            pass  # Ours knows theirs.
        elif self._target is None and theirs.covers(mine.dot):
            self._write(row, mine, now)
        else:
            # Written even where it says what ours says: all stores are to hold the same row in the end.
            joined = join(mine, row)
            if mine.finished_s and row.finished_s and _decided(mine) == joined.record.decided != _decided(row):
                self._supersede(row, mine)  # Whoever follows its leader hears that here.
            self._write(_joined_row(mine, joined, self._dot), mine, now)

    @property
    def _dot(self) -> Dot:
        return Dot(self._outbox.term, self._outbox.lsn)

    def _write(self, row: TaskRow, mine: TaskRow | None, now: float) -> None:
        if mine is not None and mine.state >= TaskState.SUCCEEDED and _decided(mine) != _decided(row):
            self._supersede(mine, row)
        if self._target is not None:
            self._target.adopt(row, mine, now)
        else:
            self._outbox.take([row])

    def _supersede(self, loser: TaskRow, winner: TaskRow) -> None:
        before, after = TaskState(loser.state), TaskState(winner.state)
        self._outbox.then(Superseded(loser.id, before, after))
        fields: dict[str, object] = {"task": loser.id.hex(), "before": before.word, "after": after.word}
        self._outbox.then(Log("warning", "a result was superseded by one of another leader", fields))


def _decided(row: TaskRow) -> Dot | None:
    return decode_record(row.record).decided


def _joined_row(mine: TaskRow, joined: Joined, dot: Dot) -> TaskRow:
    term = dot.term
    return TaskRow(
        mine.id, int(joined.state), mine.priority, mine.queue, mine.type, mine.name, mine.owner, mine.submitted_s,
        joined.changed_s, joined.finished_s, term.epoch, term.node_id, term.boot, dot.lsn, mine.spec,
        encode(joined.record),
    )  # fmt: skip
