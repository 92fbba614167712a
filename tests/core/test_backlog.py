"""Tasks that wait on the disk alone: nothing is lost, out of order or out of reach, however small the window."""

from __future__ import annotations

import pytest

from taskd.core import effects as fx
from taskd.core import events as ev
from taskd.core import holdings, reads
from taskd.core.explain import explain
from taskd.core.settings import SchedulerSettings
from taskd.core.task import Outcome, Task, TaskState
from taskd.protocol import messages as msg
from tests.core.world import World, offer

WINDOW = 8


@pytest.fixture
def world() -> World:
    """A leader without workers."""
    return World().cluster(workers=0, settings=SchedulerSettings(window=WINDOW))


def in_memory(world: World) -> int:
    return len(world.scheduler.ledger.tasks)


def hire(world: World, slots: int = 2) -> list[bytes]:
    """Have a worker run everything at once, for as long as there is something; returns the order."""
    begun: list[bytes] = []

    def work(begin: fx.Begin) -> Outcome:
        begun.append(begin.key.task_id)
        return Outcome.OK

    world.work = work
    world.add(11, "worker", offer=offer(slots))
    world.run(60)
    return begun


def test_a_long_queue_takes_no_more_memory_than_its_head(world: World) -> None:
    ids = world.submit(200)
    assert in_memory(world) <= WINDOW
    assert (len(world.scheduler.ledger), len(world.scheduler.ledger.queue)) == (200, 200)
    assert hire(world) == ids
    assert (len(world.scheduler.ledger), len(world.scheduler.ledger.queue), in_memory(world)) == (0, 0, 0)


def test_priorities_and_queues_keep_their_order(world: World) -> None:
    low = world.submit(30, queue="a")
    high = world.submit(30, queue="b", priority=5)
    low += world.submit(30, queue="b")
    high += world.submit(30, queue="a", priority=5)
    urgent = world.submit(1, priority=9)
    assert hire(world) == urgent + high + low


def test_each_shape_has_a_head_of_its_own(world: World) -> None:
    waits = world.submit(50, constraints=("gpu",))
    ids = world.submit(50)
    assert in_memory(world) <= 2 * WINDOW
    assert hire(world) == ids
    assert {world.state(task) for task in waits} == {TaskState.QUEUED}


def test_however_many_shapes_come_back_only_a_few_readings_are_made_at_a_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holdings, "PAGE_TASKS", 10)
    ids = [task for amount in range(200) for task in world.submit(2, resources={"memory": amount})]
    world.crash(1)
    world.holds_reads = True
    world.restart(1)
    world.run(1)
    world.read()  # the backlog
    world.settle()
    assert in_memory(world) == 0
    sizes = []
    while world.held_reads:
        assert len(world.held_reads) <= holdings.PAGES_AT_ONCE
        ((_, effect), *_) = world.held_reads
        assert isinstance(effect, fx.ReadRows)
        sizes.append(len(effect.ids))
        world.read()
        world.settle()
    assert sizes == [10] * 40
    assert in_memory(world) == 400
    world.holds_reads = False
    world.work = lambda begin: Outcome.OK
    world.add(11, "worker", offer=offer(2, memory=1000))
    world.run(60)
    assert {world.state(task) for task in ids} == {TaskState.SUCCEEDED}


def test_after_a_restart_everything_is_where_it_was(world: World) -> None:
    ids = world.submit(100)
    (late,) = world.submit(1, deadline_s=world.utc + 20)
    early = world.submit(50, not_before_s=world.utc + 30)
    counts = world.scheduler.ledger.counts.as_dict()
    world.crash(1)
    world.restart(1)
    world.run(1)
    assert world.scheduler.ledger.counts.as_dict() == counts
    world.run(25)
    assert world.state(late) is TaskState.EXPIRED
    assert in_memory(world) <= 2 * WINDOW
    assert hire(world) == ids + early


def test_tasks_that_wait_for_their_time_take_no_more_memory_than_the_next(world: World) -> None:
    begin_s = world.utc
    late = world.submit(40, not_before_s=begin_s + 200)
    soon = [world.submit(1, not_before_s=begin_s + 100 - number)[0] for number in range(40)]
    assert in_memory(world) <= WINDOW
    world.run(99)
    assert world.scheduler.ledger.counts.as_dict() == {
        (TaskState.QUEUED, "default"): 39,
        (TaskState.SCHEDULED, "default"): 41,
    }
    assert sorted(hire(world)) == sorted(soon)
    world.run(100)
    assert {world.state(task) for task in late} == {TaskState.SUCCEEDED}


def test_deadlines_are_kept_on_the_disk_too(world: World) -> None:
    ids = world.submit(60, deadline_s=world.utc + 50)
    delayed = world.submit(60, deadline_s=world.utc + 50, not_before_s=world.utc + 1000)
    assert in_memory(world) <= 2 * WINDOW
    world.run(49)
    assert len(world.scheduler.ledger) == 120
    world.run(2)
    assert {world.state(task) for task in ids + delayed} == {TaskState.EXPIRED}
    assert (len(world.scheduler.ledger), in_memory(world)) == (0, 0)


def test_what_is_on_the_disk_alone_can_be_cancelled(world: World) -> None:
    ids = world.submit(100)
    delayed = world.submit(100, not_before_s=world.utc + 1000)
    gone = [*ids[50:60], *ids[:2], ids[-1], delayed[0], delayed[-1], delayed[50]]
    assert sorted(world.cancel(*gone, bytes(16))) == sorted(gone)
    assert {world.state(task) for task in gone} == {TaskState.CANCELLED}
    assert len(world.scheduler.ledger) == 200 - len(gone)
    assert hire(world) == [task for task in ids if task not in gone]


