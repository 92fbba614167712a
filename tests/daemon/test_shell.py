"""The shell around a real node: what it tells the node, and what follows when the disk, the clock or a bug says no."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest

from taskd import failpoints
from taskd.core import effects as fx
from taskd.core import events as ev
from taskd.core import scheduler
from taskd.core.backlog import Backlog
from taskd.core.feed import StandbyView
from taskd.core.node import Node
from taskd.core.settings import SchedulerSettings
from taskd.core.task import TaskSpec, encode
from taskd.daemon import shell as shell_module
from taskd.daemon.hub import Hub
from taskd.daemon.metrics import text_source
from taskd.daemon.shell import Answered, Shell
from taskd.errors import StoreError, Unavailable
from taskd.protocol import messages as msg

HEAD, WORKER = 1, 2
TERM = msg.Term(1, HEAD, 1)


class FakeStore:
    """A disk that is done when the test says so."""

    store_id = bytes(16)

    def __init__(self) -> None:
        self.is_held = False
        self.commits: list[tuple[fx.Commit, asyncio.Future[None]]] = []

    async def commit(self, commit: fx.Commit) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.commits.append((commit, future))
        if not self.is_held:
            future.set_result(None)
        await future

    async def backlog(self, after: bytes) -> tuple[Backlog, bytes | None]:
        return Backlog([], [], [], b""), None

    def size_bytes(self) -> int:
        return 4096


class FakeJournal:
    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.records: list[fx.Journal] = []
        self.syncs = asyncio.Queue[None]()

    def append(self, records: fx.Journal) -> None:
        if self.failure is not None:
            raise self.failure
        self.records.append(records)

    async def sync(self) -> None:
        self.syncs.put_nowait(None)


class FakeMesh:
    def __init__(self) -> None:
        self.sent: list[tuple[int, msg.Message]] = []

    def send(self, node_id: int, message: msg.Message) -> bool:
        self.sent.append((node_id, message))
        return True

    def disconnect(self, node_id: int, reason: str) -> None: ...


class FakeRunner:
    def __init__(self) -> None:
        self.started: list[fx.Begin] = []

    def start(self, begins: list[fx.Begin]) -> None:
        self.started += begins

    def terminate(self, key: msg.AttemptKey) -> None: ...
    def kill(self, key: msg.AttemptKey) -> None: ...


@asynccontextmanager
async def running(shell: Shell) -> AsyncIterator[Shell]:
    work = asyncio.ensure_future(shell.run())
    try:
        yield shell
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        shell.close()


async def until(check: Callable[[], Any]) -> None:
    """Turn the loop until it is so."""
    async with asyncio.timeout(10):
        while not check():  # noqa: ASYNC110  # any event may have made it true
            await asyncio.sleep(0.001)


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
async def head(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shell]:
    """A scheduler that leads."""
    monkeypatch.setattr(scheduler, "JOIN_S", 0.0)
    info = msg.NodeInfo(HEAD, "head", ("scheduler",), bytes(16), 1, "1.0")
    node = Node(info, Random(1), SchedulerSettings(), None, is_founder=True)
    shell = Shell(node, Hub(), store, None)  # type: ignore[arg-type]
    shell.mesh = FakeMesh()
    async with running(shell):
        shell.tell(ev.Loaded(None, [], []))
        await until(lambda: shell.leader == HEAD)
        yield shell


@pytest.fixture
async def worker() -> AsyncIterator[Shell]:
    """A worker that is registered with a leader."""
    offer = msg.Offer(4, {"cpus": 4000}, {}, ("command",))
    info = msg.NodeInfo(WORKER, "worker", ("worker",), b"w" * 16, 1, "1.0")
    shell = Shell(Node(info, Random(1), None, offer), Hub(), None, FakeJournal())
    shell.mesh, shell.runner = FakeMesh(), FakeRunner()
    async with running(shell):
        shell.tell(ev.JournalLoaded(None, [], []))
        shell.tell(ev.PeerUp(msg.NodeInfo(HEAD, "head", ("scheduler",), bytes(16), 1, "1.0")))
        shell.tell(ev.Received(HEAD, [msg.Leading(TERM)]))
        shell.tell(ev.Received(HEAD, [msg.Registered(TERM)]))
        await until(lambda: shell.leader == HEAD)
        yield shell


def submitted(*numbers: int) -> Callable[[int], ev.Event]:
    spec = TaskSpec("command", argv=("true",), submitted_s=time.time())
    tasks = [ev.NewTask(number.to_bytes(16), spec, encode(spec)) for number in numbers]
    return lambda call: ev.Submitted(call, tasks)


def runs(*numbers: int) -> ev.Received:
    spec = encode(TaskSpec("command", argv=("true",)))
    keys = [msg.AttemptKey(number.to_bytes(16), 1, TERM, 2) for number in numbers]
    return ev.Received(HEAD, [msg.Run(TERM, tuple(msg.Assignment(key, spec) for key in keys))])


# -- Clients and the disk ----------------------------------------------------------------------------------------------


async def test_a_client_is_answered_when_the_disk_has_it(head: Shell, store: FakeStore) -> None:
    store.is_held = True
    asking = asyncio.ensure_future(head.ask(submitted(1)))
    await until(lambda: store.commits[-1][0].inserted)
    assert not asking.done()
    store.commits[-1][1].set_result(None)
    assert await asking == Answered([], "local")


async def test_what_comes_in_one_turn_is_one_commit(head: Shell, store: FakeStore) -> None:
    before = len(store.commits)
    await asyncio.gather(*(head.ask(submitted(number)) for number in range(1, 50)))
    assert len(store.commits) == before + 1


async def test_a_failed_commit_answers_all_who_wait_and_ends_the_daemon(head: Shell, store: FakeStore) -> None:
    store.is_held = True
    first = asyncio.ensure_future(head.ask(submitted(1)))
    await until(lambda: store.commits[-1][0].inserted)
    second = asyncio.ensure_future(head.ask(submitted(2)))  # Behind the commit that fails.
    await asyncio.sleep(0)
    store.commits[-1][1].set_exception(StoreError("the disk is full"))
    for asking in (first, second):
        with pytest.raises(Unavailable, match="not known"):
            await asking
    assert await head.exited == (1, "commit failed: the disk is full")
    with pytest.raises(Unavailable, match="stopping"):
        await head.ask(submitted(3))


async def test_a_client_that_goes_away_is_forgotten(head: Shell, store: FakeStore) -> None:
    store.is_held = True
    asking = asyncio.ensure_future(head.ask(submitted(1)))
    await until(lambda: store.commits[-1][0].inserted)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert not head._calls
    store.commits[-1][1].set_result(None)
    await until(lambda: head.node.scheduler is not None and head.node.scheduler.outbox.is_idle)
    assert not head.exited.done()


async def test_a_lost_store_ends_the_daemon_without_waiting_for_a_commit(head: Shell) -> None:
    head.store_lost("the process that writes ended with status -9")
    assert await head.exited == (1, "the process that writes ended with status -9")


async def test_closing_answers_whoever_still_waits(head: Shell, store: FakeStore) -> None:
    store.is_held = True
    asking = asyncio.ensure_future(head.ask(submitted(1)))
    await until(lambda: store.commits[-1][0].inserted)
    head.close()
    with pytest.raises(Unavailable, match="stopping"):
        await asking


# -- Bugs --------------------------------------------------------------------------------------------------------------


async def test_a_bug_in_the_node_ends_the_daemon_and_lets_nothing_out(
    head: Shell, store: FakeStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def half_done(event: ev.Event, now: float) -> None:
        head.node.scheduler.outbox.then(fx.Send(WORKER, msg.Leading(TERM)))  # type: ignore[union-attr]
        raise ZeroDivisionError

    assert isinstance(head.mesh, FakeMesh)
    commits = len(store.commits)
    monkeypatch.setattr(head.node, "handle", half_done)
    asking = asyncio.ensure_future(head.ask(submitted(1)))
    status, reason = await head.exited
    assert (status, "ZeroDivisionError" in reason) == (1, True)
    await asyncio.sleep(0)
    assert head.mesh.sent == []
    assert len(store.commits) == commits
    assert any(record.exc_info for record in caplog.records if record.levelno == logging.ERROR)
    head.close()
    with pytest.raises(Unavailable):
        await asking


async def test_an_effect_that_cannot_be_done_ends_the_daemon(
    worker: Shell, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(begins: list[fx.Begin]) -> None:
        raise RuntimeError("no such runner")

    monkeypatch.setattr(worker.runner, "start", broken)
    worker.tell(runs(1))
    status, reason = await worker.exited
    assert status == 1
    assert "no such runner" in reason
    assert caplog.records


# -- The clock ---------------------------------------------------------------------------------------------------------


async def test_a_clock_that_was_set_is_told_to_the_node(head: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[ev.ClockRead] = []
    handle = head.node.handle

    def listen(event: ev.Event, now: float) -> None:
        if isinstance(event, ev.ClockRead):
            told.append(event)
        handle(event, now)

    monkeypatch.setattr(head.node, "handle", listen)
    real_time = time.time
    before_s = head.utc()
    head._read_clock()
    assert told == [], "a clock that runs as it should is no news"
    monkeypatch.setattr(shell_module.time, "time", lambda: real_time() + 3600.0)
    head._read_clock()
    head._read_clock()
    assert len(told) == 1
    assert 3599 < head.utc() - before_s < 3700


async def test_the_clock_is_looked_at_from_time_to_time(head: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell_module, "CLOCK_CHECK_S", 0.001)
    real_time = time.time
    monkeypatch.setattr(shell_module.time, "time", lambda: real_time() - 3600.0)
    before_s = head.utc()
    await until(lambda: before_s - head.utc() > 3500)


def told_to(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> list[ev.Event]:
    """What the node is told from now on, in order."""
    told: list[ev.Event] = []
    handle = shell.node.handle

    def listen(event: ev.Event, now: float) -> None:
        told.append(event)
        handle(event, now)

    monkeypatch.setattr(shell.node, "handle", listen)
    return told


@pytest.mark.parametrize("stood_still_s", [1.2, 1.3, 600.0])
async def test_standing_still_is_told_before_anything_else(
    head: Shell, monkeypatch: pytest.MonkeyPatch, stood_still_s: float
) -> None:
    told = told_to(head, monkeypatch)
    real = shell_module.monotonic
    monkeypatch.setattr(shell_module, "monotonic", lambda: real() + stood_still_s)
    head._alive_at = real()
    head.tell(ev.PeerDown(77, "silent"))
    head.tell(ev.PeerDown(78, "silent"))
    kinds = [type(event).__name__ for event in told]
    assert kinds == ["Stalled"] * (stood_still_s > 1.25) + ["PeerDown", "PeerDown"]
    if isinstance(told[0], ev.Stalled):
        assert stood_still_s <= told[0].duration_s < stood_still_s + 10


async def test_standing_still_is_noticed_where_nothing_happens(head: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    told = told_to(head, monkeypatch)
    monkeypatch.setattr(shell_module, "CLOCK_CHECK_S", 0.001)
    real = shell_module.monotonic
    head._alive_at = real()
    monkeypatch.setattr(shell_module, "monotonic", lambda: real() + 5.0)
    await until(lambda: any(isinstance(event, ev.Stalled) for event in told))


async def test_what_takes_long_before_the_loop_runs_is_no_standing_still(monkeypatch: pytest.MonkeyPatch) -> None:
    info = msg.NodeInfo(HEAD, "head", ("scheduler",), bytes(16), 1, "1.0")
    shell = Shell(Node(info, Random(1), SchedulerSettings(), None), Hub(), FakeStore(), None)  # type: ignore[arg-type]
    told = told_to(shell, monkeypatch)
    real = shell_module.monotonic
    monkeypatch.setattr(shell_module, "monotonic", lambda: real() + 60.0)
    shell.tell(ev.Loaded(None, [], []))
    assert [type(event).__name__ for event in told] == ["Loaded"]
    shell.close()


# -- Other schedulers --------------------------------------------------------------------------------------------------


async def test_a_peer_that_breaks_the_protocol_is_let_go(head: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[tuple[int, str]] = []
    monkeypatch.setattr(head.mesh, "disconnect", lambda node_id, reason: ended.append((node_id, reason)))
    with monkeypatch.context() as patch:
        patch.setattr(head.node, "take_effects", lambda now: [fx.Disconnect(7, "it lies")])
        head._turn()
    assert ended == [(7, "it lies")]


async def test_the_newest_id_counts_what_other_schedulers_took(head: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(number: int) -> msg.TaskRow:
        return msg.TaskRow(number.to_bytes(16), 3, 0, "q", "t", "", "", 1.0, 1.0, 0.0, 1, 2, 3, 4, b"", b"")

    assert head.newest_id == bytes(16)
    head._commit(fx.Commit(1, inserted=[row(5), row(9), row(7)]))
    assert head.newest_id == (9).to_bytes(16)
    await until(head._commits.empty)
    head._commit(fx.Commit(2, taken=[row(8)], updated=[row(12)]))
    assert head.newest_id == (9).to_bytes(16), "what is updated is known already"


async def test_who_leads_no_more_ends_its_streams_of_events(head: Shell) -> None:
    stream = head.hub.stream()
    reading = asyncio.ensure_future(anext(stream, None))
    await asyncio.sleep(0)
    head._follow(fx.Follow(HEAD, TERM))
    await asyncio.sleep(0)
    assert not reading.done()
    head._follow(fx.Follow(None, None))
    assert await reading is None
    assert head.leader is None


# -- The journal -------------------------------------------------------------------------------------------------------


async def test_a_journal_that_fails_is_told_once_and_work_goes_on(
    worker: Shell, caplog: pytest.LogCaptureFixture
) -> None:
    assert isinstance(worker.journal, FakeJournal)
    assert isinstance(worker.runner, FakeRunner)
    runner = worker.runner
    caplog.set_level(logging.INFO, "taskd")
    worker.journal.failure = StoreError("no space left")

    async def run(number: int) -> None:
        worker.tell(runs(number))
        await until(lambda: len(runner.started) == number)
        worker.progressed([], [msg.AttemptEnded(runner.started[-1].key, 0, 1.0, 2.0, b"")])
        await asyncio.sleep(0)

    for number in (1, 2, 3):
        await run(number)
    worker.journal.failure = None
    await run(4)
    said = [record.message for record in caplog.records if "journal" in record.message]
    assert said == ["the journal cannot be written", "the journal can be written again"]


async def test_outcomes_that_nobody_takes_are_made_safe(worker: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(worker.journal, FakeJournal)
    assert isinstance(worker.runner, FakeRunner)
    runner = worker.runner
    monkeypatch.setattr(shell_module, "CLOCK_CHECK_S", 0.001)
    monkeypatch.setattr(shell_module, "JOURNAL_SYNC_S", 0.0)
    worker.tell(runs(1))
    await until(lambda: runner.started)
    key = runner.started[0].key
    worker.progressed([], [msg.AttemptEnded(key, 0, 1.0, 2.0, b"")])
    async with asyncio.timeout(10):
        await worker.journal.syncs.get()


# -- Points to die at --------------------------------------------------------------------------------------------------


async def test_points_are_passed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    hits: list[str] = []
    monkeypatch.setenv(failpoints.VARIABLE, "some.point")
    monkeypatch.setattr(failpoints, "hit", lambda name, **more: hits.append(name))
    store = FakeStore()
    info = msg.NodeInfo(HEAD, "head", ("scheduler",), bytes(16), 1, "1.0")
    shell = Shell(Node(info, Random(1), SchedulerSettings(), None), Hub(), store, FakeJournal())  # type: ignore[arg-type]
    shell.mesh = FakeMesh()
    shell._do[fx.Send](fx.Send(WORKER, msg.Leading(TERM)))
    assert hits == ["send.before.Leading"]
    await until(lambda: hits[-1] == "send.after.Leading")
    shell._write_journal(fx.Journal(None, [], [], []))
    assert hits[2:] == ["journal.before", "journal.after"]
    shell._commit(fx.Commit(1))
    writing = asyncio.ensure_future(shell._write_commits(store))  # type: ignore[arg-type]
    monkeypatch.setattr(shell, "tell", lambda event: hits.append(type(event).__name__))
    await until(lambda: hits[-1] == "Committed")
    assert hits[4:] == ["commit.before", "commit.after", "Committed"]
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    shell.close()


# -- Figures -----------------------------------------------------------------------------------------------------------


async def test_figures_are_there_and_true(head: Shell) -> None:
    await head.ask(submitted(1, 2, 3))
    text = text_source(head, lambda: 4, lambda: [])().decode()
    lines = set(text.splitlines())
    assert 'taskd_tasks{queue="default",state="queued"} 3.0' in lines
    assert 'taskd_tasks_submitted_total{queue="default",type="command"} 3.0' in lines
    assert "taskd_is_leader 1.0" in lines
    assert "taskd_peer_reconnects_total 4.0" in lines
    assert {
        "taskd_durability 0.0",
        "taskd_standbys_in_sync 0.0",
        "taskd_in_sync 1.0",
        "taskd_leader_epoch 1.0",
    } <= lines
    assert any(line.startswith('taskd_queue_oldest_age_seconds{queue="default"}') for line in lines)


async def test_the_lag_of_each_standby_is_told(head: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    assert head.node.scheduler is not None
    views = [StandbyView(5, "in_sync", 9, 2, 0.5), StandbyView(6, "catching_up", 0, 0, 0.0)]
    monkeypatch.setattr(head.node.scheduler, "standbys", lambda now: views)
    lines = set(text_source(head, lambda: 4, lambda: [])().decode().splitlines())
    assert 'taskd_replication_lag_commits{node="5"} 2.0' in lines
    assert 'taskd_replication_lag_seconds{node="5"} 0.5' in lines
    assert "taskd_standbys_in_sync 1.0" in lines
