"""The worker's side of a launcher (launcher.py): the connection to it, made again when it is lost, and who is told of
which process.

Either the launcher listens on a Unix socket, as a service of its own, or it is a child of this daemon, which is root
then. It must be root itself: nobody else can do what it is there for, and a socket of somebody else is not believed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from taskd import interpreter
from taskd.core.task import ErrorInfo, TaskSpec
from taskd.core.task import encode as encode_spec
from taskd.errors import ConfigError
from taskd.protocol.messages import AttemptEnded, AttemptKey, AttemptStarted
from taskd.runner.base import error_info
from taskd.runner.launch_messages import (
    Launch,
    Prepare,
    Prepared,
    Progress,
    Refused,
    Signal,
    decode_to_worker,
    encode,
)
from taskd.runner.launch_stream import LaunchStream
from taskd.runner.reaper import Reaper

CONNECT_S_MAX = 30.0  # A machine that has just been switched on is slow.
RETRY_S = 0.5
LEAVE_S_MAX = 15.0  # For the launcher to end what it has started.

_logger = logging.getLogger("taskd")


class Launching(Protocol):
    """Who wants to know of processes that were launched. Each is heard of exactly once as ended or lost."""

    def on_started(self, started: AttemptStarted) -> None:
        """It began a moment ago."""

    def on_ended(self, ended: AttemptEnded) -> None:
        """It has ended, with all that it had started."""

    def on_lost(self, key: AttemptKey, error: ErrorInfo) -> None:
        """The launcher is gone, and so is the process, or will be in a moment."""


class _Wanted(msgspec.Struct, frozen=True):
    """A process that is to be launched when there is a launcher again."""

    frame: bytes
    descriptors: Sequence[int]


class LauncherSettings(msgspec.Struct, frozen=True):
    """Which launcher, and how it is to be prepared. Without `socket` it is started with the other two."""

    prepare: Prepare
    socket: str
    user: str
    directory: Path
    processes_max: int = 16_384


class Launches:
    """The processes that the launcher runs for this worker."""

    def __init__(self, settings: LauncherSettings, reaper: Reaper) -> None:
        self._settings = settings
        self._reaper = reaper
        self._stream: LaunchStream | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted: dict[AttemptKey, _Wanted] = {}  # to be launched at the next launcher
        self._running: dict[AttemptKey, Launching] = {}
        self._listener: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Find the launcher, or start it. Raises ConfigError where there is none that can serve."""
        try:
            async with asyncio.timeout(CONNECT_S_MAX):
                prepared = await self._connect()
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            await self._let_go()
            what = self._settings.socket or f"of this daemon, for the user {self._settings.user!r},"
            raise ConfigError(f"the launcher {what} does not answer: {_words(error)}") from None
        self._say(logging.INFO, "tasks run as another user", user=prepared.user, launcher=prepared.pid)
        if prepared.no_groups_because:
            self._say(logging.INFO, "limits of tasks are not enforced by groups", reason=prepared.no_groups_because)
        if prepared.killed or prepared.alive:
            killed, alive = prepared.killed, prepared.alive
            self._say(logging.WARNING, "processes of an earlier daemon were ended", killed=killed, alive=alive)
        self._listener = asyncio.create_task(self._listen())

    async def close(self) -> None:
        """Let go of the launcher, which ends what still runs. Whoever waits for it has been told before."""
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.wait([self._listener])
        await self._let_go()
        for wanted in self._wanted.values():
            _close_all(wanted.descriptors)
        self._wanted.clear()
        self._lose("the worker stops")

    def launch(
        self, key: AttemptKey, spec: TaskSpec, descriptors: Sequence[int], owner: Launching, *, is_handler: bool = False
    ) -> None:
        """Start a process: `descriptors` are its stdout, its stderr, and for a handler more. They are given away."""
        frame = encode(Launch(key, encode_spec(spec), is_handler, len(descriptors)))
        self._running[key] = owner
        if self._stream is None:
            self._wanted[key] = _Wanted(frame, descriptors)
        else:
            self._stream.send(frame, descriptors)

    def signal(self, key: AttemptKey, *, is_kill: bool) -> None:
        """TERM to its process group, or KILL to all of it. What is not running is passed over."""
        wanted = self._wanted.pop(key, None)
        if wanted is not None:
            _close_all(wanted.descriptors)
            error = error_info("NotStarted", "it was ended before there was a launcher to start it")
            asyncio.get_running_loop().call_soon(self._running.pop(key).on_lost, key, error)
        elif key in self._running and self._stream is not None:
            self._stream.send(encode(Signal(key, is_kill)))

    # -- The connection ------------------------------------------------------------------------------------------------

    async def _connect(self) -> Prepared:
        connection = await self._reach() if self._settings.socket else self._start()
        self._stream = stream = LaunchStream(connection)
        if self._settings.socket and stream.peer_uid != 0:
            raise ValueError(f"it runs as user {stream.peer_uid}, not as root")
        stream.send(encode(self._settings.prepare))
        answer = decode_to_worker(await stream.receive())
        if isinstance(answer, Refused):
            raise ValueError(answer.reason)
        if not isinstance(answer, Prepared):
            raise ValueError("it does not say what a launcher says")
        return answer

    async def _reach(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, self._settings.socket)
        except BaseException:
            connection.close()
            raise
        return connection

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    launcher_command(theirs.fileno(), self._settings),
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=interpreter.environment(os.environ),
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        self._reaper.own(self._process.pid)
        return ours

    async def _listen(self) -> None:
        """Hear what the launcher says, and find it again when it is lost; until cancelled."""
        while True:
            why = await self._hear()
            self._say(logging.ERROR, "the launcher is lost, and what it ran", reason=why, tasks=len(self._running))
            await self._let_go()
            self._lose(f"the launcher is gone: {why}")
            while self._stream is None:
                await asyncio.sleep(RETRY_S)
                try:
                    async with asyncio.timeout(CONNECT_S_MAX):
                        await self._connect()
                except (OSError, EOFError, ValueError, TimeoutError) as error:
                    self._say(logging.WARNING, "the launcher does not answer", reason=_words(error))
                    await self._let_go()
            self._say(logging.INFO, "the launcher is there again")
            wanted, self._wanted = self._wanted, {}
            for it in wanted.values():
                self._stream.send(it.frame, it.descriptors)

    async def _hear(self) -> str:
        """Until the connection ends; returns why."""
        assert self._stream is not None
        try:
            while True:
                frame = decode_to_worker(await self._stream.receive())
                if not isinstance(frame, Progress):
                    return "it says what it must not"
                for started in frame.started:
                    if (owner := self._running.get(started.key)) is not None:
                        owner.on_started(started)
                for ended in frame.ended:
                    if (owner := self._running.pop(ended.key, None)) is not None:
                        owner.on_ended(ended)
        except EOFError:
            return "it has ended"
        except (ValueError, msgspec.MsgspecError) as error:
            return str(error)

    async def _let_go(self) -> None:
        """Close the connection; of a child wait for the end, so that nothing that it ran is left."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        process, self._process = self._process, None
        if process is not None:
            await _end_of(process)
            self._reaper.disown(process.pid)
            await self._reaper.end_all()  # Had it been killed, what it ran is ours now.

    def _lose(self, why: str) -> None:
        error = error_info("LauncherLost", why)
        lost = {key: owner for key, owner in self._running.items() if key not in self._wanted}
        for key, owner in lost.items():
            del self._running[key]
            owner.on_lost(key, error)

    @staticmethod
    def _say(level: int, event: str, **fields: object) -> None:
        _logger.log(level, event, extra={"fields": fields})


def _words(error: Exception) -> str:
    if isinstance(error, EOFError):
        return "it ended at once, and said why in its own log"
    return str(error) or f"nothing came within {CONNECT_S_MAX:g} s"


def launcher_command(descriptor: int, settings: LauncherSettings) -> list[str]:
    """The command that starts a launcher on an open connection."""
    program = [sys.executable] if interpreter.is_self_contained() else [sys.executable, "-P", "-m", "taskd"]
    return [
        *program, "launcher", "--connection", str(descriptor), "--user", settings.user,
        "--directory", str(settings.directory), "--processes-max", str(settings.processes_max),
    ]  # fmt: skip


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


async def _end_of(process: subprocess.Popen[bytes]) -> None:
    """Wait for its end; bring it about where it takes too long."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    with contextlib.suppress(OSError):
        pidfd = os.pidfd_open(process.pid)
        loop.add_reader(pidfd, ended.set)
        try:
            async with asyncio.timeout(LEAVE_S_MAX):
                await ended.wait()
        except TimeoutError:
            process.kill()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
    process.wait()
