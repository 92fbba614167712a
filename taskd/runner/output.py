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
from taskd.runner.archive import Archive, Stream, Swept
from taskd.runner.bundle import Kept
from taskd.runner.capture import Capture, Captured, Slots

STREAM_BYTES_MAX = 256 << 20  # Of one stream of one attempt, by default; past it the oldest part is dropped.
CHUNK_BYTES = 64 << 10
# How long a reader who follows waits before it looks again: short after news, longer in a lull.
POLL_S_MIN, POLL_S_MAX = 0.01, 0.1


class Output:
    """Everything that the attempts of one worker write. `directory` is the worker's state directory; `is_for_others`
    says that they run as another user."""

    def __init__(
        self, directory: Path, stream_bytes_max: int = STREAM_BYTES_MAX, *, is_for_others: bool = False
    ) -> None:
        self.stream_bytes_max = stream_bytes_max
        self._archive = Archive(directory / "output")
        self._slots = Slots(directory / "slots", self._archive, stream_bytes_max, is_for_others)
        self._running: dict[tuple[bytes, int], Capture] = {}

    async def open(self) -> None:
        """Take in what a killed daemon's attempts wrote, and get ready. After their processes have ended. Raises
        OSError."""
        self._archive.open()
        await self._slots.open()

    def begin(self, key: AttemptKey) -> Capture:
        """Files for an attempt that is about to begin. Raises OSError."""
        capture = self._slots.lend(key)
        self._running[key.task_id, key.number] = capture
        return capture

    def end(self, capture: Capture) -> Captured:
        """The attempt has ended and none of its processes is left: who follows it gets the rest, then the end."""
        key = capture.key
        captured = self._slots.take_back(capture)
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
        kept = self._find(task_id, number, stream)
        return None if kept is None else kept.size

    def read(self, task_id: bytes, number: int, stream: Stream, offset: int, length: int) -> tuple[int, bytes]:
        """At most `length` bytes from `offset` on, and where they begin: later than asked where the bytes there were
        dropped. Empty at the end, and where nothing is here."""
        kept = self._find(task_id, number, stream)
        fd = -1 if kept is None else _open(kept.path)
        if kept is None or fd < 0:
            return offset, b""
        try:
            offset = max(offset, _first_kept(fd, kept))
            return offset, os.pread(fd, max(0, min(length, kept.size - offset)), kept.start + offset)
        finally:
            os.close(fd)

    async def stream(
        self, task_id: bytes, number: int, stream: Stream, offset: int = 0, follow: bool = False
    ) -> AsyncIterator[bytes]:
        """The bytes from `offset` on in parts of at most 64 KiB; with `follow` until the attempt has ended, each part
        within 0.1 s of being written, and everything written before the end. Dropped bytes are replaced by a line that
        says so. Follow only an attempt that has begun: of one not known here there is nothing to come."""
        capture = self._running.get((task_id, number))
        if capture is None:
            # In a thread: among very many outputs the search takes a while.
            kept = await asyncio.to_thread(self._archive.find, task_id, number, stream)
        else:
            kept = self._find(task_id, number, stream)
        # A descriptor of its own: the file may be moved when the attempt ends.
        fd = -1 if kept is None else _open(kept.path)
        if kept is None or fd < 0:
            return
        try:
            if capture is None:
                source = _kept_parts(fd, kept, offset)
            else:
                source = _live_parts(fd, capture, stream, offset, follow)
            async with contextlib.aclosing(source) as parts:
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
        self._archive.close()

    def _find(self, task_id: bytes, number: int, stream: Stream) -> Kept | None:
        capture = self._running.get((task_id, number))
        if capture is None:
            return self._archive.find(task_id, number, stream)
        file = capture.slot.files[stream]
        return Kept(file.path, 0, file.size())


async def _kept_parts(fd: int, kept: Kept, offset: int) -> AsyncGenerator[bytes]:
    """Of an attempt that has ended."""
    os.posix_fadvise(fd, kept.start + offset, kept.size, os.POSIX_FADV_SEQUENTIAL)
    while offset < kept.size:
        at, part = _read_part(fd, kept, offset)
        if at > offset:
            yield _notice(at - offset)
        if not part:
            return
        yield part
        offset = at + len(part)


async def _live_parts(fd: int, capture: Capture, stream: Stream, offset: int, follow: bool) -> AsyncGenerator[bytes]:
    """Of an attempt that ran when this began."""
    wait_s = POLL_S_MIN
    seen = 0
    while True:
        has_ended = capture.sizes is not None
        size = os.fstat(fd).st_size if capture.sizes is None else capture.sizes[stream]
        if size < seen:  # The task has cut off its own output.
            offset = 0
        seen = size
        if has_ended and len(capture.tails[stream]) == size:
            # What was short was copied, and its file may be another attempt's by now.
            if offset < size:
                yield capture.tails[stream][offset:]
            return
        if offset < size:
            at, part = _read_part(fd, Kept("", 0, size), offset)
            if at > offset:
                yield _notice(at - offset)
            offset = at + len(part)
            if part:
                wait_s = POLL_S_MIN
                yield part
                continue
        if has_ended or not follow:
            return
        await _wait_for_end(capture, wait_s)
        wait_s = min(wait_s * 2, POLL_S_MAX)


async def _wait_for_end(capture: Capture, timeout_s: float) -> None:
    if capture.ended is None:
        capture.ended = asyncio.Event()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await capture.ended.wait()


def _read_part(fd: int, kept: Kept, offset: int) -> tuple[int, bytes]:
    """Where the next bytes are that were not dropped, and some of them; none at the end."""
    at = max(offset, _first_kept(fd, kept))
    return at, os.pread(fd, max(0, min(CHUNK_BYTES, kept.size - at)), kept.start + at)


def _first_kept(fd: int, kept: Kept) -> int:
    """Dropping leaves a hole at the front of a file; a bundle has none."""
    try:
        return min(os.lseek(fd, 0, os.SEEK_DATA), kept.size)
    except OSError:  # All of it is one hole.
        return kept.size


def _notice(dropped: int) -> bytes:
    return b"[taskd: %d bytes were dropped here, the output is too long to keep it all]\n" % dropped


def _open(path: str) -> int:
    """-1 where it is no longer there."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1
