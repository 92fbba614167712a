"""The worker's journal: what must outlive its process. Attempts begun, outcomes until acknowledged, the greatest term.

Appending is one write, which the process's death does not undo; only `sync` also guards against the machine's. The file
grows, and is written anew with what still matters when it has become large. All of that fits into memory: the core
bounds how many outcomes wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
from msgspec import Struct

from taskd.core.effects import Journal as JournalEffect
from taskd.core.events import JournalLoaded
from taskd.errors import StoreError
from taskd.protocol.messages import AttemptEnded, AttemptKey, Term
from taskd.store.records import MAGIC, Ending, Records, pack

COMPACT_BYTES = 8 << 20  # From here on the file is written anew, or from twice of what it had then, if that is more.
RECORD_BYTES = 1 << 20  # About so much goes into one record when the file is written anew.
COPY_BYTES = 1 << 20


class _Entry(Struct, array_like=True, frozen=True):
    """One record. `is_fresh`: forget all earlier ones."""

    is_fresh: bool
    term: Term | None
    begun: list[AttemptKey]
    ended: list[AttemptEnded]
    acknowledged: list[AttemptKey]
    proof: bytes = b""  # of the term


class Damage(Struct, frozen=True):
    """A part of the file that could not be read, and where it was put. Outcomes in it are lost: those tasks run again
    or fail, as their `on_lost` says."""

    moved_to: Path
    size_bytes: int


_encode = msgspec.msgpack.Encoder().encode
_decode_entry = msgspec.msgpack.Decoder(_Entry).decode


class _Live:
    """What the journal says, all records taken together."""

    def __init__(self) -> None:
        self.term: Term | None = None
        self.proof = b""
        self.open: dict[AttemptKey, None] = {}
        self.ended: dict[AttemptKey, AttemptEnded] = {}

    def take(self, entry: _Entry | JournalEffect) -> None:
        """What one record adds."""
        term = entry.term
        if term is not None and (self.term is None or term.rank() >= self.term.rank()):
            self.term, self.proof = term, entry.proof
        for key in entry.begun:
            self.open[key] = None
        for ended in entry.ended:
            self.open.pop(ended.key, None)
            self.ended[ended.key] = ended
        for key in entry.acknowledged:
            self.open.pop(key, None)
            self.ended.pop(key, None)

    def records(self) -> Iterator[bytes]:
        """All of it as records, from a copy made now."""
        first = _Entry(True, self.term, list(self.open), [], [], self.proof)
        ended = list(self.ended.values())
        return _records(first, ended)


def _records(first: _Entry, ended: list[AttemptEnded]) -> Iterator[bytes]:
    yield pack(_encode(first))
    part: list[AttemptEnded] = []
    size_bytes = 0
    for outcome in ended:
        part.append(outcome)
        size_bytes += len(outcome.report) + 100
        if size_bytes >= RECORD_BYTES:
            yield pack(_encode(_Entry(False, None, [], part, [])))
            part, size_bytes = [], 0
    if part:
        yield pack(_encode(_Entry(False, None, [], part, [])))


class Journal:
    """The open journal of one worker. Used from one event loop; its fsyncs happen in a thread."""

    damage: Damage | None
    """What was found damaged at opening."""

    def __init__(self, path: Path, fd: int, size_bytes: int, live: _Live, damage: Damage | None) -> None:
        self.damage = damage
        self._path = path
        self._fd = fd  # -1: closed
        self._size_bytes = size_bytes  # of good records; after a failed write the file may be longer
        self._live = live
        self._compact_at_bytes = COMPACT_BYTES
        self._is_behind = False  # a write failed: the file lacks something that memory has
        self._is_unsound = False  # an fsync failed: nobody knows what of this file is on the disk
        self._is_entered = False  # whether the directory is known to name this very file
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._work: asyncio.Future[None] | None = None  # what the thread does
        self._rewrite: _Rewrite | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Journal:
        """Open or make the journal. A record cut short at the end is dropped. Damage is set aside in `PATH.damaged`,
        with all that follows it, and told in `damage`. Raises StoreError."""
        path = Path(path).absolute()
        try:
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"{path} cannot be opened: {error.strerror}") from error
        try:
            live, good_bytes, ending = _read(path)
            damage = _set_aside(path, good_bytes) if ending is Ending.DAMAGED else None
            os.ftruncate(fd, good_bytes)
            if not good_bytes:
                good_bytes = os.write(fd, MAGIC)
            return cls(path, fd, good_bytes, live, damage)
        except OSError as error:
            os.close(fd)
            raise StoreError(f"{path} cannot be read or mended: {error.strerror}") from error

    def load(self) -> JournalLoaded:
        """What the last process left behind. To be asked once, right after opening."""
        return JournalLoaded(self._live.term, list(self._live.open), list(self._live.ended.values()), self._live.proof)

    def append(self, records: JournalEffect) -> None:
        """Write down, so that it outlives this process. On the loop. Raises StoreError; then it is written with the
        next append, for nothing is forgotten."""
        assert self._fd >= 0, "the journal is closed"
        self._live.take(records)
        if self._is_behind:
            self._catch_up()
        else:
            entry = _Entry(False, records.term, records.begun, records.ended, records.acknowledged, records.proof)
            self._write(pack(_encode(entry)))
        if self._size_bytes >= self._compact_at_bytes and self._work is None:
            self._begin_rewrite()

    async def sync(self) -> None:
        """Have all that was appended outlive a crash of the machine too. Raises StoreError."""
        while self._work is not None:
            await asyncio.wait([self._work])
        assert self._fd >= 0, "the journal is closed"
        if self._is_behind:
            self._catch_up()
        try:
            if self._is_unsound:
                # The same fsync again would report success, though the data may be gone: a new file is needed.
                await asyncio.shield(self._begin_rewrite())
            if not self._is_unsound:
                await asyncio.shield(self._begin_sync())
        except OSError as error:
            raise StoreError(f"{self._path} cannot be made safe: {error.strerror}") from error
        if self._is_unsound:
            raise StoreError(f"{self._path} cannot be made safe: it could not be written anew")

    def close(self) -> None:
        """Let go of the file. Waits for an fsync under way."""
        if self._fd < 0:
            return
        self._executor.shutdown()
        if self._rewrite is not None:
            self._rewrite.discard()
        os.close(self._fd)
        self._fd = -1

    def _catch_up(self) -> None:
        """After a failed write: everything once more, in the place of what may have been written in part."""
        self._write(b"".join(self._live.records()))

    def _write(self, data: bytes) -> None:
        try:
            if self._is_behind:
                os.ftruncate(self._fd, self._size_bytes)
            _write(self._fd, data)
        except OSError as error:
            self._is_behind = True
            raise StoreError(f"{self._path} cannot be written: {error.strerror}") from error
        self._is_behind = False
        self._size_bytes += len(data)

    def _begin_sync(self) -> asyncio.Future[None]:
        work = self._start(_sync, self._fd, None if self._is_entered else self._path.parent)
        work.add_done_callback(self._end_sync)
        return work

    def _end_sync(self, work: asyncio.Future[None]) -> None:
        is_done = not work.cancelled() and work.exception() is None
        self._is_unsound = not is_done
        self._is_entered |= is_done

    # -- Writing anew --------------------------------------------------------------------------------------------------

    def _begin_rewrite(self) -> asyncio.Future[None]:
        """Write what still matters to a new file, in the thread; then put it in the place of the old one."""
        rewrite = self._rewrite = _Rewrite(self._path, self._live.records(), self._size_bytes)
        work = self._start(rewrite.run)
        work.add_done_callback(lambda _: self._end_rewrite(rewrite, work))
        return work

    def _end_rewrite(self, rewrite: _Rewrite, work: asyncio.Future[None]) -> None:
        if self._fd < 0:
            return  # Closed meanwhile, and the new file with it.
        self._rewrite = None
        try:
            work.result()
            rewrite.add_tail(self._fd, self._size_bytes)
            os.replace(rewrite.path, self._path)
        except OSError:
            rewrite.discard()
            self._compact_at_bytes = 2 * self._size_bytes  # The old file is whole; a full disk is no reason to hurry.
            return
        os.close(self._fd)
        self._fd, self._size_bytes = rewrite.fd, rewrite.size_bytes
        self._compact_at_bytes = max(COMPACT_BYTES, 2 * self._size_bytes)
        self._is_unsound = self._is_entered = False

    def _start(self, job: Callable[..., None], *args: object) -> asyncio.Future[None]:
        """One job at a time for the thread."""
        assert self._work is None
        work = asyncio.get_running_loop().run_in_executor(self._executor, job, *args)
        self._work = work
        work.add_done_callback(self._end_work)
        return work

    def _end_work(self, _work: asyncio.Future[None]) -> None:
        self._work = None


class _Rewrite:
    """A new file that is to take the place of the journal. Made durable before, so that no outcome is safe in the old
    file and not in the new."""

    def __init__(self, path: Path, records: Iterator[bytes], old_bytes: int) -> None:
        """`records` stand for the first `old_bytes` of the old file."""
        self.path = path.with_name(path.name + ".new")
        self.fd = -1
        self.size_bytes = 0
        self._records = records
        self._old_bytes = old_bytes

    def run(self) -> None:
        """In the thread. Raises OSError."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self.fd = os.open(self.path, flags, 0o600)
        self._write(MAGIC)
        for record in self._records:
            self._write(record)
        os.fsync(self.fd)

    def add_tail(self, old_fd: int, end_bytes: int) -> None:
        """What has been appended to the old file meanwhile. Raises OSError."""
        at = self._old_bytes
        while at < end_bytes:
            data = os.pread(old_fd, min(COPY_BYTES, end_bytes - at), at)
            self._write(data)
            at += len(data)

    def discard(self) -> None:
        """The old file stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _write(self, data: bytes) -> None:
        _write(self.fd, data)
        self.size_bytes += len(data)


def _read(path: Path) -> tuple[_Live, int, Ending]:
    """What the file says, how many of its bytes are good, and what follows those."""
    live = _Live()
    with path.open("rb") as file:
        records = Records(file)
        for body in records:
            try:
                entry = _decode_entry(body)
            except msgspec.DecodeError:
                records.reject()
                break
            if entry.is_fresh:
                live = _Live()
            live.take(entry)
    return live, records.good_bytes, records.ending


def _set_aside(path: Path, from_byte: int) -> Damage:
    """Copy the end of the file to a file of its own, durably."""
    target = path.with_name(path.name + ".damaged")
    size_bytes = 0
    with path.open("rb") as source, open(target, "wb", opener=_open_private) as copy:
        source.seek(from_byte)
        while chunk := source.read(COPY_BYTES):
            size_bytes += copy.write(chunk)
        copy.flush()
        os.fsync(copy.fileno())
    return Damage(target, size_bytes)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write(fd: int, data: bytes) -> None:
    """All of it, at the end; usually by one call."""
    written = os.write(fd, data)
    while written < len(data):
        written += os.write(fd, data[written:])


def _sync(fd: int, directory: Path | None) -> None:
    os.fdatasync(fd)
    if directory is not None:
        directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory_fd)
        finally:
            os.close(directory_fd)
