"""Several schedulers: who leads, what a standby holds, what becomes of tasks when leaders come and go."""

from __future__ import annotations

import pytest

from taskd.core import effects as fx
from taskd.core import events as ev
from taskd.core.settings import SchedulerSettings
from taskd.core.task import Outcome, TaskSpec, TaskState, decode_record, encode
from taskd.errors import NoLeader, Unavailable
from taskd.protocol import messages as msg
from tests.core.world import World


@pytest.fixture
def world() -> World:
    return World()


def cluster(world: World, schedulers: int = 2, workers: int = 1, **options: object) -> World:
    """Schedulers 1, 2, … of which 1 leads, and workers 11, 12, …; everything in sync."""
    settings = SchedulerSettings(**options)  # type: ignore[arg-type]
    for number in range(schedulers):
        world.add(1 + number, "scheduler", settings=settings)
    for number in range(workers):
        world.add(11 + number, "worker")
    world.run(2.0)
    assert leaders(world) == [1]
    return world


def leaders(world: World) -> list[int]:
    return [
        node_id
        for node_id, host in world.hosts.items()
        if host.exited is None and host.node.scheduler is not None and host.node.scheduler.leads
    ]


def submit(world: World, node_id: int, count: int = 1, **options: object) -> list[bytes]:
    """Submit at a certain scheduler; returns the ids."""
    spec = TaskSpec("command", argv=("true",), submitted_s=world.utc, **options)  # type: ignore[arg-type]
    ids = [world.fresh_id() for _ in range(count)]
    world.last_reply = world.ask(
        lambda call: ev.Submitted(call, [ev.NewTask(task_id, spec, encode(spec)) for task_id in ids]), node_id
    )
    return ids


def states(world: World, node_id: int, ids: list[bytes]) -> list[TaskState]:
    return [TaskState(world.hosts[node_id].rows[task_id].state) for task_id in ids]


def same_rows(world: World, *node_ids: int) -> bool:
    first, *others = (world.hosts[node_id].rows for node_id in node_ids)
    return all(other == first for other in others)


def test_a_standby_holds_what_is_answered_as_replicated(world: World) -> None:
    cluster(world)
    ids = submit(world, 1, 3)
    assert world.durability[max(world.durability)] == "replicated"
    assert states(world, 2, ids) == [TaskState.ASSIGNED] * 2 + [TaskState.QUEUED] or states(world, 2, ids)
    world.run(1.0)
    assert same_rows(world, 1, 2)


def test_without_a_standby_the_answer_says_local(world: World) -> None:
    cluster(world, schedulers=1)
    submit(world, 1)
    assert world.durability[max(world.durability)] == "local"


def test_a_standby_refuses_to_decide(world: World) -> None:
    cluster(world)
    submit(world, 2)
    assert isinstance(world.last_reply, NoLeader)


def test_the_standby_takes_over_and_running_tasks_go_on(world: World) -> None:
    cluster(world)
    (running,) = submit(world, 1)
    queued = submit(world, 1, 5)
    world.run(0.1)
    world.crash(1)
    world.run(1.0)
    assert leaders(world) == [2]
    world.end(running)
    world.work = lambda begin: Outcome.OK
    world.run(1.0)
    for key in [key for host in world.hosts.values() for key in host.running]:
        world.end(key.task_id)
    world.run(1.0)
    assert set(states(world, 2, [running, *queued])) == {TaskState.SUCCEEDED}
    assert all(len(world.where(task_id)) == 1 for task_id in [running, *queued])


def test_the_old_leader_comes_back_as_a_standby_and_leads_again_when_it_is_well(world: World) -> None:
    cluster(world)
    world.crash(1)
    world.run(1.0)
    ids = submit(world, 2, 4)
    world.restart(1)
    world.run(5.0)
    assert leaders(world) == [2]
    assert same_rows(world, 1, 2)
    world.run(20.0)
    assert leaders(world) == [1]
    (task,) = submit(world, 1)
    world.run(1.0)
    assert same_rows(world, 1, 2)
    assert set(ids) | {task} <= set(world.hosts[1].rows)


