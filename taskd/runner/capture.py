"""Where a running task writes: two files, one a stream, and a private directory, all lent from a pool of slots.

The task's stdout and stderr are the files themselves, so nothing is lost with the daemon, and nothing waits for a
grandchild that keeps a pipe open. Files are lent because making and removing them is what costs: on ext4 a creation
after many removals takes 0.6 ms, as much as the rest of a short task. A short output is copied into the archive, and
its file serves the next task, if a read lease shows that nobody can write to it any more; a long one is moved there
with its file. A table on the disk says which attempt has which slot, so that nothing written is lost when the daemon is
killed.

A stream is bounded while it grows: past its limit its oldest part is given back to the disk (a hole at the front;
offsets stay true), and the task goes on. Between two looks it can overshoot by what it writes in that time.

One thing differs from a pipe: `echo text > /dev/stderr` opens the file anew and cuts off what stood in it; `>&2` does
not.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import struct
from pathlib import Path

from msgspec import Struct

from taskd.core.task import OUTPUT_TAIL_BYTES
from taskd.protocol.messages import AttemptKey
from taskd.runner.archive import STREAMS, Archive, Stream
from taskd.runner.private_directory import PrivateDirectory

_RECORD = struct.Struct(">16sQ")  # Of the table, by slot number: task id, number of the attempt.
_BLOCK_BYTES = 4096
_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)
# By this name it takes 64-bit offsets wherever it exists; elsewhere (musl) the plain name does.
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Captured(Struct, frozen=True):
    """What an attempt wrote: sizes, and the last OUTPUT_TAIL_BYTES of each stream."""

    stdout_bytes: int = 0
    stderr_bytes: int = 0
    stdout_tail: bytes = b""
    stderr_tail: bytes = b""


class StreamFile:
    """One file of a slot. `read_fd` stays open as long as the file serves."""

    __slots__ = ("_dropped", "_is_for_others", "path", "read_fd")

    def __init__(self, path: str, is_for_others: bool) -> None:
        self.path = path
        self._is_for_others = is_for_others
        self.read_fd = -1
        self._dropped = 0

    def lend(self) -> int:
        """A descriptor for a task to append by. Raises OSError."""
        if self.read_fd < 0:
            self.read_fd = os.open(self.path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._dropped = 0
            if self._is_for_others:
                # For another user's `echo text > /dev/stderr`: by its path nobody else comes to it.
                os.fchmod(self.read_fd, 0o622)
            # Who opens the file in the instant that the lease is held makes the kernel tell us: by a signal that is
            # passed over, where its own choice (SIGIO) would end the daemon.
            fcntl.fcntl(self.read_fd, fcntl.F_SETSIG, signal.SIGURG)
        # A descriptor of its own for each task: only so can the lease tell whether one is still held.
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)

    def size(self) -> int:
        return os.fstat(self.read_fd).st_size

    def tail(self, size: int) -> bytes:
        """Empty where the disk does not give it back."""
        if size:
            with contextlib.suppress(OSError):
                return os.pread(self.read_fd, OUTPUT_TAIL_BYTES, max(0, size - OUTPUT_TAIL_BYTES))
        return b""

    def is_unused(self) -> bool:
        """Whether nobody can write to it any more. False where the file system cannot tell."""
        try:
            fcntl.fcntl(self.read_fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(self.read_fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError:
            return False
        return True

    def bound(self, bytes_max: int) -> None:
        """Past `bytes_max` give all but the newest half of that back to the disk. Raises OSError."""
        size = self.size()
        if size < self._dropped:  # The task has cut it off.
            self._dropped = 0
        if size - self._dropped <= bytes_max:
            return
        until = (size - bytes_max // 2) // _BLOCK_BYTES * _BLOCK_BYTES
        write_fd = os.open(self.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if _fallocate(write_fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, 0, until) != 0:
                error = ctypes.get_errno()
                raise OSError(error, os.strerror(error), self.path)
        finally:
            os.close(write_fd)
        self._dropped = until

    def clear(self) -> None:
        """Empty it for the next task. Raises OSError."""
        # Through a descriptor that is closed then: after a truncation file systems write a file out when it is closed
        # next, against loss; so that costs nothing here, and not 0.2 ms at the next task's end.
        fd = os.open(self.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.ftruncate(fd, 0)
        finally:
            os.close(fd)
        self._dropped = 0

    def discard(self) -> None:
        """Remove it: the next task gets another."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        self.close()

    def close(self) -> None:
        if self.read_fd >= 0:
            os.close(self.read_fd)
            self.read_fd = -1


