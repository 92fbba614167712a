"""Stories of one leader and its workers: what becomes of tasks when things go well and when they do not."""

from __future__ import annotations

import pytest

from taskd.core import effects as fx
from taskd.core import events as ev
from taskd.core.seal import Seal
from taskd.core.settings import SchedulerSettings
from taskd.core.task import Backoff, Outcome, TaskState
from taskd.errors import NoLeader, Overloaded, Unavailable
from taskd.protocol import messages as msg
from tests.core.world import World, offer


@pytest.fixture
def world() -> World:
    return World()


def test_a_task_runs_and_its_success_is_recorded(world: World) -> None:
    world.cluster().work = lambda begin: Outcome.OK
    (task,) = world.submit()
    assert world.state(task) is TaskState.SUCCEEDED
    assert world.outcomes(task) == [Outcome.OK]
    assert not world.hosts[11].node.worker.unacknowledged_count
    assert not world.scheduler.ledger.tasks


def test_nothing_leaves_before_the_disk_has_it(world: World) -> None:
    world.cluster()
    world.holds_commits = True
    before = len(world.sent)
    (task,) = world.submit()
    assert world.replies.get(world._calls) is None
    assert not [message for _, _, message in world.sent[before:] if isinstance(message, msg.Run)]
    world.commit(1)
    world.settle()
    assert world.replies[world._calls] == []
    assert world.where(task) == [11]


def test_while_one_commit_is_in_flight_the_next_collects(world: World) -> None:
    world.cluster()
    world.holds_commits = True
    world.submit(3)
    second = [world.submit(), world.submit()]
    assert len(world.hosts[1].held_commits) == 1
    world.commit(1)
    world.settle()
    (commit,) = world.hosts[1].held_commits
    assert {row.id for row in commit.inserted} == {task for batch in second for task in batch}


def test_a_failed_commit_answers_those_who_wait_and_ends_the_process(world: World) -> None:
    world.cluster()
    world.holds_commits = True
    world.submit()
    call = world._calls
    commit = world.hosts[1].held_commits.pop()
    world.hosts[1].node.handle(ev.CommitFailed(commit.seq, "disk on fire"), world.now)
    world.settle()
    assert isinstance(world.replies[call], Unavailable)
    assert world.hosts[1].exited is not None
    assert world.hosts[1].exited.status == 1
    assert "disk on fire" in world.hosts[1].exited.reason


def test_after_a_failed_commit_nothing_is_written_or_sent_any_more(world: World) -> None:
    world.cluster()
    world.holds_commits = True
    (task,) = world.submit()
    node, commit = world.hosts[1].node, world.hosts[1].held_commits.pop()
    node.handle(ev.CommitFailed(commit.seq, "disk on fire"), world.now)
    node.handle(ev.CancelWanted(99, [task]), world.now)  # In the same turn: it stands on rows that may not be there.
    assert [type(effect) for effect in node.take_effects(world.now)] == [fx.Reply, fx.Exit]
    node.handle(ev.Submitted(100, []), world.now)
    assert node.take_effects(world.now) == []


def test_higher_priority_goes_first_and_age_breaks_ties(world: World) -> None:
    world.cluster(offer=offer(1))
    (first,) = world.submit()
    low, high, later = world.submit(priority=1)[0], world.submit(priority=9)[0], world.submit(priority=9)[0]
    world.end(first)
    world.end(high)
    world.end(later)
    world.end(low)
    assert [begin.key.task_id for _, begin in world.started] == [first, high, later, low]


def test_tasks_spread_evenly_over_idle_workers(world: World) -> None:
    world.cluster(3, offer=offer(4))
    tasks = world.submit(6)
    counts = [sum(world.where(task) == [node_id] for task in tasks) for node_id in (11, 12, 13)]
    assert counts == [2, 2, 2]


def test_a_worker_is_given_no_more_than_its_slots_while_durations_are_unknown(world: World) -> None:
    world.cluster(offer=offer(2))
    world.submit(10)
    assert len(world.scheduler.roster.get(11).assigned) == 2


def test_short_tasks_are_prefetched_and_long_ones_are_not(world: World) -> None:
    world.cluster(offer=offer(1))
    world.work = lambda begin: Outcome.OK
    world.submit(3)
    world.work = lambda begin: None
    world.submit(100)
    assert len(world.scheduler.roster.get(11).assigned) > 20
    slow = World().cluster(offer=offer(1))
    (first, *_) = slow.submit(5)
    slow.run(60)
    shape = slow.scheduler.ledger.tasks[first].shape
    shape.mean_s = 60.0
    slow.end(first)
    assert len(slow.scheduler.roster.get(11).assigned) == 1