def test_a_stopping_leader_hands_over_at_once(world: World) -> None:
    cluster(world)
    submit(world, 1, 3)
    world.post(1, ev.StopWanted(5.0))
    world.run(0.5)
    assert world.hosts[1].exited == fx.Exit(0, "stopped")
    assert leaders(world) == [2]


def test_who_takes_over_from_a_leader_that_stops_does_not_wait_for_its_copy(world: World) -> None:
    cluster(world)
    world.post(1, ev.StopWanted(5.0))
    world.settle()
    world.cut(1, 2, is_orderly=True)
    assert leaders(world) == [2]
    submit(world, 2)
    world.run(0.01)
    assert world.durability[max(world.durability)] == "local"


def test_three_schedulers_the_lowest_of_those_left_leads(world: World) -> None:
    cluster(world, schedulers=3)
    world.crash(1)
    world.run(1.0)
    assert leaders(world) == [2]
    world.crash(2)
    world.run(1.0)
    assert leaders(world) == [3]
    ids = submit(world, 3, 2)
    world.restart(2)
    world.restart(1)
    world.run(40.0)
    assert leaders(world) == [1]
    assert same_rows(world, 1, 2, 3)
    assert set(ids) <= set(world.hosts[1].rows)


def test_nobody_claims_while_a_peer_hears_the_leader(world: World) -> None:
    cluster(world, schedulers=3)
    world.cut(1, 2)
    world.run(5.0)
    assert leaders(world) == [1]
    world.connect(1, 2)
    world.run(1.0)
    assert leaders(world) == [1]


def test_both_sides_of_a_partition_work_and_join_afterwards(world: World) -> None:
    cluster(world, schedulers=2, workers=2)
    before = submit(world, 1, 2)
    world.run(0.1)
    for one, other in ((1, 2), (1, 12), (2, 11)):
        world.cut(one, other)
    world.run(8.0)
    assert leaders(world) == [1, 2]
    left, right = submit(world, 1, 2), submit(world, 2, 2)
    for one, other in ((1, 2), (1, 12), (2, 11)):
        world.connect(one, other)
    world.run(30.0)
    assert leaders(world) == [1]
    for _ in range(10):
        for key in [key for host in world.hosts.values() for key in host.running]:
            world.end(key.task_id)
        world.run(15.0)
    assert set(states(world, 1, [*before, *left, *right])) == {TaskState.SUCCEEDED}
    assert same_rows(world, 1, 2)


def test_a_leader_that_stood_still_steps_down_before_it_decides(world: World) -> None:
    cluster(world)
    for other in (2, 11):
        world.cut(1, other)
    world.run(3.0)
    assert 2 in leaders(world)
    world.post(1, ev.Stalled(10.0))
    submit(world, 1)
    assert world.last_reply is None
    world.connect(1, 2)
    world.connect(1, 11)
    world.run(0.1)
    assert leaders(world) == [2]
    assert isinstance(world.replies[max(world.replies)], NoLeader)


def test_an_empty_disk_catches_up_before_it_leads(world: World) -> None:
    cluster(world, schedulers=2)
    ids = submit(world, 2 - 1, 30)
    world.crash(1)
    world.run(1.0)
    world.wipe(1)
    world.run(1.0)
    assert leaders(world) == [2]
    world.run(20.0)
    assert leaders(world) == [1]
    assert set(ids) <= set(world.hosts[1].rows)
    assert same_rows(world, 1, 2)


def test_a_standby_that_was_empty_takes_over_as_soon_as_it_has_caught_up(world: World) -> None:
    cluster(world, schedulers=1)
    ids = submit(world, 1, 3)
    world.is_founder = False
    world.add(2, "scheduler")
    world.run(0.5)
    world.crash(1)
    world.run(1.0)
    assert leaders(world) == [2]
    assert set(ids) <= set(world.hosts[2].rows)


