"""Leaders die, stop and come back on one machine: clients of the other nodes notice nothing, and nothing is lost."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

import pytest

from tests.integration.cluster import Events, eventually
from tests.integration.load import Load
from tests.integration.replicas import Replicas, leader_at, long_command, replicas, replication, store_of, wipe

Build = Callable[..., Replicas]


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    """Makes a cluster of schedulers and workers, which ends with the test."""
    with ExitStack() as stack:

        def make(schedulers: int = 2, workers: int = 1, env: dict[str, str] | None = None) -> Replicas:
            return stack.enter_context(replicas(tmp_path, schedulers, workers, env=env))

        yield make


def test_a_killed_leader_is_replaced_and_leads_again_when_it_is_back(build: Build, tmp_path: Path) -> None:
    made = build(2, 2)
    history, (first, second), (worker, _) = made.history, made.schedulers, made.workers
    pids, release = tmp_path / "pids", tmp_path / "release"
    history.submit(worker, history.command(long_command(pids, release)))
    eventually(lambda: pids.exists() and pids.read_text())
    with Load(history, second) as standby_client, Load(history, worker, history.command) as worker_client:
        standby_client.wait_for(20)
        worker_client.wait_for(20)
        first.kill()
        made.wait_leader(2)
        standby_client.wait_for(20)
        worker_client.wait_for(20)
        first.start()
        made.wait_leader(1)
        standby_client.wait_for(20)
        worker_client.wait_for(20)
    release.touch()
    report = made.settle()
    assert history.errors() == []
    assert report.answered == len(history.submissions)
    assert len(pids.read_text().split()) == 1, "a command that ran through both changes was not started again"


def test_a_killed_leader_takes_nothing_with_it_that_it_answered(build: Build) -> None:
    """Its own clients get errors; what it had answered before is at the standby, and runs there."""
    made = build(2, 1)
    first, second = made.schedulers
    with Load(made.history, first, pause_s=0, tasks_per_request=5) as load:
        load.wait_for(50)
        first.kill()
        made.wait_leader(2)
    report = made.history.settle([store_of(second)])
    assert not report.faults, report.faults
    assert {one.durability for one in made.history.submissions if one.id} == {"replicated"}


def test_an_orderly_stop_hands_over(build: Build) -> None:
    made = build(2, 1)
    first, second = made.schedulers
    with Load(made.history, second) as load, Load(made.history, made.workers[0]) as other:
        load.wait_for(20)
        assert first.stop() == 0
        assert leader_at(second) == 2, "it had handed over before it ended"
        load.wait_for(20)
        other.wait_for(20)
        first.start()
        made.wait_leader(1)
        load.wait_for(20)
        other.wait_for(20)
    made.settle()
    assert made.history.errors() == []
    for daemon in made.daemons:
        assert "Traceback" not in daemon.log.read_text()


def test_a_standby_that_dies_is_told_of_and_waited_for(build: Build) -> None:
    made = build(2, 1, env={"TASKD_SCHEDULER_STANDBY_GRACE_S": "1"})
    first, second = made.schedulers
    with Load(made.history, first) as load:
        load.wait_for(20)
        second.kill()
        load.wait_for(20)
        eventually(lambda: first.ok("GET", "/v1/cluster")["durability"] == "local")
        view = first.ok("GET", "/v1/cluster")
        assert view["health"] == "degraded"
        assert view["why"]
        load.wait_for(20)
        second.start()
        made.wait_in_sync(2)
        load.wait_for(20)
    view = first.ok("GET", "/v1/cluster")
    assert (view["durability"], view["health"]) == ("replicated", "ok"), view
    said = [durability for durability, _ in groupby(one.durability for one in made.history.submissions)]
    assert said == ["replicated", "local", "replicated"]
    made.settle()
    assert made.history.errors() == []


def test_a_standby_with_a_new_disk_catches_up_and_can_lead(build: Build) -> None:
    made = build(2, 1)
    first, second = made.schedulers
    with Load(made.history, made.workers[0]) as load:
        load.wait_for(20)
        second.kill()
        wipe(second)
        load.wait_for(20)
        second.start()
        made.wait_in_sync(2)
        load.wait_for(20)
        first.kill()
        made.wait_leader(2)
        load.wait_for(20)
        wipe(first)
        first.start()
        made.wait_leader(1)
        load.wait_for(20)
    made.settle()
    assert made.history.errors() == []


def test_a_whole_cluster_that_was_killed_comes_back_with_everything(build: Build) -> None:
    made = build(2, 1)
    with Load(made.history, made.workers[0], pause_s=0) as load:
        load.wait_for(50)
        for daemon in made.daemons:
            daemon.kill()
    for daemon in made.daemons:
        daemon.start(wait=False)
    made.wait_until_whole()
    made.settle()


def test_without_a_standby_nothing_is_taken_where_the_operator_wants_one(build: Build) -> None:
    made = build(2, 1)
    first, second = made.schedulers
    for scheduler in made.schedulers:
        scheduler.stop()
    for scheduler in made.schedulers:
        scheduler.start(wait=False, env={"TASKD_SCHEDULER_MIN_REPLICAS": "1", "TASKD_SCHEDULER_STANDBY_GRACE_S": "0.5"})
    made.wait_until_whole()
    assert made.history.submit(first, made.history.handler())
    second.kill()
    eventually(lambda: first.ok("GET", "/v1/cluster")["durability"] == "local")
    status, answer = first.ask("POST", "/v1/tasks", {"argv": ["true"]})
    assert status == 503, answer
    assert "standby" in answer["error"]["message"], answer
    second.start()
    made.wait_in_sync(2)
    assert made.history.submit(first, made.history.handler())
    made.settle()


def test_standbys_answer_reads_and_see_what_the_leader_sees(build: Build) -> None:
    made = build(2, 1)
    first, second = made.schedulers
    ids = made.history.submit(second, *[made.history.handler()] * 5)
    results = second.wait(ids)
    made.settle()
    for path in (f"/{ids[0]}", f"/{ids[0]}/attempts", f"/{ids[1]}/result", "?limit=3"):
        assert second.ok("GET", f"/v1/tasks{path}") == first.ok("GET", f"/v1/tasks{path}")
    first.signal(signal.SIGSTOP)  # It leads no more, and nobody knows that yet.
    try:
        assert second.ok("GET", f"/v1/tasks/{ids[0]}/result")["state"] == results[ids[0]]["state"]
    finally:
        first.signal(signal.SIGCONT)
    made.wait_until_whole()  # The standby may have taken over meanwhile.
    view = made.workers[0].ok("GET", "/v1/cluster")
    assert [(one["node_id"], one["replication"]) for one in view["replicas"]] == [(1, "leading"), (2, "in_sync")]


def test_events_go_on_through_a_change_of_leaders(build: Build) -> None:
    """A stream of a standby tells who leads, and goes on."""
    made = build(2, 1)
    first, second = made.schedulers
    with Events(second) as events:
        made.history.submit(second, made.history.handler())
        events.wait_for("task.succeeded")
        first.kill()
        events.wait_for("leader.changed")
        made.history.submit(second, made.history.handler())
        events.wait_for("task.succeeded")


def test_of_two_nodes_with_one_id_the_younger_is_refused(build: Build) -> None:
    made = build(2, 1)
    first = made.schedulers[0]
    twin = made.add_scheduler(2, name="twin").start(wait=False)
    with Load(made.history, first) as load:
        load.wait_for(5)
        assert twin.wait_exit() != 0
        made.drop(twin)
        load.wait_for(5)
    text = twin.log.read_text()
    assert "Traceback" not in text
    assert any("2" in line and "node id" in line for line in text.splitlines()), text
    assert replication(first, 2) == "in_sync"
    made.settle()
    assert {one.durability for one in made.history.submissions} == {"replicated"}


@pytest.mark.parametrize("returning", [1, 2])
def test_three_schedulers_survive_one_after_the_other(build: Build, returning: int) -> None:
    """Two of three die in turn; whoever comes back, the lowest that lives leads in the end."""
    made = build(3, 1)
    first, second, third = made.schedulers
    with Load(made.history, third) as load:
        load.wait_for(10)
        first.kill()
        made.wait_leader(2)
        made.wait_in_sync(3)
        load.wait_for(10)
        second.kill()
        made.wait_leader(3)
        load.wait_for(10)
        (first, second)[returning - 1].start()
        made.wait_leader(returning)
        load.wait_for(10)
        (second, first)[returning - 1].start()
        made.wait_until_whole()
        load.wait_for(10)
    made.settle()
    assert made.history.errors() == []
