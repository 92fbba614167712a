"""Retries: what counts, how long the wait is, and what the last attempt makes of the task."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd.core import retry
from taskd.core.task import RETRIES_MAX, Attempt, Backoff, Outcome, Record, TaskState
from taskd.protocol.messages import Term


def record(*outcomes: Outcome | None, started_s: float = 5.0) -> Record:
    term = Term(1, 1, 1)
    return Record([Attempt(n, term, 1, 11, 1.0, started_s, outcome=outcome) for n, outcome in enumerate(outcomes, 1)])


class Fixed(Random):
    """Chance that always says the same, from 0 to just below 1."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def random(self) -> float:
        return self.value


@given(
    st.builds(
        Backoff,
        initial_s=st.floats(0, 1e6),
        factor=st.floats(1, 1e6),
        max_s=st.floats(0, 1e9),
        jitter=st.floats(0, 1),
    ),
    st.integers(1, RETRIES_MAX + 1),
    st.integers(0, 100),
)
def test_the_wait_is_within_its_bounds_however_often_it_failed(backoff: Backoff, count: int, seed: int) -> None:
    wait_s = retry.delay_s(backoff, count, Random(seed))
    try:
        plain_s = min(backoff.initial_s * backoff.factor ** (count - 1), backoff.max_s)
    except OverflowError:
        plain_s = backoff.max_s if backoff.initial_s else 0.0
    assert plain_s * (1 - backoff.jitter) <= wait_s <= plain_s * (1 + backoff.jitter)


@pytest.mark.parametrize(("count", "plain_s"), [(1, 10.0), (2, 30.0), (3, 90.0), (4, 100.0), (10_000, 100.0)])
def test_the_wait_grows_up_to_its_maximum(count: int, plain_s: float) -> None:
    backoff = Backoff(initial_s=10.0, factor=3.0, max_s=100.0, jitter=0.5)
    assert retry.delay_s(backoff, count, Fixed(0.5)) == pytest.approx(plain_s)
    assert retry.delay_s(backoff, count, Fixed(0.0)) == pytest.approx(plain_s * 0.5)
    assert retry.delay_s(backoff, count, Fixed(1 - 1e-12)) == pytest.approx(plain_s * 1.5)


def test_no_wait_stays_none_where_the_factor_overflows() -> None:
    assert retry.delay_s(Backoff(initial_s=0.0, factor=1e6), RETRIES_MAX, Fixed(0.5)) == 0.0


def test_only_what_the_task_itself_did_counts_against_retries() -> None:
    assert retry.failures(record(*Outcome, None)) == len(Outcome) - 3
    assert retry.failures(record(Outcome.OK, Outcome.LOST, Outcome.PREEMPTED, None)) == 0


def test_only_what_ran_is_held_to_have_taken_its_worker_down() -> None:
    assert retry.losses(record(Outcome.LOST, Outcome.SIGNAL, Outcome.LOST, None)) == 2
    assert retry.losses(record(Outcome.LOST, Outcome.LOST, started_s=0.0)) == 0


def test_what_takes_workers_down_before_it_is_known_to_have_begun_does_not_do_so_for_ever() -> None:
    assert retry.losses(record(*[Outcome.LOST] * 19, started_s=0.0)) == 1
    assert retry.losses(record(*[Outcome.LOST] * 20, started_s=0.0)) == 2


@pytest.mark.parametrize("outcome", Outcome)
def test_what_the_last_attempt_makes_of_the_task(outcome: Outcome) -> None:
    state = {Outcome.OK: TaskState.SUCCEEDED, Outcome.TIMEOUT: TaskState.TIMED_OUT}.get(outcome, TaskState.FAILED)
    assert retry.final_state(outcome) is state
