"""Why a task stands where it stands: one word from a fixed set, a sentence, and what every worker lacks for it."""

from __future__ import annotations

from msgspec import Struct

from taskd.core.constraints import matches
from taskd.core.queue import Shape
from taskd.core.roster import NOTHING_OFFERED, Worker
from taskd.core.scheduler import Scheduler
from taskd.core.task import Task, TaskState

NAMED_MAX = 3  # Workers in a sentence.


class Fit(Struct, frozen=True):
    """What one worker has to say to a task. `ever`: it could run it when idle, and connected; None where it is away and
    nobody knows what it offers."""

    node_id: int
    name: str
    fits: bool
    ever: bool | None
    why: str
    is_here: bool = True


class Why(Struct, frozen=True):
    """The answer. `until_s` (UTC): when it changes by itself; `position`: how many ready tasks come first, of those
    that a connected worker could run."""

    reason: str
    text: str
    position: int | None = None
    until_s: float | None = None
    fits: tuple[Fit, ...] = ()


def explain(scheduler: Scheduler, task: Task) -> Why:
    """Why this unfinished task is not further on. Reasons: BeginTime, Backoff, NoHandler, NoMatchingNode, Resources,
    Priority, Starting, Assigned, Running, Cancelling, WorkerAway."""
    if task.state is TaskState.SCHEDULED:
        return Why("BeginTime", "it was asked to begin at a later time", until_s=task.record.due_s)
    if task.state is TaskState.RETRYING:
        last = task.record.attempts[-1]
        what = last.outcome.word if last.outcome is not None else "open"
        return Why("Backoff", f"attempt {last.number} ended with {what}; it is tried again", until_s=task.record.due_s)
    if task.record.attempts and task.key is not None:
        return _explain_open(scheduler, task)
    assert task.shape is not None
    return _explain_queued(scheduler, task, task.shape)


def _explain_open(scheduler: Scheduler, task: Task) -> Why:
    attempt = task.record.attempts[-1]
    worker = scheduler.roster.get(attempt.worker)
    where = worker.name if worker is not None else str(attempt.worker)
    if worker is None or not worker.is_here:
        text = f"{where} is not connected; if it does not come back, the attempt counts as lost"
        return Why("WorkerAway", text, until_s=scheduler.gives_up_s(attempt.worker))
    if task.state is TaskState.CANCELLING:
        return Why("Cancelling", f"it is being ended on {where}")
    if task.state is TaskState.RUNNING:
        return Why("Running", f"it runs on {where}")
    return Why("Assigned", f"it is at {where} and begins there as soon as a slot is free")


def _explain_queued(scheduler: Scheduler, task: Task, shape: Shape) -> Why:
    workers = sorted(scheduler.roster, key=lambda worker: worker.node_id)
    fits = tuple(_fit(worker, shape) for worker in workers)
    here = [worker for worker in workers if worker.is_here]
    # What no worker can run stands in nobody's way; where none is here, any may come.
    position = scheduler.ledger.queue.position(
        task, lambda other: not here or any(worker.could_run(other) for worker in here)
    )
    if not here:
        return Why("NoMatchingNode", _nobody_here(fits), position, fits=fits)
    if not any(shape.type in worker.types for worker in here):
        text = f"no connected worker runs tasks of type {shape.type!r}"
        return Why("NoHandler", text, position, fits=fits)
    able = [worker for worker in here if worker.could_run(shape)]
    if not able:
        return Why("NoMatchingNode", "no connected worker could ever run it", position, fits=fits)
    if not any(worker.may_take for worker in able):
        return Why("NoMatchingNode", "every worker that could run it is drained", position, fits=fits)
    if position and any(fit.fits for fit in fits):
        return Why("Priority", _come_first(position), position, fits=fits)
    if any(fit.fits for fit in fits):
        return Why("Starting", "it is about to be handed out", position, fits=fits)
    text = "every worker that could run it is busy" + (f", and {_come_first(position)}" if position else "")
    return Why("Resources", text, position, fits=fits)


def _fit(worker: Worker, shape: Shape) -> Fit:
    offer = worker.offer
    lacks = _lacks(worker, shape)
    if not worker.is_here:
        ever = None if offer == NOTHING_OFFERED else not lacks
        why = "is not connected" + (f", and {lacks}" if ever is False else "")
        return Fit(worker.node_id, worker.name, False, ever, why, is_here=False)
    if lacks:
        why = lacks
    elif worker.drain_reason is not None:
        why = "is drained" + (f": {worker.drain_reason}" if worker.drain_reason else "")
    elif len(worker.assigned) >= offer.slots:
        why = "its only slot is busy" if offer.slots == 1 else f"all {offer.slots} slots are busy"
    elif worker.load_with(shape) > 1:
        taken = [name for name, amount in shape.needs if worker.used.get(name, 0) + amount > offer.capacity[name]] or [
            "cpus"
        ]  # One slot's share of them, which a task takes that asks for none.
        why = ", ".join(
            f"{_amount(name, max(0, offer.capacity.get(name, 0) - worker.used.get(name, 0)))} of {name} is free"
            for name in taken
        )
    else:
        return Fit(worker.node_id, worker.name, True, True, "has room")
    return Fit(worker.node_id, worker.name, False, not lacks, why)


def _lacks(worker: Worker, shape: Shape) -> str:
    """Why it could not run such a task even when idle; empty where it could."""
    offer = worker.offer
    if shape.type not in worker.types:
        return f"does not run type {shape.type!r}"
    if unmet := [constraint.text for constraint in shape.constraints if not matches(constraint, offer.labels)]:
        return "does not meet: " + ", ".join(unmet)
    if short := [(name, amount) for name, amount in shape.needs if offer.capacity.get(name, 0) < amount]:
        return ", ".join(
            f"has {_amount(name, offer.capacity.get(name, 0))} of {name}, {_amount(name, amount)} asked"
            for name, amount in short
        )
    return "" if offer.slots else "has no slots"


def _nobody_here(fits: tuple[Fit, ...]) -> str:
    """In a word, whether it helps to bring workers back."""
    able = [fit.name for fit in fits if fit.ever]
    return "no worker is connected" + (f"; {', '.join(able[:NAMED_MAX])} could run it" if able else "")


def _come_first(position: int) -> str:
    return "1 task comes first" if position == 1 else f"{position} tasks come first"


def _amount(name: str, units: int) -> str:
    return f"{units // 1000 / (1 << 20):,.0f} MiB" if name == "memory" else f"{units / 1000:g}"
