"""Gives another scheduler the rows that it lacks, page by page: to a claimer, to a leader, to a standby.

What the other lacks is what its `seen` does not cover, strays of ours included: nobody else may have them. Where this
is little, memory knows which tasks; otherwise the whole table is looked through. A page leaves when the one before
is durable over there, so that nothing piles up.
"""

from __future__ import annotations

from collections.abc import Callable

from taskd.core.effects import Effect, ReadIds, ReadLacking, ReadRows, Send
from taskd.core.events import IdsRead, RowsRead
from taskd.core.outbox import Outbox
from taskd.core.reads import Reads
from taskd.core.seen import Seen
from taskd.protocol.messages import Dot, NodeRow, Page, PageTaken, TaskRow, Term

PAGE_ROWS = 500
PAGE_BYTES = 1 << 20  # Of specs and records, unless a single row is larger: far below a frame.
PAGE_IDS = 20_000


class Giver:
    """All streams of pages that go out, one a receiver."""

    def __init__(
        self, outbox: Outbox, reads: Reads, say: Callable[[Effect], None], nodes: Callable[[], list[NodeRow]]
    ) -> None:
        self._outbox = outbox
        self._reads = reads
        self._say = say
        self._nodes = nodes
        self._streams: dict[int, _Stream] = {}

    def start(self, receiver: int, term: Term, theirs: Seen) -> None:
        """Begin to give `receiver` what it lacks, in answer to its message of `term`; and where it may have missed that
        tasks were purged, which ones are still there. Everything of ours must be durable."""
        last_purge = self._outbox.last_purge
        must_sweep = last_purge is not None and not theirs.covers(last_purge)
        stream = _Stream(receiver, term, theirs, self._outbox.seen.copy(), must_sweep)
        if not self._outbox.has_strays:
            stream.ids = self._outbox.recent.beyond(theirs, stream.ours)
        self._streams[receiver] = stream
        self._go_on(stream)

    def stop(self, receiver: int) -> None:
        """It is gone, or wants nothing any more."""
        self._streams.pop(receiver, None)

    def taken(self, receiver: int, message: PageTaken) -> None:
        """A page is durable over there: send the next. Said twice (of an earlier connection, too, where pages have the
        same numbers), it counts once: of two readings under way the second would drop what the first has brought."""
        stream = self._streams.get(receiver)
        if stream is None or not stream.is_sent or (stream.term, stream.number) != (message.term, message.number):
            return
        stream.is_sent = False
        self._go_on(stream)

    def given(self, receiver: int) -> int:
        """How many tasks it was given so far; 0 where nothing is on its way to it."""
        stream = self._streams.get(receiver)
        return stream.given if stream is not None else 0

    # -- One stream ----------------------------------------------------------------------------------------------------

    def _go_on(self, stream: _Stream) -> None:
        if stream.rows:
            self._send(stream, stream.take_rows())
        elif stream.ids:
            ids, stream.ids = stream.ids[:PAGE_ROWS], stream.ids[PAGE_ROWS:]
            self._reads.ask(lambda call: ReadRows(call, ids), self._on_rows(stream))
        elif stream.ids is None and stream.after is not None:
            after, seen = stream.after, stream.theirs.dots()
            self._reads.ask(lambda call: ReadLacking(call, seen, after), self._on_rows(stream))
        elif stream.must_sweep:
            after = stream.swept
            self._reads.ask(lambda call: ReadIds(call, after), self._on_ids(stream))
        else:
            self._send(stream, (), is_last=True)
            self._streams.pop(stream.receiver, None)

    def _on_rows(self, stream: _Stream) -> Callable[[RowsRead, float], None]:
        def then(event: RowsRead, now: float) -> None:
            if self._streams.get(stream.receiver) is not stream:
                return
            stream.rows = event.rows
            stream.after = event.after
            self._go_on(stream)

        return then

    def _on_ids(self, stream: _Stream) -> Callable[[IdsRead, float], None]:
        def then(event: IdsRead, now: float) -> None:
            if self._streams.get(stream.receiver) is not stream:
                return
            after, until = stream.swept, event.ids[-1] if event.after is not None and event.ids else b""
            stream.swept = until
            stream.must_sweep = event.after is not None
            self._send(stream, (), present=tuple(event.ids), after=after, until=until)

        return then

    def _send(
        self,
        stream: _Stream,
        rows: tuple[TaskRow, ...],
        *,
        is_last: bool = False,
        present: tuple[bytes, ...] | None = None,
        after: bytes = b"",
        until: bytes = b"",
    ) -> None:
        stream.number += 1
        stream.is_sent = True
        stream.given += len(rows)
        nodes = tuple(self._nodes()) if is_last else ()
        seen: tuple[Dot, ...] = stream.ours_dots
        page = Page(stream.term, stream.number, rows, nodes, seen, is_last, present, after, until)
        self._say(Send(stream.receiver, page))


class _Stream:
    """Pages for one receiver."""

    __slots__ = (
        "after",
        "given",
        "ids",
        "is_sent",
        "must_sweep",
        "number",
        "ours",
        "ours_dots",
        "receiver",
        "rows",
        "swept",
        "term",
        "theirs",
    )

    def __init__(self, receiver: int, term: Term, theirs: Seen, ours: Seen, must_sweep: bool) -> None:
        self.receiver = receiver
        self.term = term
        self.theirs = theirs
        self.ours = ours
        self.ours_dots = ours.dots()
        self.must_sweep = must_sweep
        self.number = 0
        self.is_sent = False  # the page of that number, and not yet taken
        self.given = 0  # tasks
        self.rows: list[TaskRow] = []  # read, not sent yet
        self.ids: list[bytes] | None = None  # to be read; None: look through the table
        self.after: bytes | None = b""  # where to go on looking; None: at the end
        self.swept = b""  # up to there the ids were told

    def take_rows(self) -> tuple[TaskRow, ...]:
        """The rows of the next page."""
        size = 0
        for count, row in enumerate(self.rows):
            size += len(row.spec) + len(row.record)
            if count and size > PAGE_BYTES:
                break
        else:
            count = len(self.rows)
        taken, self.rows = self.rows[:count], self.rows[count:]
        return tuple(taken)
