"""SQLite in particular: whose file it is, versions, damage, full and failing disks, and processes that die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest
from msgspec.structs import astuple

from taskd.core.events import Loaded
from taskd.core.task import TaskState
from taskd.errors import Overloaded, StoreError
from taskd.protocol.messages import NodeRow, TaskRow, Term
from taskd.store import process, schema, wire
from taskd.store.base import Query
from taskd.store.changes import INSERT
from taskd.store.channel import WAITING_MAX
from taskd.store.sqlite import SQLiteStore
from tests.store.samples import commit, dot, numbers, task_id, task_row, unfinished


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "taskd.db"


@contextlib.contextmanager
def opened(path: Path, **options) -> Iterator[SQLiteStore]:
    with contextlib.closing(SQLiteStore.open(path, **options)) as store:
        yield store


def fill(path: Path, *rows: TaskRow) -> None:
    """Make a database with these tasks."""
    with contextlib.closing(process.Writer(path, schema.prepare(path).writer)) as writer:
        writer.commit(write(*rows))


def write(*rows: TaskRow) -> wire.Write:
    """The commit of these new tasks, as the process gets it."""
    return wire.Write(None, [[getattr(row, name) for name in row.__struct_fields__] for row in rows], [], [])


# -- Which SQLite, which file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["3.44.6", "3.44.9", "3.50.7", "3.51.3", "3.54.1", "4.0.0"])
def test_versions_without_the_bug_are_used(version: str):
    schema.check_library(version, ("ENABLE_CARRAY",))


@pytest.mark.parametrize("version", ["3.7.0", "3.40.1", "3.44.5", "3.45.0", "3.50.6", "3.51.0", "3.51.2"])
def test_versions_that_can_lose_commits_are_refused(version: str):
    with pytest.raises(StoreError, match="apsw"):
        schema.check_library(version, ("ENABLE_CARRAY",))


def test_a_build_without_carray_is_refused():
    with pytest.raises(StoreError, match="carray"):
        schema.check_library("3.54.1", ())


def test_the_settings_that_promises_rest_on(path: Path):
    identity = schema.prepare(path)
    writer = process.Writer(path, identity.writer)
    try:
        pragmas = {name: writer.connection.pragma(name) for name in ("journal_mode", "synchronous", "application_id")}
    finally:
        writer.close()
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "application_id": schema.APPLICATION_ID}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_closing_leaves_one_file(path: Path):
    with opened(path) as store:
        await store.commit(commit([task_row(1)]))
        assert len(os.listdir(path.parent)) == 3
    assert os.listdir(path.parent) == [path.name]


def test_a_directory_that_is_not_there(path: Path):
    with pytest.raises(StoreError, match="cannot be made"):
        SQLiteStore.open(path.parent / "no" / "taskd.db")


def test_a_directory_in_the_place_of_the_file(path: Path):
    path.mkdir()
    with pytest.raises(StoreError):
        SQLiteStore.open(path)


def test_a_file_that_is_no_database_is_left_alone(path: Path):
    path.write_bytes(b"minutes of the meeting\n" * 1000)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="not a database"):
        SQLiteStore.open(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("make", ["CREATE TABLE notes (text)", "PRAGMA user_version = 3"])
def test_another_programs_database_is_left_alone(path: Path, make: str):
    connection = apsw.Connection(os.fspath(path))
    connection.execute(make)
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="another program"):
        SQLiteStore.open(path)
    assert path.read_bytes() == before


def test_a_newer_schema_is_left_alone(path: Path):
    fill(path, task_row(1))
    connection = apsw.Connection(os.fspath(path))
    connection.pragma("user_version", 99)
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="newer taskd"):
        SQLiteStore.open(path)
    assert path.read_bytes() == before


# -- Migrations --------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_step_more(monkeypatch) -> list[str]:
    """As if this program knew one version more."""
    steps = [*schema._migrations(), "ALTER TABLE tasks ADD COLUMN colour TEXT; UPDATE tasks SET colour = 'red'"]
    monkeypatch.setattr(schema, "_migrations", lambda: steps)
    return steps


def test_an_old_database_is_brought_up_to_date(path: Path, request):
    fill(path, task_row(1))
    request.getfixturevalue("one_step_more")
    schema.prepare(path)
    connection = schema.open_reader(path)
    assert connection.execute("SELECT colour FROM tasks").get == "red"
    assert connection.pragma("user_version") == len(request.getfixturevalue("one_step_more"))
    connection.close()
    schema.prepare(path)  # Nothing left to do.


def test_a_failed_migration_changes_nothing(path: Path, request):
    fill(path, task_row(1))
    version = len(schema._migrations())
    steps = request.getfixturevalue("one_step_more")
    steps.append("INSERT INTO nowhere VALUES (1)")
    with pytest.raises(StoreError):
        schema.prepare(path)
    connection = schema.open_reader(path)
    assert connection.pragma("user_version") == version
    assert connection.execute("SELECT * FROM tasks").description[-1][0] == "record"
    connection.close()


def test_a_new_database_goes_through_all_steps(path: Path, one_step_more):
    schema.prepare(path)
    connection = schema.open_reader(path)
    assert connection.pragma("user_version") == len(one_step_more)
    connection.close()


def test_the_first_version_becomes_the_second_and_keeps_everything(path: Path):
    rows = [
        task_row(number, TaskState.SUCCEEDED if number % 2 else TaskState.QUEUED, epoch=epoch, boot=boot, lsn=lsn)
        for number, (epoch, boot, lsn) in enumerate([(1, 1, 3), (1, 1, 9), (1, 1, 4), (2, 7, 1), (2, 8, (1 << 63) - 1)])
    ]
    connection = apsw.Connection(os.fspath(path))
    connection.pragma("journal_mode", "wal")
    connection.execute(schema._migrations()[0])
    connection.executemany(INSERT, [astuple(row) for row in rows])
    connection.execute("INSERT INTO nodes VALUES (5, 'a', 'scheduler', NULL, 1.5)")
    connection.execute("INSERT INTO meta VALUES ('store_id', ?), ('term', ?)", (bytes(16), b"[2,5,8]"))
    connection.pragma("application_id", schema.APPLICATION_ID)
    connection.pragma("user_version", 1)
    connection.close()
    with opened(path) as store:
        assert store.store_id == bytes(16)
        assert store.get([row.id for row in rows]) == rows
        seen = [dot(1, 5, 1, 9), dot(2, 5, 7, 1), dot(2, 5, 8, (1 << 63) - 1)]
        assert store.load() == Loaded(Term(2, 5, 8), seen, [NodeRow(5, "a", ("scheduler",), None, 1.5)])


# -- Damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(path: Path) -> Path:
    """1,000 tasks, and all pages overwritten but the first ones, which opening looks at."""
    fill(path, *(task_row(number, record=bytes(500)) for number in range(1000)))
    with path.open("r+b") as file:
        file.seek(9 * schema.PAGE_BYTES)
        file.write(b"\xa5" * (path.stat().st_size - 9 * schema.PAGE_BYTES))
    return path


async def test_damaged_pages_are_told_clearly(damaged: Path):
    with opened(damaged) as store:
        with pytest.raises(StoreError, match="damaged"):
            await store.backlog(b"")
        with pytest.raises(StoreError, match="damaged"):
            store.get([task_id(number) for number in range(1000)])
        with pytest.raises(StoreError, match="damaged"):
            await store.list(Query(limit=1000))
        with pytest.raises(StoreError, match="damaged"):
            await store.commit(commit([task_row(2000)], [task_row(number) for number in range(1000)]))
        with pytest.raises(StoreError, match="damaged"):  # Nothing is written to it any more.
            await store.commit(commit([task_row(3000)]))


async def test_a_damaged_spec_or_term_is_told_clearly(path: Path):
    fill(path, task_row(1, spec=b"\xc1" + b"\xa1a\xa1b"))
    connection = apsw.Connection(os.fspath(path))
    connection.execute("INSERT INTO meta VALUES ('term', x'00')")
    connection.close()
    with opened(path) as store:
        with pytest.raises(StoreError, match="damaged"):
            store.load()
        with pytest.raises(StoreError, match="damaged"):
            await store.list(Query(labels=(("a", "b"),)))


async def test_text_that_is_none_is_told_clearly(path: Path):
    fill(path, task_row(1), task_row(2))
    with contextlib.closing(apsw.Connection(str(path))) as connection:
        connection.execute("UPDATE tasks SET owner = CAST(x'ff' AS TEXT) WHERE id = ?", (task_id(1),))
    with opened(path) as store:
        with pytest.raises(StoreError, match=r"taskd\.db"):
            store.get([task_id(1)])
        with pytest.raises(StoreError, match=r"taskd\.db"):
            await store.list(Query())
        assert numbers(await store.rows([task_id(2)])) == [2]


def test_a_database_without_its_id_is_refused(path: Path):
    schema.prepare(path)
    connection = apsw.Connection(os.fspath(path))
    connection.execute("DELETE FROM meta")
    connection.close()
    with pytest.raises(StoreError, match="no store id"):
        SQLiteStore.open(path)


# -- The disk refuses --------------------------------------------------------------------------------------------------


@pytest.fixture
def writer(path: Path) -> Iterator[process.Writer]:
    """A writer in this process, so that its connection can be tampered with."""
    identity = schema.prepare(path)
    writer = process.Writer(path, identity.writer)
    yield writer
    writer.close()


def ids_in(path: Path) -> list[int]:
    connection = schema.open_reader(path)
    try:
        return [int.from_bytes(id[10:]) for (id,) in connection.execute("SELECT id FROM tasks ORDER BY id")]
    finally:
        connection.close()


def test_a_full_disk_fails_the_commit_alone(writer: process.Writer, path: Path):
    writer.commit(write(task_row(1)))
    pages = writer.connection.pragma("page_count")
    writer.connection.pragma("max_page_count", pages)
    with pytest.raises(StoreError, match="full"):
        writer.commit(write(*(task_row(number, record=bytes(50_000)) for number in range(2, 10))))
    assert not writer.connection.in_transaction
    assert ids_in(path) == [1]
    writer.connection.pragma("max_page_count", 1 << 30)  # Somebody made room.
    writer.commit(write(task_row(2)))
    assert ids_in(path) == [1, 2]


def test_a_disk_that_became_read_only_fails_the_commit(writer: process.Writer, path: Path):
    writer.commit(write(task_row(1)))
    writer.connection.pragma("query_only", True)
    with pytest.raises(StoreError, match="cannot be written"):
        writer.commit(write(task_row(2)))
    assert not writer.connection.in_transaction
    assert ids_in(path) == [1]


class FaultyDisk(apsw.VFS):
    """The usual files, but an fsync of the kind that `fails` names fails."""

    def __init__(self) -> None:
        super().__init__("faulty", "unix", makedefault=True)
        self.fails: int | None = None
        self.fsyncs = 0

    def xOpen(self, name, flags):  # noqa: N802 - apsw's name
        return FaultyFile(self, name, flags)


class FaultyFile(apsw.VFSFile):
    def __init__(self, disk: FaultyDisk, name, flags) -> None:
        super().__init__("unix", name, flags)
        self.disk = disk
        self.kind = flags[0] & (apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_MAIN_DB)

    def xSync(self, flags):  # noqa: N802 - apsw's name
        self.disk.fsyncs += 1
        if self.kind == self.disk.fails:
            raise apsw.IOError("the disk says no")
        super().xSync(flags)


@contextlib.contextmanager
def faulty_disk() -> Iterator[FaultyDisk]:
    """All databases opened inside are on it."""
    disk = FaultyDisk()
    try:
        yield disk
    finally:
        disk.unregister()


def test_every_commit_is_synced_before_it_is_acknowledged(path: Path):
    with faulty_disk() as disk, contextlib.closing(process.Writer(path, schema.prepare(path).writer)) as writer:
        for number in range(5):
            fsyncs = disk.fsyncs
            writer.commit(write(task_row(number)))
            assert disk.fsyncs > fsyncs


def test_after_a_failed_fsync_nothing_is_written_or_synced_again(path: Path):
    with faulty_disk() as disk:
        writer = process.Writer(path, schema.prepare(path).writer)
        writer.commit(write(task_row(1)))
        disk.fails = apsw.SQLITE_OPEN_WAL
        with pytest.raises(StoreError, match="check the disk"):
            writer.commit(write(task_row(2)))
        assert not writer.connection.in_transaction
        disk.fails = None
        fsyncs = disk.fsyncs
        with pytest.raises(StoreError, match="check the disk"):
            writer.commit(write(task_row(3)))
        writer.checkpoint()
        writer.close()
        assert disk.fsyncs == fsyncs
    schema.prepare(path)  # A new start reads what is there: the failed commit may be, the refused one must not be.
    assert ids_in(path) in ([1], [1, 2])


def test_a_failed_checkpoint_ends_writing(path: Path):
    with faulty_disk() as disk:
        writer = process.Writer(path, schema.prepare(path).writer)
        writer.commit(write(task_row(1, record=bytes(process.CHECKPOINT_PAGES * schema.PAGE_BYTES))))
        disk.fails = apsw.SQLITE_OPEN_MAIN_DB
        writer.checkpoint()
        disk.fails = None
        with pytest.raises(StoreError, match="check the disk"):
            writer.commit(write(task_row(2)))
        writer.close()
    schema.prepare(path)
    assert ids_in(path) == [1]


def test_a_long_log_is_emptied_between_commits(writer: process.Writer, path: Path):
    for number in range(30):
        writer.commit(write(task_row(number, record=bytes(process.CHECKPOINT_PAGES * schema.PAGE_BYTES // 10))))
        writer.checkpoint()
    log_bytes = Path(f"{path}-wal").stat().st_size
    assert log_bytes < 1.5 * process.CHECKPOINT_PAGES * schema.PAGE_BYTES


def test_a_checkpoint_that_a_reader_holds_up_fails_nothing(writer: process.Writer, path: Path):
    writer.commit(write(task_row(1)))
    reader = schema.open_reader(path)
    with reader:
        assert reader.execute("SELECT count(*) FROM tasks").get == 1
        for number in range(2, 6):
            writer.commit(write(task_row(number, record=bytes(process.CHECKPOINT_PAGES * schema.PAGE_BYTES))))
            writer.checkpoint()
    reader.close()
    assert ids_in(path) == [1, 2, 3, 4, 5]


async def test_a_write_error_in_the_real_process_ends_writing_and_leaves_reading(path: Path):
    with opened(path) as store:
        await store.commit(commit([task_row(1)]))
        pid = store._process.pid
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        with pytest.raises(StoreError, match="check the disk"):
            await store.commit(commit([task_row(2, record=bytes(1 << 20))]))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
        with pytest.raises(StoreError, match="check the disk"):
            await store.commit(commit([task_row(3)]))
        assert numbers(await unfinished(store)) == [1]
        assert numbers(await store.list(Query())) == [1]


# -- Others at the same file -------------------------------------------------------------------------------------------


async def test_reading_goes_on_while_a_commit_waits(path: Path):
    with opened(path) as store:
        await store.commit(commit([task_row(1)]))
        other = apsw.Connection(os.fspath(path))
        other.execute("BEGIN IMMEDIATE")
        waiting = asyncio.ensure_future(store.commit(commit([task_row(2)])))
        assert numbers(await store.list(Query())) == [1]
        assert await store.counts() == {(3, "default"): 1}
        assert numbers(store.get([task_id(1), task_id(2)])) == [1]
        assert not waiting.done()
        other.execute("ROLLBACK")
        other.close()
        await waiting
        assert numbers(await unfinished(store)) == [1, 2]


def searcher_of(store: SQLiteStore) -> int:
    """The process that reads for people: it is started last."""
    writer = store._process.pid
    *_, searcher = Path(f"/proc/{writer}/task/{writer}/children").read_text().split()
    return int(searcher)


async def test_what_the_node_asks_for_waits_for_nobodys_searches(path: Path):
    with opened(path) as store:
        await store.commit(commit([task_row(1)]))
        assert numbers(await store.list(Query())) == [1]
        searcher = searcher_of(store)
        os.kill(searcher, signal.SIGSTOP)
        try:
            waiting = [asyncio.ensure_future(store.list(Query())) for _ in range(WAITING_MAX)]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded):
                await store.list(Query())
            assert numbers(await store.rows([task_id(1)])) == [1]
            assert len((await store.backlog(b""))[0].ready) == 1
            assert await store.ids(b"") == ([task_id(1)], None)
            assert await store.ended_before(1.0) == []
            assert not any(asked.done() for asked in waiting)
        finally:
            os.kill(searcher, signal.SIGCONT)
        assert {tuple(numbers(rows)) for rows in await asyncio.gather(*waiting)} == {(1,)}


async def test_whoever_opens_last_writes(path: Path):
    with opened(path) as old:
        await old.commit(commit([task_row(1)]))
        with opened(path) as new:
            assert numbers(await unfinished(new)) == [1]
            with pytest.raises(StoreError, match="opened by another"):
                await old.commit(commit([task_row(2)]))
            await new.commit(commit([task_row(3)]))
            with pytest.raises(StoreError, match="opened by another"):
                await old.commit(commit([task_row(4)]))
            assert numbers(await unfinished(old)) == [1, 3]


# -- Processes that die ------------------------------------------------------------------------------------------------


async def test_when_its_process_is_killed_commits_fail_and_reading_goes_on(path: Path):
    with opened(path) as store:
        await store.commit(commit([task_row(1)]))
        waiting = [asyncio.ensure_future(store.commit(commit([task_row(2)]))), asyncio.ensure_future(store.counts())]
        os.kill(store._process.pid, signal.SIGKILL)
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(outcome is None or isinstance(outcome, StoreError | dict) for outcome in outcomes)
        store._process.wait()
        with pytest.raises(StoreError, match="status -9"):
            await store.commit(commit([task_row(3)]))
        assert 1 in numbers(await store.list(Query()))
        assert numbers(store.get([task_id(1)])) == [1]


async def test_the_end_of_its_process_is_told_without_a_commit(path: Path):
    lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    with opened(path) as store:
        store.on_lost = lambda reason: lost.done() or lost.set_result(reason)
        await store.commit(commit([task_row(1)]))
        os.kill(store._process.pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            assert "status -9" in await lost


async def test_a_store_that_is_closed_was_not_lost(path: Path):
    lost: list[str] = []
    with opened(path) as store:
        store.on_lost = lost.append
        await store.commit(commit([task_row(1)]))
    await asyncio.sleep(0)
    assert lost == []


async def test_signals_that_mean_the_daemon_do_not_end_the_process(path: Path):
    with opened(path) as store:
        await store.commit(commit([task_row(1)]))  # It runs, and has said what it ignores.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(store._process.pid, number)
        await store.commit(commit([task_row(2)]))
        assert os.getpgid(store._process.pid) != os.getpgid(0)
        # Of one session: the worker's reaper takes other sessions for what tasks left behind.
        assert os.getsid(store._process.pid) == os.getsid(0)


async def test_on_commit_hears_of_every_success(path: Path):
    heard: list[tuple[float, int]] = []
    with opened(path, on_commit=lambda seconds, rows: heard.append((seconds, rows))) as store:
        await store.commit(commit([task_row(1), task_row(2)]))
        await store.commit(commit(updated=[task_row(1)]))
        with pytest.raises(StoreError):
            await store.commit(commit([task_row(1)]))
    assert [rows for _, rows in heard] == [2, 1]
    assert all(seconds > 0 for seconds, _ in heard)
