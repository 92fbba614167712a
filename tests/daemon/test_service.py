"""What a daemon tells its clients: how far each scheduler is, what is wrong, and what it may answer without leading."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from taskd.api.cluster_types import Handlers
from taskd.api.service import OwnReads
from taskd.core import events as ev
from taskd.core.counts import Counts
from taskd.core.effects import Change
from taskd.core.feed import StandbyView
from taskd.core.nodes import AWAY_MAX_S, KnownNodes
from taskd.core.outbox import Outbox
from taskd.core.task import Record, TaskSpec, TaskState, encode
from taskd.daemon import service as service_module
from taskd.daemon import views as views_module
from taskd.daemon.hub import Hub
from taskd.daemon.service import DaemonService
from taskd.daemon.shell import Answered, monotonic
from taskd.errors import DiskFull
from taskd.protocol.messages import HandlerInfo, NodeInfo, NodeRow, TaskRow, Term

OWN, OTHER, THIRD, WORKER = 5, 1, 8, 9


def info(node_id: int, *roles: Any) -> NodeInfo:
    return NodeInfo(node_id, f"node-{node_id}", roles or ("scheduler",), bytes(16), 1, "1")


def row(number: int, state: TaskState = TaskState.SUCCEEDED, finished_s: float = 50.0) -> TaskRow:
    finished_s = finished_s if state.is_final else 0.0
    return TaskRow(
        number.to_bytes(16), state, 0, "q", "t", "", "", 1.0, 5.0, finished_s, 1, 2, 3, 4, b"", encode(Record([]))
    )  # fmt: skip


class FakeElection:
    def __init__(self) -> None:
        self.ready = True
        self.willing: set[int] = set()

    def is_ready(self, now: float) -> bool:
        return self.ready

    def may_lead(self, node_id: int) -> bool:
        return node_id in self.willing

    def why_not(self, now: float) -> str:
        return "they look for each other"


class FakeScheduler:
    """What the core tells of itself."""

    def __init__(self) -> None:
        self.is_in_sync = self.is_loading = False
        self.durability = "local"
        self.attached: list[StandbyView] = []
        self.missing: list[NodeRow] = []
        self.nodes = KnownNodes(Outbox())
        self.election = FakeElection()
        counts = Counts()
        counts.add(TaskState.QUEUED, "q", 2)
        counts.add(TaskState.RUNNING, "q")
        self.ledger = SimpleNamespace(tasks={}, counts=counts)
        self.outbox: set[bytes] = set()
        self.roster = FakeRoster()
        self.settings = SimpleNamespace(min_replicas=0)
        self.feed = SimpleNamespace(is_promising=False)

    def standbys(self, now: float) -> list[StandbyView]:
        return self.attached

    def away(self, now: float) -> list[NodeRow]:
        return self.missing


class FakeRoster(list[Any]):
    def get(self, node_id: int) -> None:
        return None


class FakeStore:
    def __init__(self) -> None:
        self.rows: dict[bytes, TaskRow] = {}
        self.free = 1 << 40
        self.looked_for: list[list[bytes]] = []

    def get(self, ids: list[bytes]) -> list[TaskRow]:
        return [self.rows[task_id] for task_id in ids if task_id in self.rows]

    def existing(self, ids: list[bytes]) -> set[bytes]:
        self.looked_for.append(ids)
        return {task_id for task_id in ids if task_id in self.rows}

    def free_bytes(self) -> int:
        return self.free


class Stage:
    """A scheduler's daemon without its worlds."""

    def __init__(self, *, is_scheduler: bool = True) -> None:
        self.scheduler = FakeScheduler()
        self.peers: list[Any] = []
        self.now_s = 1000.0
        self.store = FakeStore()
        self.told: list[ev.Event] = []
        self.answer = Answered([], "replicated")
        roles = ("scheduler",) if is_scheduler else ("worker",)
        self.shell = SimpleNamespace(
            node=SimpleNamespace(info=info(OWN, *roles), scheduler=self.scheduler if is_scheduler else None),
            hub=Hub(), store=self.store if is_scheduler else None, leader=None, term=None, is_stopping=False,
            leaderless_since=monotonic(), newest_id=bytes(16), exited=asyncio.get_running_loop().create_future(),
            utc=lambda: self.now_s, ask=self.ask,
        )  # fmt: skip
        shell: Any = self.shell
        calls: Any = None
        self.service = DaemonService(shell, calls, "lan", lambda: self.peers, None, lambda: b"", 1 << 20)

    async def ask(self, make: Any) -> Answered:
        self.told.append(make(1))
        return self.answer

    def lead(self) -> None:
        self.follow(OWN)

    def follow(self, leader: int | None) -> None:
        self.shell.leader = leader
        self.shell.term = Term(3, leader, 1) if leader is not None else None
        self.shell.hub.leader_changed()

    def connect(self, node_id: int, *roles: Any, clock_offset_s: float = 0.0) -> None:
        self.peers.append(
            SimpleNamespace(
                node=info(node_id, *roles),
                address="10.0.0.1:1",
                fingerprint="f00d",
                round_trip_s=0.001,
                clock_offset_s=clock_offset_s,
            )
        )

    def remember(self, node_id: int) -> None:
        self.scheduler.nodes.write(NodeRow(node_id, f"node-{node_id}", ("scheduler",), None, 40.0))

    def hire(self) -> None:
        worker = SimpleNamespace(
            node_id=WORKER, name="w", info=info(WORKER, "worker"), is_here=True, drain_reason=None, assigned={},
            offer=SimpleNamespace(slots=4, capacity={}, labels={}), used={}, types=frozenset(), seen_s=1.0,
        )  # fmt: skip
        self.scheduler.roster.append(worker)
        self.connect(WORKER, "worker")


