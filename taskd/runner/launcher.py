"""The launcher: starts processes as the task user for one worker, looks after them, and tells how they end.

A worker that must not be able to become anybody else, or to do anything but its work, leaves this to a small process
that is root and does nothing else. It takes no part in deciding: which user that is, it was told by the operator, not
by the worker; where private directories are, it says itself. What the worker tells it is what to run.

Processes are run by the same code as those of a worker that starts them itself (command.py), with the same care for
control groups, strays and memory.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from msgspec import field

from taskd.core.effects import Begin
from taskd.core.task import decode_spec
from taskd.protocol.messages import AttemptEnded, AttemptKey, AttemptStarted
from taskd.runner.base import Place
from taskd.runner.capture import Captured
from taskd.runner.cgroup import Cgroups, delegated
from taskd.runner.command import CommandKind
from taskd.runner.launch_messages import (
    DESCRIPTORS_MAX,
    Launch,
    Prepare,
    Prepared,
    Progress,
    Refused,
    Signal,
    decode_to_launcher,
    encode,
)
from taskd.runner.launch_stream import LaunchStream
from taskd.runner.output import STREAM_BYTES_MAX
from taskd.runner.private_directory import PrivateDirectory
from taskd.runner.reaper import Reaper
from taskd.runner.remover import Remover
from taskd.runner.task_user import TaskUser
from taskd.runner.user_spawner import STANDARD_DESCRIPTORS, Lent, UserSpawner


class Lending:
    """Stands where a worker has its Output (output.py): the worker keeps that itself, and its files come with each
    Launch. Private directories are made here, below `directory`, for the task user alone."""

    stream_bytes_max = STREAM_BYTES_MAX

    def __init__(self, directory: Path, user: TaskUser, reaper: Reaper) -> None:
        self._directory = str(directory)
        self._trash = f"{directory}/trash"
        self._user = user
        self._remover = Remover(self._trash, user, reaper)
        self._came: dict[AttemptKey, tuple[list[int], bool]] = {}
        self._free: list[PrivateDirectory] = []
        self._made = 0

    def open(self) -> None:
        """Begin with no directory. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            self._remover.remove(self._trash)
            for entry in os.scandir(self._directory):
                self._remover.remove(entry.path)
                with contextlib.suppress(OSError):
                    os.rmdir(entry.path)
        os.makedirs(self._directory, 0o711, exist_ok=True)
        os.chmod(self._directory, 0o711)  # noqa: S103  # the task user passes through to what is its own
        os.makedirs(self._trash, 0o700, exist_ok=True)
        os.chown(self._trash, self._user.uid, self._user.gid)
        with self._user.seeing():
            os.stat(self._trash)  # Who cannot come here, cannot run anything.

    def expect(self, key: AttemptKey, descriptors: list[int], is_handler: bool) -> None:
        """These files have come for an attempt that begins in this step."""
        self._came[key] = descriptors, is_handler

    def begin(self, key: AttemptKey) -> Lent:
        """See Output. Raises OSError."""
        descriptors, is_handler = self._came.pop(key)
        try:
            private = self._free.pop() if self._free else self._make_directory()
        except OSError:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return Lent(key, descriptors, private, is_handler)

    def end(self, lent: Lent) -> Captured:
        """See Output: what was written, the worker knows."""
        if lent.private.is_untouched():
            self._free.append(lent.private)
        else:
            self._throw_away(lent.directory)
        return Captured()

    def bound(self) -> list[tuple[AttemptKey, str]]:
        """See Output: the worker does that."""
        return []

    def close(self) -> None:
        """Remove all that is left, as far as that can be. After all processes have ended."""
        self._remover.close()
        for directory in (*(private.path for private in self._free), self._trash, self._directory):
            with contextlib.suppress(OSError):
                os.rmdir(directory)

    def _make_directory(self) -> PrivateDirectory:
        while True:
            self._made += 1
            with contextlib.suppress(FileExistsError):  # It could not be removed when this session began.
                return PrivateDirectory(f"{self._directory}/{self._made}", self._user.uid, self._user.gid)

    def _throw_away(self, directory: str) -> None:
        """Its number is not used again in this session: what cannot be removed now is in nobody's way."""
        with contextlib.suppress(OSError):
            os.rename(directory, f"{self._trash}/{os.path.basename(directory)}")
            self._remover.empty_trash()


