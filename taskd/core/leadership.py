"""Who decides: this scheduler itself, another that it follows as a standby, or nobody yet.

Who should lead is decided in election.py, a claim is carried through in claim.py, the standby is replica.py, and the
leader leader.py with its standbys in feed.py. This file takes each from one to the next: following, claiming, leading,
handing over, stepping down.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from taskd.core.claim import Claim
from taskd.core.effects import AnnounceNode, Disconnect, Effect, Log, Reply, Send
from taskd.core.election import Election
from taskd.core.feed import Feed
from taskd.core.fitness import misfit
from taskd.core.flaps import Flaps
from taskd.core.giver import Giver
from taskd.core.leader import Leader
from taskd.core.ledger import Ledger
from taskd.core.merger import Merger
from taskd.core.nodes import KnownNodes
from taskd.core.outbox import Continue, Outbox
from taskd.core.pause import HAND_OVER_S, Pause, Why
from taskd.core.reads import Reads
from taskd.core.replica import Replica, Stage
from taskd.core.roster import Roster
from taskd.core.seal import Seal
from taskd.core.settings import SchedulerSettings
from taskd.core.stats import Stats
from taskd.errors import NoLeader
from taskd.protocol import messages as msg

REMEMBER_S = 3600.0


class Leadership:
    """One scheduler's part in it. `utc` turns the monotonic `now` of events into UTC."""

    def __init__(
        self, node: msg.NodeInfo, settings: SchedulerSettings, random: Random, *, is_founder: bool = False
    ) -> None:
        self.node = node
        self.settings = settings
        self.outbox = Outbox()
        self.stats = Stats()
        self.election = Election(node)
        self.utc: Callable[[float], float] = float
        self.seal = Seal(b"")  # of schedulers that have a secret: with that
        self.is_stopping = False
        self.nodes = KnownNodes(self.outbox)
        self.leader: Leader | None = None
        self.feed: Feed | None = None
        self._merger: Merger | None = None  # while we lead
        self._claim: Claim | None = None
        self._random = random
        self._is_founder = is_founder
        self._said: list[Effect] = []  # to be done at once
        self._reads = Reads(self._say)
        self._giver = Giver(self.outbox, self._reads, self._say, lambda: list(self.nodes.values()))
        self.replica = Replica(self.outbox, self._giver, self._say, self.nodes.write)
        self._connected: dict[int, msg.NodeInfo] = {}
        self._owed: tuple[int, msg.Claim] | None = None  # a claim that we answer once everything of ours is durable
        self._pause = Pause()
        self._flaps = Flaps()
        self._remembering_at: float | None = None  # when the known schedulers are written down again
        self._told: tuple[msg.Term | None, bool] = (None, False)
        self._liars: dict[int, None] = {}  # connected, and said to have named a term that cannot be
        self._no_ledger = Ledger(self.outbox, self.stats, random, settings.crash_limit, settings.window)
        self._no_roster = Roster()

    @property
    def leads(self) -> bool:
        """Whether we decide."""
        return self.leader is not None

    def away(self, now: float) -> list[msg.NodeRow]:
        """Other schedulers that the cluster has had lately and that hold no copy of everything now."""
        here = self.feed.in_sync if self.feed is not None else []
        now_s = self.utc(now)
        return [row for row in self.nodes.schedulers(now_s) if row.node_id not in (self.node.node_id, *here)]

    # -- Whom we follow ------------------------------------------------------------------------------------------------

    def _standing(self, now: float) -> tuple[msg.Term | None, bool]:
        may_lead = self.election.is_ready(now) and not self.is_stopping
        return self.election.standing, may_lead

    def on_leading(self, sender: int, message: msg.Leading, now: float) -> None:
        """A node says whom it follows."""
        before, followed = self.election.greatest, self.election.followed
        term = message.term
        # The greatest one that we know needs no proof; a worker of the version before has none.
        is_proven = term is not None and (term == self.election.greatest or self.seal.holds(term, message.proof))
        try:
            self.election.heard(sender, message, is_proven=is_proven)
        except ValueError as error:
            self._term_refused(sender, error)
            return
        self._heard_term(before, now)
        if term is not None and term.node_id == sender and self.election.is_stale(term):
            # It has to hear why nobody obeys it.
            self._say(Send(sender, msg.Denied(term, self.election.greatest, self.election.followed)))
        if self.election.followed is not None and self.election.followed != followed:
            self._drop_claim()
            self.replica.follow(self.election.followed, now)
        elif followed is not None and self.election.followed is None:
            self.replica.leave()

    def _leading(self, now: float) -> msg.Leading:
        """What others are to hear of whom we follow."""
        term, may_lead = self._standing(now)
        is_ours = term is not None and term == self.election.leading
        return msg.Leading(term, may_lead, self.seal.of(term) if is_ours and term is not None else b"")

    def _term_refused(self, sender: int, error: ValueError) -> None:
        """Somebody names a term that cannot be: said once of each connection, and nothing else comes of it."""
        if sender not in self._liars:
            self._liars[sender] = None
            self._log("error", "term refused", peer=sender, reason=str(error))

    def _heard_term(self, before: msg.Term | None, now: float) -> None:
        """The greatest term that we know may have grown: write it down, and obey it."""
        greatest = self.election.greatest
        if greatest is None or greatest == before:
            return
        self.outbox.note(greatest)
        if self._claim is not None and greatest.rank() > self._claim.term.rank():
            self._drop_claim()
            self.outbox.note(greatest)
        if self.leader is not None and greatest.rank() > self.leader.term.rank():
            self._step_down(f"node {greatest.node_id} has a greater term", now)
            self.outbox.note(greatest)

    def _drop_claim(self) -> None:
        if self._claim is not None:
            self._claim.close()
            self._claim = None
            self.election.is_claiming = False
            self._resign()
            # Those that granted it need not wait for us any more.
            self._told = (None, not self._told[1])

    def _resign(self) -> None:
        for effect in self.outbox.resign():
            if isinstance(effect, Reply):
                self._say(Reply(effect.call, NoLeader()))
            elif isinstance(effect, Log | AnnounceNode):
                self._say(effect)

    def _step_down(self, reason: str, now: float) -> None:
        """Decide no more. What is not durable yet was promised to nobody; clients ask the next leader again."""
        assert self.leader is not None
        assert self._merger is not None
        self._log("warning", "stepping down", reason=reason, epoch=self.leader.term.epoch)
        self._merger.close()
        self.leader.close()
        self.leader = self.feed = self._merger = None
        self.election.leading = None
        self._resign()
        self._pause.end(now)  # There is no leader any more, which is what those that waited are answered.

    # -- Claims --------------------------------------------------------------------------------------------------------

    def consider(self, now: float) -> None:
        """At the end of a turn: claim if it is ours to do, answer a claim, or hand over."""
        if self.is_stopping and self.leader is None:
            return
        if self.election.may_claim(now):
            self._start_claim(now)
        elif self.leader is not None and not self._pause and self.feed is not None:
            target = self.feed.hand_over_to(now)
            if target is not None and self.election.may_lead(target):
                self._hand_over(target, now)

    def _start_claim(self, now: float) -> None:
        term = self.election.next_term()
        self.election.is_claiming = True
        self.election.followed = None
        self.replica.leave()
        merger = Merger(self.outbox, self._reads, self._learn_node)
        leader = Leader(
            term, self.settings, self.outbox, self._reads, self.stats, self._random, self.utc, self._connected,
            self._say, self.nodes,
        )  # fmt: skip
        for row in self.nodes.workers():
            leader.roster.load_row(row)
        self._claim = Claim(term, self.outbox, self._reads, merger, leader, self._won)
        self._claim.start([node.node_id for node in self.election.schedulers()])

    def _won(self, leader: Leader, now: float) -> None:
        """Our claim is complete: decide from now on."""
        self._claim = None
        self.election.is_claiming = False
        self.leader, self.election.leading = leader, leader.term
        merger = Merger(self.outbox, self._reads, self._learn_node, leader.adoption)
        self._merger = merger
        leader.is_merging = lambda: merger.is_busy
        leader.is_complete = lambda now: not merger.is_busy and not self.away(now)
        self.feed = Feed(
            leader.term, self.settings, self.outbox, self._giver, merger, self._say, leader.merged, self._flaps
        )
        self.stats.leader_changes += 1
        self._log("info", "leading", epoch=leader.term.epoch, tasks=len(leader.ledger))
        self._say(AnnounceNode("leader.changed", self.node.node_id, f"term {leader.term.epoch}"))
        self._remember_schedulers(now)
        others = list(self.election.schedulers())
        for node in others:
            if self.nodes.get(node.node_id) is None:
                self.nodes.write_scheduler(node, self.utc(now))
        if others:
            self.feed.expect([node.node_id for node in others], now)
        elif self.away(now):
            self.feed.expect_nobody(now)
        leader.begin(now)

    def _remember_schedulers(self, now: float) -> None:
        """Write down, now and then, who holds everything: who was not here for days is taken for given up."""
        self._remembering_at = now + REMEMBER_S
        self.nodes.write_scheduler(self.node, self.utc(now))
        for node_id in self.feed.in_sync if self.feed is not None else ():
            self.nodes.write_scheduler(self._connected[node_id], self.utc(now))

    def _learn_node(self, row: msg.NodeRow) -> None:
        """Another leader has remembered a node."""
        if self.nodes.learn(row) and self.leader is not None and "worker" in row.roles:
            self.leader.roster.load_row(row)

    def on_claim(self, sender: int, message: msg.Claim, now: float) -> None:
        """Another scheduler wants to lead: obey its term, and give it what it lacks."""
        if message.term.node_id != sender:
            self._say(Disconnect(sender, "it claims in another's name"))
            return
        before = self.election.greatest
        try:
            self.election.learn(message.term)
        except ValueError as error:
            self._term_refused(sender, error)
            self._say(Send(sender, msg.Denied(message.term, before, self.election.standing)))
            return
        if self.election.greatest != message.term:
            self._say(Send(sender, msg.Denied(message.term, self.election.greatest, self.election.standing)))
            return
        self._heard_term(before, now)
        self.election.grant(message.term, now)
        self.replica.leave()
        self._owed = (sender, message)

    def on_denied(self, sender: int, message: msg.Denied, now: float) -> None:
        """Our term is not the greatest, or somebody hears a leader."""
        before = self.election.greatest
        if message.greatest is not None:
            try:
                self.election.learn(message.greatest)
            except ValueError as error:
                self._term_refused(sender, error)
                return
            self._heard_term(before, now)
        if self._claim is not None and message.term == self._claim.term:
            self._drop_claim()
        self.election.denied(now)

    def on_page(self, sender: int, message: msg.Page, now: float) -> None:
        """Rows that we lack: as a claimer, as a leader, or as a standby."""
        if self._refuses(sender, message):
            return
        if self._claim is not None and message.term == self._claim.term:
            self._claim.page(sender, message, now)
        elif self.leader is not None and self._merger is not None and message.term == self.leader.term:
            self._merger.page(sender, message, now)
        else:
            self.replica.page(sender, message, now)
            if self.replica.stage is Stage.IN_SYNC:
                self.election.found_data(now)

    def _refuses(self, sender: int, message: msg.Page | msg.Replicate) -> bool:
        """Whether another scheduler's rows cannot be: then nothing is taken from it, and it has to begin anew."""
        problem = misfit(message.rows, message.nodes)
        if problem:
            self._log("error", "rows refused", peer=sender, reason=problem)
            self._say(Disconnect(sender, problem))
        return bool(problem)

    def on_page_taken(self, sender: int, message: msg.PageTaken, now: float) -> None:
        """A page of ours is durable over there."""
        if message.term == self.election.granted and sender == message.term.node_id:
            self.election.grant(message.term, now)
        self._giver.taken(sender, message)

    # -- Standbys ------------------------------------------------------------------------------------------------------

    def on_attach(self, sender: int, message: msg.Attach, now: float) -> None:
        """A standby follows us."""
        node = self._connected.get(sender)
        if self.leader is not None and self.feed is not None and node is not None and message.term == self.leader.term:
            self.feed.attach(node, message, now)

    def on_wanted(self, sender: int, message: msg.Wanted, now: float) -> None:
        """Our leader lacks something."""
        self.replica.wanted(sender, message)

    def on_replicate(self, sender: int, message: msg.Replicate, now: float) -> None:
        """Our leader has decided something."""
        if self._refuses(sender, message):
            return
        self.replica.replicate(sender, message, now)

    def on_replicated(self, sender: int, message: msg.Replicated, now: float) -> None:
        """A standby has a copy."""
        if self.feed is None:
            return
        was_in_sync = sender in self.feed.in_sync
        self._said += self.feed.replicated(sender, message, now)
        if not was_in_sync and sender in self.feed.in_sync:
            self.nodes.write_scheduler(self._connected[sender], self.utc(now))

    def _hand_over(self, heir: int, now: float) -> None:
        """Let a standby lead in our place: decide nothing new, and tell it once it has everything."""
        self._log("info", "handing over", to=heir)
        self._pause.begin(Why.FINISHING, now + HAND_OVER_S, heir)

    def _tell_heir(self, now: float) -> None:
        assert self.leader is not None
        assert self.feed is not None
        heir = self._pause.heir
        if heir is not None and self.outbox.is_idle and self.feed.is_level(heir):
            self._say(Send(heir, msg.HandOver(self.leader.term, self.feed.last_lsn)))
            self._pause.begin(Why.HANDING_OVER, now + HAND_OVER_S)

    def on_hand_over(self, sender: int, message: msg.HandOver, now: float) -> None:
        """Our leader has stopped deciding for us to go on."""
        term = message.term
        if self.replica.term != term or sender != term.node_id or self.is_stopping:
            return

        def claim(now: float) -> None:
            if self.replica.term == term and self.outbox.seen.lsn_of(term) >= message.lsn:
                self._start_claim(now)

        self.outbox.then(Continue(claim))

    def _go_on(self, now: float) -> None:
        """We have looked around, or the heir did not take over: lead on. Who was told to claim may have taken the next
        term: then under one that it cannot have taken."""
        was_told = self._pause.why is Why.HANDING_OVER
        if self._pause.heir is not None and self.feed is not None:
            self.feed.put_off(self._pause.heir, now)
        if was_told and self.leader is not None and not self.is_stopping:
            self._step_down("the standby that was to lead does not answer", now)
            self.election.next_term()
            self._start_claim(now)
        else:
            self._pause.end(now)

    # -- What is to be done at once --------------------------------------------------------------------------------

    def _say(self, effect: Effect) -> None:
        self._said.append(effect)

    def _log(self, level: str, event: str, **fields: object) -> None:
        self._say(Log(level, event, fields))
