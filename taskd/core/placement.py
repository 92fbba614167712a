"""Which worker gets which task: plain functions over the ready queue and the roster.

The best task by priority and age goes first; it goes to the worker that would be least loaded with it, by whatever is
scarcest there, so that it waits nowhere while another worker could begin it.
A task that fits nowhere now does not hold back those of other shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heapreplace

from taskd.core.queue import Rank, ReadyQueue, Shape
from taskd.core.roster import Worker
from taskd.core.task import Task, TaskState

RECALL_TASK_S_MIN = 0.02  # Shorter tasks are done sooner where they are than they could be fetched back.


def place(
    queue: ReadyQueue, workers: Iterable[Worker], prefetch_s: float, prefetch_max: int
) -> Iterator[tuple[Task, Worker]]:
    """Take tasks from the queue and yield each with its worker, already counted there, until nothing more fits."""
    open_workers = [worker for worker in workers if worker.may_take]
    heads: list[tuple[Rank, int, Shape]] = []
    for number, shape in enumerate(queue.waiting_shapes()):
        rank = shape.head()
        assert rank is not None
        heads.append((rank, number, shape))
    heapify(heads)
    candidates: dict[int, list[tuple[float, int, Worker]]] = {}
    while heads:
        _, number, shape = heads[0]
        options = candidates.get(number)
        if options is None:
            options = candidates[number] = [
                (worker.load_with(shape), worker.node_id, worker) for worker in open_workers if worker.could_run(shape)
            ]
            heapify(options)
        worker = _least_loaded(options, shape, prefetch_s, prefetch_max)
        if worker is None:
            heappop(heads)
            continue
        task = queue.pop(shape)
        worker.give(task, shape)
        yield task, worker
        rank = shape.head()
        if rank is None:
            heappop(heads)
        else:
            heapreplace(heads, (rank, number, shape))


def _least_loaded(
    options: list[tuple[float, int, Worker]], shape: Shape, prefetch_s: float, prefetch_max: int
) -> Worker | None:
    """The worker of least load that has room. Loads in the heap may be out of date: only ever too low."""
    while options:
        known, node_id, worker = options[0]
        load = worker.load_with(shape)
        if load > known:
            heapreplace(options, (load, node_id, worker))
        elif worker.has_room(shape, load, prefetch_s, prefetch_max):
            return worker
        else:
            heappop(options)  # Room only shrinks while placing.
    return None


def misplaced(workers: Iterable[Worker]) -> Iterator[tuple[Worker, list[Task]]]:
    """Work that waits at one worker while another could begin it at once."""
    here = [worker for worker in workers if worker.may_take]
    idle = [worker for worker in here if len(worker.assigned) < worker.offer.slots]
    idle_slots = sum(worker.offer.slots - len(worker.assigned) for worker in idle)
    for worker in here:
        excess = len(worker.assigned) - worker.offer.slots
        if excess > 0 and idle_slots > 0:
            last = list(worker.assigned.values())[-excess:]
            tasks = [task for task in last if _is_sooner_elsewhere(task, idle)][-idle_slots:]
            idle_slots -= len(tasks)
            if tasks:
                yield worker, tasks


def _is_sooner_elsewhere(task: Task, idle: list[Worker]) -> bool:
    shape = task.shape
    assert shape is not None
    return (
        task.state is TaskState.ASSIGNED
        and not task.is_recalled
        and (shape.mean_s or 0.0) >= RECALL_TASK_S_MIN
        and any(worker.could_run(shape) and worker.load_with(shape) <= 1 for worker in idle)
    )
