"""The leader's view of workers: who is here, what they run, what is free."""

from __future__ import annotations

from collections.abc import Iterator

from taskd.core.constraints import matches

from taskd.core.queue import Shape
from taskd.core.task import NodeRow, Task
from taskd.protocol.messages import NodeInfo, Offer

NOTHING_OFFERED = Offer(0, {}, {}, ())

# A task that runs longer than this gains nothing from waiting at a worker: the way there takes about a millisecond.
PREFETCH_TASK_S_MAX = 1.0


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
        self._could: dict[int, tuple[Shape, bool]] = {}

    def takes(self, offer: Offer) -> None:
        """Learn what it offers, newly or changed."""
        self.offer = offer
        self.types = frozenset(offer.types) | {handler.type for handler in offer.handlers}
        self._could.clear()

    def could_run(self, shape: Shape) -> bool:
        """Whether it could run tasks of this shape when idle."""
        known = self._could.get(id(shape))
        if known is not None and known[0] is shape:
            return known[1]
        verdict = (
            shape.type in self.types
            and self.offer.slots > 0
            and all(self.offer.capacity.get(name, 0) >= amount for name, amount in shape.needs.items())
            and all(matches(constraint, self.offer.labels) for constraint in shape.constraints)
        )
        if len(self._could) > 4096:
            self._could.clear()
        self._could[id(shape)] = (shape, verdict)
        return verdict

    @property
    def may_take(self) -> bool:
        """Whether it may be given tasks at all."""
        return self.is_here and self.drain_reason is None

    def has_room(self, shape: Shape, prefetch_s: float, prefetch_max: int) -> bool:
        """Whether it may be given one more task of this shape now: to run, or to wait there for a moment."""
        count, slots = len(self.assigned), self.offer.slots
        if count < slots and self._fits(shape):
            return True
        return count < slots + self._prefetch(shape, prefetch_s, prefetch_max)

    def _fits(self, shape: Shape) -> bool:
        used, capacity = self.used, self.offer.capacity
        share = 0 if "cpus" in shape.needs else self._share()
        if share and used.get("cpus", 0) + share > capacity.get("cpus", 0):
            return False
        return all(used.get(name, 0) + amount <= capacity.get(name, 0) for name, amount in shape.needs.items())

    def _share(self) -> int:
        """What a task that asks for no cpus is counted with: one slot's part of them."""
        return self.offer.capacity.get("cpus", 0) // max(self.offer.slots, 1)

    def _prefetch(self, shape: Shape, prefetch_s: float, prefetch_max: int) -> int:
        """How many tasks may wait at the worker: about `prefetch_s` of its work, so that results on their way to the
        leader leave no slot idle; none while the duration is unknown or long, so that no other worker idles."""
        mean_s = shape.mean_s
        if mean_s is None or mean_s > PREFETCH_TASK_S_MAX:
            return 0
        per_slot = int(prefetch_s / mean_s) if mean_s * prefetch_max > prefetch_s else prefetch_max
        return self.offer.slots * max(per_slot, 1)

    def give(self, task: Task, shape: Shape) -> None:
        """Count an attempt as given to it."""
        self.assigned[task.id] = task
        for name, amount in self._amounts(shape):
            self.used[name] = self.used.get(name, 0) + amount

    def release(self, task: Task) -> None:
        """Count an attempt as gone from it."""
        if self.assigned.pop(task.id, None) is None:
            return
        assert task.shape is not None
        if not self.assigned:
            self.used.clear()  # Offers may have changed since: an idle worker uses nothing.
            return
        for name, amount in self._amounts(task.shape):
            self.used[name] = max(0, self.used.get(name, 0) - amount)

    def _amounts(self, shape: Shape) -> Iterator[tuple[str, int]]:
        yield from shape.needs.items()
        if "cpus" not in shape.needs:
            yield "cpus", self._share()

    @property
    def load(self) -> float:
        """Attempts given per slot."""
        return len(self.assigned) / max(self.offer.slots, 1)


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
