"""Which worker gets which task: plain functions over the ready queue and the roster.

The best task by priority and age goes first; it goes to the worker that would be least loaded with it, by whatever is
scarcest there, so that it waits nowhere while another worker could begin it.
A task that fits nowhere now does not hold back those of other shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heapreplace
from math import inf

from taskd.core.queue import Rank, ReadyQueue, Shape
from taskd.core.roster import Roster, Worker, load_max
from taskd.core.task import ASSIGNED, Task

RECALL_TASK_S_MIN = 0.02  # Shorter tasks are done sooner where they are than they could be fetched back.
# Unless they wait for so long already: behind one that takes far longer than others of its shape.
RECALL_WAITED_S = 1.0

Options = list[tuple[float, int, Worker]]  # A heap of workers by the load that they would have with one task more.


class _Group:
    """Workers that are asked for the same shapes. Of many shapes most are passed over by what is known of all these
    workers together: with a thousand shapes in the queue each worker is not asked a thousand times."""

    __slots__ = ("_lightest", "workers")

    def __init__(self, workers: list[Worker]) -> None:
        self.workers = workers
        self._lightest: Options = [(it.load_at_least, it.node_id, it) for it in workers if it.offer.slots]
        heapify(self._lightest)

    def options(self, shape: Shape) -> Options:
        """Those that could run tasks of this shape."""
        options = [(it.load_with(shape), it.node_id, it) for it in self.workers if it.could_run(shape)]
        heapify(options)
        return options

    def load_at_least(self) -> float:
        """With a task more, whatever it needs, none of them would have less."""
        lightest = self._lightest
        while lightest:
            known, node_id, worker = lightest[0]
            load = worker.load_at_least
            if load == known:
                return load
            heapreplace(lightest, (load, node_id, worker))
        return inf


def place(queue: ReadyQueue, roster: Roster, prefetch_s: float, prefetch_max: int) -> Iterator[tuple[Task, Worker]]:
    """Take tasks from the queue and yield each with its worker, already counted there, until nothing more fits."""
    grown = [worker for worker in roster.take_grown() if worker.may_take]
    everyone = [worker for worker in roster if worker.may_take] if queue.fresh else []
    groups = _Group(grown), _Group(everyone)
    heads: list[tuple[Rank, Shape, float, _Group]] = []
    for shapes, group in zip((queue.stuck if grown else (), queue.fresh), groups, strict=True):
        for shape in shapes:
            rank = shape.head()
            assert rank is not None
            heads.append((rank, shape, load_max(shape, prefetch_s, prefetch_max), group))
    heapify(heads)  # No two ranks are equal: each ends in the id of a task.
    most = max((limit for _, _, limit, _ in heads), default=0.0)
    asked: dict[Shape, Options] = {}
    while heads:
        _, shape, limit, group = heads[0]
        options = asked.get(shape)
        if options is None:
            if group.load_at_least() > limit:
                if all(each.load_at_least() > most for each in groups):
                    break  # Nobody has room for anything.
                options = []
            else:
                options = group.options(shape)
            asked[shape] = options
        worker = _least_loaded(options, shape, limit)
        if worker is None:
            queue.found_no_room(shape)
            heappop(heads)
            continue
        task = queue.pop(shape)
        worker.give(task, shape)
        yield task, worker
        rank = shape.head()
        if rank is None:
            heappop(heads)
        else:
            heapreplace(heads, (rank, shape, limit, group))
    for _, shape, _, _ in heads:
        queue.found_no_room(shape)


def _least_loaded(options: Options, shape: Shape, limit: float) -> Worker | None:
    """The worker of least load that has room. Loads in the heap may be out of date: only ever too low."""
    while options:
        known, node_id, worker = options[0]
        load = worker.load_with(shape)
        if load > known:
            heapreplace(options, (load, node_id, worker))
        elif worker.has_room(load, limit):
            return worker
        else:
            heappop(options)  # Room only shrinks while placing.
    return None


def misplaced(
    workers: Iterable[Worker], now_s: float, task_s_min: float = RECALL_TASK_S_MIN
) -> Iterator[tuple[Worker, list[Task]]]:
    """Work that waits at one worker while another could begin it at once: of shapes that take `task_s_min` or more on
    average, and what has waited for long."""
    idle: list[Worker] = []
    idle_slots = 0
    crowded: list[tuple[Worker, int]] = []
    for worker in workers:
        if worker.may_take:
            free = worker.offer.slots - len(worker.assigned)
            if free > 0:
                idle.append(worker)
                idle_slots += free
            elif free < 0:
                crowded.append((worker, -free))
    for worker, excess in crowded:
        if not idle_slots:
            return
        last = list(worker.assigned.values())[-excess:]
        waiting = [task for task in last if task.state is ASSIGNED and not task.is_recalled]
        tasks = [task for task in waiting if _is_sooner_elsewhere(task, idle, now_s, task_s_min)][-idle_slots:]
        idle_slots -= len(tasks)
        if tasks:
            yield worker, tasks


def _is_sooner_elsewhere(task: Task, idle: list[Worker], now_s: float, task_s_min: float) -> bool:
    shape = task.shape
    assert shape is not None
    waited_s = now_s - task.record.attempts[-1].dispatched_s
    return ((shape.mean_s or 0.0) >= task_s_min or waited_s >= RECALL_WAITED_S) and any(
        worker.could_run(shape) and worker.load_with(shape) <= 1 for worker in idle
    )
