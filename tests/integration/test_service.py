"""A daemon as its operator sees it: refusals at start, signals, and what the peer port says to strangers."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path

from tests.integration.cluster import LOOPBACK, Cluster, Daemon, eventually, free_port

ALONE = {**LOOPBACK, "TASKD_NETWORK_MDNS": "false"}


def count(daemon: Daemon, text: str) -> int:
    return sum(text in line for line in daemon.log.read_text().splitlines())


def test_a_second_daemon_on_the_same_state_is_refused(fresh: Cluster) -> None:
    head = fresh.add("head", "scheduler", env=ALONE).start()
    second = Daemon(head.home, fresh.key, "scheduler", env=ALONE).start(wait=False)
    assert second.process is not None
    assert second.process.wait(20) == 1
    assert head.process is not None
    assert str(head.process.pid) in head.log.read_text()
    assert head.is_ready()


def test_a_wrong_setting_is_refused_with_words(fresh: Cluster, tmp_path: Path) -> None:
    config = tmp_path / "taskd.toml"
    config.write_text("[worker]\nslotz = 3\n")
    head = fresh.add("head", "scheduler", "--config", str(config)).start(wait=False)
    assert head.process is not None
    assert head.process.wait(20) != 0
    assert "slotz" in head.log.read_text()
    assert "Traceback" not in head.log.read_text()
    head.process = None


def test_a_port_in_use_is_refused_with_words(fresh: Cluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        head = fresh.add("head", "scheduler", "--listen", f"127.0.0.1:{port}", env=ALONE).start(wait=False)
        assert head.process is not None
        assert head.process.wait(20) == 1
        head.process = None
    assert f"127.0.0.1:{port}" in head.log.read_text()
    assert "bug" not in head.log.read_text()


def test_sigterm_ends_in_good_order_and_leaves_no_socket(fresh: Cluster) -> None:
    fresh.start(1)
    worker = fresh.daemons[1]
    assert worker.stop() == 0
    assert fresh.head.stop() == 0
    assert not fresh.head.socket.exists()
    assert "Traceback" not in fresh.head.log.read_text() + worker.log.read_text()


def test_sighup_reloads_what_can_be(fresh: Cluster, tmp_path: Path) -> None:
    config = tmp_path / "worker.toml"
    config.write_text("[worker]\nslots = 2\n")
    fresh.start(1, "--config", str(config))
    worker = fresh.daemons[1]
    config.write_text('[worker]\nslots = 5\nlabels = { disk = "ssd" }\n')
    assert worker.process is not None
    worker.process.send_signal(signal.SIGHUP)

    def changed() -> bool:
        (view,) = (view for view in fresh.head.ok("GET", "/v1/nodes")["nodes"] if view["name"] == "worker1")
        return view["slots"] == 5 and view["labels"].get("disk") == "ssd"

    eventually(changed)
    config.write_text("[worker]\nslots = many\n")
    worker.process.send_signal(signal.SIGHUP)
    eventually(lambda: count(worker, "slots") and worker.is_ready())


def test_strangers_at_the_peer_port_are_refused_once_and_disturb_nobody(fresh: Cluster) -> None:
    port = free_port()
    head = fresh.add("head", "scheduler", "--listen", f"127.0.0.1:{port}", env=ALONE).start()
    worker_options = ("--join", f"127.0.0.1:{port}")
    fresh.add("worker", "worker", *worker_options, env=ALONE).start()
    fresh.wait_for_workers(1)

    for _ in range(5):  # Plain bytes.
        with socket.create_connection(("127.0.0.1", port)) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
            drain(plain)
    for _ in range(5):  # TLS without a certificate.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection(("127.0.0.1", port)) as raw:
            assert raw.recv(100).startswith(b"taskd1 ")
            try:
                with context.wrap_socket(raw) as wrapped:
                    wrapped.sendall(b"\xff\xff\xff\xff")
                    drain(wrapped)
            except (ssl.SSLError, ConnectionError):
                pass
    stranger_key = fresh.directory / "other" / "cluster.key"
    stranger_key.parent.mkdir()
    other = Daemon(fresh.directory / "other-head", stranger_key, "scheduler", env=ALONE)
    other.start()
    stranger = Daemon(fresh.directory / "stranger", stranger_key, "worker", *worker_options, env=ALONE).start(
        wait=False
    )
    try:
        eventually(lambda: count(head, "refused"))
        eventually(lambda: stranger.log.exists() and count(stranger, "refused"))
        (result,) = head.ok("POST", "/v1/tasks?wait=30", {"argv": ["true"]})["results"]
        assert result["state"] == "succeeded"
        assert head.ok("GET", "/v1/cluster")["workers"] == 1
        assert count(head, "peer refused") == 1, "one line a minute for each address, not for each try"
        assert "Traceback" not in head.log.read_text()
    finally:
        stranger.kill()
        other.stop()


def drain(connection: socket.socket) -> None:
    """Read until the other side closes."""
    connection.settimeout(20)
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass


def test_a_worker_with_a_worker_key_alone(fresh: Cluster) -> None:
    port = free_port()
    fresh.add("head", "scheduler", "--listen", f"127.0.0.1:{port}", env=ALONE).start()
    key = fresh.directory / "worker.key"
    show = [sys.executable, "-m", "taskd", "key", "show", "--role", "worker", "--key-file", str(fresh.key)]
    text = subprocess.run(show, check=True, capture_output=True, text=True).stdout
    import_ = [sys.executable, "-m", "taskd", "key", "import", "--key-file", str(key)]
    subprocess.run(import_, input=text, check=True, capture_output=True, text=True)
    assert os.stat(key).st_mode & 0o077 == 0
    worker = Daemon(fresh.directory / "worker", key, "worker", "--join", f"127.0.0.1:{port}", env=ALONE).start()
    fresh.daemons.append(worker)
    fresh.wait_for_workers(1)
    scheduler = Daemon(fresh.directory / "bad", key, "scheduler", env=ALONE).start(wait=False)
    assert scheduler.process is not None
    assert scheduler.process.wait(20) != 0
    assert "worker key" in scheduler.log.read_text()
