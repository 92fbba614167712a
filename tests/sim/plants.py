"""Planted bugs: each breaks one rule of the protocol, and the simulator has to notice within a few thousand seeds.

A plant is a function that patches the core. Its docstring says which rule it breaks, as in the table of the documents.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from taskd.core import effects as fx
from taskd.core import events as ev
from taskd.core import feed as feed_module
from taskd.core import join as join_module
from taskd.core import merger as merger_module
from taskd.core.adoption import Adoption
from taskd.core.claim import Claim
from taskd.core.election import Election
from taskd.core.feed import Feed
from taskd.core.giver import _Stream
from taskd.core.late import LateResults
from taskd.core.leader import Leader
from taskd.core.leadership import Leadership
from taskd.core.ledger import Ledger
from taskd.core.merger import Merger
from taskd.core.nodes import KnownNodes
from taskd.core.outbox import Continue, Outbox
from taskd.core.pause import Pause
from taskd.core.queue import Shape
from taskd.core.recent import Recent
from taskd.core.replica import Replica, Stage
from taskd.core.scheduler import Scheduler
from taskd.core.task import Attempt, Outcome, Task, TaskState
from taskd.core.worker import Worker
from taskd.protocol import messages as msg


class Patch:
    """Changes that can be taken back."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Put something in the place of an attribute."""
        self._undo.append((owner, name, vars(owner)[name]))
        setattr(owner, name, value)

    def undo(self) -> None:
        """All as it was."""
        for owner, name, value in reversed(self._undo):
            setattr(owner, name, value)


Plant = Callable[[Patch], None]
PLANTS: dict[str, Plant] = {}


def plant(function: Plant) -> Plant:
    """Enter a bug."""
    PLANTS[function.__name__] = function
    return function


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """The core with one bug in it."""
    patch = Patch()
    try:
        PLANTS[name](patch)
        yield
    finally:
        patch.undo()


def _nothing(*_arguments: Any, **_options: Any) -> None:
    """Does not do what it should."""


def _early(patch: Patch, is_early: Callable[[fx.Effect], bool]) -> None:
    """Let some effects leave before the rows that they promise."""
    release = Outbox.release

    def eager(outbox: Outbox) -> list[fx.Effect]:
        early = [effect for effect in outbox._open.effects if is_early(effect)]
        outbox._open.effects = [effect for effect in outbox._open.effects if not is_early(effect)]
        return [*outbox._answered(early, is_copied=False), *release(outbox)]

    patch.set(Outbox, "release", eager)


# -- Persist, then acknowledge -----------------------------------------------------------------------------------------


@plant
def accepts_before_the_commit(patch: Patch) -> None:
    """A client is answered before its tasks are durable."""
    _early(patch, lambda effect: isinstance(effect, fx.Reply))


@plant
def acknowledges_results_before_the_commit(patch: Patch) -> None:
    """A worker is told to forget an outcome before it is durable."""
    _early(patch, lambda effect: isinstance(effect, fx.Send) and isinstance(effect.message, msg.Acknowledged))


@plant
def hands_out_before_the_commit(patch: Patch) -> None:
    """An attempt leaves for its worker before its token is durable."""
    _early(patch, lambda effect: isinstance(effect, fx.Send) and isinstance(effect.message, msg.Run))


@plant
def announces_before_the_commit(patch: Patch) -> None:
    """Waiters hear of a result before it is durable."""
    next_commit = Outbox._next_commit

    def eager(outbox: Outbox) -> fx.Commit:
        commit = next_commit(outbox)
        batch = outbox._in_flight
        assert batch is not None
        early = [effect for effect in batch.effects if isinstance(effect, fx.Announce)]
        batch.effects = [effect for effect in batch.effects if not isinstance(effect, fx.Announce)]
        outbox._open.effects += early
        return commit

    patch.set(Outbox, "_next_commit", eager)
    _early(patch, lambda effect: isinstance(effect, fx.Announce))
    release = Outbox.release

    def at_once(outbox: Outbox) -> list[fx.Effect]:
        released = release(outbox)
        early = [effect for effect in outbox._open.effects if isinstance(effect, fx.Announce)]
        outbox._open.effects = [effect for effect in outbox._open.effects if not isinstance(effect, fx.Announce)]
        return released + early

    patch.set(Outbox, "release", at_once)


