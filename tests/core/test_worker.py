"""The worker by itself: what it takes, starts, ends and reports, seen as effects."""

from __future__ import annotations

import pytest

from taskd.core import effects as fx
from taskd.core import events as ev
from taskd.core.outcomes import FINISHED_BYTES_MAX, TELL_S
from taskd.core.room import SCANNED_MAX
from taskd.core.roster import NOTHING_OFFERED
from taskd.core.task import Outcome, TaskSpec, decode_report, encode
from taskd.core.worker import (
    INVENTORY_S,
    STOP_ACKNOWLEDGED_S,
    Worker,
)
from taskd.protocol import messages as msg
from tests.core.world import info, offer

TERM = msg.Term(3, 1, 9)
NOW = 100.0


class Bench:
    """One worker (11), its leader (1), and what the worker asked for."""

    def __init__(self, offered: msg.Offer | None = None, is_registered: bool = True) -> None:
        self.worker = Worker(info(11, "worker"), offered or offer(2))
        self._ids = 0
        if is_registered:
            self.register()

    def register(self, term: msg.Term = TERM, sender: int = 1) -> list[fx.Effect]:
        self.worker.on_leading(sender, msg.Leading(term), NOW)
        self.worker.on_registered(sender, msg.Registered(term), NOW)
        return self.settle()

    def settle(self, now: float = NOW) -> list[fx.Effect]:
        return self.worker.settle(now)

    def keys(self, count: int = 1) -> list[msg.AttemptKey]:
        made = []
        for _ in range(count):
            self._ids += 1
            made.append(msg.AttemptKey(self._ids.to_bytes(16, "big"), 1, TERM, 1))
        return made

    def run(self, *keys: msg.AttemptKey, type: str = "command", **options: object) -> list[fx.Effect]:
        spec = encode(TaskSpec(type, **options))  # type: ignore[arg-type]
        self.worker.on_run(1, msg.Run(TERM, tuple(msg.Assignment(key, spec) for key in keys)), NOW)
        return self.settle()

    def progress(
        self, started: list[msg.AttemptKey] | None = None, ended: dict[msg.AttemptKey, Outcome] | None = None,
        now: float = NOW, report: bytes = b"",
    ) -> list[fx.Effect]:  # fmt: skip
        self.worker.on_progressed(
            ev.Progressed(
                [msg.AttemptStarted(key, now) for key in started or []],
                [msg.AttemptEnded(key, outcome, now, now, report) for key, outcome in (ended or {}).items()],
            ),
            now,
        )
        return self.settle(now)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def of(kind: type, effects: list[fx.Effect]) -> list[object]:
    """The effects of a kind, or the messages of one that were sent."""
    if issubclass(kind, msg.Message):
        return [it.message for it in effects if isinstance(it, fx.Send) and type(it.message) is kind]
    return [it for it in effects if type(it) is kind]


def begun(effects: list[fx.Effect]) -> list[msg.AttemptKey]:
    return [begin.key for start in of(fx.Start, effects) for begin in start.attempts]  # type: ignore[attr-defined]


def finished(effects: list[fx.Effect]) -> dict[msg.AttemptKey, int]:
    messages: list[msg.Finished] = of(msg.Finished, effects)  # type: ignore[assignment]
    return {ended.key: ended.outcome for message in messages for ended in message.attempts}


# -- The leader --------------------------------------------------------------------------------------------------------


def test_a_leader_is_obeyed_when_its_term_is_written_down(bench: Bench) -> None:
    bench = Bench(is_registered=False)
    bench.worker.on_leading(1, msg.Leading(TERM), NOW)
    assert bench.settle() == [
        fx.Journal(TERM, [], [], []),
        fx.Follow(1, TERM),
        fx.Send(1, msg.Register(offer(2), (), (), TERM)),
    ]


def test_hearsay_makes_no_leader_and_ends_one() -> None:
    bench = Bench(is_registered=False)
    bench.worker.on_leading(2, msg.Leading(TERM), NOW)
    assert bench.settle() == []
    bench.register()
    bench.worker.on_leading(1, msg.Leading(None), NOW)
    assert bench.settle() == [fx.Follow(None, None)]


def test_a_lesser_term_is_told_the_greater_one(bench: Bench) -> None:
    bench.worker.on_leading(1, msg.Leading(msg.Term(2, 1, 9)), NOW)
    effects = bench.settle()
    assert of(msg.Register, effects) == [msg.Register(NOTHING_OFFERED, (), (), TERM)]
    assert bench.worker.term == TERM


