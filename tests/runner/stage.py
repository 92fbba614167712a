"""A worker's runners on a stage: starts attempts, remembers what is told of them, and waits for it."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

from taskd.core.effects import Begin
from taskd.core.task import ErrorInfo, Outcome, Report, TaskSpec, decode_report
from taskd.protocol.messages import AttemptEnded, AttemptKey, AttemptStarted, Term
from taskd.runner.archive import Stream
from taskd.runner.base import Kind, Place
from taskd.runner.cgroup import Cgroups
from taskd.runner.command import CommandKind
from taskd.runner.limits import OomCounter
from taskd.runner.output import STREAM_BYTES_MAX, Output
from taskd.runner.reaper import Reaper
from taskd.runner.spawn import Spawner

WAIT_S = 20.0  # Never reached, unless something is broken.


class End:
    """How an attempt ended."""

    def __init__(self, told: AttemptEnded) -> None:
        self.told = told
        self.outcome = Outcome(told.outcome)
        self.report: Report = decode_report(told.report)

    @property
    def error(self) -> ErrorInfo:
        assert self.report.error is not None, self.report
        return self.report.error

    @property
    def stdout(self) -> str:
        return self.report.stdout_tail.decode()


class Audience:
    """Hears what kinds tell: each attempt must end exactly once."""

    def __init__(self) -> None:
        self.started: dict[AttemptKey, AttemptStarted] = {}
        self.ended: dict[AttemptKey, End] = {}
        self.calls = 0
        self._changed = asyncio.Event()
        self._numbers: defaultdict[bytes, int] = defaultdict(int)

    def on_progress(self, started: list[AttemptStarted], ended: list[AttemptEnded]) -> None:
        assert started or ended
        self.calls += 1
        for beginning in started:
            assert beginning.key not in self.started
            self.started[beginning.key] = beginning
        for told in ended:
            assert told.key not in self.ended
            self.ended[told.key] = End(told)
        self._changed.set()

    async def until(self, is_so: Callable[[], Any]) -> None:
        """Wait until what was told makes it so."""
        async with asyncio.timeout(WAIT_S):
            while not is_so():
                self._changed.clear()
                await self._changed.wait()

    async def end_of(self, key: AttemptKey) -> End:
        await self.until(lambda: key in self.ended)
        return self.ended[key]

    async def start_of(self, key: AttemptKey) -> AttemptStarted:
        await self.until(lambda: key in self.started or key in self.ended)
        assert key in self.started, self.ended[key].report
        return self.started[key]


class Stage(Audience):
    """Commands on the stage."""

    def __init__(
        self,
        directory: Path,
        *,
        stream_bytes_max: int = STREAM_BYTES_MAX,
        cgroups: Cgroups | None = None,
        oom_counter: OomCounter | None = None,
        has_memory_rlimit: bool = True,
    ) -> None:
        super().__init__()
        self.place = Place(directory, "/run/taskd/taskd.sock", uuid.uuid4().hex)
        self.reaper = Reaper(self.place.worker)
        self.output = Output(directory, stream_bytes_max)
        self.kind: Kind = CommandKind(
            self.place, self.on_progress, self.output, self.reaper, cgroups=cgroups, oom_counter=oom_counter,
            spawner=partial(Spawner, has_memory_rlimit=has_memory_rlimit),
        )  # fmt: skip

    async def __aenter__(self) -> Stage:
        await self.reaper.open()
        await self.output.open()
        await self.kind.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kind.close()
        await self.output.close()
        await self.reaper.close()

    def start(self, *argv: str, **spec: Any) -> AttemptKey:
        """Start an attempt of a new task."""
        key = new_key()
        self.kind.start([Begin(key, TaskSpec(type="command", argv=argv, **spec))])
        return key

    async def run(self, *argv: str, **spec: Any) -> End:
        """Run a task to its end."""
        return await self.end_of(self.start(*argv, **spec))

    def follow(self, key: AttemptKey, stream: Stream = "stdout", offset: int = 0) -> Follower:
        return Follower(self.output.stream(key.task_id, key.number, stream, offset, follow=True))

    def read(self, key: AttemptKey, stream: Stream = "stdout", offset: int = 0, length: int = 1 << 20) -> bytes:
        return self.output.read(key.task_id, key.number, stream, offset, length)[1]


class Follower:
    """Reads a followed output line by line."""

    def __init__(self, parts: Any) -> None:
        self._parts = parts
        self._rest = b""

    async def line(self) -> str:
        """The next line; empty at the end."""
        async with asyncio.timeout(WAIT_S):
            while b"\n" not in self._rest:
                part = await anext(self._parts, b"")
                if not part:
                    break
                self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    async def rest(self) -> bytes:
        """Everything up to the end."""
        async with asyncio.timeout(WAIT_S):
            async for part in self._parts:
                self._rest += part
        return self._rest

    async def close(self) -> None:
        await self._parts.aclose()


def new_key(number: int = 1) -> AttemptKey:
    return AttemptKey(uuid.uuid4().bytes, number, Term(3, 17, 99), 5)


async def until(is_so: Callable[[], Any]) -> None:
    """Wait until something in the world is so that tells nobody."""
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.002)


def child(script: str, *, own_session: bool = False, environment: dict[str, str] | None = None) -> Popen[bytes]:
    """A process that no runner knows of."""
    return Popen(["/bin/sh", "-c", script], stdout=PIPE, start_new_session=own_session, env=environment)


def is_there(pid: int) -> bool:
    """Whether a process exists, be it as a zombie."""
    return os.path.exists(f"/proc/{pid}")


def own_children() -> list[int]:
    """Child processes of this process, zombies included."""
    own = os.getpid()
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except OSError:
            continue
        if parent == own:
            found.append(int(name))
    return found