@plant
def waits_for_no_standby(patch: Patch) -> None:
    """Promises leave when the leader alone has what they promise, although a standby is in sync."""
    patch.set(Feed, "_check_copies", _nothing)


@plant
def says_replicated_without_a_copy(patch: Patch) -> None:
    """Every accepted task is called replicated."""
    answered = Outbox._answered
    patch.set(Outbox, "_answered", lambda outbox, effects, is_copied: answered(outbox, effects, is_copied=True))


@plant
def accepts_alone_against_the_settings(patch: Patch) -> None:
    """min_replicas asks for a copy, and tasks are accepted without one."""
    patch.set(Scheduler, "_refusal", lambda scheduler: None)
    answered = Outbox._answered

    def careless(outbox: Outbox, effects: list[fx.Effect], is_copied: bool) -> list[fx.Effect]:
        outbox.refuses_local = False
        return answered(outbox, effects, is_copied=is_copied)

    patch.set(Outbox, "_answered", careless)


@plant
def goes_on_after_a_failed_commit(patch: Patch) -> None:
    """A commit fails, and its effects happen as if it had not."""

    def forgiving(scheduler: Scheduler, event: ev.CommitFailed) -> list[fx.Effect]:
        return scheduler.on_committed(ev.Committed(event.seq))

    patch.set(Scheduler, "on_commit_failed", forgiving)


@plant
def standby_answers_before_its_commit(patch: Patch) -> None:
    """A standby says that it has a copy which is not on its disk yet."""

    def at_once(replica: Replica, message: msg.PageTaken | msg.Replicated) -> None:
        replica._say(fx.Send(message.term.node_id, message))

    patch.set(Replica, "_answer", at_once)


@plant
def standby_answers_while_it_catches_up(patch: Patch) -> None:
    """A standby acknowledges commits although it lacks earlier ones."""
    replicate = Replica.replicate

    def eager(replica: Replica, sender: int, message: msg.Replicate, now: float) -> None:
        replicate(replica, sender, message, now)
        if replica.stage is Stage.CATCHING_UP and message.is_last and replica._is_of_leader(sender, message.term):
            replica._answer(msg.Replicated(message.term, message.lsn))

    patch.set(Replica, "replicate", eager)


# -- What has been seen ------------------------------------------------------------------------------------------------


@plant
def sees_with_the_first_page(patch: Patch) -> None:
    """A standby counts everything as seen when the first page has come: a gap."""
    take_page = Replica.page

    def hasty(replica: Replica, sender: int, page: msg.Page, now: float) -> None:
        if replica._is_of_leader(sender, page.term):
            replica._outbox.see(page.seen)
        take_page(replica, sender, page, now)

    patch.set(Replica, "page", hasty)


@plant
def leaves_out_the_last_row_of_a_page(patch: Patch) -> None:
    """A page is a row short."""
    take_rows = _Stream.take_rows

    def short(stream: _Stream) -> tuple[msg.TaskRow, ...]:
        rows = take_rows(stream)
        return rows[:-1] if len(rows) > 1 else rows

    patch.set(_Stream, "take_rows", short)


@plant
def remembers_nothing_recent(patch: Patch) -> None:
    """Whoever lacks a little is told that it lacks nothing."""
    beyond = Recent.beyond
    patch.set(Recent, "beyond", lambda recent, theirs, ours: [] if beyond(recent, theirs, ours) is not None else None)


@plant
def streams_half_of_a_commit(patch: Patch) -> None:
    """Standbys get one row less than a commit has."""
    parts = feed_module._parts

    def half(term: msg.Term, commit: fx.Commit, lsn: int) -> list[msg.Replicate]:
        updated = commit.updated[:-1] if len(commit.updated) > 1 else commit.updated
        return parts(term, fx.Commit(commit.seq, commit.term, commit.inserted, updated, commit.nodes), lsn)

    patch.set(feed_module, "_parts", half)


