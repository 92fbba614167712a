"""A claim to lead: the term made durable, everything that live schedulers have collected, the tasks loaded.

    term durable ─▶ Claim to every live scheduler ─▶ their pages merged ─▶ strays taken in ─▶ tasks loaded ─▶ won

Each scheduler that answers has written the term down first and decides nothing below it any more. So whatever any live
standby acknowledged to the leader before is here when the new one begins to decide. A scheduler that dies on the way is
left out: what it alone knew comes back with it.
"""

from __future__ import annotations

from collections.abc import Callable

from taskd.core.effects import ReadBacklog, ReadLacking, Send
from taskd.core.events import BacklogRead, RowsRead
from taskd.core.leader import Leader
from taskd.core.merger import Merger
from taskd.core.outbox import Continue, Outbox
from taskd.core.reads import Reads
from taskd.protocol import messages as msg
from taskd.protocol.messages import Dot


class Claim:
    """One attempt to lead. `won` is told the leader that is to begin."""

    def __init__(
        self,
        term: msg.Term,
        outbox: Outbox,
        reads: Reads,
        merger: Merger,
        leader: Leader,
        won: Callable[[Leader, float], None],
    ) -> None:
        self.term = term
        self.is_loading = False
        self._outbox = outbox
        self._reads = reads
        self._merger = merger
        self._leader = leader
        self._won = won
        self._is_durable = False
        self._had_strays = False
        self._is_over = False
        self._missing: dict[int, None] = {}  # schedulers that have not given everything yet

    def start(self, others: list[int]) -> None:
        """Make the term durable, and ask the others."""
        self._had_strays = self._outbox.has_strays
        self._outbox.begin(self.term)
        self._outbox.then(Continue(self._durable))
        for node_id in others:
            self.ask(node_id)

    def ask(self, node_id: int) -> None:
        """Ask a scheduler for what we lack; one that has just come, too."""
        if self.is_loading or self._is_over:
            return
        self._missing[node_id] = None
        self._merger.expect(node_id, self.term, lambda now: self._granted(node_id, now))
        claim = msg.Claim(self.term, self._outbox.seen.dots())
        self._outbox.then(Send(node_id, claim))

    def page(self, sender: int, page: msg.Page, now: float) -> None:
        """Rows that we lack."""
        self._merger.page(sender, page, now)

    def gone(self, node_id: int, now: float) -> None:
        """A scheduler is gone: go on without it."""
        self._merger.forget(node_id)
        self._granted(node_id, now)

    def close(self) -> None:
        """Give up."""
        self._is_over = True
        self._merger.close()

    def _durable(self, now: float) -> None:
        self._is_durable = True
        self._check()

    def _granted(self, node_id: int, now: float) -> None:
        self._missing.pop(node_id, None)
        self._check()

    def _check(self) -> None:
        if self._is_durable and not self._missing and not self.is_loading and not self._is_over:
            self.is_loading = True
            if not self._had_strays and not self._merger.leaves_strays:
                self._outbox.expect_strays(has_strays=False)  # All that was given was given whole.
            self._outbox.then(Continue(lambda now: self._take_in_strays(b"")))

    def _take_in_strays(self, after: bytes) -> None:
        """Make rows that came without what belongs to them decisions of our own, so that standbys learn of them."""
        if self._is_over:
            return
        if self._outbox.has_strays:
            seen = self._outbox.seen.dots()
            self._reads.ask(lambda call: ReadLacking(call, seen, after), self._found_strays)
        else:
            self._load(b"")

    def _found_strays(self, event: RowsRead, now: float) -> None:
        if self._is_over:
            return
        outbox = self._outbox
        dot = Dot(outbox.term, outbox.lsn)
        outbox.take(row.at(dot) for row in event.rows)
        after = event.after
        if after is None:
            outbox.expect_strays(has_strays=False)
        outbox.then(Continue(lambda now: self._take_in_strays(after or b"")))

    def _load(self, after: bytes) -> None:
        if not self._is_over:
            self._reads.ask(lambda call: ReadBacklog(call, after), self._loaded)

    def _loaded(self, event: BacklogRead, now: float) -> None:
        if self._is_over:
            return
        self._leader.load(event.backlog, now)
        if event.after is not None:
            self._load(event.after)
        else:
            self._won(self._leader, now)
