"""Nodes, the cluster, keys, settings, the doctor."""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from taskd.cli import doctor_machine
from taskd.version import VERSION
from tests.cli.conftest import Taskd
from tests.client.fake_daemon import FakeDaemon


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders of a user who is not root."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for name, folder in (("XDG_CONFIG_HOME", "config"), ("XDG_STATE_HOME", "state"), ("XDG_RUNTIME_DIR", "run")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    return tmp_path


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda text: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


# -- Nodes -------------------------------------------------------------------------------------------------------------


def test_nodes_are_listed_and_shown(taskd: Taskd, daemon: FakeDaemon) -> None:
    daemon.nodes[1].update(clock_offset_s=-90.0)
    lines = taskd("node", "list").out.splitlines()
    assert lines[0].split() == ["ID", "NAME", "ROLES", "STATE", "BUSY", "HAS", "CLOCK", "NOTE"]
    assert lines[1].split() == ["1", "head", "(leads)", "scheduler", "up", "-", "-", "ok"]
    assert lines[2].split() == ["2", "arm", "worker", "up", "1/4", "cpus", "4,", "memory", "8GiB", "-1m30s"]
    daemon.nodes[1].update(state="lost", seen=time.time() - 61.5, clock_offset_s=None)
    assert taskd("node", "list").out.splitlines()[2].endswith("-      last seen 1m2s ago")
    daemon.nodes[1]["drain_reason"] = "kernel\x1b"
    assert taskd("node", "list").out.splitlines()[2].endswith("last seen 1m2s ago, kernel\\x1b")
    daemon.nodes[1].update(state="up", drain_reason="", clock_offset_s=-90.0)
    assert [json.loads(line)["name"] for line in taskd("node", "list", "--json").out.splitlines()] == ["head", "arm"]
    page = taskd("node", "show", "arm").out
    for text in ("arm  up", "cpus        1 of 4 used", "memory      0B of 8GiB used", "labels      os=debian"):
        assert text in page
    assert json.loads(taskd("node", "show", "2", "--json").out)["name"] == "arm"
    ran = taskd("node", "show", "nobody")
    assert (ran.code, ran.err) == (1, "taskd: there is no node nobody\n")


def test_a_node_is_drained_and_resumed(taskd: Taskd, daemon: FakeDaemon) -> None:
    assert taskd("node", "drain", "arm", "-m", "kernel update").out == "arm is drained; 1 still running there\n"
    assert daemon.nodes[1]["drain_reason"] == "kernel update"
    assert "kernel update" in taskd("node", "list").out
    assert taskd("node", "resume", "arm").out == "arm is up\n"
    assert json.loads(taskd("node", "drain", "2", "--json").out)["state"] == "drained"
    assert json.loads(taskd("node", "resume", "2", "--json").out)["state"] == "up"


def replica(node_id: int, name: str, stage: str | None, **more: Any) -> dict[str, Any]:
    view = {"node_id": node_id, "name": name, "replication": stage, "lag_commits": None, "lag_s": None}
    return {**view, "may_lead": True, "seen": None, "copied": None, **more}


def test_the_cluster_in_one_look(taskd: Taskd, daemon: FakeDaemon) -> None:
    ran = taskd("cluster", "status")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines() == [
        "cluster default is ok",
        "leader      head (id 1), term 3",
        "nodes       1 scheduler, 1 worker",
        "slots       4, 1 busy",
        "unfinished  2 queued, 1 running",
        "durability  local: what is accepted is on one disk; another scheduler would keep a copy",
        "asked       head (id 1, scheduler)",
        "version     0.1.0",
        "",
        "ID  SCHEDULER  STATE    BEHIND",
        "1   head       leading  -",
    ]


def test_what_is_drained_is_not_free(taskd: Taskd, daemon: FakeDaemon) -> None:
    daemon.cluster.update(workers=2, slots=8, workers_drained=1, slots_drained=4)
    lines = taskd("cluster", "status").out.splitlines()
    assert "nodes       1 scheduler, 2 workers (1 drained)" in lines
    assert "slots       8, 1 busy, 4 drained" in lines