def test_however_many_cancels_come_at_once_only_so_many_readings_are_made(world: World) -> None:
    ids = world.submit(300)
    gone = [task_id for task_id in ids if task_id not in world.scheduler.ledger.tasks]
    world.holds_reads = True
    for call, task_id in enumerate(gone, start=1000):
        world.post(1, ev.CancelWanted(call, [task_id]))
    world.settle()
    while world.held_reads:
        assert len(world.held_reads) <= reads.AT_ONCE_MAX
        world.read()
        world.settle()
    assert [world.replies[1000 + place] for place in range(len(gone))] == [[task_id] for task_id in gone]
    assert {world.state(task) for task in gone} == {TaskState.CANCELLED}


def held_answer(world: World, task_id: bytes) -> ev.Event:
    """What is read, as of now, for a cancel of a task that waits on the disk: on its way still."""
    world.holds_reads = True
    world.post(1, ev.CancelWanted(1000, [task_id]))
    world.settle()
    ((_, effect),) = world.held_reads
    world.held_reads.clear()
    world.holds_reads = False
    return world.hosts[1].read(effect)


def test_what_became_due_and_left_the_memory_again_while_it_was_read_is_cancelled(world: World) -> None:
    late = world.submit(40, not_before_s=world.utc + 10)[-1]
    answer = held_answer(world, late)
    world.run(20)
    assert world.state(late) is TaskState.QUEUED
    assert late not in world.scheduler.ledger.tasks
    world.post(1, answer)
    world.settle()
    assert world.replies[1000] == [late]
    assert world.state(late) is TaskState.CANCELLED


def test_what_has_ended_while_it_was_read_is_read_once_more(world: World) -> None:
    late = world.submit(40, not_before_s=world.utc + 10)[-1]
    answer = held_answer(world, late)
    world.cancel(late)
    world.post(1, answer)
    world.settle()
    assert world.replies[1000] == []


def test_all_that_wait_can_be_explained(world: World) -> None:
    ids = world.submit(100)
    ledger = world.scheduler.ledger
    for position, task_id in enumerate(ids):
        task = ledger.tasks.get(task_id) or ledger.looked_up(world.hosts[1].rows[task_id])
        assert explain(world.scheduler, task).position == position


def test_a_task_lost_by_its_worker_goes_first_again(world: World) -> None:
    ids = world.submit(100)
    world.work = lambda begin: None
    world.add(11, "worker", offer=offer(2))
    world.run(1)
    world.crash(11)
    world.run(10)
    assert {world.state(task) for task in ids} == {TaskState.QUEUED}
    world.work = lambda begin: Outcome.OK
    begun: list[bytes] = []
    world.work = lambda begin: begun.append(begin.key.task_id) or Outcome.OK  # type: ignore[func-returns-value]
    world.restart(11)
    world.connect(1, 11)
    world.run(30)
    assert begun == ids


@pytest.mark.parametrize("outcome", [Outcome.OK, Outcome.EXCEPTION])
def test_a_late_result_finds_its_task_on_the_disk(world: World, outcome: Outcome) -> None:
    ids = world.submit(100)
    ended = msg.AttemptEnded(msg.AttemptKey(ids[70], 1, msg.Term(1, 9, 9), 5), outcome, world.utc, world.utc, b"")
    world.add(11, "worker", offer=offer(0))
    world.post(1, ev.Received(11, [msg.Finished((ended,))]), 11)
    world.settle()
    expected = TaskState.SUCCEEDED if outcome is Outcome.OK else TaskState.QUEUED
    assert world.state(ids[70]) is expected
    assert hire(world) == [task for task in ids if task != ids[70] or outcome is not Outcome.OK]


def test_what_a_worker_runs_for_an_unknown_leader_is_not_handed_out_again(world: World) -> None:
    ids = world.submit(100)
    world.crash(1)
    world.restart(1)
    world.run(1)
    held = msg.AttemptKey(ids[60], 1, msg.Term(1, 9, 9), 5)
    world.add(11, "worker", offer=offer(0))
    world.post(1, ev.Received(11, [msg.Register(offer(0), (held,), (), None)]), 11)
    world.run(1)
    assert world.state(ids[60]) is TaskState.ASSIGNED
    assert len(world.scheduler.ledger.queue) == 99


def test_a_standby_takes_over_a_long_queue() -> None:
    world = World()
    settings = SchedulerSettings(window=WINDOW)
    for node_id in (1, 2):
        world.add(node_id, "scheduler", settings=settings)
    world.run(2)
    ids = world.submit(100)
    world.crash(1)
    world.run(2)
    leader = world.hosts[2].node.scheduler
    assert leader is not None
    assert (leader.leads, len(leader.ledger)) == (True, 100)
    assert len(leader.ledger.tasks) <= WINDOW
    assert hire(world) == ids


def test_another_leader_has_ended_what_is_here_on_the_disk_alone() -> None:
    world = World()
    settings = SchedulerSettings(window=WINDOW)
    for node_id in (1, 2):
        world.add(node_id, "scheduler", settings=settings)
    world.run(2)
    ids = world.submit(60)
    world.cut(1, 2)
    world.run(2)
    cancelled = ids[30:40]
    world.ask(lambda call: ev.CancelWanted(call, list(cancelled)), 2)
    world.run(1)
    world.connect(1, 2)
    world.run(30)
    assert len(world.scheduler.ledger) == len(world.scheduler.ledger.queue) == 50
    assert world.hosts[1].rows == world.hosts[2].rows
    assert {Task.from_row(world.hosts[1].rows[task]).state for task in cancelled} == {TaskState.CANCELLED}
    assert hire(world) == [task for task in ids if task not in cancelled]