def leave_a_stray(world: World, node_id: int) -> bytes:
    """Have a crashed scheduler's disk hold a task whose commit, the last of its leader's, it has not seen whole."""
    host = world.hosts[node_id]
    (task_id,) = submit(world, node_id, not_before_s=world.utc + 10_000)
    world.run(0.1)
    world.crash(node_id)
    row = host.rows[task_id]
    host.seen[row.dot.term] = row.lsn - 1
    host.has_strays = True
    return task_id


def test_what_a_leader_has_beyond_what_it_has_seen_reaches_its_standbys(world: World) -> None:
    cluster(world, schedulers=1)
    task_id = leave_a_stray(world, 1)
    world.restart(1)
    world.is_founder = False
    world.add(2, "scheduler")
    world.run(20.0)
    assert leaders(world) == [1]
    assert task_id in world.hosts[2].rows
    assert same_rows(world, 1, 2)
    assert not world.hosts[1].has_strays


def test_what_a_standby_has_beyond_what_it_has_seen_reaches_the_leader(world: World) -> None:
    cluster(world, schedulers=2, workers=0)
    world.cut(1, 2)
    world.run(2.0)
    assert leaders(world) == [1, 2]
    task_id = leave_a_stray(world, 2)
    world.restart(2)
    world.connect(1, 2)
    world.run(5.0)
    assert leaders(world) == [1]
    assert task_id in world.hosts[1].rows
    assert same_rows(world, 1, 2)
    assert not world.hosts[2].has_strays


def test_a_standby_cut_off_while_it_catches_up_knows_that_it_has_holes(world: World) -> None:
    cluster(world, schedulers=1)
    ids = submit(world, 1, 1200)  # more than a page
    world.is_founder = False
    world.holds_commits = True
    standby = world.add(2, "scheduler")
    while not standby.has_strays:
        world.run(0.1)
        for node_id, host in world.hosts.items():
            if host.held_commits and not standby.has_strays:
                world.commit(node_id)
    world.crash(1)
    world.crash(2)
    world.holds_commits = False
    assert 0 < len(set(ids) & set(standby.rows)) < len(ids)
    world.restart(2)
    world.restart(1)
    world.run(20.0)
    assert set(ids) <= set(world.hosts[2].rows)
    assert not world.hosts[2].has_strays


def test_the_last_standby_gone_answers_wait_a_moment_and_then_say_local(world: World) -> None:
    cluster(world)
    world.crash(2)
    submit(world, 1)
    assert world.last_reply is None
    world.run(3.0)
    assert world.durability[max(world.durability)] == "local"
    assert any(effect.kind == "durability.local" for _, effect in world.announced)


def test_with_min_replicas_tasks_without_a_copy_are_refused(world: World) -> None:
    cluster(world, min_replicas=1)
    world.crash(2)
    submit(world, 1)
    world.run(3.0)
    assert isinstance(world.replies[max(world.replies)], Unavailable)
    submit(world, 1)
    assert isinstance(world.last_reply, Unavailable)


def test_finished_tasks_are_purged_at_the_standby_too(world: World) -> None:
    cluster(world, finished_age_max_s=100.0)
    world.work = lambda begin: Outcome.OK
    ids = submit(world, 1, 3)
    world.run(1.0)
    assert states(world, 2, ids) == [TaskState.SUCCEEDED] * 3
    world.crash(2)
    world.run(300.0)
    assert not world.hosts[1].rows
    assert world.hosts[2].rows
    world.restart(2)
    world.run(5.0)
    assert not world.hosts[2].rows


def test_a_purged_task_does_not_come_back_from_an_old_disk(world: World) -> None:
    cluster(world, finished_age_max_s=100.0)
    world.work = lambda begin: Outcome.OK
    submit(world, 1, 3)
    world.run(1.0)
    world.crash(2)
    world.run(300.0)
    world.crash(1)
    world.restart(2)
    world.run(5.0)
    assert leaders(world) == [2]
    world.restart(1)
    world.run(60.0)
    assert leaders(world) == [1]
    world.run(300.0)
    assert not world.hosts[1].rows
    assert not world.hosts[2].rows


