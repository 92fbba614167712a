"""The cluster key is replaced under a running task: by the commands that an operator uses, on real daemons."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from taskd.net.keyring import Keys
from taskd.net.security import SchedulerKey
from tests.integration.cluster import Cluster, Daemon, eventually, free_port

ALONE = {"TASKD_NETWORK_MDNS": "false"}


def taskd(*arguments: str, text: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-m", "taskd", *arguments], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def reload(daemon: Daemon, words: str) -> None:
    """SIGHUP, until its log says so."""
    before = daemon.log.read_text().count(words)
    daemon.signal(signal.SIGHUP)
    eventually(lambda: daemon.log.read_text().count(words) > before)


@pytest.fixture
def fresh(tmp_path: Path):
    made = Cluster(tmp_path)
    yield made
    made.close()


def test_a_key_is_replaced_and_no_task_notices(fresh: Cluster) -> None:
    port = free_port()
    head = fresh.add("head", "scheduler", "--listen", f"127.0.0.1:{port}", env=ALONE).start()
    old_key = taskd("key", "show", "--role", "worker", "--key-file", str(fresh.key))
    keys = {name: fresh.directory / f"{name}.key" for name in ("hand", "late")}
    for path in keys.values():
        taskd("key", "import", "--key-file", str(path), text=old_key)
    hand, late = (
        Daemon(
            fresh.directory / name,
            path,
            "worker",
            "--name",
            name,
            "--join",
            f"127.0.0.1:{port}",
            env={**fresh.env, **ALONE},
        )
        for name, path in keys.items()
    )
    fresh.daemons += [hand, late]
    hand.start()
    fresh.wait_for_workers(1)
    (task,) = head.submit({"argv": ["sleep", "600"]})
    eventually(lambda: head.ok("GET", f"/v1/tasks/{task}")["state"] == "running")

    said = taskd("key", "rotate", "--grace", "1h", "--key-file", str(fresh.key))
    assert "made the key of cluster" in said
    assert "is accepted until" in said
    reload(head, "cluster key read again")
    late.start()  # With the old key only, in the grace time.
    fresh.wait_for_workers(2)
    both = taskd("key", "show", "--role", "worker", "--key-file", str(fresh.key))
    said = taskd("key", "import", "--key-file", str(keys["hand"]), text=both)
    assert "stored the worker key" in said
    reload(hand, "cluster key read again")
    lines = taskd("key", "fingerprint", "--key-file", str(keys["hand"])).splitlines()
    assert lines[0].startswith("worker key of cluster ")
    assert lines[1].startswith("previous key ")
    assert both.split()[0] not in "".join(lines)
    assert head.log.read_text().count("worker registered") == 2, "a reload closes nothing"

    taskd("key", "end-grace", "--key-file", str(fresh.key))
    taskd("key", "end-grace", "--key-file", str(keys["hand"]))
    reload(hand, "the previous cluster key is accepted no more")
    reload(head, "the previous cluster key is accepted no more")
    eventually(lambda: "has another cluster key" in late.log.read_text())
    eventually(lambda: head.log.read_text().count("worker registered") >= 3)
    eventually(lambda: head.ok("GET", "/v1/cluster")["workers"] == 1)
    view = head.ok("GET", f"/v1/tasks/{task}")
    assert (view["state"], view["attempt"]) == ("running", 1)
    head.ok("POST", f"/v1/tasks/{task}/cancel")
    assert head.wait([task])[task]["state"] == "cancelled"


@pytest.mark.parametrize("commands", [("rotate --grace 0",), ("rotate --grace 1h", "end-grace")])
def test_a_stolen_key_is_worthless_from_the_reload_on(fresh: Cluster, commands: tuple[str, ...]) -> None:
    port = free_port()
    head = fresh.add("head", "scheduler", "--listen", f"127.0.0.1:{port}", env=ALONE).start()
    old_key = taskd("key", "show", "--role", "worker", "--key-file", str(fresh.key))
    hands = []
    for name in ("hand", "thief"):
        path = fresh.directory / f"{name}.key"
        taskd("key", "import", "--key-file", str(path), text=old_key)
        options = ("--name", name, "--join", f"127.0.0.1:{port}")
        hand = Daemon(fresh.directory / name, path, "worker", *options, env={**fresh.env, **ALONE})
        hands.append(hand.start())
    fresh.daemons += hands
    hand, thief = hands
    fresh.wait_for_workers(2)

    for command in commands:
        taskd("key", *command.split(), "--key-file", str(fresh.key))
    reload(head, "the previous cluster key is accepted no more")
    eventually(lambda: "has another cluster key" in thief.log.read_text())
    eventually(lambda: head.ok("GET", "/v1/cluster")["workers"] == 0)
    assert "is not taken" not in head.log.read_text()

    other = taskd("key", "show", "--role", "worker", "--key-file", str(fresh.key))
    said = taskd("key", "import", "--key-file", str(fresh.directory / "hand.key"), text=other)
    assert "stored the worker key" in said, "it is the next one of this cluster, and needs no force"
    reload(hand, "cluster key read again")
    eventually(lambda: head.ok("GET", "/v1/cluster")["workers"] == 1)
    (task,) = head.submit({"argv": ["true"]})
    assert head.wait([task])[task]["state"] == "succeeded"


def test_the_key_of_another_cluster_is_not_taken_by_mistake(fresh: Cluster) -> None:
    head = fresh.add("head", "scheduler", "--listen", f"127.0.0.1:{free_port()}", env=ALONE).start()
    foreign = SchedulerKey.generate()
    Keys(foreign).followed_by(SchedulerKey.generate(), None).save(fresh.key, force=True)
    reload(head, "holds the key of another cluster")
    assert head.ok("GET", "/v1/cluster")["health"] != "down"


def test_a_command_that_would_lose_a_key_says_so(fresh: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "some.key"
    head = fresh.add("head", "scheduler", env=ALONE).start()
    head.stop()
    worker_key = taskd("key", "show", "--key-file", str(fresh.key))
    taskd("key", "import", "--key-file", str(path), text=worker_key)
    for arguments, text, complaint in (
        (("rotate", "--key-file", str(path)), "", "on a scheduler's machine"),
        (("import", "--key-file", str(fresh.key)), worker_key, "holds a scheduler key"),
        (("import", "--key-file", str(path)), "nonsense", "no cluster key"),
        (("show", "--key-file", str(tmp_path / "none")), "", "there is no key"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "taskd", "key", *arguments], input=text, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert complaint in done.stderr
    taskd("key", "rotate", "--key-file", str(fresh.key))
    done = subprocess.run(
        [sys.executable, "-m", "taskd", "key", "rotate", "--key-file", str(fresh.key)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "end it first" in done.stderr
