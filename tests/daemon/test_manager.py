"""What the service manager hears of a daemon, over a real datagram socket, and which life signs it rests on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from taskd.api.cluster_types import ClusterView, Ready, SchedulerView
from taskd.daemon import manager as manager_module
from taskd.daemon import vitals as vitals_module
from taskd.daemon.manager import Manager, status_text
from taskd.daemon.notify import Notifier
from taskd.daemon.vitals import Vitals

WATCHDOG_US = 20_000


def view(roles: str = "scheduler", leader: int | None = 1, why: str = "", **more: object) -> ClusterView:
    fields: dict[str, object] = {
        "cluster": "default", "node_id": 1, "name": "a", "roles": roles.split(","), "leader": leader,
        "leader_name": "a" if leader is not None else None, "term": 1, "health": "ok", "why": why,
        "durability": "local", "schedulers": 1, "workers": 2, "slots": 4, "running": 3,
        "tasks": {"running": 3, "queued": 100, "scheduled": 20}, "version": "1", "replicas": [], "by_leader": True,
        "refuses": "",
    }  # fmt: skip
    return ClusterView(**{**fields, **more})  # type: ignore[arg-type]


class Looks:
    def __init__(self) -> None:
        self.is_ready = True
        self.view = view()

    def cluster(self) -> ClusterView:
        return self.view

    def ready(self) -> Ready:
        return Ready(self.is_ready, "")


class Signs:
    def __init__(self) -> None:
        self.trouble = ""

    async def why_not(self) -> str:
        return self.trouble


class Listener:
    """The manager's end."""

    def __init__(self, path: Path) -> None:
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.channel.bind(str(path))
        self.channel.setblocking(False)

    async def hear(self) -> str:
        async with asyncio.timeout(20):
            return (await asyncio.get_running_loop().sock_recv(self.channel, 4096)).decode()

    async def hear_until(self, text: str) -> list[str]:
        heard = [await self.hear()]
        while text not in heard[-1]:
            heard.append(await self.hear())
        return heard


@asynccontextmanager
async def told(
    tmp_path: Path, looks: Looks, signs: Signs, worker: SimpleNamespace | None = None
) -> AsyncIterator[tuple[Manager, Listener]]:
    listener = Listener(tmp_path / "notify")
    environ = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": str(WATCHDOG_US)}
    manager = Manager(Notifier(environ), looks, signs, worker)
    running = asyncio.create_task(manager.run())
    try:
        yield manager, listener
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        listener.channel.close()


async def test_ready_is_said_once_there_is_a_leader_and_life_is_shown_from_then_on(tmp_path: Path) -> None:
    looks = Looks()
    looks.is_ready, looks.view = False, view(leader=None, why="they look for each other", by_leader=False)
    async with told(tmp_path, looks, Signs()) as (_, listener):
        assert await listener.hear() == "STATUS=scheduler: no leader; they look for each other"
        looks.is_ready, looks.view = True, view()
        ready = "READY=1\nSTATUS=scheduler: leads; 2 workers, 3 tasks running, 120 waiting"
        heard = await listener.hear_until("READY")
        assert heard == [ready], "the same status is not said twice"
        assert await listener.hear() == "WATCHDOG=1"
        assert await listener.hear() == "WATCHDOG=1"


async def test_a_status_is_told_where_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_module, "STATUS_S", 0.001)
    looks = Looks()
    async with told(tmp_path, looks, Signs()) as (_, listener):
        await listener.hear_until("WATCHDOG")
        assert set(await listener.hear_until("WATCHDOG")) == {"WATCHDOG=1"}
        looks.view = view(workers=1)
        heard = await listener.hear_until("STATUS")
        assert heard[-1] == "STATUS=scheduler: leads; 1 worker, 3 tasks running, 120 waiting"


