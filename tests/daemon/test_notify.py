"""What the service manager is told, over a real datagram socket."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskd.daemon.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path: Path) -> Iterator[tuple[socket.socket, dict[str, str]]]:
    """The manager's end, and the environment that leads to it."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@taskd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(name.replace("@", "\0"))
        channel.settimeout(10)
        yield channel, {"NOTIFY_SOCKET": name}


def test_everything_is_told_as_the_manager_reads_it(manager):
    channel, environ = manager
    notifier = Notifier(environ)
    before_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert notifier.ready("worker, following 1")
    assert notifier.status("2 tasks")
    assert notifier.watchdog()
    assert notifier.reloading()
    assert notifier.stopping("letting 2 tasks end", 20.5)
    heard = [channel.recv(4096).decode() for _ in range(5)]
    reloading, _, monotonic = heard.pop(3).partition("\nMONOTONIC_USEC=")
    assert heard == [
        "READY=1\nSTATUS=worker, following 1",
        "STATUS=2 tasks",
        "WATCHDOG=1",
        "STOPPING=1\nEXTEND_TIMEOUT_USEC=20500000\nSTATUS=letting 2 tasks end",
    ]
    assert reloading == "RELOADING=1"
    assert int(monotonic) >= before_us


def test_a_status_cannot_say_anything_else(manager):
    channel, environ = manager
    assert Notifier(environ).status("lost\nWATCHDOG=trigger\0" + "x" * 1000)
    heard = channel.recv(4096).decode()
    assert heard.startswith("STATUS=lost WATCHDOG=trigger xxx")
    assert len(heard) == len("STATUS=") + 200


@pytest.mark.parametrize("name", [None, "", "relative", "vsock:2:1234", "/nonexistent/notify"])
def test_without_a_manager_nothing_happens(name):
    notifier = Notifier({} if name is None else {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "no"})
    assert notifier.ready("x") is False
    assert notifier.watchdog_s is None


def test_a_manager_that_does_not_read_does_not_hold_us_up(manager, monkeypatch):
    channel, environ = manager
    monkeypatch.setattr("taskd.daemon.notify.SEND_TIMEOUT_S", 0.01)
    notifier = Notifier(environ)
    sent = 0
    while notifier.watchdog():
        sent += 1
        assert sent < 100_000
    assert channel.recv(100) == b"WATCHDOG=1"
    assert notifier.watchdog()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
    ],
)
def test_the_watchdog_is_fed_twice_in_its_time(environ, expected):
    assert Notifier({"NOTIFY_SOCKET": "/run/x", **environ}).watchdog_s == expected
    assert Notifier(environ).watchdog_s is None
