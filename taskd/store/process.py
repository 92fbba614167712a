"""The process that a store keeps at its side: it commits, and two forks of it do the long reading, one for the node
itself and one for people, away from the event loop and from each other.

Why not threads: a thread beside a busy one waits for the interpreter lock again and again, at each of SQLite's steps,
see docs/decisions/0001-writing-to-sqlite.md. Each of the three has a socket of its own and ends when that is closed, so
they never outlive the daemon by more than the commit in hand.

Its arguments are DATABASE WRITER COMMITS READS SEARCHES: the path, the right to write in hexadecimal digits
(schema.Identity.writer), and the file descriptors of the three sockets.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import apsw
import msgspec

from taskd import failpoints
from taskd.errors import StoreError
from taskd.store import changes, queries, wire
from taskd.store.schema import explain, open_reader, open_writer

CHECKPOINT_PAGES = 1000  # Once the log has so many. The commit that follows waits for it: 2 to 5 ms, seldom 8.


class Writer:
    """The only one that writes to a database. One commit at a time."""

    def __init__(self, path: Path, writer: bytes) -> None:
        """Raises StoreError."""
        self._path = path
        self._writer = writer
        self._log_pages = 0
        self._broken: StoreError | None = None
        try:
            self.connection = open_writer(path)
            self.connection.set_wal_hook(self._committed)
        except apsw.Error as error:
            raise explain(error, path) from error

    def commit(self, write: wire.Write) -> None:
        """Make everything durable, all or none. Raises StoreError: then whether they are is unknown.

        After an error of the disk nothing is written any more. Above all a failed fsync is never tried again: the
        kernel may have thrown the data away and would report success.
        """
        if self._broken is not None:
            raise self._broken
        try:
            self._commit(write)
        except StoreError:
            self._roll_back()
            raise
        except apsw.Error as error:
            failure = explain(error, self._path)
            if isinstance(error, apsw.IOError | apsw.CorruptError | apsw.NotADBError):
                self._broken = failure
            self._roll_back()
            raise failure from error
        except (TypeError, ValueError, OverflowError) as error:  # A value that SQLite cannot hold.
            self._roll_back()
            raise StoreError(f"{self._path}: {error}") from error

    def _commit(self, write: wire.Write) -> None:
        execute = self.connection.execute
        execute("BEGIN IMMEDIATE")
        if execute("SELECT value FROM meta WHERE key = 'writer'").get != self._writer:
            self._broken = StoreError(f"{self._path} was opened by another taskd: this one writes no more")
            raise self._broken
        changes.apply(self.connection, write)
        failpoints.hit("store.before_commit", with_parent=True)
        execute("COMMIT")
        failpoints.hit("store.after_commit", with_parent=True)

    def _roll_back(self) -> None:
        try:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
        except apsw.Error as error:
            self._broken = explain(error, self._path)

    def _committed(self, _connection: apsw.Connection, _name: str, log_pages: int) -> int:
        self._log_pages = log_pages
        return apsw.SQLITE_OK

    def checkpoint(self) -> None:
        """Move a long log into the database. To be called after an answer has left: nobody waits for this."""
        if self._log_pages < CHECKPOINT_PAGES or self._broken is not None:
            return
        self._log_pages = 0
        try:
            self.connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.IOError as error:
            self._broken = explain(error, self._path)
        except apsw.Error:
            pass  # Held by a reader, or no room: the log grows, and the next commit tries again.

    def close(self) -> None:
        """Empty the log into the database and let go of it; of a failed disk, just let go."""
        if self._broken is not None:
            self.connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        self.connection.close()


def serve_commits(stream: socket.socket, database: Writer) -> None:
    """Answer wire.Write until the socket is closed."""

    def answer(body: bytes) -> wire.Answer:
        try:
            database.commit(wire.decode_write(body))
        except StoreError as error:
            return wire.Failed(error.message)
        return wire.Written()

    _serve(stream, answer, then=database.checkpoint)


def serve_reads(stream: socket.socket, path: Path) -> None:
    """Answer wire.Read until the socket is closed."""
    try:
        connection = open_reader(path)
    except apsw.Error as error:
        return refuse(stream, explain(error, path))

    def answer(body: bytes) -> wire.Answer:
        try:
            match wire.decode_read(body):
                case wire.Scan(query, limit):
                    return wire.Rows(*queries.scan(connection, query, limit))
                case wire.ScanIds(suffix, before, limit):
                    return wire.Ids(*queries.scan_ids(connection, suffix, before, limit))
                case wire.Count(before):
                    return wire.Counts(*queries.count(connection, before))
                case wire.Unfinished(after):
                    return wire.Waiting(*queries.backlog(connection, after))
                case wire.Lacking(seen, after):
                    return wire.Rows(*queries.lacking(connection, seen, after))
                case wire.Fetch(ids):
                    return wire.Rows(*queries.fetch(connection, ids))
                case wire.AllIds(after):
                    return wire.Ids(*queries.ids(connection, after))
                case wire.Ended(before_s, after, limit):
                    return wire.Ids(*queries.ended(connection, before_s, after, limit))
        except apsw.Error as error:
            return wire.Failed(explain(error, path).message)
        except msgspec.DecodeError as error:
            return wire.Failed(f"{path} is damaged ({error}): restore a backup")
        except (TypeError, ValueError, OverflowError) as error:  # A value that SQLite cannot hold.
            return wire.Failed(f"{path}: {error}")

    with contextlib.closing(connection):
        return _serve(stream, answer)


def refuse(stream: socket.socket, error: StoreError) -> None:
    """Answer everything with the same error, until the socket is closed."""
    _serve(stream, lambda _body: wire.Failed(error.message))


def _serve(
    stream: socket.socket, answer: Callable[[bytes], wire.Answer], then: Callable[[], None] = lambda: None
) -> None:
    with stream, stream.makefile("rb") as requests:
        while (body := wire.receive(requests)) is not None:
            try:
                stream.sendall(wire.frame(answer(body)))
            except OSError:
                return  # The daemon is gone: nobody is left to tell.
            then()


def main(arguments: list[str]) -> None:
    """Serve the three sockets until they are closed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # They mean the daemon, which closes the sockets when it is done.
    database, writer, *fds = arguments
    path = Path(database)
    commits, *reads = (socket.socket(fileno=int(fd)) for fd in fds)
    readers = [_start_reader(stream, [commits, *reads], path) for stream in reads]
    for stream in reads:
        stream.close()
    try:
        only_writer = Writer(path, bytes.fromhex(writer))
    except StoreError as error:
        return refuse(commits, error)
    serve_commits(commits, only_writer)
    for reader in readers:
        os.waitpid(reader, 0)
    only_writer.close()  # The last connection to be closed empties the log.
    return None


def _start_reader(stream: socket.socket, streams: list[socket.socket], path: Path) -> int:
    """Fork a reader that serves this one of the sockets; returns its process id."""
    reader = os.fork()
    if reader == 0:
        for other in streams:
            if other is not stream:
                other.close()
        serve_reads(stream, path)
        os._exit(0)
    return reader
