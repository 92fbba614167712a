"""Readings of the database: what is asked is what is told, a few at a time, and a failure is told too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from taskd.core import effects as fx
from taskd.core import events as ev
from taskd.core.backlog import Backlog
from taskd.daemon.reading import AT_ONCE_MAX, Readings
from taskd.errors import Overloaded, StoreError
from taskd.protocol.messages import Dot, TaskRow, Term

SEEN = (Dot(Term(1, 2, 3), 4),)


BACKLOG = Backlog([], [], [], b"x")


def row(number: int) -> TaskRow:
    return TaskRow(number.to_bytes(16), 3, 0, "default", "command", "", "ann", 1.0, 1.0, 0.0, 1, 2, 3, 4, b"", b"")


class FakeStore:
    """Answers with what it was asked; held, it waits."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.free = asyncio.Event()
        self.free.set()
        self.at_once = self.at_once_max = 0
        self.asked: list[Any] = []

    async def _answer(self, *asked: Any) -> None:
        self.asked.append(asked)
        self.at_once += 1
        self.at_once_max = max(self.at_once, self.at_once_max)
        await self.free.wait()
        self.at_once -= 1
        if self.failure is not None:
            raise self.failure

    async def backlog(self, after: bytes) -> tuple[Backlog, bytes | None]:
        await self._answer("backlog", after)
        return BACKLOG, b"next"

    async def lacking(self, seen: Any, after: bytes) -> tuple[list[TaskRow], bytes | None]:
        await self._answer("lacking", seen, after)
        return [row(2)], None

    async def rows(self, ids: list[bytes]) -> list[TaskRow]:
        await self._answer("rows", ids)
        return [row(3)]

    async def ids(self, after: bytes) -> tuple[list[bytes], bytes | None]:
        await self._answer("ids", after)
        return [b"id"], b"next"

    async def ended_before(self, time_s: float) -> list[bytes]:
        await self._answer("ended_before", time_s)
        return [b"old"]


class Stage:
    """Readings that run, and what they told."""

    def __init__(self) -> None:
        self.store = FakeStore()
        self.told: asyncio.Queue[ev.Event] = asyncio.Queue()
        self.readings = Readings(self.store, self.told.put_nowait)  # type: ignore[arg-type]


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage()
    work = asyncio.ensure_future(stage.readings.run())
    yield stage
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


@pytest.mark.parametrize(
    ("effect", "asked", "event"),
    [
        (fx.ReadBacklog(1, b"a"), ("backlog", b"a"), ev.BacklogRead(1, BACKLOG, b"next")),
        (fx.ReadLacking(2, SEEN, b"b"), ("lacking", SEEN, b"b"), ev.RowsRead(2, [row(2)], None)),
        (fx.ReadRows(3, [b"c"]), ("rows", [b"c"]), ev.RowsRead(3, [row(3)])),
        (fx.ReadIds(4, b"d"), ("ids", b"d"), ev.IdsRead(4, [b"id"], b"next")),
        (fx.ReadOld(5, 6.0), ("ended_before", 6.0), ev.IdsRead(5, [b"old"])),
    ],
)
async def test_every_reading_is_made_and_told(stage: Stage, effect: Any, asked: Any, event: ev.Event) -> None:
    stage.readings.want(effect)
    assert await stage.told.get() == event
    assert stage.store.asked == [asked]


@pytest.mark.parametrize("error", [StoreError("the disk is gone"), Overloaded("too much")])
async def test_a_reading_that_fails_is_told_and_the_next_is_made(stage: Stage, error: Exception) -> None:
    stage.store.failure = error
    stage.readings.want(fx.ReadIds(1, b""))
    assert await stage.told.get() == ev.ReadFailed(1, str(error))
    stage.store.failure = None
    stage.readings.want(fx.ReadIds(2, b""))
    assert await stage.told.get() == ev.IdsRead(2, [b"id"], b"next")


async def test_only_a_few_are_made_at_once(stage: Stage) -> None:
    stage.store.free.clear()
    for call in range(3 * AT_ONCE_MAX):
        stage.readings.want(fx.ReadIds(call, b""))
    for _ in range(20):
        await asyncio.sleep(0)
    assert stage.store.at_once == AT_ONCE_MAX
    stage.store.free.set()
    calls = {(await stage.told.get()).call for _ in range(3 * AT_ONCE_MAX)}  # type: ignore[attr-defined]
    assert calls == set(range(3 * AT_ONCE_MAX))
    assert stage.store.at_once_max == AT_ONCE_MAX