@pytest.fixture
async def stage() -> Stage:
    return Stage()


# -- How far each is ---------------------------------------------------------------------------------------------------


async def test_the_leader_knows_how_far_all_are(stage: Stage) -> None:
    stage.lead()
    stage.hire()
    for node_id in (OTHER, THIRD, 20):
        stage.connect(node_id)
    stage.remember(30)
    stage.scheduler.attached = [
        StandbyView(OTHER, "in_sync", 7, 2, 0.5), StandbyView(THIRD, "catching_up", 0, 0, 0.0, 70)
    ]  # fmt: skip
    stage.scheduler.election.willing = {OTHER}
    view = stage.service.cluster()
    assert [
        (one.node_id, one.name, one.replication, one.lag_commits, one.lag_s, one.may_lead, one.seen, one.copied)
        for one in view.replicas
    ] == [
        (OWN, "node-5", "leading", 0, 0.0, True, None, None),
        (OTHER, "node-1", "in_sync", 2, 0.5, True, None, None),
        (THIRD, "node-8", "catching_up", None, None, False, None, 70),
        (20, "node-20", "catching_up", None, None, False, None, None),
        (30, "node-30", "away", None, None, False, 40.0, None),
    ]
    assert (view.schedulers, view.workers, view.slots, view.running, view.term) == (4, 1, 4, 1, 3)
    nodes = {node.node_id: node for node in stage.service.nodes()}
    assert {node_id: (node.replication, node.state) for node_id, node in nodes.items()} == {
        OWN: ("leading", "up"), OTHER: ("in_sync", "up"), THIRD: ("catching_up", "up"), 20: ("catching_up", "up"),
        30: ("away", "lost"), WORKER: (None, "up"),
    }  # fmt: skip
    assert (nodes[OTHER].lag_commits, nodes[OTHER].may_lead, nodes[30].roles) == (2, True, ["scheduler"])
    assert (nodes[OTHER].seen, nodes[30].seen) == (1000.0, 40.0)


async def test_drained_workers_are_counted_apart_and_told_where_there_are_no_others(stage: Stage) -> None:
    stage.lead()
    stage.hire()
    stage.hire()
    first, second = stage.scheduler.roster
    first.drain_reason = "new disk"
    view = stage.service.cluster()
    assert (view.workers, view.workers_drained, view.slots, view.slots_drained) == (2, 1, 8, 4)
    assert (view.health, view.why) == ("ok", "")
    second.drain_reason = ""
    view = stage.service.cluster()
    assert (view.health, view.slots_drained) == ("degraded", 8)
    assert view.why == "every connected worker is drained (w, w): no task begins"


async def test_a_standby_knows_of_itself_and_its_leader(stage: Stage) -> None:
    stage.follow(OTHER)
    stage.connect(OTHER)
    stage.connect(THIRD)
    stage.scheduler.is_in_sync = True
    view = stage.service.cluster()
    assert [(one.node_id, one.replication) for one in view.replicas] == [
        (OTHER, "leading"), (OWN, "in_sync"), (THIRD, None)
    ]  # fmt: skip
    assert (view.durability, view.health) == ("replicated", "ok")
    stage.scheduler.is_in_sync = False
    assert stage.service.cluster().replicas[1].replication == "catching_up"
    stage.follow(None)
    assert {one.replication for one in stage.service.cluster().replicas} == {None}


