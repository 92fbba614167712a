"""Ready tasks: grouped by shape, and within a shape ordered by priority (higher first), then age.

Tasks of one shape fit the same workers, so that placement asks once a shape and not once a task.

Of each shape only the head is in memory, so that a million tasks that wait take little more than their ids. What comes
after it is spilled: tasks stay in memory until their rows are durable, then they are on the disk alone. When the head
gets short, the next page comes back from there.

    head (a heap of tasks)  <  coming (being read)  <  spilled (tasks, not durable yet), cold (on the disk alone)

Age is when a task was submitted, then its id: an entry of both says it in an order of bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush, nsmallest

from taskd.core.backlog import ENTRY_BYTES, due_of, entry_of
from taskd.core.constraints import Constraint, parse
from taskd.core.packed import PackedSet, take_first
from taskd.core.task import Task, TaskSpec

Rank = tuple[int, bytes]  # (-priority, entry): smaller goes first.

PAGE_TASKS = 1024  # Read from the disk at once, at most: whoever takes them in holds up the event loop for some 4 ms.
GARBAGE_MIN = 64  # Places in a heap of tasks that were taken out: fewer are not worth clearing away.
SHAPES_KEPT = 1024  # At least, before those with nothing waiting are forgotten, with what was learned of durations.


class Shape:
    """What a worker must have to run a task: the type, amounts of resources, and constraints on its labels. With it the
    tasks that wait for such a worker."""

    __slots__ = (
        "_cold", "_coming", "_heap", "_limit", "_spilled", "_waiting", "_window", "constraints", "mean_s", "needs",
        "takes_share", "type",
    )  # fmt: skip

    def __init__(self, spec: TaskSpec, window: int) -> None:
        self.type = spec.type
        self.needs = tuple((name, amount) for name, amount in sorted(spec.resources.items()) if amount > 0)
        self.takes_share = all(name != "cpus" for name, _ in self.needs)  # of cpus: it asks for none
        self.constraints: tuple[Constraint, ...] = tuple(parse(text) for text in spec.constraints)
        self.mean_s: float | None = None  # how long its tasks ran lately; None while unknown
        self._window = window
        self._heap: list[Rank] = []
        self._waiting: dict[bytes, Task] = {}  # the head, by entry
        self._limit: Rank | None = None  # of what is outside the head, nothing comes before this
        self._coming: dict[bytes, int] = {}  # being read: -priority by entry
        self._spilled: dict[bytes, Task] = {}  # by entry
        self._cold: dict[tuple[int, str], PackedSet] = {}  # entries by (-priority, queue); none is empty

    def __len__(self) -> int:
        """All that wait."""
        return len(self._waiting) + self.count_outside

    @property
    def count_outside(self) -> int:
        """Of those that wait, the ones that are not in the head."""
        return len(self._coming) + len(self._spilled) + sum(map(len, self._cold.values()))

    @property
    def is_ready(self) -> bool:
        """Whether a task can be taken now."""
        return bool(self._waiting)

    @property
    def is_hungry(self) -> bool:
        """Whether the head is short, and there is more."""
        return self._limit is not None and not self._coming and len(self._waiting) <= self._window // 4

    @property
    def has_spilled(self) -> bool:
        """Whether tasks in memory could be on the disk alone."""
        return bool(self._spilled)

    def head(self) -> Rank | None:
        """The rank of the task that goes first, or None where none is ready."""
        heap = self._heap
        while heap and heap[0][1] not in self._waiting:
            heappop(heap)  # Taken out in the meantime.
        return heap[0] if heap else None

    def pop(self) -> Task:
        """Remove and return the task that goes first. There must be one."""
        rank = self.head()
        assert rank is not None
        heappop(self._heap)
        return self._waiting.pop(rank[1])

    def push(self, task: Task) -> None:
        rank = rank_of(task)
        if self._limit is not None and rank > self._limit:
            self._spilled[rank[1]] = task
            return
        heappush(self._heap, rank)
        self._waiting[rank[1]] = task
        if len(self._waiting) > self._window:
            self._spill()

    def remove(self, task: Task) -> None:
        """Take a task out that waits here, in memory."""
        entry = rank_of(task)[1]
        if self._spilled.pop(entry, None) is not None:
            return
        del self._waiting[entry]
        # Its place in the heap stays until it comes up, or such places outnumber the others.
        if len(self._heap) > GARBAGE_MIN + 2 * len(self._waiting):
            self._heap = [rank for rank in self._heap if rank[1] in self._waiting]
            heapify(self._heap)

    # -- Outside the head ----------------------------------------------------------------------------------------------

    def _spill(self) -> None:
        """Keep half of the head."""
        ranks = sorted({rank for rank in self._heap if rank[1] in self._waiting})
        keep = max(1, self._window // 2)
        self._heap = ranks[:keep]
        for _, entry in ranks[keep:]:
            self._spilled[entry] = self._waiting.pop(entry)
        self._limit = ranks[keep]

    def chill(self, is_durable: Callable[[bytes], bool]) -> list[Task]:
        """Let go of spilled tasks that are on the disk; returns them."""
        chilled = {entry: task for entry, task in self._spilled.items() if is_durable(task.id)}
        for entry, task in chilled.items():
            del self._spilled[entry]
            self._cold_of(-task.spec.priority, task.spec.queue).add(entry)
        return list(chilled.values())

    def load(self, priority: int, queue: str, entries: bytes) -> None:
        """Have many tasks that are on the disk alone."""
        cold = self._cold_of(-priority, queue)
        cold.extend(entries)
        first = cold.first()
        if first is not None and (self._limit is None or (-priority, first) < self._limit):
            self._limit = (-priority, first)

    def _cold_of(self, minus_priority: int, queue: str) -> PackedSet:
        cold = self._cold.get((minus_priority, queue))
        if cold is None:
            cold = self._cold[minus_priority, queue] = PackedSet(ENTRY_BYTES)
        return cold

    def warm(self, spec: TaskSpec, task_id: bytes) -> bool:
        """A task is wanted in memory; False where it was not on the disk alone."""
        entry = entry_of(spec.submitted_s, task_id)
        if self._coming.pop(entry, None) is not None:
            if not self._coming:
                self._come_back()
            return True
        group = (-spec.priority, spec.queue)
        cold = self._cold.get(group)
        if cold is None or not cold.discard(entry):
            return False
        if not len(cold):
            del self._cold[group]
        return True

    def next_page(self, count_max: int) -> list[bytes]:
        """The entries of tasks that are to be read, for `arrived`; none where the next ones were in memory yet."""
        bound = self._first_spilled() if self._spilled else None
        self._coming = take_first(self._cold, min(max(1, self._window // 2), count_max), bound)
        if not self._coming:
            self._come_back()
            return []
        first, minus_priority = next(iter(self._coming.items()))
        self._limit = (minus_priority, first)
        return list(self._coming)

    def arrived(self, page: list[bytes], tasks: list[Task]) -> list[Task]:
        """A page was read; returns those of its tasks that are wanted still."""
        came = []
        for task in tasks:
            rank = rank_of(task)
            if self._coming.pop(rank[1], None) is not None:
                heappush(self._heap, rank)
                self._waiting[rank[1]] = task
                came.append(task)
        for entry in page:
            self._coming.pop(entry, None)
        if not self._coming:
            self._come_back()
        return came

    def _first_cold(self) -> Rank:
        return min((group[0], cold.first() or b"") for group, cold in self._cold.items())

    def _first_spilled(self) -> Rank:
        return min(map(rank_of, self._spilled.values()))

    def _come_back(self) -> None:
        """Nothing is coming: spilled tasks whose turn it is join the head again."""
        bound = self._first_cold() if self._cold else None
        ranks = nsmallest(max(1, self._window // 2), map(rank_of, self._spilled.values())) if self._spilled else []
        for rank in ranks:
            if bound is not None and rank > bound:
                break
            self._waiting[rank[1]] = self._spilled.pop(rank[1])
            heappush(self._heap, rank)
        if self._spilled:
            spilled = self._first_spilled()
            bound = spilled if bound is None else min(bound, spilled)
        self._limit = bound

    # -- Asking --------------------------------------------------------------------------------------------------------

    def count_before(self, rank: Rank) -> int:
        """How many of those that wait go before this rank. Takes time in proportion to those in memory."""
        waiting = self._waiting
        count = sum(1 for other in {other for other in self._heap if other < rank} if other[1] in waiting)
        count += sum(1 for task in self._spilled.values() if rank_of(task) < rank)
        count += sum(1 for entry, first in self._coming.items() if (first, entry) < rank)
        for (first, _), cold in self._cold.items():
            count += len(cold) if first < rank[0] else cold.count_below(rank[1]) if first == rank[0] else 0
        return count

    def oldest(self) -> Iterator[tuple[str, bytes]]:
        """By queue the entry of an oldest task, some queues several times."""
        for tasks in (self._waiting, self._spilled):
            oldest: dict[str, bytes] = {}
            for entry, task in tasks.items():
                queue = task.spec.queue
                if queue not in oldest or entry < oldest[queue]:
                    oldest[queue] = entry
            yield from oldest.items()
        for (_, queue), cold in self._cold.items():
            yield queue, cold.first() or b""

    def ran(self, duration_s: float) -> None:
        """Learn how long its tasks run: a moving mean, quick to follow at first."""
        self.mean_s = duration_s if self.mean_s is None else self.mean_s + (duration_s - self.mean_s) * 0.1


class ReadyQueue:
    """All tasks that could run now if a worker had room.

    Shapes that have tasks ready are fresh, or stuck: no worker has room for them that has not got more since. So a
    long queue in front of busy workers costs nothing but what changes. `window`: tasks in memory at most, by shape.
    """

    def __init__(self, window: int) -> None:
        self.fresh: dict[Shape, None] = {}
        self.stuck: dict[Shape, None] = {}
        self.hungry: dict[Shape, None] = {}  # their next pages are wanted
        self.spilling: dict[Shape, None] = {}  # they have tasks in memory that could be on the disk alone
        self._window = window
        self._shapes: dict[tuple[object, ...] | str, Shape] = {}
        self._shapes_max = SHAPES_KEPT
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def shape_of(self, spec: TaskSpec) -> Shape:
        """The shape that a spec has, the same object for equal ones. Raises ValueError for a damaged constraint."""
        resources, constraints = spec.resources, spec.constraints
        # Most tasks ask for nothing special: their type alone says it.
        key = (spec.type, constraints, *resources.items()) if resources or constraints else spec.type
        shape = self._shapes.get(key)
        if shape is None:
            if len(self._shapes) >= self._shapes_max:
                self._shapes = {key: shape for key, shape in self._shapes.items() if len(shape)}
                self._shapes_max = max(SHAPES_KEPT, 2 * len(self._shapes))
            shape = self._shapes[key] = Shape(spec, self._window)
        return shape

    def push(self, task: Task) -> Shape:
        """Add a ready task; returns its shape."""
        shape = task.shape
        # A shape that was empty for long may have been forgotten meanwhile: ask again by the spec.
        if shape is None or not (shape.is_ready or len(shape)):
            shape = task.shape = self.shape_of(task.spec)
        shape.push(task)
        self._count += 1
        self._look_at(shape)
        return shape

    def pop(self, shape: Shape) -> Task:
        """Remove and return the first task of a shape."""
        task = shape.pop()
        self._count -= 1
        if not shape.is_ready or shape.is_hungry:
            self._look_at(shape)
        return task

    def remove(self, task: Task) -> None:
        """Take out a task that waits, in memory."""
        assert task.shape is not None
        task.shape.remove(task)
        self._count -= 1
        self._look_at(task.shape)

    def _look_at(self, shape: Shape) -> None:
        """Something was put into a shape, or taken out."""
        if not shape.is_ready:
            self.fresh.pop(shape, None)
            self.stuck.pop(shape, None)
        elif shape not in self.fresh and shape not in self.stuck:
            self.fresh[shape] = None
        if shape.is_hungry:
            self.hungry[shape] = None
        if shape.has_spilled:
            self.spilling[shape] = None

    # -- On the disk alone ---------------------------------------------------------------------------------------------

    def load(self, spec: TaskSpec, entries: bytes) -> None:
        """Have many tasks of one shape, priority and queue that are on the disk alone."""
        shape = self.shape_of(spec)
        shape.load(spec.priority, spec.queue, entries)
        self._count += len(entries) // ENTRY_BYTES
        self._look_at(shape)

    def chill(self, is_durable: Callable[[bytes], bool]) -> list[Task]:
        """Let go of spilled tasks that are on the disk; returns them."""
        spilling, self.spilling = self.spilling, {}
        chilled = [task for shape in spilling for task in shape.chill(is_durable)]
        self.spilling.update((shape, None) for shape in spilling if shape.has_spilled)
        return chilled

    def warm(self, spec: TaskSpec, task_id: bytes) -> bool:
        """A task is wanted in memory, and taken out of what waits; False where it was not on the disk alone."""
        shape = self.shape_of(spec)
        if not shape.warm(spec, task_id):
            return False
        self._count -= 1
        self._look_at(shape)
        return True

    def next_pages(self, count_max: int) -> list[tuple[Shape, list[bytes]]]:
        """The entries of tasks that are to be read, by shape, for `arrived`: at most so many in all. Shapes for which
        there was no room stay hungry."""
        pages = []
        while self.hungry and count_max:
            shape = next(iter(self.hungry))
            del self.hungry[shape]
            page = shape.next_page(count_max) if shape.is_hungry else []
            if page:
                pages.append((shape, page))
                count_max -= len(page)
            self._look_at(shape)
        return pages

    def arrived(self, shape: Shape, page: list[bytes], tasks: list[Task]) -> list[Task]:
        """A page was read; returns those of its tasks that are wanted still."""
        for task in tasks:
            task.shape = shape
        came = shape.arrived(page, tasks)
        self._look_at(shape)
        return came

    def oldest_s(self) -> dict[str, float]:
        """By queue when the oldest task that waits was submitted, UTC."""
        oldest: dict[str, float] = {}
        for shape in self._shapes.values():
            for queue, entry in shape.oldest():
                submitted_s = due_of(entry)[0]
                oldest[queue] = min(submitted_s, oldest.get(queue, submitted_s))
        return oldest

    # -- Room ----------------------------------------------------------------------------------------------------------

    def found_no_room(self, shape: Shape) -> None:
        """All workers were asked in vain: from now on only those that get more room need be asked."""
        if self.fresh.pop(shape, self) is None:
            self.stuck[shape] = None

    def ask_all_again(self) -> None:
        """What counts as room has changed."""
        self.fresh |= self.stuck
        self.stuck.clear()

    def position(self, task: Task, counts: Callable[[Shape], bool]) -> int:
        """How many ready tasks come before this one, of the shapes that count."""
        rank = rank_of(task)
        return sum(shape.count_before(rank) for shape in self._shapes.values() if counts(shape))


def rank_of(task: Task) -> Rank:
    """What the queue orders by."""
    return (-task.spec.priority, entry_of(task.spec.submitted_s, task.id))