@pytest.mark.parametrize("sender", [1, 2])
@pytest.mark.parametrize("term", [TERM, msg.Term(2, 1, 9), msg.Term(4, 1, 9)])
def test_wishes_are_obeyed_from_the_leader_in_its_term_only(bench: Bench, sender: int, term: msg.Term) -> None:
    (key,) = bench.keys()
    bench.worker.on_run(sender, msg.Run(term, (msg.Assignment(key, encode(TaskSpec("command"))),)), NOW)
    is_obeyed = (sender, term) == (1, TERM)
    assert begun(bench.settle()) == ([key] if is_obeyed else [])
    bench.worker.on_cancel(sender, msg.Cancel(term, (key,)), NOW)
    assert of(fx.Terminate, bench.settle()) == ([fx.Terminate(key)] if is_obeyed else [])
    bench.worker.on_recall(sender, msg.Recall(term, (key,)), NOW)
    assert bench.settle() == []


def test_it_registers_with_all_it_holds_and_owes(bench: Bench) -> None:
    running, waiting, owed = bench.keys(3)
    bench.run(owed)
    bench.progress(ended={owed: Outcome.OK})
    bench.run(running, *bench.keys(1))
    bench.run(waiting)
    bench.worker.on_peer_down(ev.PeerDown(1, "cut"), NOW)
    bench.settle()
    bench.worker.on_leading(1, msg.Leading(TERM), NOW)
    (register,) = of(msg.Register, bench.settle())
    assert isinstance(register, msg.Register)
    assert {running, waiting} < set(register.held)
    assert register.unacknowledged == (owed,)
    bench.worker.on_registered(1, msg.Registered(TERM), NOW)
    assert finished(bench.settle()) == {owed: Outcome.OK}


def test_what_began_while_it_was_alone_is_told_when_it_is_back(bench: Bench) -> None:
    (key,) = bench.keys()
    bench.run(key)
    bench.worker.on_peer_down(ev.PeerDown(1, "cut"), NOW)
    assert of(fx.Journal, bench.progress(started=[key])) == [fx.Journal(None, [key], [], [])]
    effects = bench.register()
    assert of(msg.Started, effects) == [msg.Started((msg.AttemptStarted(key, NOW),))]


def test_an_outcome_is_sent_once_though_it_comes_as_the_leader_comes_back(bench: Bench) -> None:
    (key,) = bench.keys()
    bench.run(key)
    bench.worker.on_peer_down(ev.PeerDown(1, "cut"), NOW)
    bench.worker.on_leading(1, msg.Leading(TERM), NOW)
    bench.worker.on_registered(1, msg.Registered(TERM), NOW)
    effects = bench.progress(ended={key: Outcome.OK})
    assert len(of(msg.Finished, effects)) == 1


def test_a_registration_in_another_term_is_passed_over() -> None:
    bench = Bench(is_registered=False)
    bench.worker.on_leading(1, msg.Leading(TERM), NOW)
    bench.settle()
    bench.worker.on_registered(1, msg.Registered(msg.Term(2, 1, 1)), NOW)
    bench.worker.on_registered(2, msg.Registered(TERM), NOW)
    assert bench.worker.next_deadline() is None


def test_the_inventory_names_everything_and_comes_while_registered(bench: Bench) -> None:
    running, waiting, owed = bench.keys(3)
    bench.run(owed)
    bench.progress(ended={owed: Outcome.OK})
    bench.run(running, waiting, *bench.keys(1))
    due = NOW + INVENTORY_S
    assert bench.worker.next_deadline() == due
    bench.worker.tick(due)
    (inventory,) = of(msg.Inventory, bench.settle(due))
    assert isinstance(inventory, msg.Inventory)
    assert inventory.runs_seen == 2
    assert {running, waiting, owed} < set(inventory.keys)
    bench.worker.on_leading(1, msg.Leading(msg.Term(TERM.epoch + 1, 1, 1)), due)
    assert bench.worker.next_deadline() is None, "until it is registered again nobody counts its Run messages"
    bench.worker.on_peer_down(ev.PeerDown(1, "cut"), due)
    assert bench.worker.next_deadline() is None


# -- Attempts ----------------------------------------------------------------------------------------------------------


def test_attempts_start_by_priority_then_age(bench: Bench) -> None:
    bench = Bench(offer(1))
    blocking, low, high = bench.keys(3)
    bench.run(blocking)
    bench.run(low, priority=1)
    bench.run(high, priority=2)
    assert begun(bench.progress(ended={blocking: Outcome.OK})) == [high]
    assert begun(bench.progress(ended={high: Outcome.OK})) == [low]


