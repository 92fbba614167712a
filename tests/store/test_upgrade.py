"""A database that an older taskd has left behind: brought up to date, and nothing in it lost."""

from __future__ import annotations

import contextlib
from pathlib import Path

import apsw
import pytest

from taskd.core.task import TaskState, decode_record, decode_spec
from taskd.errors import StoreError
from taskd.store import schema
from taskd.store.base import Query
from taskd.store.sqlite import SQLiteStore

OLD = Path(__file__).parent / "schema_1.sql"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database of version 1 of the schema."""
    path = tmp_path / "taskd.db"
    with contextlib.closing(apsw.Connection(str(path))) as connection:
        connection.execute(OLD.read_text())
        connection.pragma("journal_mode", "wal")
        assert connection.pragma("user_version") == 1
        assert connection.pragma("application_id") == schema.APPLICATION_ID
    return path


async def test_everything_is_still_there(path):
    with contextlib.closing(SQLiteStore.open(path)) as store:
        rows = await store.list(Query())
        states = {row.name: TaskState(row.state) for row in rows}
        assert states == {
            "done": TaskState.SUCCEEDED,
            "failed": TaskState.FAILED,
            "later": TaskState.SCHEDULED,
            "never": TaskState.QUEUED,
        }
        by_name = {row.name: row for row in rows}
        assert decode_spec(by_name["never"].spec).labels == {"kind": "fixture"}
        assert len(decode_record(by_name["failed"].record).attempts) == 2
        loaded = store.load()
        assert [node.name for node in loaded.nodes] == ["old"]
        assert loaded.term is not None
        # Since version 2 a store says what it holds: all that its own scheduler had committed.
        assert [(dot.term, dot.lsn) for dot in loaded.seen] == [(loaded.term, max(row.lsn for row in rows))]
        assert not loaded.is_empty
    with contextlib.closing(schema.open_reader(path)) as connection:
        assert connection.pragma("user_version") == schema.newest_version()


def test_a_failed_step_leaves_the_old_version(path, monkeypatch):
    steps = schema._migrations()
    monkeypatch.setattr(schema, "_migrations", lambda: [*steps, "CREATE TABLE tasks (oops)"])
    before = dump(path)
    with pytest.raises(StoreError):
        schema.prepare(path)
    assert dump(path) == before


def dump(path: Path) -> list[tuple[object, ...]]:
    with contextlib.closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)) as connection:
        version = connection.pragma("user_version")
        tables = list(connection.execute("SELECT name, sql FROM sqlite_schema ORDER BY name"))
        return [(version,), *tables, *connection.execute("SELECT * FROM tasks ORDER BY id")]
