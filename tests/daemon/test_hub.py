"""Who waits for what: watches, streams, and waiting for a leader."""

from __future__ import annotations

import asyncio
from uuid import UUID

import msgspec
import pytest

from taskd.api.cluster_types import EventView
from taskd.core.effects import AnnounceNode, Change, Superseded
from taskd.core.task import Attempt, Outcome, Record, TaskState, encode
from taskd.daemon import hub as hub_module
from taskd.daemon.hub import Hub, TaskWatch
from taskd.protocol.messages import TaskRow, Term

LONG_S = 60.0


def id_of(number: int) -> bytes:
    return number.to_bytes(16)


def change(number: int, state: TaskState = TaskState.SUCCEEDED) -> Change:
    return Change(id_of(number), state, 1.0, 1, 7, b"", "")


def watching(hub: Hub, *numbers: int) -> TaskWatch:
    watch = TaskWatch(hub)
    for number in numbers:
        watch.add_open(id_of(number))
    return watch


async def begun(watch: TaskWatch, timeout_s: float = LONG_S) -> asyncio.Task[list[Change]]:
    """A `next` that waits."""
    task = asyncio.ensure_future(watch.next(timeout_s))
    await asyncio.sleep(0)
    return task


# -- Watches -----------------------------------------------------------------------------------------------------------


async def test_a_watch_hears_of_ends_and_of_nothing_else() -> None:
    hub = Hub()
    watch = watching(hub, 1, 2)
    waiting = await begun(watch)
    hub.announce([change(1, TaskState.RUNNING), change(3), change(2, TaskState.RETRYING)])
    await asyncio.sleep(0)
    assert not waiting.done()
    hub.announce([change(1), change(2, TaskState.FAILED)])
    assert [one.id for one in await waiting] == [id_of(1), id_of(2)]
    assert watch.open == 0
    assert await watch.next(LONG_S) == [], "nothing is open: no reason to wait"
    assert not hub._watches


async def test_ends_between_two_calls_are_kept() -> None:
    hub = Hub()
    watch = watching(hub, 1, 2)
    hub.announce([change(1)])
    assert [one.id for one in await watch.next(LONG_S)] == [id_of(1)]
    waiting = await begun(watch)
    hub.announce([change(2)])
    assert [one.id for one in await waiting] == [id_of(2)]


async def test_what_has_ended_already_is_told_at_once() -> None:
    watch = watching(Hub(), 1)
    watch.add_ended(change(2))
    assert [one.id for one in await watch.next(LONG_S)] == [id_of(2)]


async def test_a_task_named_twice_is_told_once() -> None:
    hub = Hub()
    watch = watching(hub, 1, 1)
    hub.announce([change(1)])
    assert len(await watch.next(0)) == 1
    assert not hub._watches


async def test_all_who_watch_one_task_hear_of_it() -> None:
    hub = Hub()
    waiting = [await begun(watching(hub, 1)) for _ in range(3)]
    hub.announce([change(1)])
    assert [len(changes) for changes in await asyncio.gather(*waiting)] == [1, 1, 1]


@pytest.mark.parametrize("timeout_s", [0.0, 0.001])
async def test_time_runs_out(timeout_s: float) -> None:
    assert await watching(Hub(), 1).next(timeout_s) == []


async def test_nothing_is_left_of_a_closed_watch() -> None:
    hub = Hub()
    watch, other = watching(hub, *range(1000)), watching(hub, 5)
    waiting = await begun(watch)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    watch.close()
    assert list(hub._watches) == [id_of(5)]
    hub.announce([change(5)])
    assert watch.open == 0
    assert len(await other.next(0)) == 1


# -- Streams -----------------------------------------------------------------------------------------------------------


async def read(hub: Hub, got: list[EventView]) -> None:
    async for event in hub.stream():
        got.append(event)


async def test_a_stream_gets_every_change_in_order_until_it_closes() -> None:
    hub = Hub()
    hub.announce([change(1)])  # Before anybody listens.
    got: list[EventView] = []
    reader = asyncio.ensure_future(read(hub, got))
    await asyncio.sleep(0)
    hub.announce([change(1, TaskState.RUNNING), change(1)])
    hub.announce_node(AnnounceNode("node.lost", 9, "silent"), 5.0)
    hub.close()
    await reader
    assert [event.kind for event in got] == ["task.running", "task.succeeded", "node.lost"]
    assert (got[2].at, got[2].node_id, got[2].detail) == (5.0, 9, "silent")
    assert not hub._streams


