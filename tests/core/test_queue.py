"""The ready queue: its order against sorted(), its shapes, and what it forgets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from taskd.core.backlog import due_of, entry_of
from taskd.core.queue import GARBAGE_MIN, SHAPES_KEPT, ReadyQueue, Shape, rank_of
from taskd.core.task import Record, Task, TaskSpec, TaskState


def task(number: int, **options: object) -> Task:
    spec = TaskSpec("command", **options)  # type: ignore[arg-type]
    return Task(number.to_bytes(16, "big"), spec, b"", TaskState.QUEUED, Record([]))


def first(queue: ReadyQueue) -> Shape:
    """The shape whose first task goes first of all."""
    return min([*queue.fresh, *queue.stuck], key=lambda shape: shape.head() or ())


TASKS = st.lists(
    st.builds(
        dict,
        priority=st.integers(-2, 2),
        submitted_s=st.integers(0, 3).map(float),
        resources=st.sampled_from(({}, {"cpus": 1000}, {"gpus": 1000})),
    ),
    max_size=60,
)


@given(TASKS, st.data())
def test_the_order_is_by_priority_then_age_then_id_whatever_is_taken_out(
    options: list[dict[str, object]], data: st.DataObject
) -> None:
    queue = ReadyQueue(10_000)
    tasks = [task(number, **option) for number, option in enumerate(options)]
    for it in tasks:
        queue.push(it)
    gone = data.draw(st.sets(st.sampled_from(tasks))) if tasks else set()
    for it in sorted(gone, key=rank_of):
        queue.remove(it)
    expected = sorted((it for it in tasks if it not in gone), key=rank_of)
    assert [queue.position(it, lambda shape: True) for it in expected] == list(range(len(expected)))
    again = data.draw(st.integers(0, 3))
    popped = []
    while len(queue):
        it = queue.pop(first(queue))
        if again:  # A task that comes back keeps its place.
            again -= 1
            queue.push(it)
        else:
            popped.append(it)
    assert popped == expected
    assert [*queue.fresh, *queue.stuck] == []


def test_tasks_with_equal_needs_have_one_shape() -> None:
    queue = ReadyQueue(10_000)
    one, same, other = task(1, resources={"gpus": 1}), task(2, resources={"gpus": 1}), task(3, constraints=("zone=a",))
    assert queue.push(one) is queue.push(same)
    assert queue.push(other) is not one.shape
    assert [len(shape) for shape in [*queue.fresh, *queue.stuck]] == [2, 1]


def test_needs_of_nothing_are_no_needs() -> None:
    assert ReadyQueue(10_000).push(task(1, resources={"gpus": 0})).needs == ()


def test_shapes_are_forgotten_when_nothing_waits_and_there_are_many() -> None:
    queue = ReadyQueue(10_000)
    for number in range(3 * SHAPES_KEPT):
        it = task(number, resources={"cpus": number + 1})
        queue.push(it)
        queue.pop(it.shape)  # type: ignore[arg-type]
    assert len(queue._shapes) <= SHAPES_KEPT


def test_shapes_with_waiting_tasks_are_kept_however_many() -> None:
    queue = ReadyQueue(10_000)
    tasks = [task(number, resources={"cpus": number + 1}) for number in range(3 * SHAPES_KEPT)]
    for it in tasks:
        queue.push(it)
    assert len([*queue.fresh, *queue.stuck]) == len(tasks)
    assert all(queue.shape_of(it.spec) is it.shape for it in tasks)


def test_a_task_that_comes_back_after_its_shape_was_forgotten_is_found() -> None:
    queue = ReadyQueue(10_000)
    back = task(1, resources={"gpus": 7})
    queue.pop(queue.push(back))
    for number in range(2 * SHAPES_KEPT):
        queue.shape_of(TaskSpec("command", resources={"cpus": number + 1}))
    assert queue.push(back) in [*queue.fresh, *queue.stuck]


def test_what_is_cancelled_leaves_nothing_behind() -> None:
    queue = ReadyQueue(10_000)
    tasks = [task(number) for number in range(10_000)]
    for it in tasks:
        queue.push(it)
    for it in tasks:
        queue.remove(it)
    assert len(queue) == 0
    assert tasks[0].shape is not None
    assert len(tasks[0].shape._heap) <= GARBAGE_MIN


def test_the_mean_duration_follows_at_once_and_then_slowly() -> None:
    shape = Shape(TaskSpec("command"), 10_000)
    assert shape.mean_s is None
    shape.ran(10.0)
    assert shape.mean_s == 10.0
    shape.ran(0.0)
    assert shape.mean_s == 9.0


def test_a_page_goes_over_priorities_and_queues_in_their_order() -> None:
    queue = ReadyQueue(window=20)
    places = [(priority, f"queue{number}") for priority in (1, 3, 2) for number in range(3)]
    for place, (priority, name) in enumerate(places):
        entries = b"".join(entry_of(1e9 + place + 10 * age, bytes([place, age]) * 8) for age in range(2))
        queue.load(TaskSpec("command", queue=name, priority=priority, submitted_s=1e9), entries)
    ((shape, page),) = queue.next_pages(1024)
    assert [due_of(entry)[0] - 1e9 for entry in page] == [3, 4, 5, 13, 14, 15, 6, 7, 8, 16]
    assert len(shape) == 18
