"""The table of states: no move outside it, no entry that is not used, and no way out of a final state."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd.core import events as ev
from taskd.core.task import (
    FINAL,
    TRANSITIONS,
    Attempt,
    IllegalTransition,
    Outcome,
    Record,
    Task,
    TaskSpec,
    TaskState,
    decode_record,
    encode,
    units,
)
from taskd.protocol.messages import AttemptEnded, AttemptKey, Dot, Finished, Term
from tests.core.world import World, offer

S = TaskState
FIRST = (S.SCHEDULED, S.QUEUED)


def new(state: TaskState = S.QUEUED) -> Task:
    return Task(bytes(16), TaskSpec("command", submitted_s=5.0), b"", state, Record([]))


@given(st.sampled_from(FIRST), st.lists(st.sampled_from(S), max_size=40))
def test_a_move_is_in_the_table_or_refused_without_a_trace(first: TaskState, wishes: list[TaskState]) -> None:
    task = new(first)
    for number, wish in enumerate(wishes):
        before, changed_s = task.state, task.changed_s
        if wish in TRANSITIONS[before]:
            task.move(wish, 10.0 + number)
            assert (task.state, task.changed_s) == (wish, 10.0 + number)
            assert task.finished_s == (10.0 + number if wish.is_final else 0.0)
        else:
            with pytest.raises(IllegalTransition, match=f"{before.name} -> {wish.name}"):
                task.move(wish, 10.0 + number)
            assert (task.state, task.changed_s) == (before, changed_s)


def test_the_table_speaks_of_every_state() -> None:
    assert set(TRANSITIONS) == set(S)


def test_a_final_state_has_no_way_out_and_every_other_leads_to_one() -> None:
    assert {state for state, following in TRANSITIONS.items() if not following} == FINAL
    ending = set(FINAL)
    while more := {state for state, following in TRANSITIONS.items() if following & ending} - ending:
        ending |= more
    assert ending == set(S)


def test_every_state_can_be_reached() -> None:
    reached = set(FIRST)
    while more := {state for it in reached for state in TRANSITIONS[it]} - reached:
        reached |= more
    assert reached == set(S)


def test_states_and_outcomes_keep_the_numbers_they_are_stored_by() -> None:
    assert {state.word: int(state) for state in S} == {
        "scheduled": 1, "queued": 3, "assigned": 5, "running": 6, "retrying": 7, "cancelling": 8,
        "succeeded": 20, "failed": 21, "cancelled": 22, "timed_out": 23, "expired": 24,
    }  # fmt: skip
    assert {outcome.word: int(outcome) for outcome in Outcome} == {
        "ok": 0, "exit_nonzero": 1, "exception": 2, "signal": 3, "oom": 4, "timeout": 5, "lost": 6, "spawn_failed": 7,
        "preempted": 8,
    }  # fmt: skip


# -- Every move of the table is made by some story ---------------------------------------------------------------------


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[TaskState, TaskState]]]:
    made: set[tuple[TaskState, TaskState]] = set()
    move = Task.move

    def watched(task: Task, state: TaskState, now_s: float) -> None:
        made.add((task.state, state))
        move(task, state, now_s)

    monkeypatch.setattr(Task, "move", watched)
    return made


def scheduled_and_queued() -> None:
    world = World().cluster(0)
    world.submit(not_before_s=world.utc + 1)
    world.cancel(*world.submit(not_before_s=world.utc + 100))
    world.submit(not_before_s=world.utc + 100, deadline_s=world.utc + 2)
    world.cancel(*world.submit())
    world.submit(deadline_s=world.utc + 2)
    world.run(3)


def prefetching() -> World:
    """A worker with one slot at which one task runs and three wait, and their ids."""
    world = World().cluster(offer=offer(1))
    world.work = lambda begin: Outcome.OK  # ASSIGNED -> SUCCEEDED: it was quicker than the word that it began.
    world.submit()
    world.work = lambda begin: None
    return world


def assigned() -> None:
    world = prefetching()
    running, waiting, _, given_back = world.submit(4)
    world.cancel(waiting)  # -> CANCELLING -> CANCELLED
    world.ask(lambda call: ev.DrainWanted(call, 11, "upkeep"))  # -> QUEUED
    assert world.state(given_back) is S.QUEUED
    world.cancel(running)
    world.end(running)  # CANCELLING -> SUCCEEDED: what came first wins.
    for outcome, retries in ((Outcome.EXCEPTION, 0), (Outcome.EXCEPTION, 1), (Outcome.TIMEOUT, 0)):
        world = World().cluster()
        world.work = lambda begin, outcome=outcome: outcome  # type: ignore[misc]
        world.submit(retries=retries)


def running() -> None:
    world = World().cluster(offer=offer(10))
    ok, bad, again, late = (world.submit(retries=retries)[0] for retries in (0, 0, 1, 0))
    world.end(ok)
    world.end(bad, Outcome.EXIT_NONZERO)
    world.end(again, Outcome.EXIT_NONZERO)
    world.end(late, Outcome.TIMEOUT)
    world.cancel(*world.submit())
    world.submit()
    world.crash(11)
    world.run(6)  # -> QUEUED


def retrying() -> None:
    world = World().cluster()
    world.work = lambda begin: Outcome.EXCEPTION
    world.submit(retries=1)
    world.run(5)
    world.cancel(*world.submit(retries=1))


def succeeded_late() -> None:
    """The attempt of a worker that was given up succeeds, while its task waits to be run again."""
    for retries_first in (False, True):
        world = World().cluster()
        (task,) = world.submit(retries=1)
        world.cut(1, 11)
        world.run(6)  # -> QUEUED
        if retries_first:
            world.add(12, "worker")
            key = next(key for key in world.hosts[12].running)
            del world.hosts[12].running[key]
            failed = AttemptEnded(key, Outcome.EXCEPTION, world.utc, world.utc, b"")
            world.post(12, ev.Progressed([], [failed]))
            world.settle()  # -> RETRYING
        world.end(task)
        world.connect(1, 11)
        world.settle()
    # A leader whose clock was ahead has run what is not ready yet.
    world = World().cluster()
    (task,) = world.submit(not_before_s=world.utc + 100)
    ended = AttemptEnded(AttemptKey(task, 1, Term(1, 2, 9), 7), Outcome.OK, world.utc, world.utc, b"")
    world.post(1, ev.Received(11, [Finished((ended,))]), 11)
    world.settle()


def test_every_move_of_the_table_is_made(moves: set[tuple[TaskState, TaskState]]) -> None:
    for story in (scheduled_and_queued, assigned, running, retrying, succeeded_late):
        story()
    assert moves == {(state, following) for state in S for following in TRANSITIONS[state]}


# -- Rows --------------------------------------------------------------------------------------------------------------


def test_a_task_is_the_same_after_the_disk() -> None:
    term = Term(3, 1, 9)
    spec = TaskSpec("command", argv=("true",), priority=4, queue="night", name="x", owner="ann", submitted_s=5.0)
    task = Task(bytes(range(16)), spec, encode(spec), S.QUEUED, Record([]))
    task.move(S.ASSIGNED, 6.0)
    task.record.attempts.append(Attempt(1, term, 7, 11, 6.0))
    row = task.row(Dot(Term(4, 1, 9), 8))
    assert (row.priority, row.queue, row.name, row.owner, row.epoch, row.lsn) == (4, "night", "x", "ann", 4, 8)
    again = Task.from_row(row)
    assert again.key == AttemptKey(task.id, 1, term, 7)
    assert (again.state, again.spec, again.changed_s, again.finished_s) == (S.ASSIGNED, spec, 6.0, 0.0)
    assert again.row(Dot(Term(4, 1, 9), 8)) == row


def test_a_task_without_an_open_attempt_has_no_key_after_the_disk() -> None:
    task = new()
    task.spec_bytes = encode(task.spec)
    task.record.attempts.append(Attempt(1, Term(1, 1, 1), 1, 11, 6.0, outcome=Outcome.LOST))
    again = Task.from_row(task.row(Dot(Term(1, 1, 1), 2)))
    assert again.key is None
    assert again.record.open_attempt is None
    assert decode_record(task.row(Dot(Term(1, 1, 1), 2)).record).attempts == task.record.attempts


@pytest.mark.parametrize(
    ("amount", "expected"), [(1, 1000), (0.5, 500), (0.0004, 0), (0.0006, 1), (1 << 40, 1000 << 40)]
)
def test_units_are_thousandths(amount: float, expected: int) -> None:
    assert units(amount) == expected
