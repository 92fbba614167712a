"""The program `taskd launcher`: takes workers' connections one after the other, and serves each (runner/launcher.py).

As a service it gets a listening socket from the service manager, or makes one; as a child of a worker that is root it
gets the connection itself. It runs as root and answers only root and the user that it was told of.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from taskd.daemon import logs
from taskd.daemon.logs import log
from taskd.daemon.notify import Notifier
from taskd.errors import ConfigError
from taskd.runner.launch_messages import Refused, encode
from taskd.runner.launch_stream import LaunchStream
from taskd.runner.launcher import Session
from taskd.runner.task_user import TaskUser, prepare

LISTEN_FD = 3  # Where the service manager hands over the first socket.
SOCKET_MODE = 0o660
BACKLOG = 16


def run(
    *, user: str, directory: Path, allowed_uid: int, processes_max: int, connection: int | None, path: str | None
) -> int:
    """Serve until told to stop, or until the given connection ends. Returns the exit code. Raises ConfigError."""
    if os.geteuid() != 0:
        raise ConfigError("the launcher has to be root: it starts tasks as another user")
    task_user = TaskUser.named(user)
    logs.set_up("info", "auto", os.environ)
    try:
        prepare(processes_max)
        _make_reachable(directory)
    except OSError as error:
        raise ConfigError(f"the launcher cannot get ready: {error}") from None
    # The standard loop: uvloop keeps a thread of its own, and a process that changes its user must have one only.
    return asyncio.run(_Launcher(task_user, directory, allowed_uid).run(connection, path))


def _make_reachable(directory: Path) -> None:
    directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != 0 or status.st_mode & 0o022:
        raise ConfigError(f"{directory} must belong to root and be writable by nobody else")
    directory.chmod(0o711)


class _Launcher:
    def __init__(self, user: TaskUser, directory: Path, allowed_uid: int) -> None:
        self._user = user
        self._directory = directory
        self._allowed = {0, allowed_uid}
        self._notifier = Notifier(os.environ)

    async def run(self, connection: int | None, path: str | None) -> int:
        task = asyncio.current_task()
        assert task is not None
        end_on_signals(task.cancel)
        try:
            if connection is not None:
                await self._serve(socket.socket(fileno=connection))
            else:
                await self._listen(_listening(path))
        except asyncio.CancelledError:
            self._notifier.stopping("stopping")
        return 0

    async def _listen(self, listener: socket.socket) -> None:
        with listener:
            listener.setblocking(False)
            self._notifier.ready(f"starts tasks as {self._user.name}")
            log("info", "ready to start tasks", user=self._user.name)
            while True:
                connection, _ = await asyncio.get_running_loop().sock_accept(listener)
                await self._serve(connection)

    async def _serve(self, connection: socket.socket) -> None:
        stream = LaunchStream(connection)
        uid = stream.peer_uid
        if uid not in self._allowed:
            log("warning", "a user that may not is refused", uid=uid)
            stream.send(encode(Refused(f"user {uid} may not have tasks started")))
            stream.close()
            return
        with contextlib.suppress(OSError):
            self._notifier.status(f"starts tasks as {self._user.name}; a worker is connected")
        try:
            await Session(stream, self._directory, self._user).run()
        except (OSError, ValueError) as error:
            log("error", "a worker's connection was ended", reason=str(error))
        self._notifier.status(f"starts tasks as {self._user.name}; no worker is connected")


def end_on_signals(end: Callable[[], object]) -> None:
    """Have `end` called by the loop on TERM and INT."""
    loop = asyncio.get_running_loop()

    def hear(number: int, frame: object) -> None:
        loop.call_soon_threadsafe(end)

    # Not by the loop's own way (add_signal_handler): it has each signal written to a socket, which new processes share
    # until they become their program. They are the task user by then, so that any task could end the launcher.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hear)


def _listening(path: str | None) -> socket.socket:
    """The socket of the service manager, or one of our own. Raises ConfigError."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()) and os.environ.get("LISTEN_FDS") == "1":
        os.set_inheritable(LISTEN_FD, False)
        return socket.socket(fileno=LISTEN_FD)
    if path is None:
        raise ConfigError("nowhere to listen: start it by its socket unit, or give --socket")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        before = os.umask(0o777 & ~SOCKET_MODE)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {path}: {error.strerror}") from None
    return listener