def test_an_attempt_sent_again_is_passed_over(bench: Bench) -> None:
    running, ended = bench.keys(2)
    bench.run(running, ended)
    bench.progress(ended={ended: Outcome.OK})
    assert begun(bench.run(running, ended)) == []


def test_smaller_ones_pass_one_that_does_not_fit() -> None:
    bench = Bench(offer(4, gpus=1))
    first, second, small = bench.keys(3)
    bench.run(first, resources={"gpus": 1000})
    assert begun(bench.run(second, resources={"gpus": 1000}, priority=9)) == []
    assert begun(bench.run(small)) == [small]
    assert begun(bench.progress(ended={first: Outcome.OK})) == [second]


def test_only_so_many_are_looked_at_for_one_that_fits() -> None:
    bench = Bench(offer(4, gpus=1))
    first, *others = bench.keys(1 + SCANNED_MAX)
    bench.run(first, resources={"gpus": 1000})
    bench.run(*others, resources={"gpus": 1000}, priority=1)
    (small,) = bench.keys()
    assert begun(bench.run(small)) == []
    assert begun(bench.progress(ended={first: Outcome.OK})) == [others[0], small]


def test_what_it_could_never_run_goes_back(bench: Bench) -> None:
    wrong_type, too_large = bench.keys(2)
    assert finished(bench.run(wrong_type, type="nowhere")) == {wrong_type: Outcome.PREEMPTED}
    assert finished(bench.run(too_large, resources={"gpus": 1})) == {too_large: Outcome.PREEMPTED}


def test_a_run_of_what_was_given_back_leaves_no_room_taken(bench: Bench) -> None:
    blocking = bench.keys(2)
    bench.run(*blocking)
    for _ in range(1000):
        (key,) = bench.keys()
        bench.run(key)
        bench.worker.on_recall(1, msg.Recall(TERM, (key,)), NOW)
        assert finished(bench.settle()) == {key: Outcome.PREEMPTED}
    assert len(bench.worker._room._waiting) <= SCANNED_MAX + 3


def test_progress_of_an_unknown_attempt_is_passed_over(bench: Bench) -> None:
    (key,) = bench.keys()
    assert bench.progress(started=[key], ended={key: Outcome.OK}) == []


def test_an_outcome_is_written_down_before_it_is_sent_and_forgotten_when_acknowledged(bench: Bench) -> None:
    (key,) = bench.keys()
    bench.run(key)
    effects = bench.progress(ended={key: Outcome.OK})
    ended = msg.AttemptEnded(key, Outcome.OK, NOW, NOW)
    assert effects == [fx.Journal(None, [], [ended], []), fx.Send(1, msg.Finished((ended,)))]
    bench.worker.on_acknowledged(1, msg.Acknowledged(TERM, (key,)), NOW)
    assert bench.settle() == [fx.Journal(None, [], [], [key])]
    bench.worker.on_acknowledged(1, msg.Acknowledged(TERM, (key,)), NOW)
    assert bench.settle() == []
    assert bench.worker.unacknowledged_count == 0


def told(effects: list[fx.Effect]) -> list[msg.AttemptKey]:
    """The attempts that the leader hears of as ended."""
    return [ended.key for message in of(msg.Finished, effects) for ended in message.attempts]  # type: ignore[attr-defined]


def test_outcomes_are_told_together_while_there_is_enough_to_begin(bench: Bench) -> None:
    keys = bench.keys(20)
    bench.run(*keys)
    first, second, third = keys[:3]
    assert told(bench.progress(ended={first: Outcome.OK})) == [first]
    effects = bench.progress(ended={second: Outcome.OK}, now=NOW + 0.001)
    assert told(effects) == []
    assert [ended.key for journal in of(fx.Journal, effects) for ended in journal.ended] == [second]  # type: ignore[attr-defined]
    bench.progress(ended={third: Outcome.OK}, now=NOW + 0.002)
    assert bench.worker.next_deadline() == NOW + TELL_S
    bench.worker.tick(NOW + TELL_S)
    assert told(bench.settle(NOW + TELL_S)) == [second, third]
    bench.worker.tick(NOW + 2 * TELL_S)
    assert told(bench.settle(NOW + 2 * TELL_S)) == []


def test_outcomes_are_told_at_once_when_little_is_left_to_begin(bench: Bench) -> None:
    keys = bench.keys(8)
    bench.run(*keys)  # Two run, six wait.
    assert told(bench.progress(ended={keys[0]: Outcome.OK})) == keys[:1]
    assert told(bench.progress(ended={keys[1]: Outcome.OK})) == keys[1:2]
    assert told(bench.progress(ended={keys[2]: Outcome.OK})) == keys[2:3]


