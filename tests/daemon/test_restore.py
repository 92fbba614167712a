"""Backups as files, and what `taskd restore` does to a state directory: all or nothing, and nothing is removed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import apsw
import pytest

from taskd.backup_file import FORMAT, BackupFile, Manifest, head, tail
from taskd.core.task import TaskState
from taskd.daemon.restore import restore
from taskd.daemon.state import StateDirectory, identify
from taskd.errors import AlreadyRunning, Conflict, StoreError
from taskd.store import schema
from taskd.store.snapshot import snapshot
from taskd.store.sqlite import SQLiteStore
from tests.store.samples import commit, dot, task_id, task_row, unfinished

NODE = 42
MADE_S = 1_770_000_000.0


async def store_with(path: Path, *numbers: int) -> SQLiteStore:
    """A database with these tasks, and what a leader has seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    store = SQLiteStore.open(path)
    rows = [task_row(number, TaskState.QUEUED) for number in numbers]
    await store.commit(commit(rows, term=dot(3, NODE, 7, 0).term, seen=[dot(3, NODE, 7, 5)]))
    return store


def backup_of(database: Path, target: Path, **changes: object) -> Path:
    """What the daemon would send, as a file."""
    copy = target.with_suffix(".copy")
    made = snapshot(database, copy)
    fields = {
        "format": FORMAT, "made": "2026-02-02T02:40:00Z", "version": "0.1.0", "cluster": "default", "node_id": NODE,
        "node_name": "head", "store_id": made.store_id, "schema": made.schema, "bytes": made.bytes,
        "sha256": made.sha256, **changes,
    }  # fmt: skip
    manifest = Manifest(**fields)  # type: ignore[arg-type]
    target.write_bytes(head(manifest, MADE_S) + copy.read_bytes() + tail(manifest))
    copy.unlink()
    return target


@pytest.fixture
async def backup(tmp_path: Path) -> Path:
    """A backup of three tasks, made while the store was open and went on."""
    with contextlib.closing(await store_with(tmp_path / "old" / "taskd.db", 1, 2, 3)) as store:
        made = backup_of(store.path, tmp_path / "backup.tar")
        await store.commit(commit([task_row(4)]))
    return made


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


async def test_it_holds_what_was_there_when_it_was_made(backup, tmp_path):
    done = restore(backup, tmp_path / "new", is_forced=False, is_new_node=False)
    assert (done.node_id, done.moved_to, done.manifest.node_name) == (NODE, None, "head")
    with contextlib.closing(SQLiteStore.open(done.directory / "taskd.db")) as store:
        assert [row.id for row in await unfinished(store)] == [task_id(1), task_id(2), task_id(3)]
        assert store.store_id.hex() != done.manifest.store_id, "the store that was copied may still live"
        loaded = store.load()
        assert (loaded.term, loaded.seen) == (dot(3, NODE, 7, 0).term, [dot(3, NODE, 7, 5)])
        assert loaded.is_empty, "it looks for others first, as an empty disk does"
        await store.commit(commit(term=dot(4, NODE, 8, 0).term))
        assert not store.load().is_empty, "it has known a leader since"
    with contextlib.closing(StateDirectory(tmp_path / "new", ["scheduler"])) as state:
        assert identify(state, 0, MADE_S).node_id == NODE
    assert (done.directory / "taskd.db").stat().st_mode & 0o777 == 0o600


async def test_another_node_can_be_made_of_it(backup, tmp_path):
    done = restore(backup, tmp_path / "new", is_forced=False, is_new_node=True)
    assert done.node_id == 0
    with contextlib.closing(StateDirectory(tmp_path / "new", ["scheduler"])) as state:
        assert identify(state, 0, MADE_S + 1).node_id != NODE


async def test_what_is_there_is_moved_aside_with_its_log(backup, tmp_path):
    with contextlib.closing(await store_with(tmp_path / "state" / "scheduler" / "taskd.db", 8)) as store:
        await store.commit(commit([task_row(9)]))
        log = (tmp_path / "state" / "scheduler" / "taskd.db-wal").read_bytes()
        database = store.path.read_bytes()
    # As after a kill: the last commits are in the log alone.
    store.path.write_bytes(database)
    store.path.with_name("taskd.db-wal").write_bytes(log)
    with pytest.raises(Conflict, match="--force"):
        restore(backup, tmp_path / "state", is_forced=False, is_new_node=False)
    done = restore(backup, tmp_path / "state", is_forced=True, is_new_node=False)
    assert done.moved_to is not None
    with contextlib.closing(apsw.Connection(str(done.moved_to))) as connection:
        assert connection.execute("SELECT count(*) FROM tasks").get == 2
    again = restore(backup, tmp_path / "state", is_forced=True, is_new_node=False)
    assert again.moved_to not in (None, done.moved_to)


async def test_a_running_daemon_is_left_alone(backup, tmp_path):
    with contextlib.closing(StateDirectory(tmp_path / "state", ["scheduler"])), pytest.raises(AlreadyRunning):
        restore(backup, tmp_path / "state", is_forced=True, is_new_node=False)


async def test_another_nodes_directory_is_left_alone(backup, tmp_path):
    with contextlib.closing(StateDirectory(tmp_path / "state", ["scheduler"])) as state:
        identify(state, 5, MADE_S)
    with pytest.raises(Conflict, match="belongs to node 5"):
        restore(backup, tmp_path / "state", is_forced=False, is_new_node=False)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (cut, "not whole|is damaged"),
        (flip, "checksum"),
        (lambda content: content[:700], "not a backup of taskd|not whole"),
        (lambda content: b"", "not a backup"),
        (lambda content: b"\0" * 4096, "not a backup"),
        (lambda content: b"PK" + content, "not a backup"),
        (lambda content: content.replace(b'"format": 1', b'"format": 2'), "format 2"),
        (lambda content: content.replace(b'"bytes"', b'"bites"'), "not a backup"),
        (lambda content: content.replace(b"taskd.db", b"taskd.xx"), "not whole"),
    ],
)
async def test_what_is_damaged_changes_nothing(backup, tmp_path, spoil, says):
    with contextlib.closing(await store_with(tmp_path / "state" / "scheduler" / "taskd.db", 8)):
        pass
    before = files_of(tmp_path / "state" / "scheduler")
    backup.write_bytes(spoil(backup.read_bytes()))
    with pytest.raises(StoreError, match=says):
        restore(backup, tmp_path / "state", is_forced=True, is_new_node=False)
    after = files_of(tmp_path / "state" / "scheduler")
    assert {name: content for name, content in after.items() if name != "lock"} == before


async def test_a_newer_schema_is_refused(tmp_path):
    with contextlib.closing(await store_with(tmp_path / "old" / "taskd.db", 1)) as store:
        path = store.path
    with contextlib.closing(apsw.Connection(os.fspath(path))) as connection:
        connection.pragma("user_version", schema.newest_version() + 1)
    backup = backup_of(path, tmp_path / "backup.tar")
    with pytest.raises(StoreError, match="newer taskd"):
        restore(backup, tmp_path / "new", is_forced=False, is_new_node=False)
    assert set(files_of(tmp_path / "new" / "scheduler")) == {"lock"}


async def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(StoreError, match="cannot be read"):
        BackupFile(tmp_path / "none")