class Slot:
    """Two files and a directory for one task at a time."""

    __slots__ = ("directory", "files", "number", "private", "task_directory")

    def __init__(self, directory: str, number: int, is_for_others: bool) -> None:
        self.number = number
        self.directory = f"{directory}/{number}"
        self.task_directory = f"{self.directory}/task"
        self.files = {stream: StreamFile(f"{self.directory}/{stream}", is_for_others) for stream in STREAMS}
        os.mkdir(self.directory, 0o700)
        self.make_directory()

    def make_directory(self) -> None:
        """An empty one for the next task."""
        self.private = PrivateDirectory(self.task_directory)

    def close(self) -> None:
        for file in self.files.values():
            file.close()


class Capture:
    """What one attempt is lent, from its beginning to its end. The two descriptors are for its process alone."""

    __slots__ = ("ended", "key", "sizes", "slot", "stderr_fd", "stdout_fd", "tails")

    def __init__(self, key: AttemptKey, slot: Slot) -> None:
        self.key = key
        self.slot = slot
        self.sizes: dict[Stream, int] | None = None  # None until the attempt has ended
        self.tails: dict[Stream, bytes] = {}  # the last OUTPUT_TAIL_BYTES of each, when it has ended
        self.ended: asyncio.Event | None = None  # made by the first who waits for the end
        self.stdout_fd = slot.files["stdout"].lend()
        try:
            self.stderr_fd = slot.files["stderr"].lend()
        except OSError:
            os.close(self.stdout_fd)
            raise

    @property
    def directory(self) -> str:
        """The attempt's private directory."""
        return self.slot.task_directory

    def close_descriptors(self) -> None:
        """The process has them now (or never will)."""
        os.close(self.stdout_fd)
        os.close(self.stderr_fd)

    def bound(self, bytes_max: int) -> None:
        """Keep each stream within `bytes_max`. Raises OSError where the file system cannot."""
        for file in self.slot.files.values():
            file.bound(bytes_max)


