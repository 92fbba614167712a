"""The leader's view of workers: who is here, what they run, what is free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from taskd.core.constraints import matches
from taskd.core.queue import Shape
from taskd.core.task import NodeRow, Task, TaskState
from taskd.protocol.messages import NodeInfo, Offer

NOTHING_OFFERED = Offer(0, {}, {}, ())

# A task that runs longer than this gains nothing from waiting at a worker: the way there takes about a millisecond.
PREFETCH_TASK_S_MAX = 1.0
PREFETCHED_MAX = 100_000  # At one worker: it names them all in one Register, which has to fit a frame.

FITS_KEPT = 4096  # Shapes for which a worker remembers what they are to it.


class _Fit(NamedTuple):
    """What a shape is to a worker: whether it could run it, and what one task of it takes there."""

    could: bool
    amounts: tuple[tuple[str, int], ...]


class Worker:
    """One worker: what it offers and which attempts it was given and has not finished."""

    def __init__(self, node_id: int, name: str, drain_reason: str | None = None) -> None:
        self.node_id = node_id
        self.name = name
        self.info: NodeInfo | None = None
        self.is_here = False  # registered on an open connection
        self.drain_reason = drain_reason  # None: may get tasks
        self.offer = NOTHING_OFFERED
        self.types: frozenset[str] = frozenset()
        self.assigned: dict[bytes, Task] = {}  # in the order given
        self.used: dict[str, int] = {}
        self.runs_sent = 0  # Run messages since it registered
        self.seen_s = 0.0  # UTC, when it was last here
        self._fits: dict[Shape, _Fit] = {}

    def takes(self, offer: Offer) -> None:
        """Learn what it offers, newly or changed. What it has is counted anew: shares may be others now."""
        self.offer = offer
        self.types = frozenset(offer.types) | {handler.type for handler in offer.handlers}
        self._fits.clear()
        self.used.clear()
        for task in self.assigned.values():
            assert task.shape is not None
            self._count(task.shape, 1)

    def could_run(self, shape: Shape) -> bool:
        """Whether it could run tasks of this shape when idle."""
        return self._fit(shape).could

    def _fit(self, shape: Shape) -> _Fit:
        fit = self._fits.get(shape)
        if fit is None:
            if len(self._fits) >= FITS_KEPT:
                self._fits.clear()
            fit = self._fits[shape] = self._ask(shape)
        return fit

    def _ask(self, shape: Shape) -> _Fit:
        capacity, needs = self.offer.capacity, shape.needs
        could = (
            shape.type in self.types
            and self.offer.slots > 0
            and all(capacity.get(name, 0) >= amount for name, amount in needs.items())
            and all(matches(constraint, self.offer.labels) for constraint in shape.constraints)
        )
        # A task that asks for no cpus is counted with one slot's part of them.
        share = {} if "cpus" in needs else {"cpus": capacity.get("cpus", 0) // max(self.offer.slots, 1)}
        return _Fit(could, tuple((name, amount) for name, amount in {**needs, **share}.items() if amount))

    @property
    def may_take(self) -> bool:
        """Whether it may be given tasks at all."""
        return self.is_here and self.drain_reason is None

    @property
    def not_begun(self) -> list[Task]:
        """What it was given and has not begun, as far as we have heard."""
        return [task for task in self.assigned.values() if task.state is TaskState.ASSIGNED]

    def load_with(self, shape: Shape) -> float:
        """How full it would be with one more task of this shape, by what it would have least of: slots, or anything
        that the task needs. Above 1 the task would have to wait there."""
        offer, used = self.offer, self.used
        load = (len(self.assigned) + 1) / offer.slots
        for name, amount in self._fit(shape).amounts:
            load = max(load, (used.get(name, 0) + amount) / offer.capacity[name])
        return load

    def has_room(self, shape: Shape, load: float, prefetch_s: float, prefetch_max: int) -> bool:
        """Whether it may be given one more task of this shape, with which its load would be `load`: to begin at once,
        or to wait there for a moment."""
        return load <= 1 or len(self.assigned) < self.offer.slots + self._prefetch(shape, prefetch_s, prefetch_max)

    def _prefetch(self, shape: Shape, prefetch_s: float, prefetch_max: int) -> int:
        """How many tasks may wait at the worker: about `prefetch_s` of its work, so that results on their way to the
        leader leave no slot idle; none while the duration is unknown or long, so that no other worker idles."""
        mean_s = shape.mean_s
        if mean_s is None or mean_s > PREFETCH_TASK_S_MAX:
            return 0
        per_slot = max(int(prefetch_s / mean_s), 1) if mean_s * prefetch_max > prefetch_s else prefetch_max
        return min(self.offer.slots * per_slot, PREFETCHED_MAX)

    def give(self, task: Task, shape: Shape) -> None:
        """Count an attempt as given to it."""
        self.assigned[task.id] = task
        self._count(shape, 1)

    def release(self, task: Task) -> None:
        """Count an attempt as gone from it."""
        if self.assigned.pop(task.id, None) is not None:
            assert task.shape is not None
            self._count(task.shape, -1)

    def _count(self, shape: Shape, sign: int) -> None:
        used = self.used
        for name, amount in self._fit(shape).amounts:
            used[name] = used.get(name, 0) + sign * amount


class Roster:
    """All workers that the leader knows, by node id."""

    def __init__(self) -> None:
        self._workers: dict[int, Worker] = {}

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def __len__(self) -> int:
        return len(self._workers)

    def get(self, node_id: int) -> Worker | None:
        return self._workers.get(node_id)

    def known(self, node_id: int, name: str = "") -> Worker:
        """The worker of that id, newly noted where it was unknown."""
        worker = self._workers.get(node_id)
        if worker is None:
            worker = self._workers[node_id] = Worker(node_id, name or str(node_id))
        elif name:
            worker.name = name
        return worker

    def load_row(self, row: NodeRow) -> None:
        """Remember a worker from before the restart."""
        worker = self.known(row.node_id, row.name)
        worker.drain_reason = row.drain_reason
        worker.seen_s = row.seen_s