def test_resources_are_never_overcommitted(world: World) -> None:
    world.cluster(offer=offer(8, gpus=2, memory=1000))
    gpu_tasks = world.submit(5, resources={"gpus": 1000})
    big = world.submit(2, resources={"memory": 600_000})
    running = {begin.key.task_id for begin in world.hosts[11].running.values()}
    assert len(running & set(gpu_tasks)) == 2
    assert len(running & set(big)) == 1


def test_a_task_does_not_wait_at_a_worker_for_what_a_long_one_uses_there(world: World) -> None:
    world.cluster(offer=offer(4, gpus=1))
    world.submit(resources={"gpus": 1000})
    (task,) = world.submit(resources={"gpus": 1000})
    assert world.state(task) is TaskState.QUEUED
    world.add(12, "worker", offer=offer(1, gpus=1))
    assert world.where(task) == [12]


def test_a_task_that_fits_nowhere_does_not_hold_back_the_others(world: World) -> None:
    world.cluster()
    (stuck,) = world.submit(priority=100, resources={"gpus": 1000})
    (other,) = world.submit()
    assert world.where(stuck) == []
    assert world.where(other) == [11]


def test_zero_retries_means_zero(world: World) -> None:
    world.cluster().work = lambda begin: Outcome.EXIT_NONZERO
    (task,) = world.submit()
    world.run(3600)
    assert world.state(task) is TaskState.FAILED
    assert world.outcomes(task) == [Outcome.EXIT_NONZERO]


def test_retries_come_with_growing_waits_and_end(world: World) -> None:
    world.cluster().work = lambda begin: Outcome.EXCEPTION
    (task,) = world.submit(retries=2, backoff=Backoff(initial_s=10, factor=3, jitter=0))
    assert world.state(task) is TaskState.RETRYING
    world.run(9.9)
    assert len(world.where(task)) == 1
    world.run(0.2)
    assert len(world.where(task)) == 2
    world.run(29)
    assert len(world.where(task)) == 2
    world.run(2)
    assert world.state(task) is TaskState.FAILED
    assert world.outcomes(task) == [Outcome.EXCEPTION] * 3


def test_a_delayed_task_waits_for_its_time(world: World) -> None:
    world.cluster()
    (task,) = world.submit(not_before_s=world.utc + 100)
    assert world.state(task) is TaskState.SCHEDULED
    world.run(99)
    assert world.where(task) == []
    world.run(2)
    assert world.where(task) == [11]


def test_a_clock_set_forward_brings_delayed_tasks_due(world: World) -> None:
    world.cluster()
    (task,) = world.submit(not_before_s=world.utc + 1000)
    world.utc_offset_s += 2000
    world.hosts[1].node.handle(ev.ClockRead(world.utc_offset_s), world.now)
    world.run(0.1)
    assert world.where(task) == [11]


def test_a_task_that_cannot_begin_by_its_deadline_expires(world: World) -> None:
    world.cluster()
    (task,) = world.submit(deadline_s=world.utc + 5, resources={"gpus": 1000})
    (begun,) = world.submit(deadline_s=world.utc + 5)
    world.run(6)
    assert world.state(task) is TaskState.EXPIRED
    assert world.state(begun) is TaskState.RUNNING
    assert not len(world.scheduler.ledger.queue)


def test_a_task_submitted_after_its_deadline_expires_and_does_not_begin(world: World) -> None:
    world.cluster()
    (task,) = world.submit(deadline_s=world.utc - 1)
    assert world.state(task) is TaskState.EXPIRED
    assert world.where(task) == []


def test_a_task_whose_deadline_and_time_to_begin_came_while_nobody_led_expires(world: World) -> None:
    world.cluster()
    (task,) = world.submit(not_before_s=world.utc + 6, deadline_s=world.utc + 5)
    world.crash(1)
    world.run(10)
    world.restart(1)
    world.run(1)
    assert world.scheduler.leads
    assert world.state(task) is TaskState.EXPIRED


def test_a_task_given_back_unstarted_still_has_its_deadline(world: World) -> None:
    world.cluster(offer=offer(1))
    world.work = lambda begin: Outcome.OK
    world.submit()
    world.work = lambda begin: None
    world.submit()
    (task,) = world.submit(deadline_s=world.utc + 5)
    assert world.state(task) is TaskState.ASSIGNED
    world.ask(lambda call: ev.DrainWanted(call, 11, "upkeep"))
    assert world.state(task) is TaskState.QUEUED
    world.run(6)
    assert world.state(task) is TaskState.EXPIRED


