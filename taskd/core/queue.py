"""Ready tasks: grouped by shape, and within a shape ordered by priority (higher first), then age.

Tasks of one shape fit the same workers, so that placement asks once a shape and not once a task.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from taskd.core.constraints import Constraint, parse
from taskd.core.task import Task, TaskSpec

Rank = tuple[int, float, bytes]  # (-priority, submitted, id): smaller goes first.

GARBAGE_MIN = 64  # Places in a heap of tasks that were taken out: fewer are not worth clearing away.
SHAPES_KEPT = 1024  # At least, before those with nothing waiting are forgotten, with what was learned of durations.


class Shape:
    """What a worker must have to run a task: the type, amounts of resources, and constraints on its labels."""

    __slots__ = ("_heap", "_waiting", "constraints", "mean_s", "needs", "takes_share", "type")

    def __init__(self, spec: TaskSpec) -> None:
        self.type = spec.type
        self.needs = tuple((name, amount) for name, amount in sorted(spec.resources.items()) if amount > 0)
        self.takes_share = all(name != "cpus" for name, _ in self.needs)  # of cpus: it asks for none
        self.constraints: tuple[Constraint, ...] = tuple(parse(text) for text in spec.constraints)
        self.mean_s: float | None = None  # how long its tasks ran lately; None while unknown
        self._heap: list[Rank] = []
        self._waiting: dict[bytes, Task] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def head(self) -> Rank | None:
        """The rank of the task that goes first, or None where none waits."""
        heap = self._heap
        while heap and heap[0][2] not in self._waiting:
            heappop(heap)  # Taken out in the meantime.
        return heap[0] if heap else None

    def pop(self) -> Task:
        """Remove and return the task that goes first. There must be one."""
        rank = self.head()
        assert rank is not None
        heappop(self._heap)
        return self._waiting.pop(rank[2])

    def push(self, task: Task) -> None:
        heappush(self._heap, rank_of(task))
        self._waiting[task.id] = task

    def remove(self, task: Task) -> None:
        """Take a task out that waits here. It must not be put in again."""
        del self._waiting[task.id]
        # Its place in the heap stays until it comes up, or such places outnumber the others.
        if len(self._heap) > GARBAGE_MIN + 2 * len(self._waiting):
            self._heap = [rank for rank in self._heap if rank[2] in self._waiting]
            heapify(self._heap)

    def count_before(self, rank: Rank) -> int:
        """How many of those that wait go before this rank. Takes time in proportion to all that wait."""
        waiting = self._waiting
        return sum(1 for other in self._heap if other < rank and other[2] in waiting)

    def ran(self, duration_s: float) -> None:
        """Learn how long its tasks run: a moving mean, quick to follow at first."""
        self.mean_s = duration_s if self.mean_s is None else self.mean_s + (duration_s - self.mean_s) * 0.1


class ReadyQueue:
    """All tasks that could run now if a worker had room.

    Shapes that have tasks waiting are fresh, or stuck: no worker has room for them that has not got more since. So a
    long queue in front of busy workers costs nothing but what changes.
    """

    def __init__(self) -> None:
        self.fresh: dict[Shape, None] = {}
        self.stuck: dict[Shape, None] = {}
        self._shapes: dict[tuple[object, ...], Shape] = {}
        self._shapes_max = SHAPES_KEPT
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def shape_of(self, spec: TaskSpec) -> Shape:
        """The shape that a spec has, the same object for equal ones. Raises ValueError for a damaged constraint."""
        key = (spec.type, spec.constraints, *spec.resources.items())
        shape = self._shapes.get(key)
        if shape is None:
            if len(self._shapes) >= self._shapes_max:
                self._shapes = {key: shape for key, shape in self._shapes.items() if len(shape)}
                self._shapes_max = max(SHAPES_KEPT, 2 * len(self._shapes))
            shape = self._shapes[key] = Shape(spec)
        return shape

    def push(self, task: Task) -> Shape:
        """Add a ready task; returns its shape."""
        shape = task.shape
        # A shape that was empty for long may have been forgotten meanwhile: ask again by the spec.
        if shape is None or not len(shape):
            shape = task.shape = self.shape_of(task.spec)
            if not len(shape):
                self.fresh[shape] = None
        shape.push(task)
        self._count += 1
        return shape

    def pop(self, shape: Shape) -> Task:
        """Remove and return the first task of a shape."""
        task = shape.pop()
        self._took_from(shape)
        return task

    def remove(self, task: Task) -> None:
        """Take out a task that waits."""
        assert task.shape is not None
        task.shape.remove(task)
        self._took_from(task.shape)

    def _took_from(self, shape: Shape) -> None:
        self._count -= 1
        if not len(shape):
            self.fresh.pop(shape, None)
            self.stuck.pop(shape, None)

    def found_no_room(self, shape: Shape) -> None:
        """All workers were asked in vain: from now on only those that get more room need be asked."""
        if self.fresh.pop(shape, self) is None:
            self.stuck[shape] = None

    def ask_all_again(self) -> None:
        """What counts as room has changed."""
        self.fresh |= self.stuck
        self.stuck.clear()

    def position(self, task: Task) -> int:
        """How many ready tasks of any shape come before this one."""
        rank = rank_of(task)
        return sum(shape.count_before(rank) for shapes in (self.fresh, self.stuck) for shape in shapes)


def rank_of(task: Task) -> Rank:
    """What the queue orders by."""
    return (-task.spec.priority, task.spec.submitted_s, task.id)
