"""Readings of the database that the node asks for: made beside everything else, a few at a time, each answered once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from taskd.core import effects as fx
from taskd.core import events as ev
from taskd.errors import Overloaded, StoreError
from taskd.store.base import Store

AT_ONCE_MAX = 4  # The store has one process for them: more of them would only hold more rows.

Read = fx.ReadBacklog | fx.ReadLacking | fx.ReadRows | fx.ReadIds | fx.ReadOld
READS = (fx.ReadBacklog, fx.ReadLacking, fx.ReadRows, fx.ReadIds, fx.ReadOld)


class Readings:
    """Carries out the reading effects, and tells the node what was read."""

    def __init__(self, store: Store, tell: Callable[[ev.Event], None]) -> None:
        self._store = store
        self._tell = tell
        self._wanted: asyncio.Queue[Read] = asyncio.Queue()  # The node asks for no more than reads.AT_ONCE_MAX.

    def want(self, read: Read) -> None:
        """Have something read."""
        self._wanted.put_nowait(read)

    async def run(self) -> None:
        """Read; until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE_MAX):
                group.create_task(self._read_on())

    async def _read_on(self) -> None:
        while True:
            read = await self._wanted.get()
            try:
                event = await self._made(read)
            except (StoreError, Overloaded) as error:
                event = ev.ReadFailed(read.call, error.message)
            self._tell(event)

    async def _made(self, read: Read) -> ev.Event:
        store = self._store
        match read:
            case fx.ReadBacklog(call, after):
                return ev.BacklogRead(call, *await store.backlog(after))
            case fx.ReadLacking(call, seen, after):
                return ev.RowsRead(call, *await store.lacking(seen, after))
            case fx.ReadRows(call, ids):
                return ev.RowsRead(call, await store.rows(ids))
            case fx.ReadIds(call, after):
                return ev.IdsRead(call, *await store.ids(after))
            case fx.ReadOld(call, before_s):
                return ev.IdsRead(call, await store.ended_before(before_s))