def test_a_timeout_terminates_then_kills_and_is_recorded_as_such(world: World) -> None:
    world.cluster()
    (task,) = world.submit(timeout_s=10.0, grace_s=3.0)
    world.run(11)
    assert [type(effect) for effect in world.hosts[11].signals] == [fx.Terminate]
    world.run(3)
    assert [type(effect) for effect in world.hosts[11].signals] == [fx.Terminate, fx.Kill]
    world.end(task, Outcome.SIGNAL)
    assert world.state(task) is TaskState.TIMED_OUT
    assert world.outcomes(task) == [Outcome.TIMEOUT]


def test_cancel_of_a_queued_task_is_immediate(world: World) -> None:
    world.cluster(offer=offer(1))
    world.submit()
    (queued,) = world.submit()
    assert world.cancel(queued) == [queued]
    assert world.state(queued) is TaskState.CANCELLED
    assert world.outcomes(queued) == []


def test_cancel_of_a_running_task_is_decided_when_it_is_dead(world: World) -> None:
    world.cluster()
    (task,) = world.submit()
    world.cancel(task)
    assert world.state(task) is TaskState.CANCELLING
    assert [type(effect) for effect in world.hosts[11].signals] == [fx.Terminate]
    world.end(task, Outcome.SIGNAL)
    assert world.state(task) is TaskState.CANCELLED


def test_a_success_that_came_before_the_cancel_wins(world: World) -> None:
    world.cluster()
    (task,) = world.submit()
    world.cancel(task)
    world.end(task, Outcome.OK)
    assert world.state(task) is TaskState.SUCCEEDED


def test_cancel_of_a_retrying_task_ends_it(world: World) -> None:
    world.cluster().work = lambda begin: Outcome.EXIT_NONZERO
    (task,) = world.submit(retries=5)
    world.cancel(task)
    assert world.state(task) is TaskState.CANCELLED
    world.run(1000)
    assert len(world.where(task)) == 1


def test_cancel_of_an_unknown_or_ended_task_is_passed_over(world: World) -> None:
    world.cluster().work = lambda begin: Outcome.OK
    (task,) = world.submit()
    assert world.cancel(task, b"x" * 16) == []


def test_the_same_submission_twice_makes_one_task(world: World) -> None:
    world.cluster()
    (task,) = world.submit()
    world._ids -= 1
    (again,) = world.submit()
    assert again == task
    assert world.replies[world._calls] == [task]
    assert world.where(task) == [11]


def test_a_full_queue_refuses_the_whole_submission(world: World) -> None:
    world.cluster(settings=SchedulerSettings(queued_max=5))
    world.submit(4)
    world.submit(2)
    assert isinstance(world.replies[world._calls], Overloaded)
    assert len(world.hosts[1].rows) == 4


def test_a_lost_worker_means_another_attempt_after_the_grace(world: World) -> None:
    world.cluster(2, offer=offer(1))
    first, second = world.submit(2)
    victim = world.where(first)[0]
    world.crash(victim)
    world.end(second)
    world.run(4.9)
    assert len(world.where(first)) == 1
    world.run(0.2)
    assert len(world.where(first)) == 2
    world.end(first)
    assert world.outcomes(first) == [Outcome.LOST, Outcome.OK]


def test_a_worker_that_reconnects_in_time_keeps_its_work(world: World) -> None:
    world.cluster()
    (task,) = world.submit()
    world.cut(1, 11)
    world.run(4)
    world.connect(1, 11)
    world.run(60)
    world.end(task)
    assert world.where(task) == [11]
    assert world.state(task) is TaskState.SUCCEEDED


def test_a_result_found_while_disconnected_is_brought_after(world: World) -> None:
    world.cluster()
    (task,) = world.submit()
    world.cut(1, 11)
    world.end(task)
    assert world.state(task) is not TaskState.SUCCEEDED
    world.connect(1, 11)
    world.settle()
    assert world.state(task) is TaskState.SUCCEEDED
    assert not world.hosts[11].node.worker.unacknowledged_count


def test_a_result_that_comes_after_the_task_was_given_to_another_is_acknowledged_and_not_recorded(world: World) -> None:
    world.cluster(2, offer=offer(1))
    (task,) = world.submit()
    (first,) = world.where(task)
    world.cut(1, first)
    world.run(6)
    assert len(world.where(task)) == 2
    late = next(iter(world.hosts[first].running))
    ended = msg.AttemptEnded(late, Outcome.EXIT_NONZERO, world.utc, world.utc)
    world.post(first, ev.Progressed([], [ended]))
    world.connect(1, first)
    world.settle()
    assert not world.hosts[first].node.worker.unacknowledged_count
    assert world.state(task) is TaskState.RUNNING
    assert world.scheduler.stats.late_results == 1