def test_a_success_of_an_attempt_that_was_given_up_decides(world: World) -> None:
    cluster(world, schedulers=1, workers=2)
    (task,) = submit(world, 1)
    worker = world.where(task)[0]
    world.cut(1, worker)
    world.run(7.0)
    assert len(world.where(task)) == 2
    world.connect(1, worker)
    world.run(0.1)
    record = decode_record(world.hosts[1].rows[task].record)
    assert [attempt.outcome for attempt in record.attempts] == [Outcome.LOST, None]


def test_a_worker_tells_schedulers_whom_it_follows(world: World) -> None:
    cluster(world, schedulers=2)
    told = [message for source, to, message in world.sent if source == 11 and isinstance(message, msg.Leading)]
    assert told
    assert told[-1].term is not None


def test_a_lower_id_that_leads_and_dies_again_and_again_waits_longer_each_time(world: World) -> None:
    cluster(world)
    waits = []
    for _ in range(4):
        world.crash(1)
        world.run(1.0)
        world.restart(1)
        came_at = world.now
        while leaders(world) != [1]:
            world.run(1.0)
        waits.append(round(world.now - came_at, -1))
    assert waits == [10, 20, 40, 80]


def test_a_hand_over_that_fails_is_not_tried_again_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(world, workers=0)
    world.crash(1)
    world.run(1.0)
    world.restart(1)
    standby = world.hosts[1]
    world.run(1.0)
    commit = world.commit
    # From now on the standby's disk takes longer for each commit than a hand-over may.
    monkeypatch.setattr(world, "commit", lambda node_id: None if node_id == 1 else commit(node_id))
    for number in range(300):
        world.run(0.1)
        if standby.held_commits and number % 15 == 0:
            commit(1)
        submit(world, 2)
    tries = [log for log in world.logs if log.event == "handing over"]
    assert 0 < len(tries) < 4


def test_an_end_is_provisional_where_a_scheduler_was_lost_before_that_did_not_decide_it_itself(world: World) -> None:
    cluster(world, workers=1)
    world.work = lambda begin: Outcome.OK
    (before,) = submit(world, 1)
    world.run(1.0)
    world.crash(1)
    world.run(1.0)
    (after,) = submit(world, 2)
    world.run(1.0)
    scheduler = world.hosts[2].node.scheduler
    assert scheduler is not None
    rows = world.hosts[2].rows
    assert not scheduler.is_provisional(rows[before], world.now)
    assert scheduler.is_provisional(rows[after], world.now)
    world.restart(1)
    world.run(2.0)
    assert not scheduler.is_provisional(rows[after], world.now)


def test_what_a_standby_had_not_acknowledged_when_it_was_lost_is_provisional(world: World) -> None:
    cluster(world, workers=1)
    world.work = lambda begin: Outcome.OK
    world.links -= {(1, 2), (2, 1)}  # What is sent is lost, and nobody knows yet.
    (task,) = submit(world, 1)
    world.run(2.0)
    world.post(1, ev.PeerDown(2, "silent", False), 2)
    world.run(3.0)
    scheduler = world.hosts[1].node.scheduler
    assert scheduler is not None
    assert scheduler.is_provisional(world.hosts[1].rows[task], world.now)


def test_schedulers_that_are_here_are_remembered_as_such_for_weeks(world: World) -> None:
    cluster(world)
    begun_s = world.utc
    world.run(2 * 86_400.0)
    for node_id in (1, 2):
        assert world.hosts[2].node_rows[node_id].seen_s > begun_s + 86_400.0


def test_both_sides_of_a_division_hear_which_end_counts(world: World) -> None:
    cluster(world, workers=2)
    world.work = lambda begin: None
    (task,) = submit(world, 1, retries=0)
    (holder,) = world.where(task)
    other = 23 - holder
    for left, right in ((1, 2), (1, other), (2, holder)):
        world.cut(left, right)
    world.run(12.0)
    assert leaders(world) == [1, 2]
    assert world.where(task) == [holder, other]
    for node_id, outcome in ((holder, Outcome.EXCEPTION), (other, Outcome.OK)):
        (key,) = world.hosts[node_id].running
        world.post(node_id, ev.Progressed([], [msg.AttemptEnded(key, outcome, world.utc, world.utc, b"")]))
        world.run(0.1)
    assert states(world, 1, [task]) + states(world, 2, [task]) == [TaskState.FAILED, TaskState.SUCCEEDED]
    for left, right in ((1, 2), (1, other), (2, holder)):
        world.connect(left, right)
    world.run(20.0)
    assert states(world, 1, [task]) == [TaskState.SUCCEEDED]
    assert {(told.before, told.after) for _, told in world.superseded} == {(TaskState.FAILED, TaskState.SUCCEEDED)}
    leader_after_healing = 2
    assert leader_after_healing in [node_id for node_id, _ in world.superseded]