async def test_a_stream_whose_reader_is_too_far_behind_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "BACKLOG_MAX", 3)
    hub = Hub()
    slow = hub.stream()
    first = asyncio.ensure_future(anext(slow))
    await asyncio.sleep(0)
    hub.announce([change(0)])
    await first
    hub.announce([change(number) for number in range(1, 4)])
    (stream,) = hub._streams
    assert not stream.is_closed
    hub.announce([change(4)])
    assert not stream.events, "what nobody will read is not kept"
    assert [event async for event in slow] == []
    assert not hub._streams


async def test_a_reader_that_leaves_is_forgotten() -> None:
    hub = Hub()
    stream = hub.stream()
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await stream.aclose()  # type: ignore[attr-defined]
    assert not hub._streams


# -- What other schedulers decide --------------------------------------------------------------------------------------


def row(number: int, state: TaskState = TaskState.SUCCEEDED) -> TaskRow:
    attempt = Attempt(1, Term(1, 2, 3), 4, 7, 1.0, 1.0, 2.0, Outcome.OK, b"report")
    record = encode(Record([attempt], reason="so"))
    return TaskRow(id_of(number), state, 0, "q", "t", "", "", 1.0, 5.0, 5.0, 1, 2, 3, 4, b"", record)


async def test_a_watch_hears_of_rows_that_a_standby_took() -> None:
    hub = Hub()
    watch = watching(hub, 1, 2)
    hub.announce_rows([row(1), row(2, TaskState.RUNNING), row(3)])
    assert await watch.next(0) == [Change(id_of(1), TaskState.SUCCEEDED, 5.0, 1, 7, b"report", "so")]
    assert watch.open == 1


async def test_rows_that_nobody_watches_are_not_looked_into() -> None:
    hub = Hub()
    damaged = msgspec.structs.replace(row(1), record=b"\xc1")
    hub.announce_rows([damaged])
    watch = watching(hub, 2)
    hub.announce_rows([damaged, row(2)])
    assert len(await watch.next(0)) == 1


async def test_streams_hear_of_rows_and_of_results_that_are_superseded() -> None:
    hub = Hub()
    got: list[EventView] = []
    reader = asyncio.ensure_future(read(hub, got))
    await asyncio.sleep(0)
    hub.announce_rows([row(1)])
    hub.announce_superseded(Superseded(id_of(1), TaskState.TIMED_OUT, TaskState.SUCCEEDED), 9.0)
    hub.end_streams()
    await reader
    assert [(event.kind, event.at, event.detail) for event in got] == [
        ("task.succeeded", 5.0, "so"), ("task.superseded", 9.0, "succeeded, not timed out as was told before")
    ]  # fmt: skip
    assert {event.id for event in got} == {str(UUID(int=1))}


# -- Leaders, and the end ----------------------------------------------------------------------------------------------


async def test_who_waits_for_a_leader_is_woken_by_a_change() -> None:
    hub = Hub()
    waiting = asyncio.ensure_future(hub.wait_for_leader(LONG_S))
    await asyncio.sleep(0)
    hub.leader_changed()
    await waiting
    assert not hub._leader_waiters


async def test_waiting_for_a_leader_ends_and_leaves_nothing() -> None:
    hub = Hub()
    await hub.wait_for_leader(0.001)
    waiting = asyncio.ensure_future(hub.wait_for_leader(LONG_S))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not hub._leader_waiters


async def test_closing_lets_everybody_go_with_what_they_have() -> None:
    hub = Hub()
    watches = [watching(hub, 1, 2), watching(hub, 2)]
    hub.announce([change(1)])
    waiting = [await begun(watch) for watch in watches]
    for_leader = asyncio.ensure_future(hub.wait_for_leader(LONG_S))
    await asyncio.sleep(0)
    hub.close()
    assert [len(changes) for changes in await asyncio.gather(*waiting)] == [1, 0]
    await for_leader
    assert not hub._watches
    hub.close()