def test_a_worker_that_comes_back_with_an_attempt_given_up_is_told_to_end_it(world: World) -> None:
    world.cluster(2, offer=offer(1))
    (task,) = world.submit()
    (first,) = world.where(task)
    world.cut(1, first)
    world.run(6)
    world.connect(1, first)
    world.settle()
    assert [type(effect) for effect in world.hosts[first].signals] == [fx.Terminate]


def test_a_worker_restarted_quicker_than_any_timeout_has_lost_its_attempts(world: World) -> None:
    world.cluster(offer=offer(1))
    (task,) = world.submit()
    world.run(1)
    world.crash(11)
    world.restart(11)
    assert world.outcomes(task) == [Outcome.LOST, None]
    world.end(task)
    assert world.state(task) is TaskState.SUCCEEDED


def test_a_worker_crashed_before_its_result_was_acknowledged_still_delivers_it(world: World) -> None:
    world.cluster()
    (task,) = world.submit()
    world.cut(1, 11)
    world.end(task)
    world.crash(11)
    world.restart(11)
    world.run(1)
    assert world.outcomes(task) == [Outcome.OK]


def test_on_lost_fail_means_at_most_once(world: World) -> None:
    world.cluster(2)
    (task,) = world.submit(on_lost="fail")
    world.crash(world.where(task)[0])
    world.run(10)
    assert world.state(task) is TaskState.FAILED
    assert len(world.where(task)) == 1
    assert "on_lost" in world.record(task).reason


def test_a_task_that_takes_worker_after_worker_down_is_stopped(world: World) -> None:
    world.cluster()
    (task,) = world.submit()
    for _ in range(3):
        world.crash(11)
        world.restart(11)
    assert world.state(task) is TaskState.FAILED
    assert world.outcomes(task) == [Outcome.LOST] * 3
    assert len(world.where(task)) == 3


def test_what_only_waited_at_workers_that_went_down_is_not_held_to_have_taken_them_down(world: World) -> None:
    world.cluster(offer=offer(1))
    world.work = lambda begin: Outcome.OK
    world.submit()
    world.work = lambda begin: None
    poison, *others = world.submit(20)
    while world.state(poison) is not TaskState.FAILED:
        (running,) = world.hosts[11].running
        if running.task_id == poison:
            world.crash(11)
            world.restart(11)
        else:
            world.end(running.task_id)
    waited = [task for task in others if world.where(task) == []]
    assert len(waited) > 10
    assert all(world.outcomes(task)[:3] == [Outcome.LOST] * 3 for task in waited)
    world.work = lambda begin: Outcome.OK
    world.end(next(iter(world.hosts[11].running)).task_id)
    assert all(world.state(task) is TaskState.SUCCEEDED for task in others)


@pytest.mark.parametrize("late", [Outcome.SIGNAL, Outcome.EXIT_NONZERO, Outcome.PREEMPTED])
def test_however_a_lost_attempt_ends_later_it_takes_no_retry(world: World, late: Outcome) -> None:
    world.cluster(2, offer=offer(1))
    (task,) = world.submit(retries=1)
    (first,) = world.where(task)
    world.cut(1, first)
    world.run(6)
    assert world.where(task) == [first, 12]
    world.end(task, late)  # At the first worker that has it.
    world.connect(1, first)
    world.settle()
    assert world.outcomes(task) == [Outcome.LOST, None]
    assert not world.hosts[first].node.worker.unacknowledged_count
    world.end(task, Outcome.EXIT_NONZERO)
    assert world.state(task) is TaskState.RETRYING


@pytest.mark.parametrize("impossible", [False, True])
@pytest.mark.parametrize("took_s", [0.005, 0.3])
def test_what_waits_behind_a_long_task_goes_to_an_idle_worker(world: World, took_s: float, impossible: bool) -> None:
    world.cluster(2, offer=offer(1))
    for _ in range(10):
        (quick,) = world.submit()
        world.run(took_s)
        world.end(quick, took_s=took_s)
    if impossible:
        world.submit(resources={"gpus": 1000})
    ids = world.submit(4)
    (long,) = (task for task in ids if world.where(task) == [11])
    for _ in range(2):
        while running := world.hosts[12].running:
            world.run(took_s)
            world.end(next(iter(running)).task_id, took_s=took_s)
        world.run(5)
    assert {task for task in ids if world.state(task) is not TaskState.SUCCEEDED} == {long}


def test_nothing_is_written_about_a_task_that_may_be_purged_at_any_moment(world: World) -> None:
    world.cluster(2, offer=offer(1), settings=SchedulerSettings(finished_age_max_s=100.0))
    (task,) = world.submit()
    world.cut(1, 11)
    world.run(6)
    assert world.where(task) == [11, 12]
    world.end(task)  # At 11, which nobody hears of.
    world.end(task)
    row = world.hosts[1].rows[task]
    world.holds_reads = True  # The purge is slow.
    world.run(100.0)
    world.connect(1, 11)
    world.settle()
    assert isinstance(world.held_reads[-1][1], fx.ReadRows)
    world.held_reads = world.held_reads[-1:]
    world.read()
    world.settle()
    assert not world.hosts[11].node.worker.unacknowledged_count
    assert world.hosts[1].rows[task] is row