class UsersPlace(Place, frozen=True):
    """Handler processes know their attempts from their calls, not from their environment."""

    handlers: set[AttemptKey] = field(default_factory=set)

    def environment(self, key: AttemptKey, directory: str) -> dict[str, str]:
        """See Place."""
        return {} if key in self.handlers else super().environment(key, directory)


class Session:
    """One worker's time with the launcher, from its first word until it closes the stream."""

    def __init__(self, stream: LaunchStream, directory: Path, user: TaskUser) -> None:
        self._stream = stream
        self._directory = directory
        self._user = user
        self._running: set[AttemptKey] = set()

    async def run(self) -> None:
        """Serve the worker, then end what is left of its processes. Raises OSError, and ValueError for what no worker
        says."""
        try:
            prepare = decode_to_launcher(await self._stream.receive())
            if not isinstance(prepare, Prepare):
                raise ValueError("the first word must be Prepare")
            await self._serve(prepare)
        except EOFError:
            pass
        finally:
            self._stream.close()

    async def _serve(self, prepare: Prepare) -> None:
        if prepare.user not in ("", self._user.name):
            why = f"it starts tasks as {self._user.name!r}, and the worker's task_user is {prepare.user!r}"
            self._stream.send(encode(Refused(why)))
            return
        reaper = Reaper(prepare.worker, uid=self._user.uid)
        found = delegated(cpus_are_shared=prepare.cpus_are_shared)
        cgroups = found if isinstance(found, Cgroups) else None
        place = UsersPlace(self._directory, prepare.socket, prepare.worker, handlers=set())
        lending = Lending(self._directory / "tasks", self._user, reaper)
        kind = CommandKind(
            place,
            lambda started, ended: self._on_progress(place, started, ended),
            lending,
            reaper,
            cgroups=cgroups,
            environment={**prepare.environment, **self._user.environment()},
            spawner=lambda null_fd: UserSpawner(null_fd, self._user, reaper, prepare.has_memory_rlimit),
            owner_uid=self._user.uid,
        )
        leftovers = await reaper.open()
        try:
            lending.open()
            await kind.open()
        except OSError as error:
            why = f"no private directories can be made there: {error}"
            if isinstance(error, PermissionError):
                why = (
                    f"{self._user.name!r} cannot come to {self._directory}: let others search what is above (chmod o+x)"
                )
            self._stream.send(encode(Refused(why)))
            await reaper.close()
            return
        why = found if isinstance(found, str) else ""
        self._stream.send(encode(Prepared(os.getpid(), self._user.name, why, leftovers.killed, leftovers.alive)))
        try:
            while True:
                self._obey(decode_to_launcher(await self._stream.receive()), place, lending, kind)
        except EOFError:
            pass
        finally:
            await kind.close()
            await reaper.end_all()  # Or what is left of tasks goes on to write where is to be removed.
            lending.close()
            await reaper.close()

    def _obey(self, frame: Prepare | Launch | Signal, place: UsersPlace, lending: Lending, kind: CommandKind) -> None:
        if isinstance(frame, Launch):
            if not STANDARD_DESCRIPTORS <= frame.descriptors <= DESCRIPTORS_MAX:
                raise ValueError(f"{frame.descriptors} open files")
            if frame.key in self._running:
                raise ValueError("it runs already")  # Of two by one name, one would not be looked after.
            self._running.add(frame.key)
            lending.expect(frame.key, self._stream.take_descriptors(frame.descriptors), frame.is_handler)
            if frame.is_handler:
                place.handlers.add(frame.key)
            kind.start([Begin(frame.key, decode_spec(frame.spec))])
        elif isinstance(frame, Signal):
            (kind.kill if frame.is_kill else kind.terminate)(frame.key)
        else:
            raise ValueError("Prepare was said before")

    def _on_progress(self, place: UsersPlace, started: list[AttemptStarted], ended: list[AttemptEnded]) -> None:
        for it in ended:
            place.handlers.discard(it.key)
            self._running.discard(it.key)
        self._stream.send(encode(Progress(tuple(started), tuple(ended))))
