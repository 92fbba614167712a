"""The scheduler role of one node: hears everything, tells whoever decides, and says what is to be done.

Who decides is the matter of leadership.py; what is decided, of leader.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from taskd.core import events as ev
from taskd.core.deadlines import earliest
from taskd.core.effects import Commit, Effect, Exit, Follow, Reply, Send
from taskd.core.election import JOIN_S
from taskd.core.feed import StandbyView
from taskd.core.leader import Leader
from taskd.core.leadership import Leadership
from taskd.core.ledger import Ledger
from taskd.core.nodes import is_doubtful
from taskd.core.pause import Why
from taskd.core.replica import Stage
from taskd.core.roster import Roster
from taskd.core.seal import Seal
from taskd.core.seen import Seen
from taskd.errors import NoLeader, Stopping, Unavailable
from taskd.protocol import messages as msg


class Scheduler(Leadership):
    """The scheduler role."""

    # -- Views ---------------------------------------------------------------------------------------------------------

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

    def is_provisional(self, row: msg.TaskRow, now: float) -> bool:
        """Whether a result may still be superseded: a scheduler was away when it was decided, and still is."""
        return row.finished_s > 0 and is_doubtful(row, self.away(now))

    # -- Start ---------------------------------------------------------------------------------------------------------

    def on_loaded(self, event: ev.Loaded, now: float) -> None:
        """The database was opened."""
        self.election.greatest = event.term
        self.outbox.load(event.seen, event.purged, has_strays=event.has_strays)
        self.nodes.load(event.nodes)
        waits = event.is_empty and not self._is_founder
        self.election.join(now, max(JOIN_S, self.settings.empty_wait_s) if waits else JOIN_S)

    # -- Peers ---------------------------------------------------------------------------------------------------------

    def on_peer_up(self, event: ev.PeerUp, now: float) -> None:
        """A node is connected: tell it whom we follow."""
        node = event.node
        self._connected[node.node_id] = node
        self.election.peer_up(node, now)
        self._say(Send(node.node_id, self._leading(now)))
        if "scheduler" in node.roles and node.node_id != self.node.node_id:
            if self.leader is not None:
                known = self.nodes.get(node.node_id)
                self.nodes.write_scheduler(node, known.seen_s if known is not None else self.utc(now))
            if self._claim is not None:
                self._claim.ask(node.node_id)

    def on_peer_down(self, event: ev.PeerDown, now: float) -> None:
        """A connection is gone."""
        node_id = event.node_id
        was_followed = self.election.followed
        node = self._connected.pop(node_id, None)
        self._liars.pop(node_id, None)
        self.election.peer_down(node_id, now, event.is_orderly)
        self._giver.stop(node_id)
        if self._owed is not None and self._owed[0] == node_id:
            self._owed = None
        is_scheduler = node is not None and "scheduler" in node.roles
        if is_scheduler and not event.is_orderly:
            self._flaps.note(node_id, now)
        if was_followed is not None and self.election.followed is None:
            if node is not None and was_followed.node_id == node_id and self.replica.stage is Stage.IN_SYNC:
                self.nodes.write_scheduler(node, self.utc(now))
            self.replica.leave()
        if self._claim is not None:
            self._claim.gone(node_id, now)
        if self.feed is not None and node is not None and is_scheduler:
            held_until = self.feed.held_until(node_id, now)
            if held_until is not None:
                self.nodes.write_scheduler(node, self.utc(held_until))
            self.feed.gone(node_id, now, is_orderly=event.is_orderly)
        self._to_leader(lambda leader, now: leader.on_peer_down(event, now), now)

    def on_collided(self, event: ev.Collided, now: float) -> None:
        """Another live node has our id. The younger of the two gives way: whoever is still looking around."""
        if self.election.standing is None and not self.election.is_ready(now):
            self._say(Exit(1, event.text(self.node.node_id)))
        else:
            self._log(
                "error",
                "two nodes have the same id",
                other=event.name,
                address=event.address,
                reason=event.text(self.node.node_id),
            )

    # -- To the leader -------------------------------------------------------------------------------------------------

    def _to_leader(self, do: Callable[[Leader, float], None], now: float) -> None:
        """Have the leader do something, later where it may not decide at the moment; nothing where we do not lead."""
        if self._pause:
            self._pause.defer(partial(self._to_leader, do))
        elif self.leader is not None:
            do(self.leader, now)

    def on_register(self, sender: int, message: msg.Register, now: float) -> None:
        """A worker wants to work for us."""
        if message.term is not None:
            before = self.election.greatest
            try:
                # One that we know needs no proof; a worker of the version before has none.
                is_news = before is None or message.term.rank() > before.rank()
                if is_news and sender != self.node.node_id and not self.seal.holds(message.term, message.proof):
                    raise ValueError(f"a worker has obeyed term {message.term.epoch}, and shows no seal of it")
                self.election.learn(message.term)
            except ValueError as error:
                self._term_refused(sender, error)
                return
            self._heard_term(before, now)
        if self.leader is None:
            self._say(Send(sender, self._leading(now)))
            return
        self._to_leader(lambda leader, now: leader.on_register(sender, message, now), now)

    def on_worker(self, name: str, sender: int, message: msg.Message, now: float) -> None:
        """Any other message of a worker: `name` is the leader's method for it."""
        self._to_leader(lambda leader, now: getattr(leader, name)(sender, message, now), now)

    def on_client(self, name: str, event: ev.Submitted | ev.CancelWanted | ev.DrainWanted, now: float) -> None:
        """A client's wish: `name` is the leader's method for it."""
        if self._pause:
            # Which of the tasks are new may be another question by then: whoever asked finds that out again.
            again = partial(self.on_client, name, event)
            refuse = Reply(event.call, NoLeader())
            self._pause.defer((lambda now: self._say(refuse)) if isinstance(event, ev.Submitted) else again)
        elif self.leader is None:
            self._say(Reply(event.call, NoLeader()))
        elif isinstance(event, ev.Submitted) and (refusal := self._refusal()) is not None:
            self._say(Reply(event.call, refusal))
        else:
            getattr(self.leader, name)(event, now)

    def _refusal(self) -> Unavailable | None:
        if self.is_stopping:
            return Stopping()
        if self.settings.min_replicas and self.feed is not None and not self.feed.is_promising:
            return Unavailable("no standby keeps a copy, and min_replicas asks for one")
        return None

    # -- The node ------------------------------------------------------------------------------------------------------

    def on_stop_wanted(self, now: float) -> None:
        """Begin nothing new; hand over, and have everything recorded."""
        self.is_stopping = True
        self._drop_claim()
        if self.leader is not None and self.feed is not None:
            self.leader.is_stopping = True
            if not self._pause and self.feed.in_sync:
                self._hand_over(self.feed.in_sync[0], now)

    @property
    def has_stopped(self) -> bool:
        """Whether nothing is left to do after a wish to stop."""
        return self.outbox.is_durable if self.leader is None else self.outbox.is_idle and not self._pause

    def on_stalled(self, event: ev.Stalled, now: float) -> None:
        """We stood still: others may have gone on without us. Look around before deciding anything."""
        self._log("warning", "this process stood still", seconds=round(event.duration_s, 1), leads=self.leads)
        if self.leader is None:
            self._drop_claim()  # Who was asked may have gone and come again, and not remember.
            self.election.join(now)
        elif any(row.node_id != self.node.node_id for row in self.nodes.schedulers(self.utc(now))):
            # One that hands over does not go on before that either: its heir may lead by now.
            self._pause.begin(self._pause.why or Why.LOOKING_AROUND, now + JOIN_S)

    def on_settings_changed(self, event: ev.SettingsChanged, now: float) -> None:
        """The operator has changed what may be changed while running."""
        self.settings = event.settings
        if self.leader is not None and self.feed is not None:
            self.feed.settings = event.settings
            self.leader.on_settings_changed(event.settings)

    def on_keys_changed(self, event: ev.KeysChanged, now: float) -> None:
        """Terms are sealed anew: those who keep the seal of ours get the new one."""
        self.seal = Seal(*event.secrets)
        if self.leads:
            for node_id in self._connected:
                self._say(Send(node_id, self._leading(now)))

    def on_read(self, event: ev.BacklogRead | ev.RowsRead | ev.IdsRead, now: float) -> None:
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
        error = Stopping("the scheduler could not write to its disk; whether the call took effect is not known")
        calls = [effect.call for effect in self.outbox.drop() if isinstance(effect, Reply)]
        return [*(Reply(call, error) for call in calls), Exit(1, f"commit failed: {event.reason}")]

    def settle(self, now: float) -> list[Effect]:
        """At the end of a turn: what is to be done."""
        self.consider(now)
        if self._owed is not None and self.outbox.is_durable:
            (claimer, claim), self._owed = self._owed, None
            self._giver.start(claimer, claim.term, Seen(claim.seen))
        if self.leader is not None and not self._pause:
            self.leader.settle(now)
        lsn = self.outbox.lsn
        released = self.outbox.release()
        if self.feed is not None:
            for effect in released:
                if type(effect) is Commit:
                    self.feed.stream(effect, lsn, now)
            if self._pause.why is Why.FINISHING:
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
        leading = self._leading(now)
        for node_id in self._connected:
            self._say(Send(node_id, leading))

    def next_deadline(self, now: float, utc_offset_s: float) -> float | None:
        """When tick has something to do, monotonic."""
        due = [self.election.next_deadline(now), self._pause.until]
        if self.leader is not None and self.feed is not None:
            due += [self.feed.next_deadline(now)]
            if not self._pause:
                due += [self._remembering_at, self.leader.next_deadline(now, utc_offset_s)]
        return earliest(*due)

    def tick(self, now: float) -> None:
        """Do what is due."""
        if self._pause.until is not None and now >= self._pause.until:
            self._go_on(now)
        if self.feed is not None:
            self._said += self.feed.tick(now)
        if self.leader is not None and not self._pause:
            if self._remembering_at is not None and now >= self._remembering_at:
                self._remember_schedulers(now)
            self.leader.tick(now)
