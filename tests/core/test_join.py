"""Joining what leaders that did not know of each other have made of a task: any order, any grouping, again."""

from __future__ import annotations

from random import Random

import pytest

from taskd.core import events as ev
from taskd.core.join import Joined, join, same
from taskd.core.settings import SchedulerSettings
from taskd.core.task import RAN_TWICE, Attempt, Outcome, Record, TaskState, decode_record, encode
from taskd.protocol.messages import AttemptEnded, Dot, TaskRow, Term
from tests.core.world import World

SEEDS = range(40)
LEFT, RIGHT = Term(3, 1, 1), Term(4, 2, 2)


def row_of(row: TaskRow, joined: Joined) -> TaskRow:
    """The row that a leader would write; its dot does not matter to a join."""
    return TaskRow(
        row.id, int(joined.state), row.priority, row.queue, row.type, row.name, row.owner, row.submitted_s,
        joined.changed_s, joined.finished_s, 9, 9, 9, 9, row.spec, encode(joined.record),
    )  # fmt: skip


def make(state: TaskState, *attempts: Attempt, **fields: object) -> TaskRow:
    record = Record(list(attempts), **fields)  # type: ignore[arg-type]
    finished_s = 9.0 if state.is_final else 0.0
    return TaskRow(
        bytes(16), int(state), 0, "default", "command", "", "", 1.0, 5.0, finished_s, 1, 1, 1, 1, b"", encode(record)
    )


def attempt(number: int, term: Term = LEFT, outcome: Outcome | None = None, started_s: float = 2.0) -> Attempt:
    return Attempt(number, term, number, 11, 1.0, started_s, 3.0 if outcome is not None else 0.0, outcome)


def divided(seed: int) -> list[dict[bytes, TaskRow]]:
    """What three schedulers hold after they have led apart for a while, each with a worker of its own."""
    random = Random(seed)
    world = World()
    for node_id in (1, 2, 3):
        world.add(node_id, "scheduler", settings=SchedulerSettings(worker_grace_s=1.0, restart_grace_s=1.0))
    for node_id in (11, 12, 13):
        world.add(node_id, "worker")
    world.run(2.0)
    ids = world.submit(
        6, retries=random.randrange(3), **({"deadline_s": world.utc + 8} if random.random() < 0.3 else {})
    )
    world.run(random.random() * 2)
    for one in (1, 2, 3):
        for other in (*range(one + 1, 4), *(11, 12, 13)):
            if other != 10 + one:
                world.cut(one, other)
    for _ in range(12):
        world.run(random.random() * 3)
        for host in world.hosts.values():
            for key in list(host.running):
                if random.random() < 0.4:
                    del host.running[key]
                    outcome = random.choice([Outcome.OK, Outcome.OK, Outcome.EXIT_NONZERO, Outcome.TIMEOUT])
                    ended = AttemptEnded(key, outcome, world.utc - 1, world.utc, b"")
                    world.post(host.node.info.node_id, ev.Progressed([], [ended]))
        if random.random() < 0.3:
            node_id = random.choice((1, 2, 3))
            world.ask(lambda call: ev.CancelWanted(call, [random.choice(ids)]), node_id)
    return [world.hosts[node_id].rows for node_id in (1, 2, 3)]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_order_and_the_grouping_of_joins_do_not_matter(seed: int) -> None:
    for a, b, c in zip(*(list(rows.values()) for rows in divided(seed)), strict=True):
        assert a.id == b.id == c.id
        ab, ba = join(a, b), join(b, a)
        assert ab == ba
        left = join(row_of(a, ab), c)
        right = join(a, row_of(b, join(b, c)))
        assert left == right
        again = join(row_of(a, left), b)
        assert again == left, "what is in it already changes nothing"
        assert same(row_of(a, left), left)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_success_is_lost_and_no_decision_is_undone(seed: int) -> None:
    for versions in zip(*(list(rows.values()) for rows in divided(seed)), strict=True):
        joined = join(row_of(versions[0], join(versions[0], versions[1])), versions[2])
        states = {TaskState(row.state) for row in versions}
        if TaskState.SUCCEEDED in states:
            assert joined.state is TaskState.SUCCEEDED
            assert joined.record.attempts[-1].outcome is Outcome.OK
        assert joined.state.is_final == any(state.is_final for state in states)
        open_attempts = [attempt for attempt in joined.record.attempts if attempt.outcome is None]
        assert len(open_attempts) <= 1
        assert not open_attempts or (open_attempts[0] is joined.record.attempts[-1] and not joined.state.is_final)