def test_what_the_leader_waits_for_is_told_at_once_with_all_else(bench: Bench) -> None:
    keys = bench.keys(20)
    bench.run(*keys)
    bench.progress(ended={keys[0]: Outcome.OK})
    assert told(bench.progress(ended={keys[1]: Outcome.OK})) == []
    bench.worker.on_recall(1, msg.Recall(TERM, (keys[19],)), NOW)
    assert told(bench.settle()) == [keys[1], keys[19]]


def test_outcomes_that_were_held_back_are_told_once_to_the_next_leader(bench: Bench) -> None:
    keys = bench.keys(20)
    bench.run(*keys)
    bench.progress(ended={keys[0]: Outcome.OK})
    assert told(bench.progress(ended={keys[1]: Outcome.OK})) == []
    bench.worker.on_peer_down(ev.PeerDown(1, "gone", False), NOW)
    assert told(bench.register(msg.Term(4, 2, 9), 2)) == [keys[0], keys[1]]
    bench.worker.tick(NOW + TELL_S)
    assert told(bench.settle(NOW + TELL_S)) == []


def test_large_reports_go_in_several_messages() -> None:
    bench = Bench(offer(8))
    keys = bench.keys(5)
    bench.run(*keys)
    report = bytes(FINISHED_BYTES_MAX // 2)
    effects = bench.progress(ended=dict.fromkeys(keys, Outcome.OK), report=report)
    messages: list[msg.Finished] = of(msg.Finished, effects)  # type: ignore[assignment]
    assert [len(message.attempts) for message in messages] == [2, 2, 1]
    one = Bench()
    (key,) = one.keys()
    one.run(key)
    assert len(of(msg.Finished, one.progress(ended={key: Outcome.OK}, report=bytes(2 * FINISHED_BYTES_MAX)))) == 1


# -- Ends --------------------------------------------------------------------------------------------------------------


def test_a_time_limit_counts_from_the_beginning_and_not_from_the_word_of_it(bench: Bench) -> None:
    (key,) = bench.keys()
    bench.run(key, timeout_s=7.5, grace_s=3.0)
    bench.worker.on_progressed(ev.Progressed([msg.AttemptStarted(key, NOW + 0.5)], []), NOW + 2.0)
    assert bench.worker.next_deadline() == NOW + 8.0
    bench.worker.tick(NOW + 8.0)
    assert of(fx.Terminate, bench.settle()) == [fx.Terminate(key)]
    bench.worker.tick(NOW + 11.0)
    assert of(fx.Kill, bench.settle()) == [fx.Kill(key)]
    assert finished(bench.progress(ended={key: Outcome.SIGNAL}, now=NOW + 11.0)) == {key: Outcome.TIMEOUT}
    assert bench.worker._limits.next() is None


def test_a_task_that_ends_well_after_its_time_limit_has_ended_well(bench: Bench) -> None:
    (key,) = bench.keys()
    bench.run(key, timeout_s=10.0)
    bench.progress(started=[key])
    bench.worker.tick(NOW + 10.0)
    assert finished(bench.progress(ended={key: Outcome.OK}, now=NOW + 11.0)) == {key: Outcome.OK}


def test_a_second_cancel_sends_no_second_signal_and_gives_no_more_time(bench: Bench) -> None:
    (key,) = bench.keys()
    bench.run(key, grace_s=5.0)
    bench.worker.on_cancel(1, msg.Cancel(TERM, (key,)), NOW)
    assert of(fx.Terminate, bench.settle()) == [fx.Terminate(key)]
    bench.worker.on_cancel(1, msg.Cancel(TERM, (key,)), NOW + 4.0)
    assert bench.settle() == []
    assert bench.worker.next_deadline() == NOW + 5.0
    assert finished(bench.progress(ended={key: Outcome.SIGNAL})) == {key: Outcome.SIGNAL}


def test_a_cancel_of_what_waits_or_never_came_ends_it(bench: Bench) -> None:
    *running, waiting, never = bench.keys(4)
    bench.run(*running)
    bench.run(waiting)
    bench.worker.on_cancel(1, msg.Cancel(TERM, (waiting, never)), NOW)
    assert finished(bench.settle()) == {waiting: Outcome.PREEMPTED, never: Outcome.PREEMPTED}
    assert begun(bench.progress(ended=dict.fromkeys(running, Outcome.OK))) == []


def test_a_cancel_of_what_has_ended_is_answered_by_the_outcome(bench: Bench) -> None:
    (key,) = bench.keys()
    bench.run(key)
    bench.progress(ended={key: Outcome.OK})
    bench.worker.on_cancel(1, msg.Cancel(TERM, (key,)), NOW)
    assert bench.settle() == []
    assert bench.worker.unacknowledged_count == 1


def test_a_recall_of_what_has_begun_is_passed_over(bench: Bench) -> None:
    (key,) = bench.keys()
    bench.run(key)
    bench.worker.on_recall(1, msg.Recall(TERM, (key,)), NOW)
    assert bench.settle() == []
    assert bench.worker.running_count == 1


# -- Start and stop ----------------------------------------------------------------------------------------------------


def test_after_a_crash_what_ran_is_lost_and_what_ended_is_owed() -> None:
    bench = Bench(is_registered=False)
    ran, ended = bench.keys(2)
    outcome = msg.AttemptEnded(ended, Outcome.OK, 1.0, 2.0)
    bench.worker.on_journal_loaded(ev.JournalLoaded(TERM, [ran, ended], [outcome]), NOW)
    (journal,) = bench.settle()
    assert isinstance(journal, fx.Journal)
    (lost,) = journal.ended
    assert (lost.key, lost.outcome) == (ran, Outcome.LOST)
    error = decode_report(lost.report).error
    assert error is not None
    assert error.type == "WorkerRestarted"
    assert finished(bench.register()) == {ran: Outcome.LOST, ended: Outcome.OK}


def test_an_idle_worker_stops_at_once(bench: Bench) -> None:
    bench.worker.on_stop_wanted(ev.StopWanted(5.0), NOW)
    assert bench.settle() == [fx.Send(1, msg.Offering(NOTHING_OFFERED))]
    assert bench.worker.has_stopped
    bench.worker.on_stop_wanted(ev.StopWanted(5.0), NOW)
    assert bench.settle() == []


def test_a_stop_ends_what_runs_and_gives_back_what_waits(bench: Bench) -> None:
    *running, waiting = bench.keys(3)
    bench.run(*running, waiting, grace_s=600.0)
    bench.worker.on_stop_wanted(ev.StopWanted(5.0), NOW)
    effects = bench.settle()
    assert of(fx.Terminate, effects) == [fx.Terminate(key) for key in running]
    assert finished(effects) == {waiting: Outcome.PREEMPTED}
    assert finished(bench.run(*bench.keys())) != {}, "what comes late goes back"
    bench.worker.tick(NOW + 5.0)
    assert of(fx.Kill, bench.settle()) == [fx.Kill(key) for key in running]
    ended = dict(zip(running, (Outcome.SIGNAL, Outcome.OK), strict=True))
    assert finished(bench.progress(ended=ended)) == {running[0]: Outcome.PREEMPTED, running[1]: Outcome.OK}
    assert not bench.worker.has_stopped
    owed = tuple(bench.worker._unacknowledged)
    bench.worker.on_acknowledged(1, msg.Acknowledged(TERM, owed), NOW)
    assert bench.worker.has_stopped


def test_a_stop_waits_for_a_leader_only_so_long(bench: Bench) -> None:
    (key,) = bench.keys()
    bench.run(key)
    bench.worker.on_stop_wanted(ev.StopWanted(5.0), NOW)
    bench.progress(ended={key: Outcome.OK})
    assert not bench.worker.has_stopped
    end = NOW + 5.0 + STOP_ACKNOWLEDGED_S
    bench.worker.tick(end)
    assert bench.worker.has_stopped
    alone = Bench()
    alone.run(key)
    alone.worker.on_stop_wanted(ev.StopWanted(5.0), NOW)
    alone.worker.on_peer_down(ev.PeerDown(1, "cut"), NOW)
    assert not alone.worker.has_stopped
    alone.progress(ended={key: Outcome.OK})
    assert alone.worker.has_stopped, "nobody is there to take the outcome, which is in the journal"


def test_counts_for_those_who_look(bench: Bench) -> None:
    bench.run(*bench.keys(5))
    assert (bench.worker.running_count, bench.worker.waiting_count, bench.worker.unacknowledged_count) == (2, 3, 0)


def test_a_clock_that_was_set_back_ends_nothing() -> None:
    bench = Bench()
    (key,) = bench.keys()
    bench.run(key, timeout_s=600.0)
    bench.worker.utc = lambda now: now + 3600
    bench.progress(started=[key], now=NOW)
    bench.worker.tick(NOW + 599)
    assert fx.Terminate(key) not in bench.settle(NOW + 599)
    bench.worker.tick(NOW + 601)
    assert fx.Terminate(key) in bench.settle(NOW + 601)
