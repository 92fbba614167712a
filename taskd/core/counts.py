"""How many tasks are unfinished, by queue and state: counted as they move, for to look at millions takes too long."""

from __future__ import annotations

from taskd.core.task import TaskState

QUEUES_KEPT = 1024  # At least, before those that are empty are forgotten.

OfQueue = list[int]  # by state


class Counts:
    """Of one reign."""

    def __init__(self) -> None:
        self.total = 0
        self._queues: dict[str, OfQueue] = {}
        self._queues_max = QUEUES_KEPT

    def add(self, state: TaskState, queue: str, number: int = 1) -> None:
        """Count tasks in, or with a negative number out."""
        self.of(queue)[state] += number
        self.total += number

    def of(self, queue: str) -> OfQueue:
        """The counts of a queue by state, to be changed by whoever moves a task from one state to another."""
        found = self._queues.get(queue)
        if found is None:
            if len(self._queues) >= self._queues_max:
                self._queues = {name: counts for name, counts in self._queues.items() if any(counts)}
                self._queues_max = max(QUEUES_KEPT, 2 * len(self._queues))
            found = self._queues[queue] = [0] * (max(TaskState) + 1)
        return found

    def as_dict(self) -> dict[tuple[TaskState, str], int]:
        """What is not zero, by state and queue."""
        return {
            (TaskState(state), queue): count
            for queue, counts in self._queues.items()
            for state, count in enumerate(counts)
            if count
        }