async def test_a_worker_knows_who_leads() -> None:
    stage = Stage(is_scheduler=False)
    stage.connect(OTHER)
    stage.connect(THIRD)
    assert stage.service.cluster().why == "no scheduler leads yet, of those that are connected: node-1, node-8"
    stage.follow(OTHER)
    view = stage.service.cluster()
    assert [(one.node_id, one.replication) for one in view.replicas] == [(OTHER, "leading"), (THIRD, None)]
    assert (view.leader_name, view.health, view.durability) == ("node-1", "ok", "local")
    assert not view.by_leader
    assert await stage.service.own_reads() is OwnReads.NOTHING
    stage.follow(None)
    stage.peers, stage.now_s = [], 1060.0
    view = stage.service.cluster()
    assert view.why == views_module.NO_SCHEDULER
    assert [(one.name, one.replication, one.seen) for one in view.replicas] == [
        ("node-1", "away", 1000.0), ("node-8", "away", 1000.0)
    ]  # fmt: skip


async def test_whoever_is_away_was_seen_when_it_was_last_noticed(stage: Stage) -> None:
    stage.follow(OTHER)
    stage.connect(OTHER)
    stage.remember(OTHER)  # The cluster's memory of a leader says when it began to lead.
    stage.service.cluster()
    stage.peers, stage.now_s = [], 1060.0
    stage.lead()
    seen = {one.node_id: one.seen for one in stage.service.cluster().replicas}
    assert seen == {OWN: None, OTHER: 1000.0}
    stage.scheduler.nodes.write(NodeRow(OTHER, "renamed", ("scheduler",), None, 1030.0))
    (view,) = (one for one in stage.service.cluster().replicas if one.node_id == OTHER)
    assert (view.name, view.seen) == ("renamed", 1030.0)
    stage.now_s = 1030.0 + AWAY_MAX_S
    assert [one.node_id for one in stage.service.cluster().replicas] == [OWN]
    assert stage.service.cluster().why == "no worker is connected"


# -- How it is ---------------------------------------------------------------------------------------------------------


async def test_a_cluster_is_well_or_says_why_not(stage: Stage) -> None:
    stage.lead()
    assert stage.service.cluster().why == "no worker is connected"
    stage.hire()
    assert (stage.service.cluster().health, stage.service.cluster().why) == ("ok", "")
    stage.remember(OTHER)
    why = "no standby is in sync, so that what is accepted is on one disk alone (node-1 is away)"
    assert (stage.service.cluster().health, stage.service.cluster().why) == ("degraded", why)
    stage.connect(OTHER, clock_offset_s=-90.0)
    clock = "the clock of node-1 is 1m30s behind that of node-5"
    assert stage.service.cluster().why == f"{why.replace('away', 'catching up')}; {clock}"
    stage.scheduler.durability = "replicated"
    stage.peers[-1].clock_offset_s = 1.0
    assert stage.service.cluster().health == "ok"
    assert stage.service.cluster().durability == "replicated"


async def test_readiness_tells_the_truth(stage: Stage) -> None:
    ready = stage.service.ready()
    assert (ready.ready, ready.why) == (False, "they look for each other")
    stage.scheduler.is_loading = True
    assert "about to lead" in stage.service.ready().why
    assert stage.service.cluster().health == "down"
    stage.lead()
    assert stage.service.ready().ready
    stage.scheduler.settings.min_replicas = 1
    assert stage.service.cluster().refuses == views_module.NO_STANDBY
    stage.hire()
    stage.remember(OTHER)
    assert stage.service.cluster().why == f"{views_module.NO_STANDBY}; no standby is in sync (node-1 is away)"
    stage.scheduler.feed.is_promising = True
    assert stage.service.cluster().refuses == ""
    stage.shell.is_stopping = True
    assert stage.service.ready().why == "this daemon is stopping"


# -- Reading without leading -------------------------------------------------------------------------------------------


async def test_what_a_standby_may_answer(stage: Stage) -> None:
    stage.follow(OTHER)
    stage.connect(OTHER)
    assert await stage.service.own_reads() is OwnReads.NOTHING
    stage.scheduler.is_in_sync = True
    assert await stage.service.own_reads() is OwnReads.SETTLED
    stage.remember(THIRD)  # It is away: results may be provisional, which the leader alone can tell.
    assert await stage.service.own_reads() is OwnReads.NOTHING


