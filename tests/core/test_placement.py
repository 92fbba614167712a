"""Placement and the roster: nothing is overcommitted, and nothing waits for which there is room."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskd.core.constraints import matches
from taskd.core.placement import RECALL_TASK_S_MIN, RECALL_WAITED_S, misplaced, place
from taskd.core.queue import ReadyQueue, Shape, rank_of
from taskd.core.roster import ASSIGNED_MAX, PREFETCH_TASK_S_MAX, Roster, Worker
from taskd.core.task import Attempt, Record, Task, TaskSpec, TaskState
from taskd.protocol.messages import HandlerInfo, NodeInfo, NodeRow, Offer, Term


class Floor:
    """A queue, a roster, and tasks that come and go."""

    def __init__(self) -> None:
        self.queue = ReadyQueue(10_000)
        self.roster = Roster()
        self._ids = 0

    def arrive(self, node_id: int, offer: Offer) -> Worker:
        worker = self.roster.known(node_id)
        info = NodeInfo(node_id, f"node{node_id}", ("worker",), bytes(16), 1, "test")
        worker.arrives(info, offer, 0.0)
        return worker

    def push(self, **options: object) -> Task:
        self._ids += 1
        spec = TaskSpec(options.pop("type", "command"), **options)  # type: ignore[arg-type]
        task = Task(self._ids.to_bytes(16, "big"), spec, b"", TaskState.QUEUED, Record([]))
        self.queue.push(task)
        return task

    def place(self, prefetch_s: float = 0.0, prefetch_max: int = 0) -> list[tuple[Task, Worker]]:
        placed = list(place(self.queue, self.roster, prefetch_s, prefetch_max))
        for task, _ in placed:
            task.state = TaskState.ASSIGNED
        return placed

    def check(self) -> None:
        """What holds after every placement."""
        for worker in self.roster:
            share = worker.offer.capacity.get("cpus", 0) // max(worker.offer.slots, 1)
            for name, amount in worker.used.items():
                without = share if name == "cpus" else 0
                counted = sum(task.spec.resources.get(name, without) for task in worker.assigned.values())
                assert amount == counted, (name, worker.used)
        for shape in (*self.queue.fresh, *self.queue.stuck):
            assert len(shape)
            for worker in self.roster:
                assert not (worker.may_take and worker.could_run(shape) and worker.load_with(shape) <= 1)


# Few kinds of everything, so that tasks and workers meet.
NOW_S = 1e9
OFFERS = st.builds(
    Offer,
    slots=st.integers(0, 3),
    capacity=st.fixed_dictionaries({"cpus": st.sampled_from((3000, 0, 1000))}, optional={"gpus": st.just(2000)}),
    labels=st.sampled_from(({}, {"zone": "a"})),
    types=st.sampled_from((("command",), ("command", "http"), ())),
    handlers=st.sampled_from(((), (HandlerInfo("echo", b"{}"),))),
)
TASKS = st.fixed_dictionaries(
    {"type": st.sampled_from(("command", "command", "http", "echo")), "priority": st.integers(0, 2)},
    optional={
        "resources": st.sampled_from(({"cpus": 1500}, {"cpus": 1000, "gpus": 1000})),
        "constraints": st.sampled_from((("zone=a",), ("zone!=a",))),
    },
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), TASKS, st.integers(1, 4)),
        st.tuples(st.just("arrive"), st.integers(1, 4), OFFERS),
        st.tuples(st.just("leave"), st.integers(1, 4)),
        st.tuples(st.just("drain"), st.integers(1, 4), st.sampled_from((None, "upkeep"))),
        st.tuples(st.just("release"), st.integers(0, 100)),
        st.tuples(st.just("cancel"), st.integers(0, 100)),
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(STEPS)
def test_nothing_is_overcommitted_and_nothing_waits_for_which_there_is_room(steps: list[tuple[object, ...]]) -> None:
    floor = Floor()
    for node_id in (1, 2):
        floor.arrive(node_id, Offer(node_id, {"cpus": 2000, "gpus": 1000}, {}, ("command",)))
    waiting: list[Task] = []
    placed: list[tuple[Task, Worker]] = []
    for step in steps:
        match step:
            case ("push", dict(options), int(count)):
                waiting += [floor.push(**options) for _ in range(count)]
            case ("arrive", int(node_id), Offer() as offer):
                floor.arrive(node_id, offer)
            case ("leave", int(node_id)):
                floor.roster.known(node_id).leaves(0.0)
            case ("drain", int(node_id), reason):
                floor.roster.known(node_id).drain(reason)  # type: ignore[arg-type]
            case ("release", int(number)) if placed:
                task, worker = placed.pop(number % len(placed))
                worker.release(task)
            case ("cancel", int(number)) if waiting:
                floor.queue.remove(waiting.pop(number % len(waiting)))
        before = set(waiting)
        for task, worker in floor.place():
            waiting.remove(task)
            placed.append((task, worker))
            assert worker.may_take
            assert task.spec.type in worker.types
            assert task.shape is not None
            assert all(matches(constraint, worker.offer.labels) for constraint in task.shape.constraints)
            assert len(worker.assigned) <= worker.offer.slots
            assert all(worker.used[name] <= worker.offer.capacity[name] for name, _ in task.shape.needs)
        floor.check()
        # Among equals the first goes first.
        for task in before - set(waiting):
            assert all(rank_of(task) < rank_of(other) for other in waiting if other.shape is task.shape)
    for task, worker in placed:
        worker.release(task)
    assert not any(amount for worker in floor.roster for amount in worker.used.values())


def test_tasks_spread_evenly_and_to_the_lower_node_id_where_all_is_equal() -> None:
    floor = Floor()
    for node_id in (3, 1, 2):
        floor.arrive(node_id, Offer(2, {"cpus": 2000}, {}, ("command",)))
    for _ in range(5):
        floor.push()
    assert [worker.node_id for _, worker in floor.place()] == [1, 2, 3, 1, 2]


def test_a_release_of_what_is_not_there_changes_nothing() -> None:
    floor = Floor()
    worker = floor.arrive(1, Offer(1, {"cpus": 1000}, {}, ("command",)))
    floor.push()
    ((task, _),) = floor.place()
    worker.release(task)
    worker.release(task)
    assert worker.used == {"cpus": 0}


def test_a_long_queue_in_front_of_busy_workers_asks_only_who_got_room() -> None:
    floor = Floor()
    workers = [floor.arrive(number, Offer(1, {"cpus": 1000}, {}, ("command",))) for number in range(5)]
    for _ in range(10):
        floor.push()
    placed = floor.place()
    assert len(placed) == 5
    asked: list[int] = []
    for worker in workers:
        worker.load_with = lambda shape, it=worker: asked.append(it.node_id) or Worker.load_with(it, shape)  # type: ignore
    workers[3].release(placed[3][0])
    assert [worker.node_id for _, worker in floor.place()] == [3]
    assert set(asked) == {3}
    asked.clear()
    floor.push()
    assert floor.place() == []
    assert asked == []


def test_a_free_slot_is_no_room_where_something_else_is_short() -> None:
    floor = Floor()
    floor.arrive(1, Offer(4, {"cpus": 4000, "gpus": 1000}, {}, ("command",)))
    for _ in range(3):
        floor.push(resources={"gpus": 1000})
    assert len(floor.place(prefetch_s=0.05, prefetch_max=512)) == 1


def test_load_is_by_what_is_scarcest() -> None:
    floor = Floor()
    big = floor.arrive(1, Offer(8, {"cpus": 8000}, {}, ("command",)))
    floor.push(resources={"cpus": 7000})
    assert floor.place()[0][1] is big
    small = floor.arrive(2, Offer(2, {"cpus": 2000}, {}, ("command",)))
    floor.push()
    assert floor.place()[0][1] is small, "one of eight slots is taken there, but seven of eight cpus"


@pytest.mark.parametrize(
    ("mean_s", "prefetch_s", "prefetch_max", "per_slot"),
    [
        (None, 0.05, 512, 0),
        (PREFETCH_TASK_S_MAX * 1.01, 60.0, 512, 0),
        (1.0, 0.05, 512, 1),
        (0.01, 0.05, 512, 5),
        (0.0, 0.05, 512, 512),
        (1e-9, 0.05, 512, 512),
        (0.01, 0.05, 3, 3),
        (0.01, 0.0, 512, 1),
        (0.01, 0.05, 0, 0),
        (0.0, 0.05, 0, 0),
    ],
)
def test_how_many_tasks_wait_at_a_worker(
    mean_s: float | None, prefetch_s: float, prefetch_max: int, per_slot: int
) -> None:
    floor = Floor()
    floor.arrive(1, Offer(2, {"cpus": 2000}, {}, ("command",)))
    shape = floor.queue.shape_of(TaskSpec("command"))
    shape.mean_s = mean_s
    for _ in range(2000):
        floor.push()
    assert len(floor.place(prefetch_s, prefetch_max)) == 2 + 2 * per_slot


def test_tasks_wait_by_what_is_scarce_and_not_by_slots() -> None:
    floor = Floor()
    floor.arrive(1, Offer(64, {"cpus": 64000, "gpus": 1000}, {}, ("command",)))
    floor.push(resources={"gpus": 1000}).shape.mean_s = 0.01  # type: ignore[union-attr]
    for _ in range(100):
        floor.push(resources={"gpus": 1000})
    assert len(floor.place(prefetch_s=0.05, prefetch_max=512)) == 1 + 5


def test_no_worker_is_given_more_than_it_can_name_in_one_message() -> None:
    floor = Floor()
    worker = floor.arrive(1, Offer(1000, {}, {}, ("command",)))
    floor.queue.shape_of(TaskSpec("command")).mean_s = 0.0
    shape = floor.push().shape
    assert shape is not None
    task = floor.queue.pop(shape)
    worker.assigned = {number.to_bytes(16, "big"): task for number in range(ASSIGNED_MAX)}
    assert not worker.has_room(2.0, 10_000.0)
    assert floor.place(1.0, 10_000) == []


def test_of_a_thousand_shapes_only_those_are_looked_at_for_which_there_may_be_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Shape] = []
    could_run = Worker.could_run

    def counted(worker: Worker, shape: Shape) -> bool:
        asked.append(shape)
        return could_run(worker, shape)

    floor = Floor()
    floor.arrive(1, Offer(1, {"cpus": 4000, "memory": 10_000_000}, {}, ("command",)))
    tasks = [floor.push(resources={"memory": 1000 * number}) for number in range(1, 1001)]
    (first,) = floor.place(prefetch_s=0.05, prefetch_max=512)
    assert first[0] is tasks[0]
    monkeypatch.setattr(Worker, "could_run", counted)
    assert floor.place(prefetch_s=0.05, prefetch_max=512) == []
    assert not asked, "nobody has got more room"
    for number in range(1, 11):
        first[1].release(tasks[number - 1])
        assert floor.place(prefetch_s=0.05, prefetch_max=512) == [(tasks[number], first[1])]
    assert asked == [task.shape for task in tasks[1:11]]
    floor.check()


def test_shares_of_cpus_leave_every_slot_its_own() -> None:
    floor = Floor()
    floor.arrive(1, Offer(3, {"cpus": 4000}, {}, ("command",)))
    for _ in range(5):
        floor.push()
    assert len(floor.place()) == 3


def test_a_worker_without_cpus_to_count_still_has_its_slots() -> None:
    floor = Floor()
    floor.arrive(1, Offer(2, {}, {}, ("command",)))
    for _ in range(5):
        floor.push()
    assert len(floor.place()) == 2


def test_waiting_work_goes_to_idle_slots_and_no_more_than_there_are() -> None:
    floor = Floor()
    crowded = floor.arrive(1, Offer(1, {"cpus": 1000}, {}, ("command",)))
    shape = floor.queue.shape_of(TaskSpec("command"))
    shape.mean_s = RECALL_TASK_S_MIN
    tasks = [floor.push() for _ in range(5)]
    assert len(floor.place(prefetch_s=1.0, prefetch_max=10)) == 5
    for task in tasks:
        task.record.attempts.append(Attempt(1, Term(1, 1, 1), 1, 1, NOW_S))
    tasks[0].state = TaskState.RUNNING
    assert list(misplaced(floor.roster, NOW_S)) == []
    floor.arrive(2, Offer(2, {"cpus": 2000}, {}, ("command",)))
    assert list(misplaced(floor.roster, NOW_S)) == [(crowded, tasks[-2:])]
    tasks[-1].is_recalled = True
    assert list(misplaced(floor.roster, NOW_S)) == [(crowded, tasks[2:4])]
    assert list(misplaced(floor.roster, NOW_S, inf)) == []
    shape.mean_s = RECALL_TASK_S_MIN / 2
    assert list(misplaced(floor.roster, NOW_S)) == []
    assert list(misplaced(floor.roster, NOW_S + RECALL_WAITED_S)) == [(crowded, tasks[2:4])], "behind a long one"
    shape.mean_s = 1.0
    floor.roster.known(2).drain("upkeep")
    assert list(misplaced(floor.roster, NOW_S)) == []


def test_what_is_known_of_a_worker_survives_a_restart() -> None:
    roster = Roster()
    roster.load_row(NodeRow(7, "seven", ("worker",), "upkeep", 5.0))
    worker = roster.get(7)
    assert worker is not None
    assert (worker.name, worker.drain_reason, worker.seen_s, worker.is_here) == ("seven", "upkeep", 5.0, False)
    assert len(roster) == 1
    assert list(roster) == [worker]
    assert not worker.may_take