def test_of_two_open_attempts_the_later_leaders_goes_on() -> None:
    joined = join(make(TaskState.RUNNING, attempt(1, LEFT)), make(TaskState.ASSIGNED, attempt(1, RIGHT, None, 0.0)))
    first, last = joined.record.attempts
    assert (first.term, first.outcome, first.reason) == (LEFT, Outcome.LOST, RAN_TWICE)
    assert (last.term, last.outcome, joined.state) == (RIGHT, None, TaskState.ASSIGNED)


def test_what_a_worker_said_counts_above_what_a_leader_assumed() -> None:
    lost, real = attempt(1, LEFT, Outcome.LOST), attempt(1, LEFT, Outcome.EXIT_NONZERO)
    for one, other in ((lost, real), (real, lost)):
        joined = join(make(TaskState.QUEUED, one), make(TaskState.QUEUED, other))
        assert [it.outcome for it in joined.record.attempts] == [Outcome.EXIT_NONZERO]


def test_a_success_wins_over_a_cancellation_and_speaks_for_the_task() -> None:
    dot = Dot(LEFT, 7)
    success = make(TaskState.SUCCEEDED, attempt(1, LEFT, Outcome.OK), decided=dot)
    cancelled = make(
        TaskState.CANCELLED, attempt(1, LEFT, Outcome.LOST), attempt(2, RIGHT, Outcome.SIGNAL),
        cancel_wanted=True, decided=Dot(RIGHT, 9),
    )  # fmt: skip
    joined = join(success, cancelled)
    assert (joined.state, joined.record.decided, joined.record.cancel_wanted) == (TaskState.SUCCEEDED, dot, True)
    assert joined.record.attempts[-1].outcome is Outcome.OK


def test_of_two_successes_the_later_leaders_counts() -> None:
    one = make(TaskState.SUCCEEDED, attempt(1, LEFT, Outcome.OK), decided=Dot(LEFT, 7))
    other = make(TaskState.SUCCEEDED, attempt(1, RIGHT, Outcome.OK), decided=Dot(RIGHT, 2))
    assert join(one, other).record.decided == Dot(RIGHT, 2)
    assert join(one, other).record.attempts[-1].term == RIGHT


def test_the_wish_to_cancel_is_kept() -> None:
    joined = join(make(TaskState.RUNNING, attempt(1)), make(TaskState.CANCELLING, attempt(1), cancel_wanted=True))
    assert joined.state is TaskState.CANCELLING


@pytest.mark.parametrize(
    ("attempts", "state"), [((), TaskState.SCHEDULED), ((attempt(1, LEFT, Outcome.EXIT_NONZERO),), TaskState.RETRYING)]
)
def test_what_one_leader_has_not_seen_become_ready_waits(attempts: tuple[Attempt, ...], state: TaskState) -> None:
    joined = join(make(TaskState.QUEUED, *attempts), make(state, *attempts, due_s=50.0))
    assert (joined.state, joined.record.due_s) == (state, 50.0)


def test_who_took_a_task_first_is_remembered() -> None:
    row = make(TaskState.QUEUED, accepted=Dot(LEFT, 1))
    assert join(row, make(TaskState.QUEUED, accepted=Dot(RIGHT, 1))).record.accepted == Dot(LEFT, 1)
    assert decode_record(row.record).accepted == join(row, make(TaskState.QUEUED)).record.accepted
