"""Rows that no scheduler writes: whoever sends them is refused, and nothing of them is taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec import structs

from taskd.core import effects as fx
from taskd.core import events as ev
from taskd.core.fitness import misfit
from taskd.core.task import Attempt, Outcome, Record, TaskSpec, TaskState, decode_spec, encode
from taskd.protocol import messages as msg
from taskd.protocol.messages import TaskRow
from tests.core.test_take_over import cluster, leaders, submit
from tests.core.world import World, offer

NAN, INFINITE = float("nan"), float("inf")
TERM = msg.Term(1, 2, 3)


@pytest.fixture
def row() -> TaskRow:
    spec = TaskSpec("command", argv=("true",), submitted_s=5.0)
    return TaskRow(
        bytes(16), int(TaskState.QUEUED), 0, "default", "command", "", "", 5.0, 5.0, 0.0, 1, 2, 3, 4, encode(spec),
        encode(Record([], accepted=msg.Dot(TERM, 4))),
    )  # fmt: skip


def with_spec(row: TaskRow, **changes: object) -> TaskRow:
    return structs.replace(row, spec=encode(structs.replace(decode_spec(row.spec), **changes)))


OPEN = encode(Record([Attempt(1, TERM, 4, 11, 5.0)]))
CLOSED = encode(Record([Attempt(1, TERM, 4, 11, 5.0, 5.0, 6.0, Outcome.OK)]))
BAD: dict[str, tuple[Callable[[TaskRow], TaskRow], str]] = {
    "no specification": (lambda row: structs.replace(row, spec=b""), "cannot be read"),
    "a damaged one": (lambda row: structs.replace(row, spec=row.spec[:-3]), "cannot be read"),
    "one of something else": (lambda row: structs.replace(row, spec=encode([1, 2])), "cannot be read"),
    "a text that is none": (lambda row: structs.replace(row, spec=b"\x81\xa4type\xa2\xff\xfe"), "cannot be read"),
    "no record": (lambda row: structs.replace(row, record=b"\xc1"), "cannot be read"),
    "an outcome that there is not": (
        lambda row: structs.replace(row, record=encode([[[1, [1, 2, 3], 4, 11, 5.0, 5.0, 6.0, 99]]])), "cannot be read",
    ),
    "a state that there is not": (lambda row: structs.replace(row, state=99), "no state 99"),
    "another queue": (lambda row: structs.replace(row, queue="other"), "columns"),
    "another type": (lambda row: structs.replace(row, type="http"), "columns"),
    "a constraint that is none": (lambda row: with_spec(row, constraints=("gpu", "a ~= b")), "constraint"),
    "another priority": (lambda row: structs.replace(row, priority=1), "columns"),
    "a priority beyond a database": (
        lambda row: with_spec(structs.replace(row, priority=1 << 63), priority=1 << 63), "priority",
    ),
    "a time that is no number": (lambda row: structs.replace(row, changed_s=NAN), "time"),
    "an infinite time": (lambda row: with_spec(row, not_before_s=INFINITE), "time"),
    "an infinite wait": (lambda row: structs.replace(row, record=encode(Record([], due_s=INFINITE))), "time"),
    "running without an attempt": (lambda row: structs.replace(row, state=int(TaskState.RUNNING)), "attempts"),
    "running after its attempt": (
        lambda row: structs.replace(row, state=int(TaskState.RUNNING), record=CLOSED), "attempts",
    ),
    "queued with an open attempt": (lambda row: structs.replace(row, record=OPEN), "attempts"),
}  # fmt: skip


def test_what_a_scheduler_writes_is_fit(row: TaskRow) -> None:
    assert misfit([row, structs.replace(row, state=int(TaskState.ASSIGNED), record=OPEN)], []) == ""


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_named(row: TaskRow, name: str) -> None:
    spoil, why = BAD[name]
    assert why in misfit([row, spoil(row)], [])


def test_a_node_that_was_seen_at_no_time_is_none() -> None:
    assert "node 7" in misfit([], [msg.NodeRow(7, "seven", ("worker",), None, NAN)])


@pytest.mark.parametrize("name", BAD)
def test_a_standby_takes_nothing_from_a_leader_whose_rows_cannot_be(row: TaskRow, name: str) -> None:
    world = cluster(World(), schedulers=2, workers=0)
    term = world.hosts[1].term
    assert term is not None
    before = dict(world.hosts[2].rows)
    bad = BAD[name][0](row)
    message = msg.Replicate(term, world.hosts[2].seen[term] + 1, (row, bad), (), (), (), is_last=True)
    ended = watch(world)
    world.post(2, ev.Received(1, [message]))
    world.settle()
    assert world.hosts[2].rows == before
    assert ended == [(2, 1)]


def test_a_leader_takes_nothing_from_a_standby_whose_rows_cannot_be(row: TaskRow) -> None:
    world = cluster(World(), schedulers=2, workers=0)
    ids = submit(world, 1)
    term = world.hosts[1].term
    assert term is not None
    ended = watch(world)
    for message in (
        msg.Attach(term, (msg.Dot(TERM, 9),), has_strays=False),
        msg.Page(term, 1, (structs.replace(row, state=99),), (), (msg.Dot(TERM, 9),), is_last=True),
    ):
        world.post(1, ev.Received(2, [message]))
    world.settle()
    assert ended == [(1, 2)]
    assert leaders(world) == [1]
    assert list(world.hosts[1].rows) == ids


def test_a_worker_says_that_it_cannot_read_a_task() -> None:
    world = World().cluster()
    worker = world.hosts[11].node.worker
    assert worker is not None
    assert worker.term is not None
    key = msg.AttemptKey(bytes(16), 1, worker.term, 1)
    world.post(11, ev.Received(1, [msg.Run(worker.term, (msg.Assignment(key, b"\xc1"),))]))
    world.settle()
    (finished,) = [message for _, _, message in world.sent if isinstance(message, msg.Finished)]
    assert finished.attempts[0].outcome == Outcome.SPAWN_FAILED
    assert b"UnreadableTask" in finished.attempts[0].report
    assert worker.offer == offer()


def watch(world: World) -> list[tuple[int, int]]:
    """Who ends its connection to whom from now on."""
    ended: list[tuple[int, int]] = []
    does = world.does

    def watched(node_id: int, host: object, effect: fx.Effect) -> None:
        if isinstance(effect, fx.Disconnect):
            ended.append((node_id, effect.node_id))
        does(node_id, host, effect)  # type: ignore[arg-type]

    world.does = watched  # type: ignore[method-assign]
    return ended