def test_when_a_lost_attempt_began_stays_known(world: World) -> None:
    world.cluster()
    (task,) = world.submit()
    began_s = world.utc
    world.run(1)
    world.crash(11)
    world.restart(11)
    assert world.record(task).attempts[0].started_s == began_s


def test_an_attempt_whose_beginning_only_the_journal_knows_counts_as_begun(world: World) -> None:
    world.cluster()
    world.holds_commits = True
    (task,) = world.submit()
    world.commit(1)
    world.settle()
    world.cut(1, 11)
    assert world.where(task) == [11]
    world.crash(1)
    world.holds_commits = False
    world.crash(11)
    world.restart(1)
    world.restart(11)
    world.run(1)
    assert world.outcomes(task)[0] is Outcome.LOST
    assert world.record(task).attempts[0].started_s


def test_a_restarted_scheduler_goes_on_and_running_tasks_are_not_started_again(world: World) -> None:
    world.cluster(2, offer=offer(2))
    tasks = world.submit(10)
    running = {begin.key.task_id for host in world.hosts.values() for begin in host.running.values()}
    assert len(running) == 4
    world.crash(1)
    world.run(2)
    world.restart(1)
    world.run(2)
    for _ in range(10):
        for task in tasks:
            if any(key.task_id == task for host in world.hosts.values() for key in host.running):
                world.end(task)
    assert all(world.state(task) is TaskState.SUCCEEDED for task in tasks)
    assert all(len(world.where(task)) == 1 for task in tasks)


def test_a_restarted_scheduler_waits_for_workers_then_gives_their_attempts_up(world: World) -> None:
    world.cluster(2, offer=offer(1))
    (task,) = world.submit()
    (worker,) = world.where(task)
    world.crash(1)
    world.crash(worker)
    world.restart(1)
    world.run(1)
    (fresh,) = world.submit()
    assert len(world.where(fresh)) == 1, "new tasks do not wait for missing workers"
    world.end(fresh)
    world.run(8)
    assert len(world.where(task)) == 1
    world.run(2)
    assert len(world.where(task)) == 2


def test_a_restarted_scheduler_leads_under_a_greater_term(world: World) -> None:
    world.cluster()
    before = world.hosts[1].term
    world.crash(1)
    world.restart(1)
    world.run(1)
    assert world.hosts[1].term.rank() > before.rank()
    assert world.hosts[11].node.worker.term == world.hosts[1].term


def test_an_orderly_stop_of_a_worker_moves_its_work_at_once_and_counts_as_no_failure(world: World) -> None:
    world.cluster(2, offer=offer(1))
    (task,) = world.submit()
    (worker,) = world.where(task)
    world.post(worker, ev.StopWanted(5.0))
    world.settle()
    assert [type(effect) for effect in world.hosts[worker].signals] == [fx.Terminate]
    world.end(task, Outcome.SIGNAL)
    assert world.hosts[worker].exited == fx.Exit(0, "stopped")
    assert world.outcomes(task) == [Outcome.PREEMPTED, None]
    assert len(world.where(task)) == 2


def test_an_orderly_stop_gives_back_what_has_not_begun(world: World) -> None:
    world.cluster(offer=offer(1))
    world.work = lambda begin: Outcome.OK
    world.submit(2)
    world.work = lambda begin: None
    tasks = world.submit(10)
    assert world.hosts[11].node.worker.waiting_count == 9
    world.post(11, ev.StopWanted(5.0))
    world.settle()
    world.end(tasks[0], Outcome.SIGNAL)
    assert world.hosts[11].exited is not None
    assert all(world.state(task) is TaskState.QUEUED for task in tasks)


def test_what_is_given_back_survives_a_connection_that_breaks(world: World) -> None:
    world.cluster(offer=offer(1))
    world.work = lambda begin: Outcome.OK
    world.submit()
    world.work = lambda begin: None
    _, task = world.submit(2, on_lost="fail")
    worker = world.hosts[11].node.worker
    world.post(11, ev.Received(1, [msg.Recall(worker.term, (world.scheduler.ledger.tasks[task].key,))]))
    world.cut(1, 11)
    world.connect(1, 11)
    world.settle()
    assert world.outcomes(task)[0] is Outcome.PREEMPTED
    assert world.state(task) is not TaskState.FAILED


