"""A pool of handler processes on the stage: starts calls, remembers what is told of them, and waits for it."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import msgspec

from taskd.core.effects import Begin
from taskd.core.task import Outcome, TaskSpec
from taskd.protocol.messages import AttemptKey
from taskd.runner.base import Place
from taskd.runner.handler_child import Child
from taskd.runner.handlers import HandlerPool
from taskd.runner.reaper import Reaper
from tests.runner.stage import Audience, End, is_there, new_key, until

MODULES = Path(__file__).parent / "modules"


class HandlerStage(Audience):
    """A pool with the handlers of modules/staged.py."""

    def __init__(self, directory: Path, processes: int = 1, modules: tuple[str, ...] = ("staged",), **settings: Any):
        super().__init__()
        self.place = Place(directory, str(directory / "taskd.sock"), uuid.uuid4().hex)
        self.reaper = Reaper(self.place.worker)
        self.processes = processes
        self.pool = HandlerPool(
            self.place, self.on_progress, self.reaper, processes=processes, modules=modules, path=[str(MODULES)],
            **settings,
        )  # fmt: skip

    async def __aenter__(self) -> HandlerStage:
        await self.reaper.open()
        await self.pool.open()
        await self.until_whole()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.pool.close()
        await self.reaper.close()

    def begin(self, type: str, **params: Any) -> Begin:
        return Begin(new_key(), TaskSpec(type=type, params=msgspec.json.encode(params)))

    def start(self, type: str, **params: Any) -> AttemptKey:
        """Start one call."""
        begin = self.begin(type, **params)
        self.pool.start([begin])
        return begin.key

    def start_all(self, *begins: Begin) -> list[AttemptKey]:
        """Start calls together, in this order."""
        self.pool.start(list(begins))
        return [begin.key for begin in begins]

    async def run(self, type: str, **params: Any) -> End:
        """Make a call and wait for its end."""
        return await self.end_of(self.start(type, **params))

    async def result(self, type: str, **params: Any) -> Any:
        """What a call returns."""
        return result_of(await self.run(type, **params))

    @property
    def children(self) -> list[Child]:
        """The processes that can be given calls."""
        return [child for child in self.pool._fleet.children if child.takes_calls]

    @property
    def pids(self) -> set[int]:
        return {child.pid for child in self.children}

    async def until_whole(self) -> None:
        """Wait until there are as many processes as there should be, and no others."""
        if self.pool.handlers:
            await until(lambda: len(self.children) == self.processes == len(self.pool._fleet.children))


def result_of(end: End) -> Any:
    assert end.outcome is Outcome.OK, (end.outcome, end.report)
    return msgspec.json.decode(end.report.result)


async def until_gone(*pids: int) -> None:
    """Wait until no such process exists."""
    await until(lambda: not any(map(is_there, pids)))