@plant
def streams_no_purges(patch: Patch) -> None:
    """Standbys are not told what was purged."""
    parts = feed_module._parts

    def keeping(term: msg.Term, commit: fx.Commit, lsn: int) -> list[msg.Replicate]:
        return [
            msg.Replicate(part.term, part.lsn, part.rows, part.nodes, (), part.seen, part.is_last)
            for part in parts(term, commit, lsn)
        ]

    patch.set(feed_module, "_parts", keeping)


@plant
def standby_purges_by_itself(patch: Patch) -> None:
    """A standby removes finished tasks without the leader's word."""
    replicate = Replica.replicate

    def tidy(replica: Replica, sender: int, message: msg.Replicate, now: float) -> None:
        replicate(replica, sender, message, now)
        replica._outbox.purge([row.id for row in message.rows if row.finished_s])

    patch.set(Replica, "replicate", tidy)


@plant
def purges_at_once(patch: Patch) -> None:
    """Finished tasks are removed before their time."""
    ask = Leader._purge

    def hasty(leader: Leader, now: float) -> None:
        utc = leader.utc
        leader.utc = lambda now: utc(now) + leader.settings.finished_age_max_s
        ask(leader, now)
        leader.utc = utc

    patch.set(Leader, "_purge", hasty)


@plant
def takes_purged_rows_back(patch: Patch) -> None:
    """A task that was purged comes back from a scheduler that missed it."""
    merge = Merger._merge

    def generous(merger: Merger, row: msg.TaskRow, mine: msg.TaskRow | None, *rest: Any) -> None:
        if mine is None:
            merger._write(row, None, rest[-1])
        else:
            merge(merger, row, mine, *rest)

    patch.set(Merger, "_merge", generous)


@plant
def passes_on_no_purge_that_it_had_nothing_of(patch: Patch) -> None:
    """A leader that is told of a purge of tasks which it never had does not have its standbys follow that."""
    patch.set(Outbox, "remember_purge", _nothing)


# -- Joining -----------------------------------------------------------------------------------------------------------


@plant
def the_newer_row_wins(patch: Patch) -> None:
    """Histories are overwritten instead of joined."""

    def overwrite(merger: Merger, row: msg.TaskRow, mine: msg.TaskRow | None, theirs: Any, now: float) -> None:
        if mine is None or row.dot.rank() > mine.dot.rank():
            merger._write(row, mine, now)

    patch.set(Merger, "_merge", overwrite)


@plant
def the_lesser_decision_wins(patch: Patch) -> None:
    """The join takes the weaker of two decisions."""
    ranks = join_module._RANK
    patch.set(join_module, "_RANK", {state: -rank for state, rank in ranks.items()})


@plant
def a_lost_attempt_beats_its_result(patch: Patch) -> None:
    """The join believes the leader that gave an attempt up, and not the worker that ended it."""
    progress = join_module._progress

    def backwards(attempt: Attempt) -> tuple[object, ...]:
        stage, *rest = progress(attempt)
        return (3 if attempt.outcome is Outcome.LOST else stage, *rest)

    patch.set(join_module, "_progress", backwards)


@plant
def forgets_the_wish_to_cancel(patch: Patch) -> None:
    """The join drops it."""
    join = merger_module.join

    def forgetful(mine: msg.TaskRow, theirs: msg.TaskRow) -> join_module.Joined:
        joined = join(mine, theirs)
        joined.record.cancel_wanted = False
        return joined

    patch.set(merger_module, "join", forgetful)


@plant
def keeps_the_old_dot_after_a_join(patch: Patch) -> None:
    """A joined row is not stamped anew, so that others take it for the row they have."""
    joined_row = merger_module._joined_row
    patch.set(merger_module, "_joined_row", lambda mine, joined, dot: joined_row(mine, joined, mine.dot))
    adopt = Adoption.adopt

    def quiet(adoption: Adoption, row: msg.TaskRow, mine: msg.TaskRow | None, now: float) -> None:
        adopt(adoption, row, mine, now)
        adoption._outbox._open.updated.pop(row.id, None)

    patch.set(Adoption, "adopt", quiet)