def test_who_leads_alone_where_there_were_others_says_that_there_is_no_copy(world: World) -> None:
    cluster(world)
    world.crash(1)
    world.run(5.0)
    kinds = [told.kind for node_id, told in world.announced if node_id == 2]
    assert kinds.index("leader.changed") < kinds.index("durability.local")


def test_a_scheduler_that_is_a_worker_too_is_remembered_as_both_whatever_is_done_to_the_worker(world: World) -> None:
    for node_id in (1, 2):
        world.add(node_id, "scheduler", "worker")
    world.run(2.0)
    world.crash(1)
    world.run(2.0)
    seen_s = world.hosts[2].node_rows[1].seen_s
    for _ in range(2):
        world.ask(lambda call: ev.DrainWanted(call, 1, "upkeep"), 2)
        world.crash(2)
        world.restart(2)
        world.run(2.0)
    row = world.hosts[2].node_rows[1]
    assert (row.roles, row.drain_reason, row.seen_s) == (("scheduler", "worker"), "upkeep", seen_s)
    scheduler = world.hosts[2].node.scheduler
    assert scheduler is not None
    assert [other.node_id for other in scheduler.away(world.now)] == [1]


def test_what_is_being_handed_out_is_not_lost_when_histories_meet(world: World) -> None:
    cluster(world, workers=0)
    (task,) = submit(world, 1, on_lost="fail")
    world.cut(1, 2)
    world.add(11, "worker")
    world.cut(2, 11)
    world.run(8.0)
    assert leaders(world) == [1, 2]
    assert world.where(task) == [11]
    world.holds_commits = True
    world.connect(1, 2)
    world.add(12, "worker")
    assert task in [row.id for row in world.hosts[2].held_commits[-1].updated]
    while world.hosts[1].held_commits:  # It steps down, and tells what it has.
        world.commit(1)
        world.settle()
    world.holds_commits = False
    while world.hosts[2].held_commits:
        world.commit(2)
        world.settle()
    world.run(1.0)
    assert leaders(world) == [2]
    assert states(world, 2, [task]) == [TaskState.RUNNING]
    assert world.where(task) == [11, 12]


@pytest.mark.parametrize("on_lost", ["retry", "fail"])
def test_a_success_that_waits_at_its_worker_counts_when_its_task_comes(world: World, on_lost: str) -> None:
    cluster(world)
    world.crash(1)
    world.run(5)
    (task,) = submit(world, 2, on_lost=on_lost)
    assert world.where(task) == [11]
    world.crash(2)
    world.run(1)
    world.end(task)
    world.restart(1)
    world.run(3)
    assert leaders(world) == [1]
    assert world.hosts[11].node.worker.unacknowledged_count == 1
    world.restart(2)
    world.run(30)
    assert world.where(task) == [11]
    assert states(world, 1, [task]) == [TaskState.SUCCEEDED]


def test_an_attempt_that_another_scheduler_brings_is_lost_where_its_worker_never_comes(world: World) -> None:
    cluster(world)
    world.crash(1)
    world.run(1)
    (task,) = submit(world, 2)
    assert world.where(task) == [11]
    world.crash(2)
    world.crash(11)
    world.restart(1)
    world.run(15)
    world.restart(2)
    world.run(15)
    assert leaders(world) == [1]
    assert states(world, 1, [task]) == [TaskState.QUEUED]
    assert [attempt.outcome for attempt in world.record(task).attempts] == [Outcome.LOST]