def test_a_worker_that_stops_while_it_registers_is_not_given_work_for_ever(world: World) -> None:
    world.cluster(offer=offer(2))
    world.submit()
    world.cut(1, 11)
    (task,) = world.submit()
    world.holds_commits = True
    world.connect(1, 11)
    world.settle()
    world.post(11, ev.StopWanted(5.0))
    world.settle()
    world.holds_commits = False
    while world.hosts[1].held_commits:
        world.commit(1)
        world.settle()
    assert world.where(task) == []
    assert world.state(task) is TaskState.QUEUED
    assert len(world.record(task).attempts) == 1


def test_a_stopping_worker_offers_nothing_whatever_its_configuration_says(world: World) -> None:
    world.cluster(offer=offer(2))
    world.submit()
    world.post(11, ev.StopWanted(5.0))
    world.post(11, ev.OfferChanged(offer(4)))
    world.settle()
    (task,) = world.submit()
    assert world.state(task) is TaskState.QUEUED
    assert world.record(task).attempts == []


def test_a_stop_does_not_wait_longer_for_what_is_ending_already(world: World) -> None:
    world.cluster()
    (task,) = world.submit(grace_s=3600.0)
    world.cancel(task)
    world.post(11, ev.StopWanted(5.0))
    world.run(5.1)
    assert [type(effect) for effect in world.hosts[11].signals] == [fx.Terminate, fx.Kill]


def test_a_stopping_worker_waits_for_the_last_outcome_to_be_taken(world: World) -> None:
    world.cluster()
    (task,) = world.submit()
    world.post(11, ev.StopWanted(60.0))
    world.run(30)
    world.holds_commits = True
    world.end(task)
    assert world.hosts[11].exited is None
    world.commit(1)
    world.settle()
    assert world.hosts[11].exited == fx.Exit(0, "stopped")
    assert world.state(task) is TaskState.SUCCEEDED


def test_what_waits_at_a_worker_goes_back_when_the_worker_offers_less(world: World) -> None:
    world.cluster(offer=offer(1, gpus=1))
    world.work = lambda begin: Outcome.OK
    world.submit(resources={"gpus": 1000})
    world.work = lambda begin: None
    running, waiting = world.submit(2, resources={"gpus": 1000})
    world.post(11, ev.OfferChanged(offer(1)))
    world.settle()
    assert world.state(running) is TaskState.RUNNING
    assert world.state(waiting) is TaskState.QUEUED


def test_a_new_offer_is_heard_while_the_worker_registers(world: World) -> None:
    world.cluster(0)
    world.holds_commits = True
    world.add(11, "worker", offer=offer(1))
    world.post(11, ev.OfferChanged(offer(7)))
    world.settle()
    assert world.scheduler.roster.get(11).offer.slots == 7


def test_a_leader_on_a_new_disk_learns_the_term_its_workers_have_obeyed(world: World) -> None:
    world.cluster()
    for _ in range(3):
        world.crash(1)
        world.restart(1)
        world.run(1)
    world.crash(1)
    host = world.hosts[1]
    host.rows, host.node_rows, host.term, host.seen = {}, {}, None, {}
    world.restart(1)
    world.run(1)
    assert world.scheduler.leads
    assert world.hosts[1].term.epoch == 5
    (task,) = world.submit()
    assert world.where(task) == [11]


def test_drain_gives_nothing_new_and_takes_back_what_waits(world: World) -> None:
    world.cluster(2, offer=offer(1))
    world.ask(lambda call: ev.DrainWanted(call, 11, "new disk"))
    tasks = world.submit(3)
    assert [world.where(task) for task in tasks] == [[12], [], []]
    world.crash(1)
    world.restart(1)
    world.run(1)
    assert world.scheduler.roster.get(11).drain_reason == "new disk"
    world.ask(lambda call: ev.DrainWanted(call, 11, None))
    assert world.where(tasks[1]) == [11]


def test_work_that_waits_at_one_worker_goes_to_another_that_idles(world: World) -> None:
    world.cluster(offer=offer(1))
    world.work = lambda begin: Outcome.OK
    world.submit(1)
    shape = next(iter(world.scheduler.ledger.queue._shapes.values()))
    shape.mean_s = 0.04
    world.work = lambda begin: None
    tasks = world.submit(2)
    assert len(world.scheduler.roster.get(11).assigned) == 2
    world.add(12, "worker", offer=offer(1))
    assert world.where(tasks[1]) == [12]


