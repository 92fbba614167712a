"""The worker: keeps what it was given in order, starts what fits, and holds every outcome until a leader has it.

It obeys one leader at a time, the one with the greatest term it has seen, and goes on working while there is none.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from taskd.core import events as ev
from taskd.core.deadlines import Deadlines, earliest
from taskd.core.effects import Begin, Effect, Exit, Follow, Journal, Kill, Log, Send, Start, Terminate
from taskd.core.election import is_absurd
from taskd.core.outcomes import OutcomeBatch, finished_messages
from taskd.core.room import Place, Room
from taskd.core.roster import NOTHING_OFFERED
from taskd.core.task import ErrorInfo, Outcome, Report, TaskSpec, decode_spec, encode
from taskd.protocol import messages as msg

INVENTORY_S = 10.0
# How long a stopping worker waits, after its tasks have had their grace, for a leader to take the last outcomes: those
# that it does not take are in the journal.
STOP_ACKNOWLEDGED_S = 5.0


class _Running:
    """An attempt that a runner has."""

    __slots__ = ("begun", "is_stopped", "is_timed_out", "place", "spec", "started_s")

    def __init__(self, spec: TaskSpec, place: Place, begun: float) -> None:
        self.spec = spec
        self.place = place
        self.begun = begun  # monotonic; given to the runner
        self.started_s = 0.0
        self.is_timed_out = False
        self.is_stopped = False  # ended because this worker stops


class Worker:
    """The worker role of one node."""

    def __init__(self, node: msg.NodeInfo, offer: msg.Offer) -> None:
        self.node = node
        self.offer = offer
        self.utc: Callable[[float], float] = float
        self.term: msg.Term | None = None  # the greatest obeyed
        self.leader: int | None = None
        self.is_stopping = False
        self._registered = False
        self._schedulers: dict[int, None] = {}  # connected ones
        self._unacknowledged_before: dict[msg.AttemptKey, None] = {}  # when the last inventory was sent
        self._room = Room(offer)
        self._running: dict[msg.AttemptKey, _Running] = {}
        self._unacknowledged: dict[msg.AttemptKey, msg.AttemptEnded] = {}
        self._runs_seen = 0
        self._limits: Deadlines[tuple[str, msg.AttemptKey]] = Deadlines()  # run time-outs, and the grace after TERM
        self._timers: Deadlines[str] = Deadlines()
        self._unreported: dict[msg.AttemptKey, float] = {}
        self._proof = b""  # the leader's seal of our term: without it no scheduler believes us that there is one
        self._effects: list[Effect] = []
        self._ended: list[msg.AttemptEnded] = []  # in this turn
        self._batch = OutcomeBatch()
        self._forgotten: list[msg.AttemptKey] = []

    # -- The leader ----------------------------------------------------------------------------------------------------

    def on_journal_loaded(self, event: ev.JournalLoaded, now: float) -> None:
        """What the last process of this worker left: attempts it was running are lost, outcomes are still owed."""
        self.term, self._proof = event.term, event.proof
        for ended in event.unacknowledged:
            self._unacknowledged[ended.key] = ended
        report = encode(Report(error=ErrorInfo("WorkerRestarted", "the worker ended while the task ran")))
        for key in event.interrupted:
            if key not in self._unacknowledged:
                self._end(msg.AttemptEnded(key, Outcome.LOST, 0.0, self.utc(now), report))

    def on_leading(self, sender: int, message: msg.Leading, now: float) -> None:
        """A scheduler says whom it follows. Only a leader itself is believed, and only with no lesser term."""
        term = message.term
        if term is None or term.node_id != sender:
            if self.leader == sender:
                self._lose_leader()
            return
        if self.term is not None and term.rank() < self.term.rank():
            # It has to hear why nobody obeys it: its disk may be new or restored, and its epoch of long ago.
            self._log("warning", "term refused: a greater one was obeyed", peer=sender, epoch=term.epoch)
            self._effects.append(Send(sender, msg.Register(NOTHING_OFFERED, (), (), self.term, self._proof)))
            return
        known = self.term.epoch if self.term is not None else None
        if is_absurd(term.epoch, known):
            self._log("error", "term refused: its epoch cannot be", peer=sender, epoch=term.epoch, known=known)
            return
        if sender == self.leader and term == self.term:
            if message.proof != self._proof:  # The cluster key has been replaced meanwhile.
                self._proof = message.proof
                self._effects.append(Journal(term, [], [], [], self._proof))
                self._tell_schedulers()
            return  # Said twice. A second Register could cross with what the first one has brought on its way.
        self.term, self.leader, self._proof = term, sender, message.proof
        self._registered = False
        self._timers.clear("inventory")
        self._effects.append(Journal(term, [], [], [], self._proof))
        self._effects.append(Follow(sender, term))
        self._tell_schedulers()
        unacknowledged = tuple(self._unacknowledged)
        held = (*self._running, *self._room)
        offer = NOTHING_OFFERED if self.is_stopping else self.offer
        self._effects.append(Send(sender, msg.Register(offer, held, unacknowledged, term, self._proof)))

    def on_registered(self, sender: int, message: msg.Registered, now: float) -> None:
        """The leader has taken us in: tell it what it missed."""
        if sender != self.leader or message.term != self.term:
            return
        self._registered = True
        self._runs_seen = 0
        started = tuple(msg.AttemptStarted(key, it.started_s) for key, it in self._running.items() if it.started_s)
        if started:
            self._effects.append(Send(sender, msg.Started(started)))
        self._batch.forget()
        fresh = {ended.key for ended in self._ended}  # These are sent at the end of the turn.
        self._send_finished([ended for key, ended in self._unacknowledged.items() if key not in fresh])
        self._timers.set("inventory", now + INVENTORY_S)

    def on_peer_up(self, event: ev.PeerUp) -> None:
        """A scheduler is connected: it hears whom we follow, and says whom it follows."""
        if "scheduler" in event.node.roles and "scheduler" not in self.node.roles:
            self._schedulers[event.node.node_id] = None
            self._effects.append(Send(event.node.node_id, self._standing))

    def on_collided(self, event: ev.Collided) -> None:
        """Another live node has our id; schedulers have taken it in before us."""
        if self.leader is None:
            self._effects.append(Exit(1, event.text(self.node.node_id)))
        else:
            self._log(
                "error",
                "two nodes have the same id",
                other=event.name,
                address=event.address,
                reason=event.text(self.node.node_id),
            )

    def on_peer_down(self, event: ev.PeerDown, now: float) -> None:
        """A connection is gone; without the leader work goes on, and outcomes wait."""
        self._schedulers.pop(event.node_id, None)
        if event.node_id == self.leader:
            self._lose_leader()

    def _lose_leader(self) -> None:
        self.leader = None
        self._registered = False
        self._timers.clear("inventory")
        self._effects.append(Follow(None, None))
        self._tell_schedulers()

    def _tell_schedulers(self) -> None:
        """Say whom we follow: a scheduler that cannot hear the leader learns from us that there is one. A node that is
        a scheduler too speaks as that alone."""
        for node_id in self._schedulers:
            self._effects.append(Send(node_id, self._standing))

    @property
    def _standing(self) -> msg.Leading:
        return msg.Leading(self.term, proof=self._proof) if self.leader is not None else msg.Leading(None)

    def _obeys(self, sender: int, term: msg.Term) -> bool:
        return sender == self.leader and term == self.term

    # -- The leader's wishes -------------------------------------------------------------------------------------------

    def on_run(self, sender: int, message: msg.Run, now: float) -> None:
        """Attempts to run. One that is known already is passed over: the message was sent again."""
        if not self._obeys(sender, message.term):
            return
        self._runs_seen += 1
        for assignment in message.assignments:
            key = assignment.key
            if key in self._room or key in self._running or key in self._unacknowledged:
                continue
            try:
                spec = decode_spec(assignment.spec)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                # Of a newer scheduler, or damaged: another worker may be able to.
                text = ErrorInfo("UnreadableTask", f"this worker cannot read what it is to run: {error}")
                self._end(msg.AttemptEnded(key, Outcome.SPAWN_FAILED, 0.0, self.utc(now), encode(Report(error=text))))
                continue
            if self.is_stopping or not self._room.could_run(spec):
                self._give_back(key, now)
                continue
            self._room.add(key, spec)

    def on_cancel(self, sender: int, message: msg.Cancel, now: float) -> None:
        """End these attempts, whatever they are doing."""
        if not self._obeys(sender, message.term):
            return
        for key in message.keys:
            if key in self._running:
                self._terminate(key, now, self._running[key].spec.grace_s)
            elif key not in self._unacknowledged:
                self._give_back(key, now)  # Waiting, or never seen: either way it does not run and never will.

    def on_recall(self, sender: int, message: msg.Recall, now: float) -> None:
        """Give back what has not begun."""
        if not self._obeys(sender, message.term):
            return
        for key in message.keys:
            if key in self._room:
                self._give_back(key, now)

    def _give_back(self, key: msg.AttemptKey, now: float) -> None:
        """End an attempt that has not begun: an outcome like any other, so that it is not lost on the way."""
        self._room.discard(key)
        self._batch.hurry(now)
        self._end(msg.AttemptEnded(key, Outcome.PREEMPTED, 0.0, self.utc(now)))

    def on_acknowledged(self, sender: int, message: msg.Acknowledged, now: float) -> None:
        """These outcomes are recorded: forget them."""
        for key in message.keys:
            if self._unacknowledged.pop(key, None) is not None:
                self._forgotten.append(key)

    # -- Task processes ------------------------------------------------------------------------------------------------

    def on_progressed(self, event: ev.Progressed, now: float) -> None:
        """Runners began and ended attempts."""
        for started in event.started:
            running = self._running.get(started.key)
            if running is None:
                continue
            running.started_s = started.started_s
            self._unreported[started.key] = started.started_s
            if running.spec.timeout_s:
                # Runners tell of a beginning a moment later; the moment counts, and no step of the clock.
                ran_s = min(max(0.0, self.utc(now) - started.started_s), now - running.begun)
                self._limits.set(("timeout", started.key), now + running.spec.timeout_s - ran_s)
        for ended in event.ended:
            self._on_ended(ended)

    def _on_ended(self, ended: msg.AttemptEnded) -> None:
        key = ended.key
        running = self._running.pop(key, None)
        if running is None:
            return
        self._room.release(running.place)
        if ended.started_s:
            self._room.ran(running.spec.type, ended.ended_s - ended.started_s)
        if self._limits:
            self._limits.clear(("timeout", key))
            self._limits.clear(("grace", key))
        self._unreported.pop(key, None)
        if ended.outcome != Outcome.OK:
            if running.is_timed_out:
                ended = msg.AttemptEnded(key, Outcome.TIMEOUT, ended.started_s, ended.ended_s, ended.report)
            elif running.is_stopped:
                ended = msg.AttemptEnded(key, Outcome.PREEMPTED, ended.started_s, ended.ended_s, ended.report)
        self._end(ended)

    def _end(self, ended: msg.AttemptEnded) -> None:
        self._unacknowledged[ended.key] = ended
        self._ended.append(ended)

    def _terminate(self, key: msg.AttemptKey, now: float, grace_s: float) -> None:
        """TERM now, unless that was sent already; KILL when the grace is over, this one or an earlier one."""
        due = self._limits.get(("grace", key))
        if due is None:
            self._effects.append(Terminate(key))
        if due is None or due > now + grace_s:
            self._limits.set(("grace", key), now + grace_s)

    # -- The node ------------------------------------------------------------------------------------------------------

    def on_offer_changed(self, event: ev.OfferChanged, now: float) -> None:
        """The configuration or the handlers have changed. What waits goes back: it may not fit any more."""
        self.offer = event.offer
        self._room.change(event.offer)
        if self.leader is not None and not self.is_stopping:
            self._effects.append(Send(self.leader, msg.Offering(event.offer)))
        for key in list(self._room):
            self._give_back(key, now)

    def on_stop_wanted(self, event: ev.StopWanted, now: float) -> None:
        """Give back what waits, end what runs; the end follows when the last outcome is acknowledged or time is up."""
        if self.is_stopping:
            return
        self.is_stopping = True
        if self.leader is not None:
            self._effects.append(Send(self.leader, msg.Offering(NOTHING_OFFERED)))
        for key in list(self._room):
            self._give_back(key, now)
        for key, running in self._running.items():
            running.is_stopped = True
            self._terminate(key, now, event.grace_s)
        self._timers.set("acknowledgement", now + event.grace_s + STOP_ACKNOWLEDGED_S)

    @property
    def has_stopped(self) -> bool:
        """Whether nothing is left to do after StopWanted."""
        if not self.is_stopping or self._running:
            return False
        return not self._unacknowledged or not self._registered or self._timers.get("acknowledgement") is None

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def waiting_count(self) -> int:
        return len(self._room)

    @property
    def unacknowledged_count(self) -> int:
        return len(self._unacknowledged)

    def next_deadline(self) -> float | None:
        """When tick has something to do, monotonic."""
        return earliest(self._limits.next(), self._timers.next())

    def tick(self, now: float) -> None:
        """Do what is due."""
        for kind, key in self._limits.pop_due(now):
            running = self._running.get(key)
            if running is None:
                continue
            if kind == "timeout":
                running.is_timed_out = True
                self._terminate(key, now, running.spec.grace_s)
            else:
                self._effects.append(Kill(key))
        for timer in self._timers.pop_due(now):
            if timer == "inventory" and self.leader is not None:
                keys = (*self._running, *self._room, *self._unacknowledged)
                self._effects.append(Send(self.leader, msg.Inventory(self._runs_seen, keys)))
                self._timers.set("inventory", now + INVENTORY_S)
                self._send_again()

    def _send_again(self) -> None:
        """Outcomes that the leader has left unanswered for so long: it may know by now what they belong to."""
        before, unacknowledged = self._unacknowledged_before, self._unacknowledged
        again = [ended for key, ended in unacknowledged.items() if key in before]
        if again:
            self._send_finished(again)
        self._unacknowledged_before = dict.fromkeys(unacknowledged)

    def _report_started(self) -> None:
        self._effects.append(Journal(None, list(self._unreported), [], []))
        if self._registered and self.leader is not None:
            attempts = tuple(msg.AttemptStarted(key, at_s) for key, at_s in self._unreported.items())
            self._effects.append(Send(self.leader, msg.Started(attempts)))
        self._unreported.clear()

    def settle(self, now: float) -> list[Effect]:
        """At the end of a turn: start what fits, and report what ended."""
        if self._unreported:
            self._report_started()
        begins = self._room.take_fitting(len(self._running))
        if begins:
            for key, spec, place in begins:
                self._running[key] = _Running(spec, place, now)
            self._effects.append(Start([Begin(key, spec) for key, spec, _ in begins]))
        if self._ended or self._forgotten:
            self._effects.append(Journal(None, [], self._ended, self._forgotten))
        if self._registered:
            self._batch.add(self._ended)
            self._tell_outcomes(now)
        self._ended, self._forgotten = [], []
        effects, self._effects = self._effects, []
        return effects

    def _tell_outcomes(self, now: float) -> None:
        """Send what has ended, or wait for more of it."""
        due = self._batch.due(len(self._room), self.offer.slots)
        if due is not None and now < due:
            self._timers.set("outcomes", due)
        elif due is not None:
            self._timers.clear("outcomes")
            self._send_finished(self._batch.take(now))

    def _send_finished(self, ended: list[msg.AttemptEnded]) -> None:
        assert self.leader is not None
        self._effects += [Send(self.leader, message) for message in finished_messages(ended)]

    def _log(self, level: str, event: str, **fields: object) -> None:
        self._effects.append(Log(level, event, fields))