@plant
def supersedes_without_a_word(patch: Patch) -> None:
    """A result that was told is replaced, and nobody is told of that."""
    then = Outbox.then

    def quiet(outbox: Outbox, effect: fx.Effect) -> None:
        if not isinstance(effect, fx.Superseded):
            then(outbox, effect)

    patch.set(Outbox, "then", quiet)
    next_commit = Outbox._next_commit

    def silent(outbox: Outbox) -> fx.Commit:
        commit = next_commit(outbox)
        batch = outbox._in_flight
        assert batch is not None
        for effect in batch.effects:
            if isinstance(effect, fx.Announce):
                effect.changes[:] = [change for change in effect.changes if not change.state.is_final]
        return commit

    patch.set(Outbox, "_next_commit", silent)


# -- Leadership --------------------------------------------------------------------------------------------------------


@plant
def claims_a_used_epoch(patch: Patch) -> None:
    """A new term has the epoch of the last one."""

    def again(election: Election) -> msg.Term:
        epoch = election.greatest.epoch if election.greatest is not None else 1
        election.greatest = msg.Term(epoch, election.node.node_id, election.node.boot)
        return election.greatest

    patch.set(Election, "next_term", again)


@plant
def learns_no_epoch_of_others(patch: Patch) -> None:
    """What others lead under is not remembered: two leaders under one epoch."""
    patch.set(Election, "learn", _nothing)


@plant
def claims_while_a_peer_hears_a_leader(patch: Patch) -> None:
    """A scheduler that lost its leader claims although others still follow it."""
    patch.set(
        Election, "_is_in_the_way",
        lambda election, peer, now: peer.is_scheduler and peer.may_lead and peer.info.node_id < election.node.node_id,
    )  # fmt: skip


@plant
def claims_over_a_lower_id(patch: Patch) -> None:
    """Whoever is first leads."""
    patch.set(
        Election, "_is_in_the_way",
        lambda election, peer, now: (not peer.has_spoken and now < peer.speaks_until)
        or (peer.says is not None and peer.says.node_id != election.node.node_id),
    )  # fmt: skip


@plant
def takes_over_without_asking(patch: Patch) -> None:
    """A claimer does not ask the live schedulers for what it lacks."""
    patch.set(Claim, "ask", _nothing)


@plant
def claims_before_the_term_is_durable(patch: Patch) -> None:
    """Others are asked under a term that a crash would forget."""
    _early(patch, lambda effect: isinstance(effect, fx.Send) and isinstance(effect.message, msg.Claim))


@plant
def answers_a_claim_before_the_term_is_durable(patch: Patch) -> None:
    """A scheduler gives its rows to a claimer under a term that a crash would forget."""
    patch.set(Outbox, "is_durable", property(lambda outbox: True))


@plant
def does_not_step_down(patch: Patch) -> None:
    """A leader that hears a greater term goes on."""
    patch.set(Leadership, "_step_down", _nothing)


@plant
def never_hands_over(patch: Patch) -> None:
    """The lowest id never leads again."""
    patch.set(Feed, "hand_over_to", lambda feed, now: None)


@plant
def drops_what_came_during_a_hand_over(patch: Patch) -> None:
    """What waits while a leader may not decide is forgotten."""
    patch.set(Pause, "defer", _nothing)


@plant
def hands_over_before_all_is_copied(patch: Patch) -> None:
    """The heir is told to lead while it lacks the last commits."""
    patch.set(Feed, "is_level", lambda feed, node_id: True)
    patch.set(Outbox, "is_idle", property(lambda outbox: True))


# -- Work --------------------------------------------------------------------------------------------------------------


@plant
def mints_a_token_twice(patch: Patch) -> None:
    """All attempts of a reign have the same number of commit."""
    begin = Ledger.begin

    def again(ledger: Ledger, task: Any, worker: int, now_s: float) -> msg.AttemptKey:
        lsn, ledger._outbox.lsn = ledger._outbox.lsn, 1
        key = begin(ledger, task, worker, now_s)
        ledger._outbox.lsn = lsn
        return key

    patch.set(Ledger, "begin", again)


