"""A worker's task processes: opens the runners in order, and says what they offer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

from taskd.api.streams import close_stream
from taskd.config import WorkerSettings
from taskd.daemon.capacity import offer
from taskd.daemon.logs import log
from taskd.protocol.messages import AttemptEnded, AttemptStarted, Offer
from taskd.runner.archive import Stream
from taskd.runner.base import OnProgress, Place
from taskd.runner.cgroup import Cgroups, delegated
from taskd.runner.command import CommandKind
from taskd.runner.handlers import HandlerPool
from taskd.runner.http import HttpKind
from taskd.runner.output import Output
from taskd.runner.reaper import Reaper
from taskd.runner.runner import Runner

SWEEP_S = 600.0  # Output is removed by age in days: minutes do not matter.


class Work:
    """The runners of one worker, the outputs they keep, and the offer that follows from them."""

    def __init__(self, directory: Path, store_id: bytes, socket: str, settings: WorkerSettings) -> None:
        self.on_progress: OnProgress | None = None  # set before the first attempt is started
        self._settings = settings
        place = Place(directory, socket, store_id.hex(), settings.environment)
        self.output = Output(directory, settings.output_stream_bytes_max)
        reaper = Reaper(place.worker)
        found = delegated(cpus_are_shared=settings.cpu_limit == "share")
        cgroups = found if isinstance(found, Cgroups) else None
        if isinstance(found, str):
            log("info", "limits of tasks are not enforced by control groups", reason=found)
        slots = offer(settings, ()).slots
        self._pool = HandlerPool(
            place,
            self._progressed,
            reaper,
            processes=settings.handler_processes or slots,
            modules=settings.handlers,
            path=settings.handler_path,
            calls_max=settings.handler_calls_max,
            memory_max=settings.handler_memory_max,
        )
        command = CommandKind(
            place,
            self._progressed,
            self.output,
            reaper,
            cgroups=cgroups,
            has_memory_rlimit=settings.memory_rlimit,
        )
        self.runner = Runner(self.output, reaper, command, HttpKind(self._progressed), self._pool)

    def _progressed(self, started: list[AttemptStarted], ended: list[AttemptEnded]) -> None:
        assert self.on_progress is not None
        self.on_progress(started, ended)

    async def open(self, stack: AsyncExitStack) -> None:
        """Get ready; closed by the stack."""
        leftovers = await self.runner.open()
        stack.push_async_callback(self.runner.close)
        if leftovers.killed or leftovers.alive:
            log("warning", "processes of an earlier daemon were ended", killed=leftovers.killed, alive=leftovers.alive)

    def offer(self, settings: WorkerSettings) -> Offer:
        """What this worker can run."""
        return offer(settings, tuple(self._pool.handlers))

    async def read_output(
        self, task_id: bytes, attempt: int, stream: str, offset: int, follow: bool
    ) -> AsyncIterator[bytes]:
        """What an attempt wrote."""
        which: Stream = "stderr" if stream == "stderr" else "stdout"
        parts = self.output.stream(task_id, attempt, which, offset, follow)
        try:
            async for part in parts:
                yield part
        finally:
            await close_stream(parts)

    async def keep_tidy(self) -> None:
        """Remove old output from time to time; until cancelled."""
        while True:
            settings = self._settings
            try:
                await asyncio.to_thread(
                    self.output.sweep, time.time(), settings.output_age_max, settings.output_bytes_max
                )
            except OSError as error:
                log("error", "old output cannot be removed", reason=str(error))
            await asyncio.sleep(SWEEP_S)
