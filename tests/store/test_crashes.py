"""Whatever dies and whenever: what was answered is there afterwards, all of it, and nothing half."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from taskd import failpoints
from taskd.core.effects import Commit, Purge
from taskd.core.task import TaskState
from taskd.protocol.messages import TaskRow
from taskd.store.sqlite import SQLiteStore
from tests.store.samples import commit, dot, task_id, task_row

ROOT = Path(__file__).parents[2]

DAEMON = """
import asyncio, sys
from taskd.store.sqlite import SQLiteStore
from tests.store.test_crashes import commits_held, the_commit

async def main():
    store = SQLiteStore.open(sys.argv[1])
    number = commits_held(store)
    print(store._process.pid, flush=True)
    while True:
        number += 1
        await store.commit(the_commit(number))
        print(number, flush=True)

asyncio.run(main())
"""


def the_commit(number: int) -> Commit:
    """The daemon's commit of that number: something of everything that a commit can hold."""
    at = {"epoch": 1, "node_id": 5, "boot": 1, "lsn": number}
    first = 100 + number * 10
    return commit(
        [task_row(first + offset, record=bytes(400), **at) for offset in range(1 + number % 7)],
        [task_row(first - 10, TaskState.SUCCEEDED, **at)] if number > 1 else [],
        taken=[task_row(number % 3, TaskState.RUNNING, name=str(number), **at)],
        purged=[task_id(first - 20)],
        purges=[Purge(task_id(first - 31), task_id(first - 22), (), (dot(1, 5, 1, number - 3),))] if number > 4 else [],
        seen=[dot(1, 5, 1, number)],
        last_purge=dot(1, 5, 1, number),
    )


def rows_after(number: int) -> list[TaskRow]:
    """What is there after so many commits, worked out without a database."""
    rows: dict[bytes, TaskRow] = {}
    for done in map(the_commit, range(1, number + 1)):
        for row in (*done.inserted, *done.updated, *done.taken):
            rows[row.id] = row
        for id in done.purged:
            rows.pop(id, None)
        for purge in done.purges:
            for id in [id for id in rows if purge.after < id <= purge.until]:
                del rows[id]
    return sorted(rows.values(), key=lambda row: row.id)


def commits_held(store: SQLiteStore) -> int:
    """How many of the daemon's commits are there."""
    loaded = store.load()
    return loaded.seen[0].lsn if loaded.seen else 0


def check(path: Path) -> int:
    """How many commits are there, after a look that there are neither more nor less of their rows."""

    async def rows(store: SQLiteStore) -> list[TaskRow]:
        ids, going_on = await store.ids(b"")
        assert going_on is None
        return await store.rows(ids)

    with contextlib.closing(SQLiteStore.open(path)) as store:
        number = commits_held(store)
        assert asyncio.run(rows(store)) == rows_after(number)
        assert store.load().purged == (dot(1, 5, 1, number) if number else None)
    return number


def start(path: Path, **environment: str) -> tuple[subprocess.Popen[bytes], int]:
    """A daemon that commits for ever, and the pidfd of its store's process."""
    daemon = subprocess.Popen(
        [sys.executable, "-c", DAEMON, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # `communicate` reads the pipe itself, past what `readline` would have buffered.
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert daemon.stdout is not None
    return daemon, os.pidfd_open(int(daemon.stdout.readline()))


def wait_for_end(pidfd: int) -> None:
    select.select([pidfd], [], [])
    os.close(pidfd)


@pytest.mark.parametrize("victim", ["daemon", "its process"])
@pytest.mark.parametrize("commits", [1, 200])
def test_what_was_acknowledged_before_a_kill_is_there_after_it(tmp_path: Path, victim: str, commits: int):
    path = tmp_path / "taskd.db"
    daemon, writer = start(path)
    assert daemon.stdout is not None
    with daemon:
        acknowledged = 0
        while acknowledged < commits:
            acknowledged = int(daemon.stdout.readline())
        if victim == "daemon":
            daemon.kill()
        else:
            signal.pidfd_send_signal(writer, signal.SIGKILL)
        output, complaint = daemon.communicate()
    acknowledged = int((output.split() or [acknowledged])[-1])  # What was acknowledged until it died.
    assert victim == "daemon" or b"StoreError" in complaint
    wait_for_end(writer)  # The process follows its daemon by itself.
    assert check(path) in (acknowledged, acknowledged + 1)  # One commit was in hand.


@pytest.mark.parametrize(("point", "kept"), [("store.before_commit", 0), ("store.after_commit", 1)])
def test_a_point_kills_the_process_and_its_daemon_there_and_nowhere_else(tmp_path: Path, point: str, kept: int):
    path = tmp_path / "taskd.db"
    held = 0
    for count in (1, 7, 2):  # Again and again, with the same database.
        daemon, writer = start(path, **{failpoints.VARIABLE: f"{point}:{count}"})
        with daemon:
            output, complaint = daemon.communicate()
        wait_for_end(writer)
        assert daemon.returncode == -signal.SIGKILL, complaint
        assert output.split() == [b"%d" % (held + number) for number in range(1, count)]
        held += count - 1 + kept
        assert check(path) == held


# -- The points themselves ---------------------------------------------------------------------------------------------

VISITOR = "from taskd import failpoints\nfor name in 'abacada': failpoints.hit(name); print(name, end='', flush=True)"


def visit(**options: Any) -> subprocess.CompletedProcess[bytes]:
    """A process that comes to some points."""
    return subprocess.run([sys.executable, "-c", VISITOR], cwd=ROOT, capture_output=True, check=False, **options)


@pytest.mark.parametrize(
    ("wanted", "reached"),
    [("", "abacada"), ("a", ""), ("b", "a"), ("a:1", ""), ("a:3", "abac"), ("a:5", "abacada"), ("e", "abacada")],
)
def test_the_counted_hit_kills(wanted: str, reached: str):
    visitor = visit(env={**os.environ, failpoints.VARIABLE: wanted})
    assert visitor.stdout.decode() == reached
    assert visitor.returncode == (0 if reached == "abacada" else -signal.SIGKILL)


def test_without_the_variable_nothing_happens():
    environment = {name: value for name, value in os.environ.items() if name != failpoints.VARIABLE}
    visitor = visit(env=environment)
    assert (visitor.stdout, visitor.stderr, visitor.returncode) == (b"abacada", b"", 0)


@pytest.mark.parametrize("wanted", ["a:", "a:0", "a:-1", "a:x", ":1", ":", "a:1:2"])
def test_a_mistyped_point_is_told_at_once(wanted: str):
    visitor = visit(env={**os.environ, failpoints.VARIABLE: wanted})
    assert visitor.stdout == b""
    assert b"ValueError" in visitor.stderr
