"""Pages for another scheduler: each leaves once, in order, when the one before is taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from taskd.core import effects as fx
from taskd.core import events as ev
from taskd.core.giver import PAGE_BYTES, PAGE_ROWS, Giver
from taskd.core.reads import Reads
from taskd.core.seen import Seen
from taskd.core.task import TaskState
from taskd.protocol import messages as msg

TERM = msg.Term(3, 1, 9)


def row(number: int, size_bytes: int) -> msg.TaskRow:
    return msg.TaskRow(
        number.to_bytes(16, "big"), TaskState.QUEUED, 0, "", "command", "", "", 1.0, 1.0, 0.0, 3, 2, 9, number,
        bytes(size_bytes), b"",
    )  # fmt: skip


class Stage:
    """A giver, what it said, and its readings, which are answered by hand."""

    def __init__(self, rows: list[msg.TaskRow]) -> None:
        self.rows = {row.id: row for row in rows}
        self.said: list[Any] = []
        self.reads = Reads(self.said.append)
        recent = SimpleNamespace(beyond=lambda theirs, ours: list(self.rows))
        outbox: Any = SimpleNamespace(last_purge=None, seen=Seen(), has_strays=False, recent=recent)
        self.giver = Giver(outbox, self.reads, self.said.append, list)

    def readings(self) -> list[fx.ReadRows]:
        return [effect for effect in self.said if isinstance(effect, fx.ReadRows)]

    def answer(self, reading: fx.ReadRows) -> None:
        self.said.remove(reading)
        self.reads.answered(ev.RowsRead(reading.call, [self.rows[task_id] for task_id in reading.ids]), 0.0)

    def pages(self) -> list[msg.Page]:
        return [effect.message for effect in self.said if isinstance(effect, fx.Send)]

    def take(self, number: int) -> None:
        self.giver.taken(2, msg.PageTaken(TERM, number))


def test_a_page_that_is_told_twice_as_taken_loses_nothing() -> None:
    """The second may be of an earlier connection, whose pages had the same numbers."""
    rows = [row(number, 2 * PAGE_BYTES // PAGE_ROWS) for number in range(1, 3 * PAGE_ROWS + 1)]
    stage = Stage(rows)
    stage.giver.start(2, TERM, Seen())
    taken = 0
    while not (pages := stage.pages()) or not pages[-1].is_last:
        for reading in stage.readings():
            stage.answer(reading)
        for page in stage.pages()[taken:]:
            taken = page.number
            stage.take(taken)
            stage.take(taken)
            assert len(stage.readings()) <= 1
    assert [given.id for page in stage.pages() for given in page.rows] == [given.id for given in rows]
    assert [page.number for page in stage.pages()] == list(range(1, len(stage.pages()) + 1))
