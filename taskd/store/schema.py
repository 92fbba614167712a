"""The database file: which SQLite may touch it, and how it is recognised, made, brought up to date and opened."""

from __future__ import annotations

import contextlib
import os
import secrets
from importlib.resources import files
from pathlib import Path

import apsw
from msgspec import Struct

from taskd.errors import StoreError

APPLICATION_ID = 0x7461736B  # "task": tells our files from others'.
PAGE_BYTES = 8192  # Large rows cost a tenth to a third less than with 4096, small ones the same.
BUSY_S = 10.0  # How long to wait for another program, say a backup, that holds the database.
WRITER_CACHE_KIB = 16 << 10
WAL_BYTES_KEPT = 64 << 20  # A log that once grew beyond this is cut back to it.

_MEND = "restore a backup, or move the file away to start anew"


class Identity(Struct, frozen=True):
    """What opening a database tells."""

    store_id: bytes  # 16 random bytes, made with the database
    writer: bytes  # 16 random bytes, new with every opening: only who knows them may write


def check_library(version: str, compile_options: tuple[str, ...]) -> None:
    """Refuse an SQLite that can lose commits, or that lacks what we use. Raises StoreError.

    Up to 3.51.2 a checkpoint that coincides with a commit can corrupt a database in WAL mode; mended in 3.51.3 and in
    two older branches.
    """
    numbers = tuple(int(part) for part in version.split("."))
    is_mended = numbers >= (3, 51, 3) or (3, 50, 7) <= numbers < (3, 51) or (3, 44, 6) <= numbers < (3, 45)
    if not is_mended:
        raise StoreError(
            f"SQLite {version} has a bug that can lose committed data (write-ahead log): install a newer apsw, "
            "whose bundled SQLite is 3.51.3 or later"
        )
    if "ENABLE_CARRAY" not in compile_options:
        raise StoreError("this SQLite was built without carray: install apsw from PyPI, which bundles one with it")


def prepare(path: Path) -> Identity:
    """Make the database or bring it up to date, and become its only writer: whoever opened it before can write no more.

    Raises StoreError for what is not ours, newer than we are, damaged, or cannot be written; then nothing was changed.
    """
    check_library(apsw.sqlite_lib_version(), apsw.compile_options)
    try:
        with contextlib.suppress(FileExistsError):  # Private from the start: tasks may hold secrets in `env`.
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise StoreError(f"{path} cannot be made: {error.strerror}") from error
    migrations = _migrations()
    try:
        with contextlib.closing(_open(path, apsw.SQLITE_OPEN_READONLY)) as connection:
            _check_ours(connection, path, newest=len(migrations))
        with contextlib.closing(open_writer(path, is_new=True)) as connection:
            return _claim(connection, path, migrations)
    except apsw.Error as error:
        raise explain(error, path) from error


def open_writer(path: Path, *, is_new: bool = False) -> apsw.Connection:
    """A connection that may write. It checkpoints only when told to. Raises apsw.Error, StoreError."""
    connection = _open(path, apsw.SQLITE_OPEN_READWRITE)
    if is_new:
        connection.pragma("page_size", PAGE_BYTES)  # Of no effect on a database that has pages.
    if connection.pragma("journal_mode", "wal") != "wal":
        connection.close()
        raise StoreError(f"the file system of {path} cannot hold a write-ahead log: use a local disk")
    connection.pragma("synchronous", "full")
    connection.pragma("journal_size_limit", WAL_BYTES_KEPT)
    connection.pragma("cache_size", -WRITER_CACHE_KIB)
    connection.wal_autocheckpoint(0)
    return connection


def open_reader(path: Path) -> apsw.Connection:
    """A connection that cannot write. Raises apsw.Error."""
    return _open(path, apsw.SQLITE_OPEN_READONLY)


def explain(error: apsw.Error, path: Path) -> StoreError:
    """What to tell people of an error of SQLite."""
    text = str(error)
    code = apsw.mapping_extended_result_codes.get(getattr(error, "extendedresult", 0))
    if isinstance(code, str):
        text += f", {code}"
    match error:
        case apsw.CorruptError() | apsw.NotADBError():
            what = f"{path} is damaged or not a database ({text}): {_MEND}"
        case apsw.FullError():
            what = f"the disk of {path} is full ({text}): free some space"
        case apsw.ReadOnlyError() | apsw.PermissionsError():
            what = f"{path} cannot be written ({text}): check the permissions and whether the disk is mounted read-only"
        case apsw.CantOpenError():
            what = f"{path} cannot be opened ({text}): check that its directory exists and may be written"
        case apsw.BusyError() | apsw.LockedError():
            what = f"another program holds {path} ({text})"
        case apsw.IOError():
            what = f"reading or writing {path} failed ({text}): check the disk"
        case _:
            what = f"{path}: {text}"
    return StoreError(what)


def _open(path: Path, flags: int) -> apsw.Connection:
    connection = apsw.Connection(os.fspath(path), flags=flags)
    connection.set_busy_timeout(round(BUSY_S * 1000))
    connection.transaction_mode = "IMMEDIATE"  # So that waiting for another program happens at the start.
    return connection


def _migrations() -> list[str]:
    """The steps from an empty file to the newest version, in order: sql/0001.sql leads to version 1, and so on."""
    folder = files("taskd.store") / "sql"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".sql"))
    assert names == [f"{number:04}.sql" for number in range(1, len(names) + 1)], names
    return [(folder / name).read_text(encoding="utf-8") for name in names]


def newest_version() -> int:
    """The version of the schema that this taskd writes."""
    return len(_migrations())


def _check_ours(connection: apsw.Connection, path: Path, newest: int) -> None:
    version = connection.pragma("user_version")
    if connection.pragma("application_id") != APPLICATION_ID:
        if version or connection.execute("SELECT 1 FROM sqlite_schema").get is not None:
            raise StoreError(f"{path} is a database of another program: give taskd a directory of its own")
    elif version > newest:
        raise StoreError(
            f"{path} was written by a newer taskd (version {version} of the schema, this one knows {newest}): "
            "start that one, or restore a backup made before the upgrade"
        )


def _claim(connection: apsw.Connection, path: Path, migrations: list[str]) -> Identity:
    writer = secrets.token_bytes(16)
    with connection:  # One transaction: a crash leaves the old version or the new one.
        version = connection.pragma("user_version")
        for migration in migrations[version:]:
            connection.execute(migration)
        if not version:
            connection.pragma("application_id", APPLICATION_ID)
            connection.execute("INSERT INTO meta VALUES ('store_id', ?)", (secrets.token_bytes(16),))
        if version < len(migrations):
            connection.pragma("user_version", len(migrations))
        connection.execute("INSERT OR REPLACE INTO meta VALUES ('writer', ?)", (writer,))
        store_id = connection.execute("SELECT value FROM meta WHERE key = 'store_id'").get
    if not isinstance(store_id, bytes) or len(store_id) != 16:
        raise StoreError(f"{path} is damaged (it has no store id): {_MEND}")
    return Identity(store_id, writer)
