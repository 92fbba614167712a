"""kill -9 in the middle of the work: everything that was acknowledged ends, once in the record."""

from __future__ import annotations

import os
from pathlib import Path

from tests.integration.cluster import Cluster, Daemon, eventually
from tests.integration.conftest import HANDLERS

TASKS = 2000


def submit_marks(node: Daemon, marks: Path, count: int) -> list[str]:
    """Commands that note each of their runs in a file of their own."""
    marks.mkdir()
    tasks = [{"shell": f"echo $TASKD_FENCE >> {marks}/{number}"} for number in range(count)]
    return node.submit(*tasks)


def runs(marks: Path) -> list[int]:
    return [len(mark.read_text().splitlines()) for mark in marks.iterdir()]


def check_record(head: Daemon, ids: list[str]) -> None:
    """Every acknowledged task has succeeded, with exactly one successful attempt in its record."""
    results = head.wait(ids, 100)
    assert set(results) == set(ids)
    assert {result["state"] for result in results.values()} == {"succeeded"}
    for task in ids[:: max(1, len(ids) // 50)]:
        attempts = head.ok("GET", f"/v1/tasks/{task}")["attempts"]
        assert [attempt["outcome"] for attempt in attempts].count("ok") == 1


def test_kill_of_the_scheduler_loses_nothing_and_restarts_nothing_needlessly(fresh: Cluster, tmp_path: Path) -> None:
    fresh.start(2, env={"TASKD_WORKER_SLOTS": "2"})
    head = fresh.head
    release = tmp_path / "release"
    long = head.submit(*[{"shell": f"echo $$ >> {tmp_path}/long; until [ -e {release} ]; do sleep 0.05; done"}] * 2)
    eventually(lambda: (tmp_path / "long").exists() and len((tmp_path / "long").read_text().split()) == 2)
    ids = submit_marks(head, tmp_path / "marks", TASKS)
    eventually(lambda: len(os.listdir(tmp_path / "marks")) > TASKS // 4)
    head.kill()
    head.start()
    check_record(head, ids)
    release.touch()
    check_record(head, long)
    pids = (tmp_path / "long").read_text().split()
    assert len(pids) == 2, "commands that ran through the restart were not started again"
    assert len(runs(tmp_path / "marks")) == TASKS
    assert max(runs(tmp_path / "marks")) == 1, "workers kept what they had: no second run"


def test_kill_of_a_worker_moves_its_work(fresh: Cluster, tmp_path: Path) -> None:
    fresh.start(2, env={"TASKD_WORKER_SLOTS": "2"})
    head, victim = fresh.head, fresh.daemons[1]
    ids = submit_marks(head, tmp_path / "marks", TASKS)
    eventually(lambda: len(os.listdir(tmp_path / "marks")) > TASKS // 4)
    victim.kill()
    check_record(head, ids)
    victim.start()
    fresh.wait_for_workers(2)
    assert min(runs(tmp_path / "marks")) >= 1


def test_a_restarted_worker_ends_what_its_last_process_left(fresh: Cluster, tmp_path: Path) -> None:
    fresh.start(1)
    head, worker = fresh.head, fresh.daemons[1]
    pid_file = tmp_path / "pid"
    (task,) = head.submit({"shell": f"echo $$ > {pid_file}; exec sleep 1000", "on_lost": "fail"})
    eventually(lambda: pid_file.exists() and pid_file.read_text())
    worker.kill()
    worker.start()
    assert head.wait([task])[task]["state"] == "failed"
    pid = int(pid_file.read_text())
    eventually(lambda: not os.path.exists(f"/proc/{pid}"))


def test_handlers_survive_kills_of_both(fresh: Cluster) -> None:
    fresh.start(2, env=HANDLERS)
    head = fresh.head
    ids = head.submit(*[{"type": "add", "params": {"left": number}} for number in range(TASKS * 5)])
    fresh.daemons[1].kill()
    head.kill()
    head.start()
    results = head.wait(ids, 100)
    assert [results[task]["result"] for task in ids] == [number + 1 for number in range(TASKS * 5)]


def test_a_restart_with_a_great_many_kinds_of_tasks(fresh: Cluster) -> None:
    """Each asks for another amount, so that each is the head of a queue of its own, and all are on the disk alone."""
    head = fresh.start(0).head
    ids = head.submit(*[{"argv": ["true"], "resources": {"disk": number}} for number in range(1, 1501)])
    head.kill()
    head.start()
    head.ok("POST", "/v1/tasks/cancel", {"ids": ids})
    assert {result["state"] for result in head.wait(ids).values()} == {"cancelled"}


def test_an_orderly_stop_loses_nothing(fresh: Cluster, tmp_path: Path) -> None:
    fresh.start(2)
    head = fresh.head
    (task,) = head.submit({"shell": "trap 'exit 3' TERM; while :; do sleep 0.02; done", "retries": 0})
    eventually(lambda: head.ok("GET", f"/v1/tasks/{task}")["state"] == "running")
    first = head.ok("GET", f"/v1/tasks/{task}")["worker_name"]
    worker = next(daemon for daemon in fresh.daemons if daemon.home.name == first)
    assert worker.stop() == 0
    eventually(lambda: head.ok("GET", f"/v1/tasks/{task}")["state"] == "running")
    detail = head.ok("GET", f"/v1/tasks/{task}")
    assert [attempt["outcome"] for attempt in detail["attempts"]] == ["preempted", None]
    assert detail["worker_name"] != first
    head.ok("POST", f"/v1/tasks/{task}/cancel")
    head.wait([task])
    assert head.stop() == 0


def test_a_scheduler_that_stops_keeps_where_its_workers_were(fresh: Cluster) -> None:
    fresh.start(1)
    fresh.wait_for_workers(1)
    fresh.head.stop()
    (kept,) = fresh.directory.rglob("addresses.json")
    assert kept.parent.name == "scheduler"
    assert "127.0.0.1" in kept.read_text()
    fresh.head.start()
    fresh.wait_for_workers(1)
