"""The referee of the other tests: it finds nothing wrong with what is right, and finds each thing that is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from taskd.core.task import TaskState
from tests.integration.cluster import Cluster
from tests.integration.conftest import HANDLERS
from tests.integration.history import History
from tests.integration.load import Load
from tests.integration.replicas import store_of


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[History, Path]:
    """The history of a quiet quarter of a second, and the database that it left."""
    directory = tmp_path_factory.mktemp("played")
    history = History(directory)
    made = Cluster(directory)
    try:
        made.start(1, env=HANDLERS)
        with Load(history, made.head) as load, Load(history, made.daemons[1], history.command):
            load.wait_for(10)
        report = history.settle([store_of(made.head)])
        assert not report.faults, report.faults
        assert made.head.stop() == 0
    finally:
        made.close()
    return history, store_of(made.head)


def test_a_quiet_history_is_good(played: tuple[History, Path]) -> None:
    history, store = played
    report = history.check([store, store])
    assert report.faults == {}
    assert report.answered == report.runs == len(history.ids) > 10
    assert report.refused == report.recovered == report.second_runs == report.late_results == 0


def _delete_one(connection: apsw.Connection) -> None:
    connection.execute("DELETE FROM tasks WHERE id = (SELECT min(id) FROM tasks)")


def _fail_one(connection: apsw.Connection) -> None:
    connection.execute("UPDATE tasks SET state = ? WHERE id = (SELECT min(id) FROM tasks)", (int(TaskState.FAILED),))


def _reopen_one(connection: apsw.Connection) -> None:
    connection.execute("UPDATE tasks SET state = ? WHERE id = (SELECT min(id) FROM tasks)", (int(TaskState.QUEUED),))


def _double_one(connection: apsw.Connection) -> None:
    columns = [row[1] for row in connection.execute("PRAGMA table_info(tasks)")][1:]
    names = ", ".join(columns)
    connection.execute(f"INSERT INTO tasks (id, {names}) SELECT zeroblob(16), {names} FROM tasks LIMIT 1")


@pytest.mark.parametrize(
    ("change", "both", "found"),
    [
        (_delete_one, False, "missing"),
        (_delete_one, True, "lost"),
        (_fail_one, False, "unequal"),
        (_fail_one, True, "wrong"),
        (_reopen_one, False, "unfinished"),
        (_double_one, True, "doubled"),
    ],
)
def test_a_doctored_store_is_found_out(
    played: tuple[History, Path], tmp_path: Path, change: Callable[[apsw.Connection], None], both: bool, found: str
) -> None:
    history, store = played
    copy = tmp_path / "copy.db"
    shutil.copyfile(store, copy)
    with closing(apsw.Connection(str(copy))) as connection:
        change(connection)
    assert found in history.check([copy] if both else [store, copy]).faults


def test_what_ran_without_leave_is_found_out(played: tuple[History, Path], tmp_path: Path) -> None:
    history, store = played
    told = History(tmp_path)
    told.submissions = history.submissions[1:]
    lines = history.runs_file.read_text().splitlines()
    task, attempt, token, pid = lines[-1].split()
    told.runs_file.write_text("\n".join([*lines, lines[0], f"{task} {attempt} 9{token} {pid}", ""]))
    report = told.check([store])
    assert set(report.faults) == {"unexpected", "restarted", "unrecorded"}
    assert report.second_runs == 1