def test_how_far_each_scheduler_is(taskd: Taskd, daemon: FakeDaemon) -> None:
    daemon.cluster.update(
        leader=3, leader_name="c", health="degraded", why="this; and that",
        replicas=[
            replica(3, "c", "leading", lag_commits=0, lag_s=0.0),
            replica(1, "a", "in_sync", lag_commits=0, lag_s=0.0),
            replica(2, "b", "in_sync", lag_commits=0, lag_s=0.0, may_lead=False),
            replica(4, "d", "in_sync", lag_commits=2, lag_s=1.5),
            replica(5, "e", "catching_up", copied=12_500),
            replica(6, "f", "catching_up", lag_commits=1, lag_s=3.0),
            replica(7, "g", "away", seen=time.time() - 190.2),
            replica(8, "h", "away"),
            replica(9, "i", None),
        ],
    )  # fmt: skip
    ran = taskd("cluster", "status")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[:3] == ["cluster default is degraded", "why         this", "            and that"]
    assert "durability  local: what is accepted is on one disk, until a standby is in sync" in lines
    assert lines[lines.index("") + 1 :] == [
        "ID  SCHEDULER  STATE                 BEHIND               NOTE",
        "3   c          leading               -",
        "1   a          standby, in sync      nothing              is to lead soon, by its lower id",
        "2   b          standby, in sync      nothing",
        "4   d          standby, in sync      2 commits, for 1.5s",
        "5   e          standby, catching up  -                    12,500 tasks copied so far",
        "6   f          standby, catching up  1 commit, for 3s",
        "7   g          away                  -                    last seen 3m10s ago",
        "8   h          away                  -",
        "9   i          up                    -",
    ]
    daemon.cluster.update(refuses="min_replicas asks for a copy")
    assert "durability  local: no standby is in sync" in taskd("cluster", "status").out.splitlines()
    daemon.cluster.update(durability="replicated")
    assert "replicated: what is accepted is on the disks of two schedulers or more" in taskd("cluster", "status").out


def test_a_cluster_that_nobody_leads(taskd: Taskd, daemon: FakeDaemon) -> None:
    daemon.cluster.update(
        leader=None, leader_name=None, term=None, health="down", why="none is connected", by_leader=False, name="arm",
        node_id=2, roles=["worker"], schedulers=0, workers=0, slots=0, running=0, tasks={}, replicas=[],
    )  # fmt: skip
    ran = taskd("cluster", "status")
    assert ran.code == 1
    assert ran.out.splitlines() == [
        "cluster default is down",
        "why      none is connected",
        "leader   nobody",
        "nodes    0 schedulers",
        "asked    arm (id 2, worker), which knows no more without a leader",
        "version  0.1.0",
    ]
    ran = taskd("cluster", "status", "--json")
    assert (ran.code, json.loads(ran.out)) == (1, daemon.cluster)
    daemon.stop()
    ran = taskd("cluster", "status")
    assert (ran.code, ran.out) == (3, "")
    assert "taskd start" in ran.err


def test_what_others_wrote_does_not_repaint_the_screen(taskd: Taskd, daemon: FakeDaemon) -> None:
    daemon.cluster.update(why="\x1b[2J", leader_name="\x1b[1m", replicas=[replica(1, "\x1b[0m", "leading")])
    assert "\x1b" not in taskd("cluster", "status").out


# -- Keys --------------------------------------------------------------------------------------------------------------


def test_a_key_goes_from_a_scheduler_to_a_worker(taskd: Taskd, home: Path, stdin: Callable[[str], None]) -> None:
    from taskd.net.security import SchedulerKey

    path = home / "config" / "taskd" / "cluster.key"
    ran = taskd("key", "show")
    assert ran.code == 1
    assert str(path) in ran.err
    key = SchedulerKey.generate()
    key.save(path)
    assert taskd("key", "show", "--role", "scheduler") == (0, key.text + "\n", "")
    shown = taskd("key", "show").out
    assert shown == key.worker_key.text + "\n"

    other = home / "other.key"
    stdin(shown)
    assert taskd("key", "import", "--key-file", str(other)).code == 0
    assert other.stat().st_mode & 0o777 == 0o600
    assert taskd("key", "show", "--key-file", str(other)).out == shown
    ran = taskd("key", "show", "--role", "scheduler", "--key-file", str(other))
    assert (ran.code, "holds a worker key" in ran.err) == (1, True)


def test_an_import_replaces_nothing_unless_told(taskd: Taskd, home: Path, stdin: Callable[[str], None]) -> None:
    from taskd.net.security import SchedulerKey

    first, second = SchedulerKey.generate(), SchedulerKey.generate()
    path = home / "config" / "taskd" / "cluster.key"
    first.save(path)
    stdin(second.text)
    ran = taskd("key", "import")
    assert (ran.code, "--force" in ran.err) == (1, True)
    stdin(second.text)
    assert taskd("key", "import", "--force", "--role", "worker").code == 0
    assert path.read_text().strip() == second.worker_key.text
    stdin(second.worker_key.text)
    assert "taskd key show --role scheduler" in taskd("key", "import", "--role", "scheduler", "--force").err
    stdin("nonsense")
    ran = taskd("key", "import")
    assert (ran.code, "no cluster key" in ran.err) == (1, True)


