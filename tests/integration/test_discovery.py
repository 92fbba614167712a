"""Nodes find each other with nothing but their role and a shared key."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cluster import Cluster, Daemon, eventually
from tests.integration.lan import Lan, lan, why_not

REASON = why_not()


def test_two_plain_daemons_find_each_other_by_mdns(fresh: Cluster) -> None:
    head = fresh.add("head", "scheduler").start()
    worker = fresh.add("worker", "worker").start()
    fresh.wait_for_workers(1)
    (result,) = worker.ok("POST", "/v1/tasks?wait=30", {"argv": ["true"]})["results"]
    assert result["state"] == "succeeded"
    assert head.ok("GET", f"/v1/tasks/{result['id']}")["worker_name"] == "worker"


def test_a_worker_may_start_before_there_is_a_key_or_a_scheduler(fresh: Cluster) -> None:
    worker = fresh.add("worker", "worker").start(wait=False)
    eventually(lambda: worker.log.exists() and "key" in worker.log.read_text())
    fresh.add("head", "scheduler").start()
    worker.wait_ready()
    fresh.wait_for_workers(1)


def test_a_scheduler_that_comes_back_on_another_port_is_found_again(fresh: Cluster) -> None:
    head = fresh.add("head", "scheduler", "--listen", "127.0.0.1:0").start()
    fresh.add("worker", "worker").start()
    fresh.wait_for_workers(1)
    head.kill()
    head.start()
    fresh.wait_for_workers(1)
    (result,) = head.ok("POST", "/v1/tasks?wait=30", {"argv": ["true"]})["results"]
    assert result["state"] == "succeeded"


@pytest.fixture
def network() -> Iterator[Lan]:
    if REASON is not None:
        pytest.skip(REASON)
    with lan(4) as made:
        yield made


@pytest.mark.namespaces
def test_four_hosts_on_a_lan(fresh: Cluster, network: Lan, tmp_path: Path) -> None:
    """Real mDNS between four hosts; then a cable is pulled, and put back."""
    fresh.env = {}  # As on a user's machines: all interfaces that lead to others.
    head = fresh.add("host1", "scheduler", prefix=network.prefix(1)).start()
    for number in (2, 3, 4):
        slots = {"TASKD_WORKER_SLOTS": "2"}
        fresh.add(f"host{number}", "worker", env=slots, prefix=network.prefix(number)).start()
    fresh.wait_for_workers(3)
    nodes = {view["name"]: view for view in head.ok("GET", "/v1/nodes")["nodes"]}
    assert {name: view["address"].split(":")[0] for name, view in nodes.items() if name != "host1"} == {
        "host2": "10.99.0.2",
        "host3": "10.99.0.3",
        "host4": "10.99.0.4",
    }
    command = f"echo $TASKD_FENCE > {tmp_path}/$TASKD_TASK_ID; sleep 0.2"
    ids = head.submit(*[{"shell": command, "on_lost": "retry"}] * 60)
    eventually(lambda: len(os.listdir(tmp_path)) > 12)
    network.cut(3)
    eventually(lambda: node_state(head, "host3") == "lost")
    results = head.wait(ids)
    assert {result["state"] for result in results.values()} == {"succeeded"}
    network.mend(3)
    eventually(lambda: node_state(head, "host3") == "up")
    assert head.wait(head.submit({"argv": ["true"]}))


def node_state(head: Daemon, name: str) -> str:
    nodes = head.ok("GET", "/v1/nodes")["nodes"]
    return next(view["state"] for view in nodes if view["name"] == name)
