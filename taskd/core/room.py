"""What a worker has room for: attempts that wait, in order, and which of them fit beside what runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from math import ceil

from msgspec import Struct

from taskd.core.task import TaskSpec
from taskd.protocol.messages import AttemptKey, Offer

SHORT_CALL_S = 0.005  # Handler calls shorter than this share a slot: waking a process costs more than many of them,
SHARED_WORK_S = 0.01  # so each process has about so much work of theirs at once,
PARTS = 256  # and at most so many calls: the parts of a slot.
SCANNED_MAX = 64  # Waiting attempts looked at in one go for one that fits.


class Place(Struct, frozen=True, gc=False):
    """What a running attempt takes: amounts, and a slot of its own or, sharing one with other short calls, `parts`."""

    amounts: dict[str, int]
    parts: int  # 0: a slot of its own


class Room:
    """Waiting attempts by priority, then age, and the amounts in use."""

    def __init__(self, offer: Offer) -> None:
        self.change(offer)
        self._waiting: list[tuple[int, float, bytes, int, AttemptKey]] = []
        self._specs: dict[AttemptKey, TaskSpec] = {}  # of those waiting
        self._used: Counter[str] = Counter()
        self._short_count = self._short_parts = 0  # among the running
        self._mean_s: dict[str, float] = {}  # of handler types: how long calls take
        self._count = 0

    def change(self, offer: Offer) -> None:
        """The worker offers something else from now on."""
        self.offer = offer
        self._handler_types = frozenset(handler.type for handler in offer.handlers)

    # -- Waiting -------------------------------------------------------------------------------------------------------

    def __contains__(self, key: AttemptKey) -> bool:
        return key in self._specs

    def __iter__(self) -> Iterator[AttemptKey]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def add(self, key: AttemptKey, spec: TaskSpec) -> None:
        """Have an attempt wait."""
        self._specs[key] = spec
        self._count += 1
        heappush(self._waiting, (-spec.priority, spec.submitted_s, key.task_id, self._count, key))

    def discard(self, key: AttemptKey) -> None:
        """It waits no more, if it did."""
        self._specs.pop(key, None)

    # -- Running -------------------------------------------------------------------------------------------------------

    def release(self, place: Place) -> None:
        """An attempt has ended."""
        for name, amount in place.amounts.items():
            self._used[name] -= amount
        if place.parts:
            self._short_count -= 1
            self._short_parts -= place.parts

    def ran(self, type: str, duration_s: float) -> None:
        """Learn how long calls of a handler take."""
        if type in self._handler_types:
            mean_s = self._mean_s.get(type, duration_s)
            self._mean_s[type] = mean_s + (duration_s - mean_s) * 0.1

    def take_fitting(self, running: int) -> list[tuple[AttemptKey, TaskSpec, Place]]:
        """Take waiting attempts that fit beside `running` others, best first. One that does not fit lets smaller ones
        behind it pass: the leader sends no more than fits, so that it does not wait long."""
        begins: list[tuple[AttemptKey, TaskSpec, Place]] = []
        if len(self._waiting) > SCANNED_MAX + 2 * len(self._specs):  # Mostly given back.
            self._waiting = [entry for entry in self._waiting if entry[4] in self._specs]
            heapify(self._waiting)
        aside: list[tuple[int, float, bytes, int, AttemptKey]] = []
        waiting, specs = self._waiting, self._specs
        while waiting and len(aside) < SCANNED_MAX:
            key = waiting[0][4]
            spec = specs.get(key)
            if spec is None:
                heappop(waiting)  # Cancelled or given back.
                continue
            parts = self._parts(spec.type)
            if not self._has_slot(parts, running + len(begins)):
                break
            entry = heappop(waiting)
            amounts = self._amounts(spec, is_short=parts > 0)
            if amounts and any(
                self._used[name] + amount > self.offer.capacity.get(name, 0) for name, amount in amounts.items()
            ):
                aside.append(entry)
                continue
            del specs[key]
            for name, amount in amounts.items():
                self._used[name] += amount
            if parts:
                self._short_count += 1
                self._short_parts += parts
            begins.append((key, spec, Place(amounts, parts)))
        for entry in aside:
            heappush(waiting, entry)
        return begins

    def _parts(self, type: str) -> int:
        """How many parts of a shared slot a call takes; 0 for whatever has a slot of its own."""
        mean_s = self._mean_s.get(type, 1.0)
        if mean_s >= SHORT_CALL_S or type not in self._handler_types:
            return 0
        return ceil(mean_s * (PARTS / SHARED_WORK_S)) or 1

    def _has_slot(self, parts: int, running: int) -> bool:
        """Whether a slot is free, or so many parts of one that is shared."""
        others = running - self._short_count + (not parts)
        return others + -(-(self._short_parts + parts) // PARTS) <= self.offer.slots

    def could_run(self, spec: TaskSpec) -> bool:
        """Whether it could run here on an idle machine. The offer may have changed while the task was on its way."""
        offer = self.offer
        is_known = spec.type in offer.types or spec.type in self._handler_types
        return (
            is_known
            and offer.slots > 0
            and all(offer.capacity.get(name, 0) >= amount for name, amount in spec.resources.items())
        )

    def _amounts(self, spec: TaskSpec, *, is_short: bool) -> dict[str, int]:
        """What an attempt takes; short calls queue behind each other in their processes and take nothing more."""
        if is_short and not spec.resources:
            return {}
        amounts = {name: amount for name, amount in spec.resources.items() if amount > 0}
        if "cpus" not in amounts:
            amounts["cpus"] = self.offer.capacity.get("cpus", 0) // max(self.offer.slots, 1)
        return amounts