# -- Settings ----------------------------------------------------------------------------------------------------------


def test_settings_are_checked_as_a_daemon_would(taskd: Taskd, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = taskd("config", "check")
    assert ran.code == 0
    assert "does not exist, which is fine; 0 settings differ from the defaults" in ran.out
    file = home / "taskd.toml"
    file.write_text('[node]\nname = "arm"\n[worker]\nslots = 3\nlabels = { disk = "ssd" }\n')
    ran = taskd("config", "check", str(file))
    assert f"{file} is fine; 3 settings differ" in ran.out
    assert "worker.labels  disk=ssd" in ran.out
    assert json.loads(taskd("config", "check", str(file), "--json").out)["worker.slots"] == 3
    file.write_text("[worker]\nslot = 3\n")
    ran = taskd("config", "check", str(file))
    assert ran.code == 1
    assert "[worker] slot" in ran.err
    monkeypatch.setenv("TASKD_WORKER_SLOTS", "many")
    assert "TASKD_WORKER_SLOTS" in taskd("config", "check").err
    assert taskd("config", "check", str(home / "none.toml")).code == 1


# -- The doctor --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody announces anything here: no need to listen for long."""
    monkeypatch.setattr(doctor_machine, "LISTEN_S", 0.02)


def findings(taskd: Taskd, *options: str) -> tuple[int, dict[str, tuple[str, str]]]:
    ran = taskd("doctor", "--json", *options)
    return ran.code, {item["what"]: (item["level"], item["text"]) for item in json.loads(ran.out)}


def test_the_doctor_finds_all_well(taskd: Taskd, daemon: FakeDaemon, home: Path) -> None:
    code, found = findings(taskd)
    levels = {what: level for what, (level, _) in found.items()}
    assert {
        "settings",
        "key",
        "state",
        "secrets",
        "disk",
        "sync",
        "sqlite",
        "interfaces",
        "discovery",
        "port",
        "cgroups",
        "event loop",
        "daemon",
        "socket",
        "leader",
        "workers",
        "clocks",
        "versions",
        "keys",
    } == set(levels)
    assert (code, levels["key"], levels["daemon"], levels["leader"]) == (0, "warn", "ok", "ok")
    text = taskd("doctor").out
    assert f"answers on {daemon.path}" in text
    assert "taskd key import" in text


def test_the_doctor_finds_what_is_wrong(
    taskd: Taskd, daemon: FakeDaemon, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = home / "config" / "taskd" / "cluster.key"
    key.parent.mkdir(parents=True)
    key.write_text("x")
    key.chmod(0o644)
    daemon.nodes[0]["clock_offset_s"] = 5.0
    daemon.nodes[1]["state"] = "lost"
    daemon.cluster.update(health="degraded", why="no worker is connected", version="9.9")
    monkeypatch.setenv("TASKD_NETWORK_MDNS", "maybe")
    monkeypatch.setenv("TASKD_SCHEDULER_FREE_DISK_MIN_BYTES", "1KiB")
    code, found = findings(taskd)
    assert code == 1
    assert found["settings"][0] == "fail"
    assert found["key"][0] == "fail"
    assert "can be read by others" in found["key"][1]
    assert found["clocks"] == ("warn", "head is 5s ahead")
    assert found["workers"] == ("fail", "arm is lost")
    assert found["leader"][0] == "warn"
    assert found["version"][0] == "warn"
    daemon.cluster.update(health="down", why="the leader, head, does not answer")
    assert findings(taskd)[1]["leader"] == ("fail", "the leader, head, does not answer")
    daemon.stop()
    code, found = findings(taskd)
    assert (code, found["daemon"][0]) == (1, "fail")
    assert "taskd start" in found["daemon"][1]


def test_the_doctor_looks_at_the_nodes(taskd: Taskd, daemon: FakeDaemon, home: Path) -> None:
    for node, fingerprint in zip(daemon.nodes, ("aa", "bb"), strict=False):
        node.update(fingerprint=fingerprint)
    daemon.nodes[1]["version"] = "0.0.9"
    found = findings(taskd)[1]
    assert found["versions"][0] == found["keys"][0] == "warn"
    assert "arm has 0.0.9" in found["versions"][1]
    assert found["keys"][1] == "aa: head; bb: arm"
    daemon.nodes[1].update(version=VERSION, fingerprint="aa")
    found = findings(taskd)[1]
    assert found["keys"] == ("ok", "aa: head, arm")


def test_the_doctor_knows_drained_workers_from_missing_ones(taskd: Taskd, daemon: FakeDaemon, home: Path) -> None:
    daemon.nodes[1].update(state="drained")
    assert findings(taskd)[1]["workers"] == ("fail", "arm is drained")
    assert "taskd node resume arm" in taskd("doctor").out
    daemon.nodes[1].update(state="lost")
    assert "taskd start --role worker" in taskd("doctor").out


def test_the_doctor_looks_where_the_daemon_keeps_its_state(
    taskd: Taskd, daemon: FakeDaemon, home: Path, tmp_path: Path
) -> None:
    for name in ("daemons", "own", "files"):
        (tmp_path / name).mkdir(mode=0o700)
    daemon.cluster["state_dir"] = str(tmp_path / "daemons")
    assert findings(taskd)[1]["state"] == ("ok", f"{tmp_path / 'daemons'} is private")
    assert findings(taskd, "--state-dir", str(tmp_path / "own"))[1]["state"] == ("ok", f"{tmp_path / 'own'} is private")
    daemon.stop()
    (tmp_path / "taskd.toml").write_text(f'[node]\nstate_dir = "{tmp_path / "files"}"\n')
    found = findings(taskd, "--config", str(tmp_path / "taskd.toml"))[1]
    assert found["state"] == ("ok", f"{tmp_path / 'files'} is private")


def test_the_doctor_looks_at_permissions(
    taskd: Taskd, daemon: FakeDaemon, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = tmp_path / "kept"
    (state / "scheduler").mkdir(parents=True)
    monkeypatch.setenv("TASKD_NODE_STATE_DIR", str(state))
    (state / "scheduler").chmod(0o777)
    assert findings(taskd)[1]["state"] == ("fail", f"{state / 'scheduler'} can be written by others")
    (state / "scheduler").chmod(0o700)
    Path(daemon.path).chmod(0o666)
    found = findings(taskd)[1]
    assert found["state"][0] == "ok"
    assert found["socket"][0] == "warn"
    assert list(state.iterdir()) == [state / "scheduler"], "nothing is left behind"


def test_the_doctor_looks_at_secrets(
    taskd: Taskd, daemon: FakeDaemon, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secrets = tmp_path / "secrets"
    monkeypatch.setenv("TASKD_WORKER_SECRETS_DIR", str(secrets))
    assert findings(taskd)[1]["secrets"] == ("ok", f"there is no directory {secrets}")
    secrets.mkdir(mode=0o750)
    (secrets / "token").touch(mode=0o640)
    assert findings(taskd)[1]["secrets"] == ("fail", f"{secrets} is open to others than its owner")
    secrets.chmod(0o700)
    assert findings(taskd)[1]["secrets"] == ("fail", f"{secrets / 'token'} is open to others than its owner")
    (secrets / "token").chmod(0o600)
    assert findings(taskd)[1]["secrets"] == ("ok", f"{secrets} is private")
    if os.geteuid() == 0:
        os.chown(secrets / "token", 65534, 65534)
        assert "does not belong to the owner" in findings(taskd)[1]["secrets"][1]


def test_the_doctor_looks_at_the_port(
    taskd: Taskd, daemon: FakeDaemon, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("TASKD_NETWORK_LISTEN", f"127.0.0.1:{port}")

        def greet(with_: bytes) -> None:
            with server.accept()[0] as connection:
                connection.sendall(with_)

        for greeting, level in ((b"taskd1 f00d\n", "ok"), (b"SSH-2.0\r\n", "warn")):
            thread = threading.Thread(target=greet, args=(greeting,))
            thread.start()
            assert findings(taskd)[1]["port"][0] == level
            thread.join()
    assert findings(taskd)[1]["port"] == ("ok", f"nothing listens on TCP {port}: free for a scheduler")


def test_the_doctor_looks_at_the_disk(
    taskd: Taskd, daemon: FakeDaemon, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASKD_SCHEDULER_FREE_DISK_MIN_BYTES", "1000TiB")
    code, found = findings(taskd)
    assert (code, found["disk"][0]) == (1, "fail")
    monkeypatch.setenv("TASKD_NETWORK_INTERFACES", "none0")
    monkeypatch.setenv("TASKD_SCHEDULER_FREE_DISK_MIN_BYTES", "1KiB")
    code, found = findings(taskd)
    assert found["interfaces"] == ("fail", "no usable interface (wanted: none0)")
    assert found["discovery"][0] == "warn"
    monkeypatch.setenv("TASKD_NETWORK_MDNS", "off")
    assert findings(taskd)[1]["discovery"][0] == "ok"
