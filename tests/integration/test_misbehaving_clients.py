"""Clients that are slow, many, or gone in the middle: nobody else notices, and nothing is left of them."""

from __future__ import annotations

import http.client
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.integration.cluster import Cluster, Daemon, UnixConnection, eventually

MIB = 1 << 20
OUTPUT_BYTES = 24 * MIB


@contextmanager
def answering(daemon: Daemon, path: str) -> Iterator[http.client.HTTPResponse]:
    """An answer that is read at our pace."""
    connection = UnixConnection(daemon.socket, 60)
    try:
        connection.request("GET", path)
        yield connection.getresponse()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def long_output(shared: Cluster) -> str:
    """A task that wrote much."""
    (task,) = shared.head.submit({"shell": f"head -c {OUTPUT_BYTES} /dev/zero"})
    assert shared.head.wait([task])[task]["state"] == "succeeded"
    return f"/v1/tasks/{task}/output"


def test_a_slow_reader_gets_all_of_a_long_output_from_any_node(shared: Cluster, long_output: str) -> None:
    for daemon in shared.daemons:
        with answering(daemon, long_output) as slow:
            assert slow.read(1) == b"\0"
            # By the time that a quick reader has all of it, a slow one without any say would have been overrun.
            with answering(daemon, long_output) as quick:
                assert len(quick.read()) == OUTPUT_BYTES
            assert len(slow.read()) == OUTPUT_BYTES - 1


def test_readers_that_leave_in_the_middle_leave_no_file_open(shared: Cluster, long_output: str) -> None:
    def open_outputs() -> int:
        found = 0
        for daemon in shared.daemons:
            assert daemon.process is not None
            directory = f"/proc/{daemon.process.pid}/fd"
            for name in os.listdir(directory):
                try:
                    target = os.readlink(f"{directory}/{name}")
                    found += "/output/" in target and "/bundles/" not in target
                except OSError:  # Closed meanwhile.
                    continue
        return found

    before = open_outputs()
    for daemon in shared.daemons:
        for _ in range(5):
            with answering(daemon, long_output) as response:
                response.read(MIB)
    (task,) = shared.head.submit({"shell": "echo begun; sleep 1000"})
    for daemon in shared.daemons:
        for _ in range(5):
            with answering(daemon, f"/v1/tasks/{task}/output?follow=1") as response:
                assert response.read(6) == b"begun\n"
    shared.head.ok("POST", f"/v1/tasks/{task}/cancel")
    shared.head.wait([task])
    eventually(lambda: open_outputs() <= before)


def test_half_requests_and_crowds_keep_nobody_out(shared: Cluster) -> None:
    for daemon in shared.daemons:
        crowd = [socket.socket(socket.AF_UNIX) for _ in range(300)]
        try:
            for number, one in enumerate(crowd):
                one.connect(str(daemon.socket))
                head = b"POST /v1/tasks HTTP/1.1\r\nHost: taskd\r\nContent-Length: 1000\r\n\r\n[{"
                one.sendall(head[: 1 + number % len(head)])
            (result,) = daemon.ok("POST", "/v1/tasks?wait=30", {"argv": ["true"]})["results"]
            assert result["state"] == "succeeded"
        finally:
            for one in crowd:
                one.close()
        assert daemon.is_ready()


def test_text_that_no_task_can_have_finds_nothing_and_ends_nobody(shared: Cluster) -> None:
    for daemon in shared.daemons:
        for field in ("queue", "type", "owner", "label"):
            _, listed = daemon.ask("GET", f"/v1/tasks?{field}=%00x")
            assert not listed.get("tasks"), (field, listed)
        assert daemon.ask("GET", "/v1/tasks?queue=%ED%A0%80")[0] == 400
    assert shared.head.ok("GET", "/v1/tasks?queue=default") is not None
