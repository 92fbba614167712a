"""The output of tasks on this worker: lent files while they run (capture.py), kept files afterwards (archive.py), and
one way to read both, from any offset, to the end or for as long as an attempt runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

from taskd.protocol.messages import AttemptKey
from taskd.runner.archive import Archive, Swept
from taskd.runner.capture import Capture, Captured, Slots, Stream

STREAM_BYTES_MAX = 256 << 20  # Of one stream of one attempt, by default; past it the oldest part is dropped.
CHUNK_BYTES = 64 << 10
# How long a reader who follows waits before it looks again: short after news, longer in a lull.
POLL_S_MIN, POLL_S_MAX = 0.01, 0.1


class Output:
    """Everything that the attempts of one worker write. `directory` is the worker's state directory."""

    def __init__(self, directory: Path, stream_bytes_max: int = STREAM_BYTES_MAX) -> None:
        self.stream_bytes_max = stream_bytes_max
        self._slots = Slots(directory / "slots")
        self._archive = Archive(directory / "output")
        self._running: dict[tuple[bytes, int], Capture] = {}

    async def open(self) -> None:
        """Take in what a killed daemon's attempts wrote, and get ready. After their processes have ended. Raises
        OSError."""
        self._archive.open()
        for found in self._slots.found():
            self._archive.keep(found.path, found.task_id, found.number, found.stream)
        await self._slots.open()

    def begin(self, key: AttemptKey) -> Capture:
        """Files for an attempt that is about to begin. Raises OSError."""
        capture = self._slots.lend(key)
        self._running[key.task_id, key.number] = capture
        return capture

    def end(self, capture: Capture) -> Captured:
        """The attempt has ended and none of its processes is left: who follows it gets the rest, then the end."""
        key = capture.key
        captured, written = self._slots.take_back(capture)
        for stream, path in written:
            try:
                self._archive.keep(path, key.task_id, key.number, stream)
            except OSError:  # No space for a directory, say: the report has the tail all the same.
                with contextlib.suppress(OSError):
                    os.unlink(path)
        if self._running.get((key.task_id, key.number)) is capture:
            del self._running[key.task_id, key.number]
        return captured

    def bound(self) -> list[tuple[AttemptKey, str]]:
        """Keep every stream of running attempts within its limit. Returns the attempts whose streams the file system
        cannot bound, and why: they have to be ended, or they fill the disk."""
        failed: list[tuple[AttemptKey, str]] = []
        for capture in self._running.values():
            try:
                capture.bound(self.stream_bytes_max)
            except OSError as error:
                failed.append((capture.key, error.strerror or str(error)))
        return failed

    def size(self, task_id: bytes, number: int, stream: Stream) -> int | None:
        """How many bytes an attempt has written so far; None where nothing is here (nothing written, or swept)."""
        path = self._path(task_id, number, stream)
        try:
            return None if path is None else os.stat(path).st_size
        except FileNotFoundError:
            return None

    def read(self, task_id: bytes, number: int, stream: Stream, offset: int, length: int) -> tuple[int, bytes]:
        """At most `length` bytes from `offset` on, and where they begin: later than asked where the bytes there were
        dropped. Empty at the end, and where nothing is here."""
        path = self._path(task_id, number, stream)
        try:
            if path is None:
                return offset, b""
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return offset, b""
        try:
            offset = max(offset, _first_kept(fd))
            return offset, os.pread(fd, length, offset)
        finally:
            os.close(fd)

    async def stream(
        self, task_id: bytes, number: int, stream: Stream, offset: int = 0, follow: bool = False
    ) -> AsyncIterator[bytes]:
        """The bytes from `offset` on in parts of at most 64 KiB; with `follow` until the attempt has ended, each part
        within 0.1 s of being written, and everything written before the end. Dropped bytes are replaced by a line that
        says so. Follow only an attempt that has begun: of one not known here there is nothing to come."""
        capture = self._running.get((task_id, number))
        path = self._path(task_id, number, stream)
        if path is None:
            return
        try:
            # Of its own: the file is moved when the attempt ends, and the descriptor goes with it.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            async with contextlib.aclosing(_parts(fd, capture, stream, offset, follow)) as parts:
                async for part in parts:
                    yield part
        finally:
            os.close(fd)

    def sweep(self, now_s: float, age_max_s: float, bytes_max: int) -> Swept:
        """Remove kept output older than `age_max_s` seconds, then the oldest beyond `bytes_max`. For a thread, on a
        timer. Raises OSError."""
        return self._archive.sweep(now_s, age_max_s, bytes_max)

    async def close(self) -> None:
        """Let go of all files. After all attempts have ended."""
        await self._slots.close()

    def _path(self, task_id: bytes, number: int, stream: Stream) -> str | None:
        capture = self._running.get((task_id, number))
        if capture is not None:
            return capture.slot.files[stream].path
        return self._archive.find(task_id, number, stream)


async def _parts(fd: int, capture: Capture | None, stream: Stream, offset: int, follow: bool) -> AsyncGenerator[bytes]:
    os.posix_fadvise(fd, offset, 0, os.POSIX_FADV_SEQUENTIAL)
    wait_s = POLL_S_MIN
    seen = 0
    while True:
        # Once ended, the file may serve another attempt: no byte beyond the final size is this one's.
        sizes = capture.sizes if capture is not None else None
        size = os.fstat(fd).st_size if sizes is None else sizes[stream]
        if size < seen:  # The task has cut off its own output.
            offset = 0
        seen = size
        if offset < size:
            wait_s = POLL_S_MIN
            kept = _first_kept(fd)
            if kept > offset:
                yield b"[taskd: %d bytes were dropped here, the output is too long to keep it all]\n" % (kept - offset)
                offset = kept
            part = os.pread(fd, min(CHUNK_BYTES, size - offset), offset)
            offset += len(part)
            if part:
                yield part
                continue
        if capture is None or not follow or sizes is not None:
            return
        await _wait_for_end(capture, wait_s)
        wait_s = min(wait_s * 2, POLL_S_MAX)


async def _wait_for_end(capture: Capture, timeout_s: float) -> None:
    if capture.ended is None:
        capture.ended = asyncio.Event()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await capture.ended.wait()


def _first_kept(fd: int) -> int:
    """Where the first byte stands that was not dropped: dropping leaves a hole at the front."""
    try:
        return os.lseek(fd, 0, os.SEEK_DATA)
    except OSError:
        return os.fstat(fd).st_size  # All of it is one hole.
