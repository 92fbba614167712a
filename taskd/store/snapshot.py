"""A consistent copy of a database that goes on being written, made by a process of its own; and a copy put in the place
of a database.

The copy is made by VACUUM INTO, from one snapshot: commits go on meanwhile, in the write-ahead log, and are not in it.
SQLite's backup interface would begin anew with each of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import secrets
import signal
import sys
from pathlib import Path

import apsw
import msgspec
from msgspec import Struct

from taskd.errors import StoreError
from taskd.store.schema import APPLICATION_ID, explain, newest_version, open_reader, open_writer

NICE = 10  # Serving comes first.
READ_BYTES = 1 << 20
_PR_SET_PDEATHSIG = 1


class Snapshot(Struct, frozen=True):
    """A copy that was made."""

    schema: int
    store_id: str  # 32 hexadecimal digits
    bytes: int
    sha256: str


def snapshot(database: Path, target: Path) -> Snapshot:
    """Copy a database as it is now to a new file. Raises StoreError."""
    try:
        with contextlib.closing(open_reader(database)) as connection:
            connection.pragma("synchronous", "off")  # Of the copy: whoever keeps it makes it durable.
            connection.execute("VACUUM INTO ?", (os.fspath(target),))
        with contextlib.closing(open_reader(target)) as connection:
            schema = connection.pragma("user_version")
            store_id = connection.execute("SELECT value FROM meta WHERE key = 'store_id'").get
    except apsw.Error as error:
        raise explain(error, database) from error
    assert isinstance(schema, int), schema
    assert isinstance(store_id, bytes), store_id
    digest = hashlib.sha256()
    with target.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return Snapshot(schema, store_id.hex(), target.stat().st_size, digest.hexdigest())


def main(arguments: list[str]) -> None:
    """The process: DATABASE TARGET PARENT. Writes what it made to stdout, as JSON, or why not to stderr."""
    database, target, parent = arguments
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):
        return
    os.nice(NICE)
    try:
        made = snapshot(Path(database), Path(target))
    except StoreError as error:
        sys.exit(error.message)
    os.write(sys.stdout.fileno(), msgspec.json.encode(made))


def settle(database: Path) -> None:
    """Move the log of a database that nobody uses into it, so that the file alone is all of it; where it is damaged,
    it stays as it is."""
    with contextlib.suppress(apsw.Error), contextlib.closing(open_writer(database)) as connection:
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)


def adopt(path: Path) -> None:
    """Make the copy at `path` a database to start from: check all of it, and give it an identity of its own.

    Its store is another one than that which was copied, which may still live; and it holds only what was there when the
    copy was made, so its scheduler looks around for others before it leads, as one with an empty disk does. Raises
    StoreError for what is damaged, newer than we are, or not ours.
    """
    try:
        with contextlib.closing(apsw.Connection(os.fspath(path), flags=apsw.SQLITE_OPEN_READWRITE)) as connection:
            version = connection.pragma("user_version")
            if connection.pragma("application_id") != APPLICATION_ID:
                raise StoreError(f"{path} is a database of another program")
            if not isinstance(version, int) or version > newest_version():
                raise StoreError(
                    f"it was made by a newer taskd (version {version} of the schema, this one knows "
                    f"{newest_version()}): install that one first"
                )
            problem = connection.execute("PRAGMA integrity_check(1)").get
            if problem != "ok":
                raise StoreError(f"the database in it is damaged: {problem}")
            connection.pragma("journal_mode", "delete")  # All of it in one file.
            connection.pragma("synchronous", "full")
            with connection:
                connection.execute("DELETE FROM meta WHERE key = 'writer'")
                connection.execute("UPDATE meta SET value = ? WHERE key = 'store_id'", (secrets.token_bytes(16),))
                connection.execute("INSERT OR REPLACE INTO meta VALUES ('restored', x'01')")
    except apsw.Error as error:
        raise explain(error, path) from error