class Slots:
    """All slots of one worker, in `directory`, which is theirs alone."""

    def __init__(self, directory: Path, archive: Archive, stream_bytes_max: int, is_for_others: bool) -> None:
        self._directory = str(directory)
        self._stream_bytes_max = stream_bytes_max
        self._is_for_others = is_for_others  # tasks run as another user
        self._archive = archive
        self._trash = Trash(f"{directory}/trash")
        self._free: list[Slot] = []
        self._count = 0
        self._table_fd = -1

    async def open(self) -> None:
        """Take in what a killed daemon's attempts wrote, then begin with no slot. Raises OSError."""
        await asyncio.to_thread(self._rescue)
        await asyncio.to_thread(remove_tree, self._directory)
        os.makedirs(self._directory, 0o700, exist_ok=True)
        os.mkdir(self._trash.directory, 0o700)
        self._table_fd = os.open(f"{self._directory}/table", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _rescue(self) -> None:
        try:
            with open(f"{self._directory}/table", "rb") as file:
                table = file.read()
        except FileNotFoundError:
            return
        for number in range(len(table) // _RECORD.size):
            task_id, attempt = _RECORD.unpack_from(table, number * _RECORD.size)
            for stream in STREAMS:
                path = f"{self._directory}/{number}/{stream}"
                with contextlib.suppress(FileNotFoundError):
                    if os.stat(path).st_size:
                        self._archive.keep_file(path, task_id, attempt, stream)

    def lend(self, key: AttemptKey) -> Capture:
        """A slot for one attempt. Raises OSError."""
        if self._free:
            slot = self._free.pop()
        else:
            self._count += 1
            slot = Slot(self._directory, self._count - 1, self._is_for_others)
        try:
            os.pwrite(self._table_fd, _RECORD.pack(key.task_id, key.number), slot.number * _RECORD.size)
            return Capture(key, slot)
        except OSError:
            self._give_up(slot)
            raise

    def take_back(self, capture: Capture) -> Captured:
        """The attempt has ended, and none of its processes is left: what it wrote, which is in the archive now."""
        sizes: dict[Stream, int] = {}
        for stream, file in capture.slot.files.items():
            size = sizes[stream] = file.size()
            capture.tails[stream] = file.tail(size)
            self._put_away(capture, stream, file, size)
        capture.sizes = sizes
        if capture.ended is not None:
            capture.ended.set()
        self._restore_directory(capture.slot)
        return Captured(sizes["stdout"], sizes["stderr"], capture.tails["stdout"], capture.tails["stderr"])

    def _put_away(self, capture: Capture, stream: Stream, file: StreamFile, size: int) -> None:
        key, tail = capture.key, capture.tails[stream]
        # Where it cannot be kept (a full disk), the report has its tail all the same.
        try:
            if len(tail) < size:
                file.bound(self._stream_bytes_max)  # It may have written much since the last look.
                self._archive.keep_file(file.path, key.task_id, key.number, stream)
                return file.close()
            if size:
                self._archive.keep_bytes(tail, key.task_id, key.number, stream)
            if not file.is_unused():
                return file.discard()
            if size:
                file.clear()
        except OSError:
            file.discard()
        return None

    async def close(self) -> None:
        """Let go of all files; nothing is lent any more."""
        for slot in self._free:
            slot.close()
        self._free.clear()
        await self._trash.close()
        if self._table_fd >= 0:
            os.close(self._table_fd)
            self._table_fd = -1

    def _restore_directory(self, slot: Slot) -> None:
        try:
            if not slot.private.is_untouched():
                self._trash.add(slot.task_directory)
                slot.make_directory()
        except OSError:
            return self._give_up(slot)
        return self._free.append(slot)

    def _give_up(self, slot: Slot) -> None:
        """Somebody has tampered with it, or the disk is full: leave what is there to the next `open`."""
        slot.close()


class Trash:
    """Removes directory trees in a thread, one after another: a task can leave a million files behind."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._count = 0
        self._removing: asyncio.Future[None] | None = None
        self._is_waiting = False

    def add(self, path: str) -> None:
        """Take this tree away now, and remove it soon. One that does not exist is passed over. Raises OSError."""
        self._count += 1
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, f"{self.directory}/{self._count}")
        if self._removing is None:
            self._remove()
        else:
            self._is_waiting = True

    async def close(self) -> None:
        """Wait until all is removed."""
        while self._removing is not None:
            await asyncio.wait([self._removing])

    def _remove(self) -> None:
        self._is_waiting = False
        self._removing = asyncio.get_running_loop().run_in_executor(None, remove_contents, self.directory)
        self._removing.add_done_callback(self._removed)

    def _removed(self, future: asyncio.Future[None]) -> None:
        future.exception()  # Looked at, and left: what could not be removed is tried again at the next start.
        self._removing = None
        if self._is_waiting:
            self._remove()


def remove_contents(directory: str) -> None:
    """Remove all that is in a directory, as `remove_tree` does. Raises OSError where it cannot be listed."""
    for name in os.listdir(directory):
        remove_tree(f"{directory}/{name}")


def remove_tree(path: str) -> None:
    """Remove a directory tree, or whatever stands there, as far as possible, even where directories in it forbid it."""
    with contextlib.suppress(OSError):
        os.unlink(path)
    shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):
        for directory, _, _ in os.walk(path):
            with contextlib.suppress(OSError):
                os.chmod(directory, 0o700)
                for entry in os.scandir(directory):
                    if entry.is_dir(follow_symlinks=False):
                        os.chmod(entry.path, 0o700)
        shutil.rmtree(path, ignore_errors=True)