@plant
def does_not_reconcile(patch: Patch) -> None:
    """Attempts that a worker does not hold any more stay open."""
    on_register = Leader.on_register

    def trusting(leader: Leader, sender: int, message: msg.Register, now: float) -> None:
        worker = leader.roster.get(sender)
        held = tuple(task.key for task in worker.assigned.values() if task.key) if worker is not None else ()
        message = msg.Register(message.offer, held, message.unacknowledged, message.term)
        on_register(leader, sender, message, now)

    patch.set(Leader, "on_register", trusting)
    patch.set(Leader, "on_inventory", _nothing)


@plant
def forgets_the_worker_outbox(patch: Patch) -> None:
    """A worker that starts again does not report what its last process had to say."""
    on_journal_loaded = Worker.on_journal_loaded

    def forgetful(worker: Worker, event: ev.JournalLoaded, now: float) -> None:
        on_journal_loaded(worker, ev.JournalLoaded(event.term, event.interrupted, []), now)

    patch.set(Worker, "on_journal_loaded", forgetful)


@plant
def reports_only_once(patch: Patch) -> None:
    """A worker does not send an outcome again that no leader acknowledged."""
    patch.set(Worker, "_send_again", _nothing)
    on_registered = Worker.on_registered

    def quiet(worker: Worker, sender: int, message: msg.Registered, now: float) -> None:
        kept, worker._unacknowledged = worker._unacknowledged, {}
        on_registered(worker, sender, message, now)
        worker._unacknowledged = kept

    patch.set(Worker, "on_registered", quiet)


@plant
def obeys_a_lower_term(patch: Patch) -> None:
    """A worker follows whoever spoke last."""
    on_leading = Worker.on_leading

    def obedient(worker: Worker, sender: int, message: msg.Leading, now: float) -> None:
        if message.term is not None and message.term != worker.term:
            worker.term = None
        on_leading(worker, sender, message, now)

    patch.set(Worker, "on_leading", obedient)


@plant
def throws_late_successes_away(patch: Patch) -> None:
    """The success of an attempt that was given up is acknowledged and forgotten."""

    def careless(late: LateResults, sender: int, ended: list[msg.AttemptEnded], *_rest: Any) -> list[msg.AttemptKey]:
        return [it.key for it in ended]

    patch.set(LateResults, "take", careless)


@plant
def cancels_while_it_runs(patch: Patch) -> None:
    """A task is called cancelled with an attempt still open."""

    def hasty(ledger: Ledger, task: Any, now_s: float) -> None:
        if not task.record.cancel_wanted:
            task.record.cancel_wanted = True
            if task.key is not None:
                ledger._move(task, TaskState.CANCELLING, now_s)
            ledger._finish(task, TaskState.CANCELLED, now_s)

    patch.set(Ledger, "cancel", hasty)


@plant
def runs_again_what_must_not(patch: Patch) -> None:
    """A lost task is queued again although on_lost is fail."""
    lose = Ledger.lose

    def generous(ledger: Ledger, task: Any, reason: str, cause: str, now_s: float) -> None:
        if task.spec.on_lost != "fail" or task.record.cancel_wanted:
            return lose(ledger, task, reason, cause, now_s)
        task.record.attempts[-1].ended_s = now_s
        ledger._close(task, task.record.attempts[-1], Outcome.LOST)
        return ledger._requeue(task, now_s)

    patch.set(Ledger, "lose", generous)


@plant
def begins_before_its_time(patch: Patch) -> None:
    """not_before is not looked at."""
    accept = Ledger.accept

    def hasty(ledger: Ledger, new: ev.NewTask, now_s: float) -> bool:
        return accept(ledger, new, max(now_s, new.spec.not_before_s))

    patch.set(Ledger, "accept", hasty)


