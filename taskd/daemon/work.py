"""A worker's task processes: opens the runners in order, and says what they offer."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from taskd import paths
from taskd.api.streams import close_stream
from taskd.config import WorkerSettings
from taskd.daemon.capacity import offer
from taskd.daemon.logs import log
from taskd.errors import ConfigError
from taskd.protocol.messages import AttemptEnded, AttemptStarted, Offer
from taskd.runner.archive import Stream
from taskd.runner.base import Kind, OnProgress, Place, base_environment
from taskd.runner.cgroup import Cgroups, delegated
from taskd.runner.command import CommandKind
from taskd.runner.handlers import HandlerPool
from taskd.runner.http import HttpKind
from taskd.runner.launch_messages import Prepare
from taskd.runner.launched import LauncherSettings, Launches
from taskd.runner.launched_command import LaunchedCommandKind
from taskd.runner.output import Output
from taskd.runner.reaper import Reaper
from taskd.runner.runner import Runner
from taskd.runner.secrets import Secrets
from taskd.runner.spawn import Spawner

SWEEP_S = 600.0  # Output is removed by age in days: minutes do not matter.


class Work:
    """The runners of one worker, the outputs they keep, and the offer that follows from them."""

    def __init__(self, directory: Path, store_id: bytes, socket: str, settings: WorkerSettings) -> None:
        self.on_progress: OnProgress | None = None  # set before the first attempt is started
        self._settings = settings
        place = Place(directory, socket, store_id.hex(), settings.environment)
        reaper = Reaper(place.worker)
        launches = _launches(place, settings, reaper)
        self.output = Output(directory, settings.output_stream_bytes_max, is_for_others=launches is not None)
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
            launches=launches,
        )
        command = self._commands(place, reaper) if launches is None else self._launched_commands(launches)
        self.runner = Runner(
            self.output,
            reaper,
            command,
            HttpKind(self._progressed),
            self._pool,
            on_progress=self._progressed,
            secrets=Secrets(Path(settings.secrets_dir or paths.secrets_directory())),
            launches=launches,
        )

    def _commands(self, place: Place, reaper: Reaper) -> Kind:
        settings = self._settings
        found = delegated(cpus_are_shared=settings.cpu_limit == "share")
        cgroups = found if isinstance(found, Cgroups) else None
        if isinstance(found, str):
            log("info", "limits of tasks are not enforced by control groups", reason=found)
        spawner = partial(Spawner, has_memory_rlimit=settings.memory_rlimit)
        return CommandKind(place, self._progressed, self.output, reaper, cgroups=cgroups, spawner=spawner)

    def _launched_commands(self, launches: Launches) -> Kind:
        return LaunchedCommandKind(self._progressed, self.output, launches)

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


def _launches(place: Place, settings: WorkerSettings, reaper: Reaper) -> Launches | None:
    """The way to a launcher, where tasks are to run as another user. Raises ConfigError where there can be none."""
    if not settings.task_user and not settings.launcher:
        return None
    if not settings.launcher and os.geteuid() != 0:
        raise ConfigError(
            f"tasks are to run as {settings.task_user!r}, which only root can start: run the worker as root, "
            "or give the socket of a launcher in [worker] launcher",
            field="worker.task_user",
        )
    prepare = Prepare(
        place.worker,
        place.socket,
        base_environment(settings.environment),
        settings.cpu_limit == "share",
        settings.memory_rlimit,
        settings.task_user,
    )
    directory = _reachable(place, settings)
    launcher = LauncherSettings(prepare, settings.launcher, settings.task_user, directory, settings.task_processes_max)
    return Launches(launcher, reaper)


def _reachable(place: Place, settings: WorkerSettings) -> Path:
    """Where a launcher of our own makes private directories, and its groups: all made ready for it."""
    directory = place.directory / "tasks"
    if not settings.launcher:
        delegated()  # It begins in the leaf that we move to, and makes groups beside that.
        for above in (place.directory, place.directory.parent):
            above.chmod(above.stat().st_mode | 0o111)  # For the task user to pass through, and nothing else.
    return directory