async def test_no_life_is_shown_while_something_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(manager_module, "UNWELL_POLL_S", 0.001)
    caplog.set_level(logging.INFO, "taskd")
    signs = Signs()
    asked = asyncio.Event()

    async def why_not() -> str:
        asked.set()
        return signs.trouble

    monkeypatch.setattr(signs, "why_not", why_not)
    signs.trouble = "a commit is under way for 30 s"
    async with told(tmp_path, Looks(), signs) as (_, listener):
        assert "READY" in await listener.hear()
        for _ in range(20):
            asked.clear()
            await asyncio.wait_for(asked.wait(), 20)
        with pytest.raises(BlockingIOError):
            listener.channel.recv(100)
        signs.trouble = ""
        assert [await listener.hear(), await listener.hear()] == ["WATCHDOG=1"] * 2
    assert [record.message for record in caplog.records] == [
        "this daemon stands still: it will be restarted if that lasts",
        "this daemon goes on",
    ]


async def test_a_reload_before_the_start_is_done_does_not_end_the_start(tmp_path: Path) -> None:
    looks = Looks()
    looks.is_ready = False
    async with told(tmp_path, looks, Signs()) as (manager, listener):
        await listener.hear()
        manager.reloading()
        manager.reloaded()
        looks.is_ready = True
        assert len(await listener.hear_until("READY=1")) == 1
        manager.reloading()
        manager.reloaded()
        heard = await listener.hear_until("READY=1")
        assert next(line for line in heard if line != "WATCHDOG=1").startswith("RELOADING=1\n")


async def test_a_stop_asks_for_the_time_that_tasks_have(tmp_path: Path) -> None:
    worker = SimpleNamespace(running_count=1, waiting_count=0)
    async with told(tmp_path, Looks(), Signs(), worker) as (manager, listener):
        await listener.hear_until("READY=1")
        manager.stopping(30.0)
        heard = await listener.hear_until("STOPPING")
        assert heard[-1] == "STOPPING=1\nEXTEND_TIMEOUT_USEC=30000000\nSTATUS=stopping: 1 task to end"


async def test_without_a_manager_nothing_runs() -> None:
    await asyncio.wait_for(Manager(Notifier({}), Looks(), Signs(), None).run(), 20)


def test_what_a_status_says_of_each_role() -> None:
    worker = SimpleNamespace(running_count=1, waiting_count=7)
    own = SchedulerView(1, "a", "in_sync", 0, 0.0, True, None, None)
    standby = view(leader=2, leader_name="b", by_leader=False, tasks={}, running=0, replicas=[own])
    assert status_text(standby, None) == "scheduler: follows b, in sync"
    follower = view("worker", leader=2, leader_name="b", by_leader=False, tasks={}, running=0)
    assert status_text(follower, worker) == "worker: follows b; 1 task running here, 7 waiting"
    both = view("scheduler,worker", why="no worker is connected")
    assert status_text(both, worker) == (
        "scheduler,worker: leads; 2 workers, 3 tasks running, 120 waiting; no worker is connected"
    )


# -- Signs of life -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def answering(path: Path, answer: bytes) -> AsyncIterator[str]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_unix_server(handle, path)
    try:
        yield str(path)
    finally:
        server.close()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 429 Too Many Requests\r\n\r\n"])
async def test_any_answer_of_the_socket_is_life(tmp_path: Path, answer: bytes) -> None:
    async with answering(tmp_path / "s", answer) as path:
        assert await Vitals(path, lambda: 1.0, lambda: 1.0, 2.5).why_not() == ""


@pytest.mark.parametrize(
    ("commit_age_s", "silence_s", "expected"),
    [(21.0, 0.0, "a commit is under way for 21 s"), (0.0, 7.6, "a connected peer was not heard for 8 s")],
)
async def test_what_stands_still_is_named(tmp_path: Path, commit_age_s: float, silence_s: float, expected: str) -> None:
    async with answering(tmp_path / "s", b"HTTP/1.1 200 OK\r\n\r\n") as path:
        assert await Vitals(path, lambda: commit_age_s, lambda: silence_s, 2.5).why_not() == expected


async def test_a_socket_that_is_gone_or_silent_is_no_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vitals = Vitals(str(tmp_path / "s"), float, float, 2.5)
    assert "does not answer" in await vitals.why_not()
    async with answering(tmp_path / "s", b""):
        assert "does not answer" in await vitals.why_not()
    (tmp_path / "s").unlink(missing_ok=True)
    monkeypatch.setattr(vitals_module, "ANSWER_S_MAX", 0.05)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "s"))
        deaf.listen()
        assert "does not answer" in await vitals.why_not()
