"""When tasks are due: to be ready, or to have begun. What is far off may be known of tasks on the disk alone."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

from taskd.core.backlog import ENTRY_BYTES, due_of, entry_of
from taskd.core.deadlines import Deadlines, earliest
from taskd.core.packed import PackedSet


class Due(IntEnum):
    """What is due."""

    READY = 1  # a SCHEDULED or RETRYING task becomes ready
    TOO_LATE = 2  # the deadline to begin


READY, TOO_LATE = Due  # Looked up in an enumeration these would cost more than what is done with them.


class Calendar:
    """Times of tasks, UTC. Near ones are of tasks in memory, far ones of tasks that are not; once they are due, they
    are coming: their rows are read. `window`: near ones to be ready, about."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._near: dict[Due, Deadlines[bytes]] = {kind: Deadlines() for kind in Due}
        self._far: dict[Due, PackedSet] = {kind: PackedSet(ENTRY_BYTES) for kind in Due}
        self._coming: dict[tuple[Due, bytes], None] = {}

    @property
    def count_outside(self) -> int:
        """Times to be ready of tasks that are not in memory."""
        return len(self._far[READY]) + len(self._coming)

    @property
    def has_far(self) -> bool:
        """Whether something is known of tasks on the disk alone."""
        far = self._far
        return bool(far[READY]) or bool(far[TOO_LATE]) or bool(self._coming)

    # -- Of tasks in memory --------------------------------------------------------------------------------------------

    def set(self, kind: Due, task_id: bytes, due_s: float) -> None:
        """Set or move a time."""
        self._near[kind].set(task_id, due_s)

    def clear(self, kind: Due, task_id: bytes) -> None:
        """Forget a time, if there is one."""
        self._near[kind].clear(task_id)

    def next(self) -> float | None:
        """When something is due next."""
        near = self._near
        due_s = earliest(near[READY].next(), near[TOO_LATE].next())
        if self.has_far and not self._coming:
            due_s = earliest(due_s, *(due_of(entry)[0] for far in self._far.values() if (entry := far.first())))
        return due_s

    def pop_due(self, now_s: float) -> list[tuple[Due, bytes]]:
        """Remove and return what is due of tasks in memory: first those that become ready."""
        return [(kind, task_id) for kind, near in self._near.items() for task_id in near.pop_due(now_s)]

    # -- Of tasks on the disk alone ------------------------------------------------------------------------------------

    def load(self, kind: Due, entries: bytes) -> None:
        """Have many far times."""
        self._far[kind].extend(entries)

    @property
    def is_crowded(self) -> bool:
        """Whether tasks that wait for their time could be on the disk alone."""
        return len(self._near[READY]) > self._window

    def pop_far(self, may_chill: Callable[[bytes], bool]) -> list[bytes]:
        """Keep half as many times to be ready as near; returns the tasks whose times are far from now on."""
        if not self.is_crowded:
            return []
        near, far = self._near[READY], self._far[READY]
        chilled = []
        for task_id, due_s in near.latest(len(near) - self._window // 2):
            if may_chill(task_id):
                near.clear(task_id)
                far.add(entry_of(due_s, task_id))
                self.chill(task_id)
                chilled.append(task_id)
        return chilled

    def chill(self, task_id: bytes) -> None:
        """A task is on the disk alone from now on: its deadline is far."""
        due_s = self._near[TOO_LATE].get(task_id)
        if due_s is not None:
            self._near[TOO_LATE].clear(task_id)
            self._far[TOO_LATE].add(entry_of(due_s, task_id))

    def warm(self, kind: Due, task_id: bytes, due_s: float) -> bool:
        """A task is wanted in memory: forget its far time; whether there was one."""
        return self.came(kind, task_id) or self._far[kind].discard(entry_of(due_s, task_id))

    def take_far(self, now_s: float) -> list[tuple[Due, bytes]]:
        """What is due of tasks on the disk alone, to be read; nothing while some are being read."""
        if self._coming:
            return []
        for kind, far in self._far.items():
            first = far.first()
            if first is None or due_of(first)[0] > now_s:
                continue
            for entry in far.peek(max(1, self._window // 2)):
                due_s, task_id = due_of(entry)
                if due_s > now_s:
                    break
                self._coming[kind, task_id] = None
            far.take(sum(1 for it, _ in self._coming if it is kind))
        return list(self._coming)

    def came(self, kind: Due, task_id: bytes) -> bool:
        """A task is no longer being read; whether it was."""
        return self._coming.pop((kind, task_id), self) is None