def test_waiting_work_is_not_taken_back_for_a_worker_that_cannot_run_it(world: World) -> None:
    world.cluster(2, offer=offer(1))
    world.work = lambda begin: Outcome.OK
    world.submit()
    next(iter(world.scheduler.ledger.queue._shapes.values())).mean_s = 0.04
    world.work = lambda begin: None
    tasks = world.submit(4)
    world.add(13, "worker", offer=msg.Offer(2, {}, {}, ("http",)))
    assert [len(world.scheduler.roster.get(node_id).assigned) for node_id in (11, 12, 13)] == [2, 2, 0]
    assert all(len(world.record(task).attempts) == 1 for task in tasks)


def test_a_task_goes_where_it_can_begin_and_not_where_it_would_wait(world: World) -> None:
    world.cluster(0)
    world.add(11, "worker", offer=offer(8, gpus=1))
    world.work = lambda begin: Outcome.OK
    world.submit(resources={"gpus": 1000})
    world.work = lambda begin: None
    (first,) = world.submit(resources={"gpus": 1000})
    world.add(12, "worker", offer=offer(2, gpus=1))
    world.submit()
    (second,) = world.submit(resources={"gpus": 1000})
    assert world.where(first) == [11]
    assert world.where(second) == [12]


def test_what_a_worker_uses_is_counted_anew_when_it_offers_something_else(world: World) -> None:
    world.cluster(offer=offer(4))
    first, *_ = world.submit(4)
    world.post(11, ev.OfferChanged(msg.Offer(4, {"cpus": 8000}, {}, ("command",))))
    world.settle()
    worker = world.scheduler.roster.get(11)
    assert worker.used["cpus"] == 8000
    world.end(first)
    assert worker.used["cpus"] == 6000


def test_a_leader_that_says_twice_that_it_leads_is_registered_with_once(world: World) -> None:
    world.cluster()
    (task,) = world.submit()
    registered = len([message for _, _, message in world.sent if isinstance(message, msg.Register)])
    world.post(11, ev.Received(1, [msg.Leading(world.hosts[11].node.worker.term)]))
    world.settle()
    assert len([message for _, _, message in world.sent if isinstance(message, msg.Register)]) == registered
    assert world.state(task) is TaskState.RUNNING


def test_an_attempt_the_worker_never_heard_of_is_found_by_the_inventory(world: World) -> None:
    world.cluster(offer=offer(1))
    (task,) = world.submit()
    key = next(iter(world.hosts[11].running))
    worker = world.hosts[11].node.worker
    worker._room.release(worker._running.pop(key).place)
    world.hosts[11].running.clear()
    world.run(11)
    assert world.outcomes(task)[0] is Outcome.LOST
    assert len(world.where(task)) == 2


def test_a_node_that_is_both_talks_to_itself(world: World) -> None:
    world.add(1, "scheduler", "worker")
    world.run(1)
    world.work = lambda begin: Outcome.OK
    (task,) = world.submit()
    assert world.state(task) is TaskState.SUCCEEDED
    world.post(1, ev.StopWanted(5.0))
    world.settle()
    assert world.hosts[1].exited == fx.Exit(0, "stopped")


def test_a_lower_id_that_arrives_first_leads(world: World) -> None:
    world.add(2, "scheduler")
    world.add(1, "scheduler")
    world.run(2)
    assert world.scheduler.leads
    assert not world.hosts[2].node.scheduler.leads


def test_workers_refuse_a_lesser_term(world: World) -> None:
    world.cluster()
    worker = world.hosts[11].node.worker
    term = worker.term
    stale = msg.Term(term.epoch - 1, 7, 1)
    world.post(11, ev.Received(7, [msg.Leading(stale)]))
    world.settle()
    assert worker.leader == 1
    assert worker.term == term


def test_a_leader_with_an_impossible_epoch_is_not_believed(world: World) -> None:
    world.cluster()
    world.add(2, "scheduler")
    world.post(1, ev.Received(2, [msg.Leading(msg.Term(1 << 40, 2, 1))]))
    world.settle()
    assert world.scheduler.leads
    assert any(entry.event == "term refused" for entry in world.logs)


def test_a_worker_that_comes_back_under_another_node_id_is_believed(world: World) -> None:
    world.cluster()
    (task,) = world.submit()
    world.cut(1, 11)
    world.end(task)
    world.crash(11)
    journal = world.hosts.pop(11).journal
    world.add(12, "worker")
    worker = world.hosts[12].node.worker
    ended = [entry.ended[0] for entry in journal if entry.ended]
    worker.on_journal_loaded(ev.JournalLoaded(worker.term, [], ended), 0.0)
    world.cut(1, 12)
    world.connect(1, 12)
    world.settle()
    assert world.state(task) is TaskState.SUCCEEDED
    world.run(10)
    assert not world.scheduler.roster.get(11).assigned


