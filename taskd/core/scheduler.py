"""The scheduler role of one node: it looks for a leader and follows it as a standby, or claims and leads itself.

Who should lead is decided in election.py, a claim is carried through in claim.py, the standby is replica.py, and the
leader leader.py with its standbys in feed.py. This file says which of these is there, and what each gets to hear.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

from taskd.core import events as ev
from taskd.core.claim import Claim
from taskd.core.deadlines import Deadlines
from taskd.core.effects import AnnounceNode, Commit, Effect, Exit, Follow, Log, Reply, Send
from taskd.core.election import JOIN_S, Election
from taskd.core.feed import Feed, StandbyView
from taskd.core.giver import Giver
from taskd.core.leader import Leader
from taskd.core.ledger import Ledger
from taskd.core.merger import Merger
from taskd.core.outbox import Continue, Outbox
from taskd.core.reads import Reads
from taskd.core.replica import Replica, Stage
from taskd.core.roster import NOTHING_OFFERED, Roster
from taskd.core.seen import Seen
from taskd.core.settings import SchedulerSettings
from taskd.core.stats import Stats
from taskd.errors import NoLeader, Unavailable
from taskd.protocol import messages as msg

HAND_OVER_S = 1.0  # To let everything become durable, and again for the other to claim; then the leader goes on.
AWAY_MAX_S = 7 * 86_400.0  # A scheduler that was not here for so long is taken for given up.
"""How long an absent scheduler still counts where durability is judged."""


class Scheduler:
    """The scheduler role. `utc` turns the monotonic `now` of events into UTC."""

    def __init__(
        self, node: msg.NodeInfo, settings: SchedulerSettings, random: Random, *, is_founder: bool = False
    ) -> None:
        self.node = node
        self.settings = settings
        self.outbox = Outbox()
        self.stats = Stats()
        self.election = Election(node)
        self.utc: Callable[[float], float] = float
        self.is_stopping = False
        self.nodes: dict[int, msg.NodeRow] = {}  # all that the cluster remembers
        self.leader: Leader | None = None
        self.feed: Feed | None = None
        self._merger: Merger | None = None  # while we lead
        self._claim: Claim | None = None
        self._random = random
        self._is_founder = is_founder
        self._said: list[Effect] = []  # to be done at once
        self._reads = Reads(self._say)
        self._giver = Giver(self.outbox, self._reads, self._say, lambda: list(self.nodes.values()))
        self.replica = Replica(self.outbox, self._giver, self._say, self._copy_node)
        self._connected: dict[int, msg.NodeInfo] = {}
        self._owed: tuple[int, msg.Claim] | None = None  # a claim that we answer once everything of ours is durable
        self._deferred: list[Callable[[float], None]] | None = None  # what comes while we may not decide
        self._timers: Deadlines[str] = Deadlines()
        self._handing_to: int | None = None
        self._told: tuple[msg.Term | None, bool] = (None, False)
        self._no_ledger = Ledger(self.outbox, self.stats, random, settings.crash_limit)
        self._no_roster = Roster()

    # -- Views ---------------------------------------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """Whether we decide."""
        return self.leader is not None

    @property
    def is_loading(self) -> bool:
        """Whether we are about to lead."""
        return self._claim is not None

    @property
    def is_in_sync(self) -> bool:
        """Whether we hold everything that the leader has: as its standby, or as the leader."""
        return self.leads or (self.replica.stage is Stage.IN_SYNC and self.election.followed is not None)

    @property
    def ledger(self) -> Ledger:
        """The unfinished tasks; none where we do not lead."""
        return self.leader.ledger if self.leader is not None else self._no_ledger

    @property
    def roster(self) -> Roster:
        """The workers; none where we do not lead."""
        return self.leader.roster if self.leader is not None else self._no_roster

    def gives_up_s(self, node_id: int) -> float | None:
        """When the attempts of a worker that is away count as lost, UTC."""
        return self.leader.gives_up_s(node_id) if self.leader is not None else None

    def standbys(self, now: float) -> list[StandbyView]:
        """The standbys that are attached to us."""
        return self.feed.views(now) if self.feed is not None else []

    @property
    def durability(self) -> str:
        """Of what is accepted now."""
        return "replicated" if self.feed is not None and self.feed.in_sync else "local"

    def away(self, now: float) -> list[msg.NodeRow]:
        """Other schedulers that the cluster has had lately and that hold no copy of everything now."""
        here = self.feed.in_sync if self.feed is not None else []
        now_s = self.utc(now)
        return [
            row
            for row in self.nodes.values()
            if "scheduler" in row.roles
            and row.node_id not in (self.node.node_id, *here)
            and row.seen_s > now_s - AWAY_MAX_S
        ]

    def is_provisional(self, row: msg.TaskRow, now: float) -> bool:
        """Whether a result may still be superseded: a scheduler was away when it was decided, and still is."""
        return row.finished_s > 0 and any(other.seen_s < row.finished_s for other in self.away(now))

    # -- Start ---------------------------------------------------------------------------------------------------------

    def on_loaded(self, event: ev.Loaded, now: float) -> None:
        """The database was opened."""
        self.election.greatest = event.term
        self.outbox.load(event.seen, event.purged)
        self.nodes = {row.node_id: row for row in event.nodes}
        waits = event.is_empty and not self._is_founder
        self.election.join(now, max(JOIN_S, self.settings.empty_wait_s) if waits else JOIN_S)

    # -- Peers ---------------------------------------------------------------------------------------------------------

    def on_peer_up(self, event: ev.PeerUp, now: float) -> None:
        """A node is connected: tell it whom we follow."""
        node = event.node
        self._connected[node.node_id] = node
        self.election.peer_up(node)
        self._say(Send(node.node_id, msg.Leading(*self._standing(now))))
        if "scheduler" in node.roles and node.node_id != self.node.node_id:
            self._remember_scheduler(node, self.nodes[node.node_id].seen_s if node.node_id in self.nodes else 0.0)
            if self._claim is not None:
                self._claim.ask(node.node_id)

    def on_peer_down(self, event: ev.PeerDown, now: float) -> None:
        """A connection is gone."""
        node_id = event.node_id
        was_followed = self.election.followed
        node = self._connected.pop(node_id, None)
        self.election.peer_down(node_id, now, event.is_orderly)
        self._giver.stop(node_id)
        if self._owed is not None and self._owed[0] == node_id:
            self._owed = None
        if was_followed is not None and self.election.followed is None:
            self.replica.leave()
        if self._claim is not None:
            self._claim.gone(node_id, now)
        if self.feed is not None and node is not None and "scheduler" in node.roles:
            if node_id in self.feed.in_sync:
                self._remember_scheduler(node, self.utc(now))
            self.feed.gone(node_id, now, is_orderly=event.is_orderly)
        self._to_leader(lambda leader, now: leader.on_peer_down(event, now), now)

    def _remember_scheduler(self, node: msg.NodeInfo, seen_s: float) -> None:
        if self.leads:
            old = self.nodes.get(node.node_id)
            drain = old.drain_reason if old is not None else None
            self._write_node(msg.NodeRow(node.node_id, node.name, node.roles, drain, seen_s))

    def _write_node(self, row: msg.NodeRow) -> None:
        if self.nodes.get(row.node_id) != row:
            self.nodes[row.node_id] = row
            self.outbox.node(row)

    def _copy_node(self, row: msg.NodeRow) -> None:
        """What our leader remembers of a node counts."""
        self._write_node(row)

    def _learn_node(self, row: msg.NodeRow) -> None:
        """What another leader remembered of a node counts where it is newer."""
        old = self.nodes.get(row.node_id)
        if old is None or old.seen_s < row.seen_s:
            self._write_node(row)
            if self.leader is not None and "worker" in row.roles and self.leader.roster.get(row.node_id) is None:
                self.leader.roster.load_row(row)

    def on_collided(self, event: ev.Collided, now: float) -> None:
        """Another live node has our id. The younger of the two gives way: whoever is still looking around."""
        text = f"node id {self.node.node_id} is taken by {event.name} at {event.address}: start with another --node-id"
        if self.election.standing is None and not self.election.is_ready(now):
            self._say(Exit(1, text))
        else:
            self._log("error", "two nodes have the same id", other=event.name, address=event.address)

    # -- Whom we follow ------------------------------------------------------------------------------------------------

    def _standing(self, now: float) -> tuple[msg.Term | None, bool]:
        may_lead = self.election.is_ready(now) and not self.is_stopping
        return self.election.standing, may_lead

    def on_leading(self, sender: int, message: msg.Leading, now: float) -> None:
        """A node says whom it follows."""
        before, followed = self.election.greatest, self.election.followed
        try:
            self.election.heard(sender, message)
        except ValueError as error:
            self._log("error", "term refused", peer=sender, reason=str(error))
            return
        self._heard_term(before, now)
        term = message.term
        if term is not None and term.node_id == sender and self.election.is_stale(term):
            # It has to hear why nobody obeys it.
            self._say(Send(sender, msg.Denied(term, self.election.greatest, self.election.followed)))
        if self.election.followed is not None and self.election.followed != followed:
            self._drop_claim()
            self.replica.follow(self.election.followed, now)
        elif followed is not None and self.election.followed is None:
            self.replica.leave()

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
        self.leader = self.feed = self._merger = None
        self.election.leading = None
        self._handing_to = None
        self._timers.clear("hand over")
        self._timers.clear("stall")
        self._resign()
        for event in self._take_deferred():
            event(now)  # There is no leader any more, which is what they are answered.

    # -- Claims --------------------------------------------------------------------------------------------------------

    def consider(self, now: float) -> None:
        """At the end of a turn: claim if it is ours to do, answer a claim, or hand over."""
        if self.is_stopping and self.leader is None:
            return
        if self.election.may_claim(now):
            self._start_claim(now)
        elif self.leader is not None and self._deferred is None and self.feed is not None:
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
            self._say, self._write_node,
        )  # fmt: skip
        for row in self.nodes.values():
            if "worker" in row.roles:
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
        self.feed = Feed(leader.term, self.settings, self.outbox, self._giver, merger, self._say, leader.merged)
        self.stats.leader_changes += 1
        self._log("info", "leading", epoch=leader.term.epoch, tasks=len(leader.ledger.tasks))
        self._say(AnnounceNode("leader.changed", self.node.node_id, f"epoch {leader.term.epoch}"))
        self._remember_scheduler(self.node, self.utc(now))
        for node in self.election.schedulers():
            if node.node_id not in self.nodes:
                self._remember_scheduler(node, 0.0)
        leader.begin(now)

    def on_claim(self, sender: int, message: msg.Claim, now: float) -> None:
        """Another scheduler wants to lead: obey its term, and give it what it lacks."""
        before = self.election.greatest
        try:
            self.election.learn(message.term)
        except ValueError as error:
            self._log("error", "term refused", peer=sender, reason=str(error))
            self._say(Send(sender, msg.Denied(message.term, before, self.election.standing)))
            return
        if self.election.greatest != message.term:
            self._say(Send(sender, msg.Denied(message.term, self.election.greatest, self.election.standing)))
            return
        self._heard_term(before, now)
        self.election.followed, self.election.granted = None, message.term
        self.replica.leave()
        self._owed = (sender, message)

    def on_denied(self, sender: int, message: msg.Denied, now: float) -> None:
        """Our term is not the greatest, or somebody hears a leader."""
        before = self.election.greatest
        if message.greatest is not None:
            try:
                self.election.learn(message.greatest)
            except ValueError as error:
                self._log("error", "term refused", peer=sender, reason=str(error))
                return
            self._heard_term(before, now)
        if self._claim is not None and message.term == self._claim.term:
            self._drop_claim()
        self.election.denied(now)

    def on_page(self, sender: int, message: msg.Page, now: float) -> None:
        """Rows that we lack: as a claimer, as a leader, or as a standby."""
        if self._claim is not None and message.term == self._claim.term:
            self._claim.page(sender, message, now)
        elif self.leader is not None and self._merger is not None and message.term == self.leader.term:
            self._merger.page(sender, message, now)
        else:
            self.replica.page(sender, message, now)

    def on_page_taken(self, sender: int, message: msg.PageTaken, now: float) -> None:
        """A page of ours is durable over there."""
        self._giver.taken(sender, message)

    # -- Standbys ------------------------------------------------------------------------------------------------------

    def on_attach(self, sender: int, message: msg.Attach, now: float) -> None:
        """A standby follows us."""
        if self.leader is not None and self.feed is not None and message.term == self.leader.term:
            self.feed.attach(self._connected[sender], message, now)

    def on_wanted(self, sender: int, message: msg.Wanted, now: float) -> None:
        """Our leader lacks something."""
        self.replica.wanted(sender, message)

    def on_replicate(self, sender: int, message: msg.Replicate, now: float) -> None:
        """Our leader has decided something."""
        self.replica.replicate(sender, message, now)

    def on_replicated(self, sender: int, message: msg.Replicated, now: float) -> None:
        """A standby has a copy."""
        if self.feed is None:
            return
        was_in_sync = sender in self.feed.in_sync
        self._said += self.feed.replicated(sender, message, now)
        if not was_in_sync and sender in self.feed.in_sync:
            self._remember_scheduler(self._connected[sender], self.utc(now))

    def _hand_over(self, target: int, now: float) -> None:
        """Let a standby lead in our place: decide nothing new, and tell it once it has everything."""
        self._log("info", "handing over", to=target)
        self._handing_to = target
        self._deferred = []
        self._timers.set("hand over", now + HAND_OVER_S)

    def _tell_heir(self, now: float) -> None:
        assert self.leader is not None
        assert self.feed is not None
        target = self._handing_to
        if target is not None and self.outbox.is_idle and self.feed.is_level(target):
            self._handing_to = None
            self._say(Send(target, msg.HandOver(self.leader.term, self.feed.last_lsn)))
            self._timers.set("hand over", now + HAND_OVER_S)

    def on_hand_over(self, sender: int, message: msg.HandOver, now: float) -> None:
        """Our leader has stopped deciding for us to go on."""
        term = message.term
        if self.replica.term != term or sender != term.node_id or self.is_stopping:
            return

        def claim(now: float) -> None:
            if self.replica.term == term and self.outbox.seen.lsn_of(term) >= message.lsn:
                self._start_claim(now)

        self.outbox.then(Continue(claim))

    def _hand_over_failed(self, now: float) -> None:
        """The heir did not take over: lead on, under a term that it cannot have taken."""
        was_told = self._handing_to is None
        self._handing_to = None
        if not was_told or self.is_stopping:
            self._resume(now)
            return
        self._step_down("the standby that was to lead does not answer", now)
        self.election.next_term()
        self._start_claim(now)

    def _take_deferred(self) -> list[Callable[[float], None]]:
        deferred, self._deferred = self._deferred or [], None
        return deferred

    def _resume(self, now: float) -> None:
        for event in self._take_deferred():
            event(now)

    # -- To the leader -------------------------------------------------------------------------------------------------

    def _to_leader(self, do: Callable[[Leader, float], None], now: float) -> None:
        """Have the leader do something, later where it may not decide at the moment; nothing where we do not lead."""
        if self._deferred is not None:
            self._deferred.append(partial(self._to_leader, do))
        elif self.leader is not None:
            do(self.leader, now)

    def on_register(self, sender: int, message: msg.Register, now: float) -> None:
        """A worker wants to work for us."""
        if message.term is not None:
            before = self.election.greatest
            try:
                self.election.learn(message.term)
            except ValueError as error:
                self._log("error", "term refused", peer=sender, reason=str(error))
                return
            self._heard_term(before, now)
        if self.leader is None or message.offer is NOTHING_OFFERED:
            self._say(Send(sender, msg.Leading(*self._standing(now))))
            return
        self._to_leader(lambda leader, now: leader.on_register(sender, message, now), now)

    def on_worker(self, name: str, sender: int, message: msg.Message, now: float) -> None:
        """Any other message of a worker: `name` is the leader's method for it."""
        self._to_leader(lambda leader, now: getattr(leader, name)(sender, message, now), now)

    def on_client(self, name: str, event: ev.Submitted | ev.CancelWanted | ev.DrainWanted, now: float) -> None:
        """A client's wish: `name` is the leader's method for it."""
        if self._deferred is not None:
            self._deferred.append(partial(self.on_client, name, event))
        elif self.leader is None:
            self._say(Reply(event.call, NoLeader()))
        elif isinstance(event, ev.Submitted) and (refusal := self._refusal()) is not None:
            self._say(Reply(event.call, refusal))
        else:
            getattr(self.leader, name)(event, now)

    def _refusal(self) -> Unavailable | None:
        if self.is_stopping:
            return Unavailable("the scheduler is stopping; try again in a moment")
        if self.settings.min_replicas and self.durability == "local" and not self.outbox.needs_copy:
            return Unavailable("no standby keeps a copy, and min_replicas asks for one")
        return None

    # -- The node ------------------------------------------------------------------------------------------------------

    def on_stop_wanted(self, now: float) -> None:
        """Begin nothing new; hand over, and have everything recorded."""
        self.is_stopping = True
        self._drop_claim()
        if self.leader is not None and self.feed is not None:
            self.leader.is_stopping = True
            if self._deferred is None and self.feed.in_sync:
                self._hand_over(self.feed.in_sync[0], now)

    @property
    def has_stopped(self) -> bool:
        """Whether nothing is left to do after a wish to stop."""
        return self.outbox.is_durable if self.leader is None else self.outbox.is_idle and self._deferred is None

    def on_stalled(self, event: ev.Stalled, now: float) -> None:
        """We stood still: others may have gone on without us. Look around before deciding anything."""
        self._log("warning", "this process stood still", seconds=round(event.duration_s, 1), leads=self.leads)
        if self.leader is None:
            self.election.join(now)
        elif self._deferred is None and any(
            "scheduler" in row.roles and row.node_id != self.node.node_id for row in self.nodes.values()
        ):
            self._deferred = []
            self._timers.set("stall", now + JOIN_S)

    def on_settings_changed(self, event: ev.SettingsChanged, now: float) -> None:
        """The operator has changed what may be changed while running."""
        self.settings = event.settings
        if self.leader is not None and self.feed is not None:
            self.feed.settings = event.settings
            self.leader.on_settings_changed(event.settings)

    def on_read(self, event: ev.RowsRead | ev.IdsRead, now: float) -> None:
        """A reading that we asked for."""
        self._reads.answered(event, now)

    def on_read_failed(self, event: ev.ReadFailed, now: float) -> None:
        """Our own disk cannot be read: nothing can be decided."""
        self._say(Exit(1, f"reading the database failed: {event.reason}"))

    def on_committed(self, event: ev.Committed) -> list[Effect]:
        """A commit is durable: what waited for it."""
        if self.feed is not None:
            self.feed.committed()
        return self.outbox.committed(event.seq)

    def on_commit_failed(self, event: ev.CommitFailed) -> list[Effect]:
        """The disk failed us: what waits must not happen. Whoever waits is told; the next process reads the truth."""
        error = Unavailable("the scheduler could not write to its disk; whether the call took effect is not known")
        calls = [effect.call for effect in self.outbox.drop() if isinstance(effect, Reply)]
        return [*(Reply(call, error) for call in calls), Exit(1, f"commit failed: {event.reason}")]

    def settle(self, now: float) -> list[Effect]:
        """At the end of a turn: what is to be done."""
        self.consider(now)
        if self._owed is not None and self.outbox.is_durable:
            (claimer, claim), self._owed = self._owed, None
            self._giver.start(claimer, claim.term, Seen(claim.seen))
        if self.leader is not None and self._deferred is None:
            self.leader.settle(now)
        lsn = self.outbox.lsn
        released = self.outbox.release()
        if self.feed is not None:
            for effect in released:
                if type(effect) is Commit:
                    self.feed.stream(effect, lsn, now)
            if self._handing_to is not None:
                self._tell_heir(now)
        self._tell_all(now)
        said, self._said = self._said, []
        return said + released

    def _tell_all(self, now: float) -> None:
        """Tell everybody whom we follow, when that has changed."""
        standing = self._standing(now)
        if standing == self._told:
            return
        if standing[0] != self._told[0]:
            term = standing[0]
            self._say(Follow(term.node_id if term is not None else None, term))
        self._told = standing
        for node_id in self._connected:
            self._say(Send(node_id, msg.Leading(*standing)))

    def next_deadline(self, now: float, utc_offset_s: float) -> float | None:
        """When tick has something to do, monotonic."""
        due = [self.election.next_deadline(now), self._timers.next()]
        if self.leader is not None and self.feed is not None:
            due += [self.feed.next_deadline(now)]
            if self._deferred is None:
                due += [self.leader.next_deadline(now, utc_offset_s)]
        return min((time for time in due if time is not None), default=None)

    def tick(self, now: float) -> None:
        """Do what is due."""
        for timer in self._timers.pop_due(now):
            if timer == "stall":
                self._resume(now)
            else:
                self._hand_over_failed(now)
        if self.feed is not None:
            self._said += self.feed.tick(now)
        if self.leader is not None and self._deferred is None:
            self.leader.tick(now)

    def _say(self, effect: Effect) -> None:
        self._said.append(effect)

    def _log(self, level: str, event: str, **fields: object) -> None:
        self._say(Log(level, event, fields))