async def test_without_a_leader_one_is_waited_for_a_moment(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    asking = asyncio.ensure_future(stage.service.own_reads())
    await asyncio.sleep(0)
    stage.follow(OTHER)
    assert await asking is OwnReads.NOTHING
    stage.follow(None)
    stage.shell.leaderless_since = monotonic() - service_module.READ_WAIT_S
    assert await stage.service.own_reads() is OwnReads.ALL
    stage.shell.leaderless_since = monotonic()
    asking = asyncio.ensure_future(stage.service.own_reads())
    await asyncio.sleep(0)
    stage.lead()
    assert await asking is OwnReads.ALL


async def test_a_watch_without_leading_hears_of_what_is_decided_elsewhere(stage: Stage) -> None:
    stage.store.rows = {one.id: one for one in (row(1), row(2, TaskState.RUNNING))}
    watch = stage.service.watch([(1).to_bytes(16), (2).to_bytes(16), (3).to_bytes(16)])
    assert watch.open == 1
    assert [change.id for change in await watch.next(0)] == [(1).to_bytes(16)]
    stage.shell.hub.announce_rows([row(2)])
    assert await watch.next(0) == [Change((2).to_bytes(16), TaskState.SUCCEEDED, 5.0, 0, 0, b"", "")]


async def test_what_ended_while_a_scheduler_was_away_is_provisional(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "AWAY_CHECK_S", -1.0)
    stage.lead()
    assert not stage.service.is_provisional(row(1))
    stage.scheduler.missing = [NodeRow(OTHER, "x", ("scheduler",), None, 40.0)]
    assert stage.service.is_provisional(row(1, finished_s=41.0))
    assert not stage.service.is_provisional(row(1, finished_s=39.0))
    stage.follow(OTHER)
    assert not stage.service.is_provisional(row(1, finished_s=41.0))


# -- Submitting --------------------------------------------------------------------------------------------------------


def new(*numbers: int) -> list[ev.NewTask]:
    spec = TaskSpec("command")
    return [ev.NewTask(number.to_bytes(16), spec, b"") for number in numbers]


async def test_what_is_known_is_not_taken_again_and_its_copy_is_waited_for(stage: Stage) -> None:
    stage.lead()
    stage.store.rows = {row(1).id: row(1)}
    receipt = await stage.service.submit(new(5, 6))
    assert (receipt.known, receipt.durability) == (set(), "replicated")
    stage.shell.newest_id = (1).to_bytes(16)
    stage.answer = Answered([(7).to_bytes(16)], "local")
    receipt = await stage.service.submit(new(1, 7))
    assert (receipt.known, receipt.durability) == ({(1).to_bytes(16), (7).to_bytes(16)}, "local")
    stage.answer = Answered([], "")
    stage.scheduler.durability = "replicated"
    assert (await stage.service.submit(new(1))).durability == "replicated"
    sent = [[task.id[-1] for task in event.tasks] for event in stage.told if isinstance(event, ev.Submitted)]
    assert sent == [[5, 6], [7], []]


async def test_ids_above_all_others_are_not_looked_for(stage: Stage) -> None:
    stage.lead()
    stage.shell.newest_id = (4).to_bytes(16)
    await stage.service.submit(new(5, 6))
    assert stage.store.looked_for == []
    await stage.service.submit(new(6, 7))
    assert len(stage.store.looked_for) == 1


async def test_a_full_disk_takes_nothing_new_and_knows_what_it_has(stage: Stage) -> None:
    stage.lead()
    stage.hire()
    stage.store.free = 0
    stage.store.rows = {row(1).id: row(1)}
    stage.shell.newest_id = (1).to_bytes(16)
    assert (await stage.service.submit(new(1))).known == {row(1).id}
    with pytest.raises(DiskFull):
        await stage.service.submit(new(2))
    assert "disk is nearly full" in stage.service.cluster().why
    assert stage.service.cluster().refuses == views_module.DISK_FULL
    stage.store.free = 1 << 40
    stage.service._free_checked_s -= 2.0
    assert stage.service.cluster().health == "ok"


# -- What workers say --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schema",
    [b"", b"{", b"no", b"{}, {}", b"[]", b"true", b'"text"', b'{"a": "\xff"}', b"\xff", b"{'a': 1}", b'{"a":' * 20_000],
)
async def test_a_schema_that_is_none_breaks_nobodys_view_of_the_handlers(stage: Stage, schema: bytes) -> None:
    stage.lead()
    stage.hire()
    (worker,) = stage.scheduler.roster
    good = HandlerInfo("resize", b'{"type": "object"}')
    worker.offer.handlers = (HandlerInfo("hostile", schema), good)
    shown = msgspec.json.decode(msgspec.json.encode(Handlers(stage.service.handlers())))
    (handler,) = shown["handlers"]
    assert (handler["type"], handler["schema"], handler["nodes"]) == ("resize", {"type": "object"}, [WORKER])
