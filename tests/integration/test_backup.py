"""Backups of schedulers that serve, and clusters that begin again from them."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

from tests.integration.cluster import Cluster, Daemon, eventually
from tests.integration.load import Load
from tests.integration.replicas import replicas, store_of


def taskd(*args: str, socket: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command."""
    env = {**os.environ, **({"TASKD_SOCKET": str(socket)} if socket else {})}
    command = [sys.executable, "-m", "taskd", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def restore(daemon: Daemon, backup: Path, *options: str) -> None:
    """Restore a daemon's state from a backup; it must have ended."""
    done = taskd("restore", str(backup), "--state-dir", str(daemon.home), *options)
    assert done.returncode == 0, done.stderr


def rows_of(scheduler: Daemon) -> list[tuple[object, ...]]:
    """What a scheduler's store says of all tasks."""
    with contextlib.closing(sqlite3.connect(f"file:{store_of(scheduler)}?mode=ro", uri=True)) as connection:
        return connection.execute("SELECT id, state, epoch, lsn, record FROM tasks ORDER BY id").fetchall()


def counting(mark: Path) -> dict[str, object]:
    """A task that notes each run in a file."""
    return {"type": "command", "shell": f"echo run >> {mark}"}


def test_a_single_scheduler_goes_on_from_its_backup(fresh: Cluster, tmp_path: Path) -> None:
    settings = {"TASKD_NETWORK_MDNS": "false", "TASKD_SCHEDULER_EMPTY_WAIT_S": "1"}
    node = fresh.add("node", "scheduler,worker", env=settings).start()
    ended = node.submit(counting(tmp_path / "ended"))
    node.wait(ended)
    waiting = node.submit({**counting(tmp_path / "waiting"), "delay": 3})
    file = tmp_path / "backup.tar"
    made = taskd("backup", str(file), "--json", socket=node.socket)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["node_name"] == "node"
    assert file.stat().st_mode & 0o777 == 0o600
    assert taskd("backup", str(file), socket=node.socket).returncode == 1, "it exists"
    refused = taskd("restore", str(file), "--state-dir", str(node.home), "--force")
    assert refused.returncode == 1
    assert "another daemon" in refused.stderr

    epoch = node.ok("GET", "/v1/cluster")["term"]
    later = node.submit(counting(tmp_path / "later"))
    node.wait(later)
    node.kill()
    restore(node, file, "--force")
    node.start()
    view = node.ok("GET", "/v1/cluster")
    assert view["term"] > epoch
    assert node.ask("GET", f"/v1/tasks/{later[0]}")[0] == 404, "what came after the backup is not in it"
    assert node.wait([*ended, *waiting])[waiting[0]]["state"] == "succeeded"
    assert (tmp_path / "ended").read_text() == "run\n", "what had ended is not run again"


def test_an_old_copy_joins_a_cluster_and_brings_nothing_back(tmp_path: Path) -> None:
    with replicas(tmp_path / "cluster", 2, 1) as made:
        first, second = made.schedulers
        before = first.submit(*(counting(tmp_path / f"before{number}") for number in range(5)))
        held = first.submit({**counting(tmp_path / "held"), "delay": 1})
        file = tmp_path / "backup.tar"
        with Load(made.history, second, pause_s=0) as load:
            load.wait_for(20)
            assert taskd("backup", str(file), socket=first.socket).returncode == 0
            load.wait_for(20)
        after = first.submit(*(counting(tmp_path / f"after{number}") for number in range(5)))
        first.wait([*before, *held, *after])

        first.kill()
        made.wait_leader(2, second)
        late = second.submit(*(counting(tmp_path / f"late{number}") for number in range(5)))
        restore(first, file, "--force")
        first.start()
        made.wait_leader(1)
        made.wait_in_sync(2)
        results = first.wait([*before, *held, *after, *late])
        assert {result["state"] for result in results.values()} == {"succeeded"}
        marks = [path for path in tmp_path.iterdir() if path.name.startswith(("before", "held", "after", "late"))]
        assert len(marks) == 16
        assert {path.read_text() for path in marks} == {"run\n"}, "nothing ran twice"
        first.wait([one for submission in made.history.submissions for one in [submission.id] if one])
        eventually(lambda: rows_of(first) == rows_of(second))


def test_a_copy_does_not_lead_beside_the_node_that_it_was_made_of(fresh: Cluster, tmp_path: Path) -> None:
    settings = {"TASKD_NETWORK_MDNS": "false"}
    node = fresh.add("node", "scheduler", env=settings).start()
    file = tmp_path / "backup.tar"
    assert taskd("backup", str(file), socket=node.socket).returncode == 0
    listening = next(line for line in node.log.read_text().splitlines() if "listening" in line).split("address=")[1]
    copy = fresh.add("copy", "scheduler", "--join", listening.split()[0], env=settings)
    restore(copy, file)
    copy.start(wait=False)
    assert copy.wait_exit() == 1
    assert "node id" in copy.log.read_text()
    assert node.is_ready()

    restore(copy, file, "--force", "--new-node")
    copy.start()
    eventually(lambda: any(view["replication"] == "in_sync" for view in node.ok("GET", "/v1/cluster")["replicas"]))


def test_a_worker_keeps_nothing_to_back_up(shared: Cluster, tmp_path: Path) -> None:
    worker = shared.daemons[1]
    done = taskd("backup", str(tmp_path / "b"), socket=worker.socket)
    assert done.returncode == 1
    assert "worker only" in done.stderr
    assert not list(tmp_path.iterdir())