def test_an_outcome_that_a_newer_worker_has_a_name_for_is_a_failure(world: World) -> None:
    world.cluster()
    (task,) = world.submit()
    (key,) = world.hosts[11].running
    world.post(1, ev.Received(11, [msg.Finished((msg.AttemptEnded(key, 99, world.utc, world.utc),))]))
    world.settle()
    assert world.state(task) is TaskState.FAILED
    assert world.outcomes(task) == [Outcome.EXCEPTION]


def test_a_drained_worker_that_missed_the_recall_hears_it_when_it_comes_back(world: World) -> None:
    world.cluster(offer=offer(1))
    world.work = lambda begin: Outcome.OK
    world.submit()
    world.work = lambda begin: None
    running, waiting = world.submit(2)
    world.cut(1, 11)
    world.ask(lambda call: ev.DrainWanted(call, 11, "upkeep"))
    world.connect(1, 11)
    world.settle()
    assert world.state(running) is TaskState.RUNNING
    assert world.state(waiting) is TaskState.QUEUED


def test_a_scheduler_that_stops_under_load_stops(world: World) -> None:
    world.cluster()
    world.holds_commits = True
    world.submit()
    world.post(1, ev.StopWanted(5.0))
    world.submit()
    refused = world._calls
    world.commit(1)  # What was taken in is durable, and what could be handed out now is not.
    world.settle()
    assert isinstance(world.replies[refused], Unavailable)
    assert world.hosts[1].exited == fx.Exit(0, "stopped")


def test_a_scheduler_that_follows_with_open_tasks_of_its_own_rests(world: World) -> None:
    world.cluster()
    world.submit()
    world.crash(1)
    world.crash(11)
    second = world.add(0, "scheduler")
    world.run(1)
    assert second.node.scheduler.leads
    world.restart(1)
    world.run(30)
    assert not world.scheduler.leads
    assert world.hosts[1].node.next_deadline(world.now) is None


def test_a_scheduler_that_does_not_lead_drains_nothing(world: World) -> None:
    world.cluster()
    world.add(2, "scheduler")
    world.run(1)
    assert isinstance(world.ask(lambda call: ev.DrainWanted(call, 11, "upkeep"), 2), NoLeader)


def test_a_worker_with_an_impossible_epoch_is_not_believed(world: World) -> None:
    world.cluster()
    impossible = msg.Term(1 << 40, 2, 1)
    world.post(1, ev.Received(11, [msg.Register(world.hosts[11].node.worker.offer, (), (), impossible)]))
    world.settle()
    assert world.hosts[1].exited is None
    assert world.hosts[1].term.epoch == 1


def test_a_worker_cannot_name_a_term_that_never_was(world: World) -> None:
    """Whoever holds a worker key forces no change of leaders: what it says of terms has no seal."""
    world.cluster()
    offer = world.hosts[11].node.worker.offer
    term = world.hosts[1].term
    for epoch in range(term.epoch, term.epoch + 20):
        false = msg.Term(epoch, 0, 77)
        for message in (msg.Register(offer, (), (), false, b"x" * 16), msg.Leading(false, True, b"x" * 16)):
            world.post(1, ev.Received(11, [message]))
            world.settle()
    assert world.hosts[1].node.scheduler.leads
    assert world.hosts[1].term == term
    assert sum(log.event == "term refused" for log in world.logs) == 1


def test_an_honest_worker_tells_a_stale_leader_by_the_seal_that_it_was_given(world: World) -> None:
    """The only one that has met the greater term: the scheduler's disk is of long ago, and no other is left."""
    world.cluster()
    world.crash(1)
    seal = Seal(b"")
    greater = msg.Term(40, 2, 5)
    world.hosts[11].node.worker.on_leading(2, msg.Leading(greater, True, seal.of(greater)), world.now)
    world.settle()
    world.hears(11, ev.PeerDown(2, "gone"))
    world.settle()
    world.restart(1)
    world.run(10)
    assert world.hosts[1].node.scheduler.leads
    assert world.hosts[1].term.epoch == 41
    (task,) = world.submit()
    assert world.where(task) == [11]


def test_short_calls_share_a_slot_and_never_one_with_a_long_task(world: World) -> None:
    handlers = (msg.HandlerInfo("echo", b"{}"), msg.HandlerInfo("sleep", b"{}"))
    world.cluster(offer=msg.Offer(2, {"cpus": 2000}, {}, (), handlers))
    running = world.hosts[11].running
    world.work = lambda begin: Outcome.OK
    world.submit(type="echo")
    world.work = lambda begin: None
    world.submit(type="sleep")
    world.submit(500, type="echo")
    assert sorted(begin.spec.type for begin in running.values()) == ["echo"] * 256 + ["sleep"]
    (other,) = world.submit(type="sleep", priority=1)
    assert world.where(other) == []