@plant
def wakes_nobody_when_a_read_is_done(patch: Patch) -> None:
    """What should go on inside the core after a commit does not."""
    committed = Outbox.committed
    count = [0]

    def lossy(outbox: Outbox, seq: int) -> list[fx.Effect]:
        effects = committed(outbox, seq)
        count[0] += 1
        return [it for it in effects if not isinstance(it, Continue)] if count[0] % 7 == 0 else effects

    patch.set(Outbox, "committed", lossy)


# -- Bugs that there once were -----------------------------------------------------------------------------------------


@plant
def forgets_rows_that_came_alone(patch: Patch) -> None:
    """Rows that came without what belongs to them are not remembered as such, and never reach another scheduler."""
    patch.set(Outbox, "expect_strays", _nothing)


@plant
def loses_the_page_after_a_late_one(patch: Patch) -> None:
    """A page of waiting tasks that comes late takes the next one, which is still being read, for its own."""

    arrived = Shape.arrived

    def careless(shape: Shape, page: list[bytes], tasks: list[Any]) -> list[Any]:
        came = arrived(shape, page, tasks)
        shape._coming.clear()
        return came

    patch.set(Shape, "arrived", careless)


@plant
def takes_a_drained_scheduler_for_a_worker(patch: Patch) -> None:
    """Of a node of both roles that is away, draining the worker forgets that it is a scheduler."""

    def careless(nodes: KnownNodes, row: msg.NodeRow, *, is_here: bool) -> None:
        nodes.write(row)

    patch.set(KnownNodes, "write_worker", careless)


@plant
def keeps_the_claim_of_a_process_that_stood_still(patch: Patch) -> None:
    """A claimer that stood still goes on with its claim, though those that it asked have come anew since."""
    on_stalled = Scheduler.on_stalled

    def careless(scheduler: Scheduler, event: ev.Stalled, now: float) -> None:
        claim, scheduler._claim = scheduler._claim, None
        on_stalled(scheduler, event, now)
        scheduler._claim = claim

    patch.set(Scheduler, "on_stalled", careless)


@plant
def takes_pages_of_who_is_gone(patch: Patch) -> None:
    """A claimer goes on without one that died, and takes its last page beside the tasks that it has loaded since."""
    patch.set(Merger, "_is_given_up", lambda merger, sender: False)


@plant
def looks_around_no_more_when_it_hands_over(patch: Patch) -> None:
    """A leader that stood still while it handed over takes the next term at once, though its heir may lead by now."""
    on_stalled = Scheduler.on_stalled

    def careless(scheduler: Scheduler, event: ev.Stalled, now: float) -> None:
        if not scheduler._pause:
            on_stalled(scheduler, event, now)

    patch.set(Scheduler, "on_stalled", careless)


@plant
def answers_no_call_about_tasks_that_were_being_read(patch: Patch) -> None:
    """A leader steps down while it reads tasks that a client wants cancelled, and the client is never answered."""
    close = Leader.close

    def silent(leader: Leader) -> None:
        leader._looking.clear()
        close(leader)

    patch.set(Leader, "close", silent)


@plant
def compares_with_what_it_did_not_read(patch: Patch) -> None:
    """A row is given while its task is in memory, and compared when it is on the disk alone: taken for purged."""
    take = Merger._take

    def careless(
        merger: Merger, sender: int, page: msg.Page, rows: list[msg.TaskRow], found: dict[bytes, Any], now: float
    ) -> None:
        take(merger, sender, page, rows, dict.fromkeys([row.id for row in rows]) | found, now)

    patch.set(Merger, "_take", careless)


@plant
def takes_up_an_attempt_that_was_given_up(patch: Patch) -> None:
    """A worker comes with an attempt that a join has closed, and has it recorded a second time."""
    sort_out = Adoption.sort_out

    def careless(adoption: Adoption, *arguments: Any) -> list[msg.AttemptKey]:
        blind = Patch()
        blind.set(Task, "attempt", _nothing)
        try:
            return sort_out(adoption, *arguments)
        finally:
            blind.undo()

    patch.set(Adoption, "sort_out", careless)
