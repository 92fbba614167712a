"""What follows a failed attempt: another one, and when; or the end. Plain functions."""

from __future__ import annotations

from random import Random

from taskd.core.task import RAN_TWICE, Backoff, Outcome, Record, TaskState

UNSTARTED_PER_LOSS = 10

_UNCOUNTED = frozenset({Outcome.LOST, Outcome.PREEMPTED, Outcome.OK})


def failures(record: Record) -> int:
    """Attempts that count against `retries`: those that the task itself failed."""
    return sum(1 for attempt in record.attempts if attempt.outcome is not None and attempt.outcome not in _UNCOUNTED)


def losses(record: Record) -> int:
    """Attempts that ran when their worker was lost. What only waited there has hardly taken it down; yet one that does
    so before anybody hears that it has begun looks the same, so ten of those count for one.
    What was given up only because another leader had handed the task out too has no part in it."""
    lost = [it for it in record.attempts if it.outcome is Outcome.LOST and it.reason != RAN_TWICE]
    begun = sum(1 for attempt in lost if attempt.started_s)
    return begun + (len(lost) - begun) // UNSTARTED_PER_LOSS


def delay_s(backoff: Backoff, failure_count: int, random: Random) -> float:
    """Seconds to wait after the n-th failure (from 1): exponential, bounded, spread by jitter so that tasks which
    failed together do not come back together."""
    try:
        base = backoff.initial_s * backoff.factor ** (failure_count - 1)
    except OverflowError:
        base = backoff.max_s if backoff.initial_s else 0.0
    return min(base, backoff.max_s) * (1 + backoff.jitter * (2 * random.random() - 1))


def final_state(outcome: Outcome) -> TaskState:
    """The state of a task whose last attempt ended so and gets no further one."""
    if outcome is Outcome.OK:
        return TaskState.SUCCEEDED
    return TaskState.TIMED_OUT if outcome is Outcome.TIMEOUT else TaskState.FAILED
