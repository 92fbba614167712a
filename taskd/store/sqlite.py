"""The database of a scheduler: SQLite in WAL mode, each commit made durable by an fsync.

Quick reads by key are made here, on the event loop, by a connection that cannot write. Commits and readings that may
look at many tasks are made by processes of the store's own (process.py), so that neither an fsync nor a long search
ever holds up the loop. What people search for has one of its own: however much that is, the node's own readings wait
for none of it, and are never refused.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path

import apsw
import msgspec

from taskd import interpreter
from taskd.core.backlog import Backlog
from taskd.core.effects import Commit
from taskd.core.events import Loaded
from taskd.errors import StoreError
from taskd.protocol.messages import Dot, NodeRow, TaskRow
from taskd.store import queries, wire
from taskd.store.base import Query
from taskd.store.changes import CHANGING
from taskd.store.channel import Channel
from taskd.store.schema import explain, open_reader, prepare

CLOSE_S = 30.0  # For the last commit and checkpoint; then the process is killed, which loses nothing durable.
EXIT_S = 0.1  # A process that dies closes its sockets a moment before its status is known.
SOCKET_BYTES = 1 << 20  # Asked of the kernel, which may grant less: a usual commit leaves in one write.

ENDED_IDS_MAX = 5000
ENDED_SLICES_MAX = 10  # About 50 ms.

_changing = attrgetter(*CHANGING)
_encode_json = msgspec.json.Encoder().encode

OnCommit = Callable[[float, int], None]
"""Told after each commit: how many seconds it took, how many rows it held."""


class SQLiteStore:
    """See store.base.Store. To be used by one loop, and by one process at a time."""

    def __init__(
        self,
        *,
        path: Path,
        store_id: bytes,
        reader: apsw.Connection,
        process: subprocess.Popen[bytes],
        commits: socket.socket,
        reads: socket.socket,
        searches: socket.socket,
        on_commit: OnCommit | None,
    ) -> None:
        self.store_id = store_id
        self.on_lost: Callable[[str], None] | None = None  # told why, once the process that writes has ended by itself
        self.path = path
        self._reader = reader
        self._process = process
        self._commits = Channel(commits, self._why_ended)
        self._reads = Channel(reads, self._why_ended)  # of the node itself
        self._searches = Channel(searches, self._why_ended)  # of people
        self._on_commit = on_commit
        self._is_closed = False
        self._ended_after = b""  # Up to here nothing was to be purged, when it was last looked at.

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, on_commit: OnCommit | None = None) -> SQLiteStore:
        """Open the database, making it or bringing it up to date where needed. The directory must exist.

        A store that another process still has open on it can write no more from now on. Raises StoreError.
        """
        path = Path(path).absolute()
        identity = prepare(path)
        with contextlib.ExitStack() as undo:
            commits, their_commits = _socket_pair(undo)
            reads, their_reads = _socket_pair(undo)
            searches, their_searches = _socket_pair(undo)
            try:
                reader = open_reader(path)
            except apsw.Error as error:
                raise explain(error, path) from error
            undo.callback(reader.close)
            process = _start_process(path, identity.writer, their_commits, their_reads, their_searches)
            undo.pop_all()
        their_commits.close()
        their_reads.close()
        their_searches.close()
        return cls(
            path=path,
            store_id=identity.store_id,
            reader=reader,
            process=process,
            commits=commits,
            reads=reads,
            searches=searches,
            on_commit=on_commit,
        )

    # -- Writing -------------------------------------------------------------------------------------------------------

    async def commit(self, commit: Commit) -> None:
        """Make everything durable, all or none. Raises StoreError: then whether it is is unknown.

        After an error of the disk, and after the database was opened by another process, every commit fails.
        """
        write = wire.Write(
            None if commit.term is None else _encode_json(commit.term),
            commit.inserted,
            [_changing(row) for row in commit.updated],
            [_node_values(row) for row in commit.nodes],
            commit.taken,
            commit.purged,
            commit.purges,
            [(dot.term.epoch, dot.term.node_id, dot.term.boot, dot.lsn) for dot in commit.seen],
            None if commit.last_purge is None else _encode_json(commit.last_purge),
            commit.has_strays,
        )
        begun = time.perf_counter()
        await self._commits.ask(write)
        if self._on_commit is not None:
            rows = (
                len(commit.inserted) + len(commit.updated) + len(commit.nodes) + len(commit.taken) + len(commit.purged)
            )
            self._on_commit(time.perf_counter() - begun, rows)

    # -- Quick reading, on the loop ------------------------------------------------------------------------------------

    def load(self) -> Loaded:
        """What a scheduler needs at start, tasks aside. Raises StoreError."""
        with self._reading():
            return queries.load(self._reader)

    def get(self, ids: list[bytes]) -> list[TaskRow]:
        """The rows of those ids that exist, in the order of `ids`. Raises StoreError. 1,000 recent ones: 1 to 3 ms."""
        with self._reading():
            return queries.get(self._reader, ids)

    def existing(self, ids: list[bytes]) -> set[bytes]:
        """Which of these ids are taken. Raises StoreError. 20,000 that are not: 1 to 3 ms."""
        with self._reading():
            return queries.existing(self._reader, ids)

    def newest_id(self) -> bytes:
        """The greatest id of all tasks, 16 zero bytes where there is none. Raises StoreError."""
        with self._reading():
            return queries.newest_id(self._reader)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except apsw.Error as error:
            raise explain(error, self.path) from error
        except msgspec.DecodeError as error:
            raise StoreError(f"{self.path} is damaged ({error}): restore a backup") from error
        except (TypeError, ValueError, OverflowError) as error:  # What SQLite cannot hold, or Python.
            raise StoreError(f"{self.path}: {error}") from error

    # -- Long reading for the node itself, in a process ----------------------------------------------------------------

    async def backlog(self, after: bytes) -> tuple[Backlog, bytes | None]:
        """Unfinished tasks by id, above `after`, at most 10,000; and where to go on, None at the end. Raises
        StoreError, Overloaded."""
        answer = await self._reads.ask(wire.Unfinished(after))
        assert isinstance(answer, wire.Waiting), answer
        return answer.backlog, answer.next or None

    async def lacking(self, seen: Sequence[Dot], after: bytes) -> tuple[list[TaskRow], bytes | None]:
        """Tasks by id, above `after`, whose last change `seen` does not cover: at most 500 or about 1 MiB, often none,
        for no more than 20,000 tasks are looked at; and where to go on, None at the end. About 0.5 s for a million.
        Raises StoreError, Overloaded."""
        return await self._slice_of_rows(wire.Lacking(list(seen), after))

    async def rows(self, ids: Sequence[bytes]) -> list[TaskRow]:
        """The rows of those ids that exist, of any number, by id. Raises StoreError, Overloaded."""
        wanted = sorted(set(ids))
        rows: list[TaskRow] = []
        start = 0
        while start < len(wanted):
            part = wanted[start : start + queries.FETCH_IDS]
            found, after = await self._slice_of_rows(wire.Fetch(part))
            rows += found
            start = start + len(part) if after is None else bisect_right(wanted, after, start)
        return rows

    async def ids(self, after: bytes) -> tuple[list[bytes], bytes | None]:
        """All ids above `after`, ascending, about 20,000; and where to go on, None at the end. Raises StoreError,
        Overloaded."""
        answer = await self._reads.ask(wire.AllIds(after))
        assert isinstance(answer, wire.Ids), answer
        return answer.ids, answer.next or None

    async def ended_before(self, time_s: float) -> list[bytes]:
        """Ids of tasks that had ended before that time (UTC), the oldest ids first, at most 5,000. Raises StoreError,
        Overloaded.

        Only ids made before that time are looked at, so that there is next to nothing to do where nothing is old. Among
        very many old tasks that have not ended, or not long ago, one call looks at 200,000, and the next goes on there.
        """
        ids: list[bytes] = []
        after = self._ended_after
        for _ in range(ENDED_SLICES_MAX):
            answer = await self._reads.ask(wire.Ended(time_s, after, ENDED_IDS_MAX - len(ids)))
            assert isinstance(answer, wire.Ids), answer
            if not ids:  # What is found will be asked for again until it is gone.
                self._ended_after = after if answer.ids else answer.next
            ids += answer.ids
            after = answer.next
            if not after or len(ids) >= ENDED_IDS_MAX:
                break
        return ids

    async def _slice_of_rows(self, request: wire.Read) -> tuple[list[TaskRow], bytes | None]:
        answer = await self._reads.ask(request)
        assert isinstance(answer, wire.Rows), answer
        return answer.rows, answer.next or None

    # -- Long reading for people, in another process -------------------------------------------------------------------

    async def ending_in(self, suffix: str, limit: int = 2) -> list[bytes]:
        """Ids whose hexadecimal form, without hyphens, ends so; newest first, at most `limit`. Raises StoreError,
        Overloaded."""
        ids: list[bytes] = []
        before = b""
        while len(ids) < limit:
            answer = await self._searches.ask(wire.ScanIds(suffix, before, limit - len(ids)))
            assert isinstance(answer, wire.Ids), answer
            ids += answer.ids
            before = answer.next
            if not before:
                break
        return ids

    async def counts(self) -> dict[tuple[int, str], int]:
        """How many tasks there are, by (state, queue). About 0.4 s for a million. Raises StoreError, Overloaded."""
        total: Counter[tuple[int, str]] = Counter()
        before = b""
        while True:
            answer = await self._searches.ask(wire.Count(before))
            assert isinstance(answer, wire.Counts), answer
            for state, queue, number in answer.counts:
                total[state, queue] += number
            before = answer.next
            if not before:
                return dict(total)

    async def list(self, query: Query) -> list[TaskRow]:
        """One page of tasks, newest first; of a scan that finds little, however long it is. Raises StoreError,
        Overloaded."""
        rows: list[TaskRow] = []
        while len(rows) < query.limit:
            answer = await self._searches.ask(wire.Scan(query, query.limit - len(rows)))
            assert isinstance(answer, wire.Rows), answer
            rows += answer.rows
            if not answer.next:
                break
            query = msgspec.structs.replace(query, before=answer.next)
        return rows

    async def newest(self, owner: str) -> bytes | None:
        """The newest task of this owner. Raises StoreError, Overloaded."""
        rows = await self.list(Query(owners=(owner,), limit=1))
        return rows[0].id if rows else None

    # -- The files -----------------------------------------------------------------------------------------------------

    def size_bytes(self) -> int:
        """Bytes on disk, write-ahead log included. Raises StoreError."""
        total = 0
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(f"{self.path}{suffix}").st_size
        return total

    def free_bytes(self) -> int:
        """Bytes free on the database's disk, to us. Raises StoreError."""
        try:
            found = os.statvfs(self.path)
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror}") from error
        return found.f_bavail * found.f_frsize

    def close(self) -> None:
        """Let go of the files, in good order: what was asked for is finished. Blocks for some milliseconds."""
        if self._is_closed:
            return
        self._is_closed = True
        self._reader.close()
        self._reads.close()
        self._searches.close()
        self._commits.close()
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _why_ended(self) -> str:
        try:
            ended = f"ended with status {self._process.wait(EXIT_S)}"
        except subprocess.TimeoutExpired:
            ended = "stopped answering"
        reason = f"the process {self._process.pid} that writes {self.path} {ended}"
        if self.on_lost is not None and not self._is_closed:
            self.on_lost(reason)
        return reason


def _socket_pair(undo: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    """Our end, which never blocks, and the other."""
    ours, theirs = socket.socketpair()
    undo.callback(ours.close)
    undo.callback(theirs.close)
    ours.setblocking(False)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
    return ours, theirs


def _start_process(path: Path, writer: bytes, *sockets: socket.socket) -> subprocess.Popen[bytes]:
    """`sockets`: for commits, the node's own reads, and searches."""
    files = [each.fileno() for each in sockets]
    try:
        return subprocess.Popen(
            interpreter.command("store", path, writer.hex(), *files),
            stdin=subprocess.DEVNULL,
            pass_fds=files,
            env=interpreter.environment(os.environ),
            process_group=0,  # A Ctrl-C at the terminal is the daemon's to answer.
        )
    except OSError as error:
        raise StoreError(f"the process that writes {path} cannot be started: {error}") from error


def _node_values(row: NodeRow) -> tuple[int, str, str, str | None, float]:
    return row.node_id, row.name, ",".join(row.roles), row.drain_reason, row.seen_s
