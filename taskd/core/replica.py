"""The standby: follows one leader, writes down every commit of it, and says so.

    ATTACHING ──first page──▶ CATCHING_UP ──last page durable──▶ IN_SYNC

Rows arrive in pages (what was missed) and as commits (what happens now), in any order: of two versions of a task the
newer dot wins. Only after the last page does the standby's `seen` advance: until then it has holes, and rows that came
all the same are strays, which the next leader asks for before anything else.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from taskd.core.effects import AnnounceRows, Effect, Log, Purge, Send
from taskd.core.giver import Giver
from taskd.core.outbox import Continue, Outbox
from taskd.core.seen import Seen
from taskd.protocol import messages as msg


class Stage(Enum):
    """How far we are."""

    IDLE = "idle"
    ATTACHING = "attaching"
    CATCHING_UP = "catching_up"
    IN_SYNC = "in_sync"


class Replica:
    """Our copy of a leader's tasks."""

    def __init__(
        self, outbox: Outbox, giver: Giver, say: Callable[[Effect], None], learn_node: Callable[[msg.NodeRow], None]
    ) -> None:
        self.stage = Stage.IDLE
        self.term: msg.Term | None = None  # of the leader that we follow
        self.has_caught_up = False  # with some leader, once
        self._outbox = outbox
        self._giver = giver
        self._say = say
        self._learn_node = learn_node
        self._page_number = 1  # expected next
        self._streamed_lsn = 0  # of the leader's term: the last commit that came whole
        self._swept = False
        self._is_in_parts = False  # the last commit came in part
        # While we catch up: what pages that were read before do not know of.
        self._seen_meanwhile: list[msg.Dot] = []
        self._purged_meanwhile: set[bytes] = set()

    def follow(self, term: msg.Term, now: float) -> None:
        """Copy this leader from now on. The term is on its way to the disk."""
        if self.term == term and self.stage is not Stage.IDLE:
            return
        self.leave()
        self.term = term
        self._attach()

    def _attach(self) -> None:
        self.stage = Stage.ATTACHING
        self._page_number, self._streamed_lsn, self._swept, self._is_in_parts = 1, 0, False, False
        self._seen_meanwhile, self._purged_meanwhile = [], set()
        term = self.term
        assert term is not None

        def attach(now: float) -> None:
            if self.term == term and self.stage is Stage.ATTACHING:
                self._say(Send(term.node_id, msg.Attach(term, self._outbox.seen.dots(), self._outbox.has_strays)))

        self._outbox.then(Continue(attach))

    def leave(self) -> None:
        """Follow nobody."""
        if self.term is not None:
            self._giver.stop(self.term.node_id)
        self.term, self.stage = None, Stage.IDLE

    def _is_of_leader(self, sender: int, term: msg.Term) -> bool:
        return term == self.term and sender == term.node_id

    # -- What we have and the leader lacks -----------------------------------------------------------------------------

    def wanted(self, sender: int, message: msg.Wanted) -> None:
        """The leader asks for what it lacks."""
        if self._is_of_leader(sender, message.term):
            self._giver.start(sender, message.term, Seen(message.seen))

    # -- What the leader has -------------------------------------------------------------------------------------------

    def page(self, sender: int, page: msg.Page, now: float) -> None:
        """Rows that we missed."""
        if not self._is_of_leader(sender, page.term) or self.stage is Stage.IN_SYNC:
            return
        if page.number != self._page_number:
            return
        self.stage = Stage.CATCHING_UP
        self._page_number += 1
        outbox = self._outbox
        purged = self._purged_meanwhile
        outbox.take(row for row in page.rows if row.id not in purged)
        for node in page.nodes:
            self._learn_node(node)
        if page.present is not None:
            outbox.follow_purge(Purge(page.after, page.until, page.present, page.seen))
            self._swept = True
        if not page.is_last:
            if page.rows:
                outbox.expect_strays(has_strays=True)
            self._answer(msg.PageTaken(page.term, page.number))
            return
        outbox.see(page.seen)
        given_lsn = Seen(page.seen).lsn_of(page.term)
        self._streamed_lsn = max(self._streamed_lsn, given_lsn)
        outbox.see([*self._seen_meanwhile, msg.Dot(page.term, self._streamed_lsn)])
        self._seen_meanwhile, self._purged_meanwhile = [], set()
        if self._swept:
            outbox.remember_purge(msg.Dot(page.term, given_lsn))
        outbox.expect_strays(has_strays=self._is_in_parts)
        self.stage = Stage.IN_SYNC
        self.has_caught_up = True
        self._answer(msg.Replicated(page.term, self._streamed_lsn))
        outbox.then(Log("info", "caught up with the leader", {"leader": sender, "lsn": self._streamed_lsn}))

    def replicate(self, sender: int, message: msg.Replicate, now: float) -> None:
        """A commit of the leader, or a part of it."""
        if not self._is_of_leader(sender, message.term):
            return
        outbox = self._outbox
        if self._streamed_lsn and message.lsn not in (self._streamed_lsn, self._streamed_lsn + 1):
            if message.lsn > self._streamed_lsn:
                # One is missing, which an unbroken connection does not do: begin again rather than have a hole.
                self._say(Log("error", "a commit of the leader is missing", {"lsn": self._streamed_lsn + 1}))
                self._attach()
            return
        if message.rows:
            outbox.take(message.rows)
            outbox.then(AnnounceRows(list(message.rows)))
        for node in message.nodes:
            self._learn_node(node)
        dot = msg.Dot(message.term, message.lsn)
        if message.purged:
            outbox.purge(list(message.purged))
            outbox.remember_purge(dot)
            if self.stage is not Stage.IN_SYNC:
                self._purged_meanwhile.update(message.purged)
        self._is_in_parts = not message.is_last
        if self._is_in_parts or (message.rows and self.stage is not Stage.IN_SYNC):
            outbox.expect_strays(has_strays=True)
        if not message.is_last:
            return
        self._streamed_lsn = message.lsn
        if self.stage is Stage.IN_SYNC:
            outbox.see([*message.seen, dot])
            outbox.expect_strays(has_strays=False)
            self._answer(msg.Replicated(message.term, message.lsn))
        else:
            self._seen_meanwhile += message.seen

    def _answer(self, message: msg.PageTaken | msg.Replicated) -> None:
        """Tell the leader, once all this is durable and unless we have obeyed another one by then."""

        def answer(now: float) -> None:
            if self.term == message.term:
                self._say(Send(message.term.node_id, message))

        self._outbox.then(Continue(answer))
