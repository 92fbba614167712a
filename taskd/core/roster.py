"""The leader's view of workers: who is here, what they run, what is free."""

from __future__ import annotations

from collections.abc import Iterator

from taskd.core.constraints import matches
from taskd.core.queue import Shape
from taskd.core.task import ASSIGNED, Task
from taskd.protocol.messages import AttemptKey, NodeInfo, NodeRow, Offer

NOTHING_OFFERED = Offer(0, {}, {}, ())

# A task that runs longer than this gains nothing from waiting at a worker: the way there takes about a millisecond.
PREFETCH_TASK_S_MAX = 1.0
ASSIGNED_MAX = 100_000  # At one worker, before more wait there: it names them all in one Register, in one frame.


class Worker:
    """One worker: what it offers and which attempts it was given and has not finished."""

    def __init__(self, node_id: int, name: str, grown: dict[int, Worker]) -> None:
        self.node_id = node_id
        self.name = name
        self.info: NodeInfo | None = None
        self.is_here = False  # registered on an open connection
        self.drain_reason: str | None = None  # None: may get tasks
        self.offer = NOTHING_OFFERED
        self.types: frozenset[str] = frozenset()
        self.assigned: dict[bytes, Task] = {}  # in the order given
        self.foreign: dict[AttemptKey, None] = {}  # what it holds for leaders whose rows are not here yet
        self.used: dict[str, int] = {}
        self.runs_sent = 0  # Run messages since it registered
        self.seen_s = 0.0  # UTC, when it was last here
        self._share = 0  # what a task that asks for no cpus is counted with: one slot's part of them
        self._grown = grown  # of the roster

    def arrives(self, info: NodeInfo, offer: Offer, now_s: float) -> None:
        """It registers, on a new connection or again."""
        self.info, self.name = info, info.name
        self.is_here, self.runs_sent, self.seen_s = True, 0, now_s
        self.takes(offer)

    def leaves(self, now_s: float) -> None:
        """Its connection is gone. What it was given stays counted until that is known to be lost."""
        self.is_here, self.seen_s = False, now_s

    def drain(self, reason: str | None) -> None:
        """Give it nothing new, for this reason; None: use it again."""
        self.drain_reason = reason
        self._grown[self.node_id] = self

    def takes(self, offer: Offer) -> None:
        """Learn what it offers, newly or changed. What it has is counted anew: shares may be others now."""
        self.offer = offer
        self._grown[self.node_id] = self
        self.types = frozenset(offer.types) | {handler.type for handler in offer.handlers}
        self._share = offer.capacity.get("cpus", 0) // max(offer.slots, 1)
        self.used.clear()
        for task in self.assigned.values():
            assert task.shape is not None
            self._count(task.shape, 1)

    def could_run(self, shape: Shape) -> bool:
        """Whether it could run tasks of this shape when idle."""
        offer = self.offer
        if shape.type not in self.types or not offer.slots:
            return False
        for name, amount in shape.needs:
            if offer.capacity.get(name, 0) < amount:
                return False
        return not shape.constraints or all(matches(constraint, offer.labels) for constraint in shape.constraints)

    @property
    def may_take(self) -> bool:
        """Whether it may be given tasks at all."""
        return self.is_here and self.drain_reason is None

    @property
    def not_begun(self) -> list[Task]:
        """What it was given and has not begun, as far as we have heard."""
        return [task for task in self.assigned.values() if task.state is ASSIGNED]

    def load_with(self, shape: Shape) -> float:
        """How full it would be with one more task of this shape, by what it would have least of: slots, or anything
        that the task needs. Above 1 the task would have to wait there. Only for a shape that it could run."""
        used, offer = self.used, self.offer
        load = (len(self.assigned) + 1) / offer.slots
        if shape.takes_share and self._share:
            load = max(load, (used.get("cpus", 0) + self._share) / offer.capacity["cpus"])
        for name, amount in shape.needs:
            load = max(load, (used.get(name, 0) + amount) / offer.capacity[name])
        return load

    @property
    def load_at_least(self) -> float:
        """What `load_with` does not fall below, whatever the shape. Only where it offers slots."""
        return (len(self.assigned) + 1) / self.offer.slots

    def has_room(self, load: float, limit: float) -> bool:
        """Whether it may be given one more task, with which its load would be `load`, where `limit` is its shape's
        `load_max`."""
        return load <= 1 or (load <= limit and len(self.assigned) < ASSIGNED_MAX)

    def give(self, task: Task, shape: Shape) -> None:
        """Count an attempt as given to it."""
        self.assigned[task.id] = task
        self._count(shape, 1)

    def release(self, task: Task) -> None:
        """Count an attempt as gone from it."""
        if self.assigned.pop(task.id, None) is not None:
            assert task.shape is not None
            self._count(task.shape, -1)
            self._grown[self.node_id] = self

    def _count(self, shape: Shape, sign: int) -> None:
        used = self.used
        if shape.takes_share:
            used["cpus"] = used.get("cpus", 0) + sign * self._share
        for name, amount in shape.needs:
            used[name] = used.get(name, 0) + sign * amount


def load_max(shape: Shape, prefetch_s: float, prefetch_max: int) -> float:
    """The load up to which a worker may be given tasks of this shape: 1, where all begin at once, and what may wait
    there behind each that runs. That is about `prefetch_s` of work, so that results on their way to the leader leave no
    slot idle; nothing while the duration is unknown or long, so that no other worker idles."""
    mean_s = shape.mean_s
    if mean_s is None or mean_s > PREFETCH_TASK_S_MAX:
        return 1
    return 1 + (max(int(prefetch_s / mean_s), 1) if mean_s * prefetch_max > prefetch_s else prefetch_max)


class Roster:
    """All workers that the leader knows, by node id."""

    def __init__(self) -> None:
        self._workers: dict[int, Worker] = {}
        self._grown: dict[int, Worker] = {}  # that may have more room than when they were last asked

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
            worker = self._workers[node_id] = Worker(node_id, name or str(node_id), self._grown)
        return worker

    def take_grown(self) -> list[Worker]:
        """The workers that may have more room than when this was last called."""
        grown = list(self._grown.values())
        self._grown.clear()
        return grown

    def load_row(self, row: NodeRow) -> None:
        """Remember a worker from before the restart."""
        worker = self.known(row.node_id, row.name)
        worker.drain_reason = row.drain_reason
        worker.seen_s = row.seen_s
