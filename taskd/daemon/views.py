"""The cluster as one node sees it, in the form that users see: its nodes, who leads, who has a copy, how it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from taskd.api.cluster_types import ClusterView, NodeView, Ready, Replication, SchedulerView
from taskd.core.feed import StandbyView
from taskd.core.nodes import AWAY_MAX_S
from taskd.core.roster import Worker
from taskd.core.scheduler import Scheduler
from taskd.core.task import TaskState
from taskd.daemon.shell import Shell, monotonic
from taskd.protocol.messages import NodeInfo
from taskd.values import format_duration
from taskd.version import VERSION

CLOCK_OFFSET_S_MAX = 1.0  # From here on times of different nodes cannot be compared, and people wonder.
NO_SCHEDULER = "no scheduler is connected: none runs, or none can be reached from here"
NO_STANDBY = "new tasks are refused: no standby keeps a copy, and min_replicas asks for one"
ONE_DISK = "no standby is in sync, so that what is accepted is on one disk alone"
DRAINED_NAMED_MAX = 5
DISK_FULL = "new tasks are refused: the scheduler's disk is nearly full"


class PeerView(Protocol):
    """What the mesh knows of a connected peer."""

    @property
    def node(self) -> NodeInfo: ...
    @property
    def address(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def round_trip_s(self) -> float | None: ...
    @property
    def clock_offset_s(self) -> float | None: ...


class Views:
    """What one node can tell of the cluster."""

    def __init__(
        self, shell: Shell, cluster: str, peers: Callable[[], Sequence[PeerView]], state_dir: str = ""
    ) -> None:
        self.is_disk_full = False  # set by who looks
        self._shell = shell
        self._node = shell.node
        self._cluster = cluster
        self._peers = peers
        self._state_dir = state_dir
        self._noticed: dict[int, tuple[str, float]] = {}  # schedulers by id: the name, and when it was last here, UTC

    @property
    def _leads(self) -> bool:
        return self._node.scheduler is not None and self._shell.leader == self._node.info.node_id

    def node_name(self, node_id: int) -> str:
        """A node's name, or its id as text."""
        if node_id == self._node.info.node_id:
            return self._node.info.name
        scheduler = self._node.scheduler
        if scheduler is not None:
            worker = scheduler.roster.get(node_id)
            if worker is not None:
                return worker.name
            if node_id in scheduler.nodes:
                return scheduler.nodes[node_id].name
        return next((peer.node.name for peer in self._peers() if peer.node.node_id == node_id), str(node_id))

    # -- Schedulers ----------------------------------------------------------------------------------------------------

    def schedulers(self) -> list[SchedulerView]:
        """Every scheduler that is known and was not given up: the leader first, then by id, as they would lead."""
        here = {peer.node.node_id: peer.node.name for peer in self._peers() if "scheduler" in peer.node.roles}
        scheduler, own = self._node.scheduler, self._node.info
        standbys: dict[int, StandbyView] = {}
        if scheduler is not None:
            here[own.node_id] = own.name
            standbys = {view.node_id: view for view in scheduler.standbys(monotonic())}
        self._notice(here)
        views = [
            self._scheduler_view(node_id, name, node_id in here, seen_s, standbys.get(node_id))
            for node_id, (name, seen_s) in self._noticed.items()
        ]
        return sorted(views, key=lambda view: (view.replication != "leading", view.node_id))

    def _notice(self, here: dict[int, str]) -> None:
        """Remember who is here, and learn from the cluster's memory who was. That is written down now and then: what we
        have noticed ourselves may be newer, as often as somebody looks."""
        now_s = self._shell.utc()
        noticed = self._noticed
        noticed.update((node_id, (name, now_s)) for node_id, name in here.items())
        if self._node.scheduler is not None:
            for row in self._node.scheduler.nodes.values():
                if "scheduler" in row.roles and row.seen_s > noticed.get(row.node_id, ("", -1.0))[1]:
                    noticed[row.node_id] = (row.name, row.seen_s)
        self._noticed = {
            node_id: (name, seen_s) for node_id, (name, seen_s) in noticed.items() if seen_s > now_s - AWAY_MAX_S
        }

    def _scheduler_view(
        self, node_id: int, name: str, is_here: bool, seen_s: float, standby: StandbyView | None
    ) -> SchedulerView:
        stage = self._replication(node_id, is_here, standby)
        commits: int | None = None
        seconds: float | None = None
        if stage == "leading":
            commits, seconds = 0, 0.0
        elif standby is not None and standby.stage in ("in_sync", "stalled"):
            commits, seconds = standby.lag_commits, standby.lag_s
        away_seen_s = seen_s if stage == "away" else None
        copied = standby.given if standby is not None and standby.stage == "catching_up" else None
        return SchedulerView(node_id, name, stage, commits, seconds, self._may_lead(node_id), away_seen_s, copied)

    def _replication(self, node_id: int, is_here: bool, standby: StandbyView | None) -> Replication | None:
        scheduler, is_self = self._node.scheduler, node_id == self._node.info.node_id
        if node_id == self._shell.leader:
            return "leading"
        if standby is not None and standby.stage == "in_sync":
            return "in_sync"
        if is_self:
            assert scheduler is not None
            if self._shell.leader is None:
                return None  # There is nobody to be in sync with.
            return "in_sync" if scheduler.is_in_sync else "catching_up"
        if not is_here:
            return "away"
        return "catching_up" if self._leads else None

    def _may_lead(self, node_id: int) -> bool:
        scheduler = self._node.scheduler
        if scheduler is None:
            return node_id == self._shell.leader
        if node_id == self._node.info.node_id:
            return not self._shell.is_stopping and scheduler.election.is_ready(monotonic())
        return scheduler.election.may_lead(node_id)

    # -- Nodes ---------------------------------------------------------------------------------------------------------

    def nodes(self) -> list[NodeView]:
        """All known nodes, schedulers first."""
        scheduler = self._node.scheduler
        assert scheduler is not None
        peers = {peer.node.node_id: peer for peer in self._peers()}
        workers = {worker.node_id: worker for worker in scheduler.roster}
        replicas = {view.node_id: view for view in self.schedulers()}
        infos = {info.node_id: info for info in (self._node.info, *(peer.node for peer in peers.values()))}
        views = [
            self._node_view(
                node_id, infos.get(node_id), workers.get(node_id), peers.get(node_id), replicas.get(node_id)
            )
            for node_id in {**infos, **workers, **replicas}
        ]
        return sorted(views, key=lambda view: (not view.is_leader, "scheduler" not in view.roles, view.node_id))

    def _node_view(
        self,
        node_id: int,
        info: NodeInfo | None,
        worker: Worker | None,
        peer: PeerView | None,
        replica: SchedulerView | None,
    ) -> NodeView:
        scheduler = self._node.scheduler
        row = scheduler.nodes.get(node_id) if scheduler is not None else None
        is_self = node_id == self._node.info.node_id
        is_here = is_self or peer is not None
        state = "up" if is_here else "lost"
        running = 0
        if worker is not None and is_here and worker.drain_reason is not None:
            state = "draining" if worker.assigned else "drained"
        if worker is not None:
            running = sum(1 for task in worker.assigned.values() if task.state is not TaskState.ASSIGNED)
        offer = worker.offer if worker is not None else None
        seen_s = max(worker.seen_s if worker is not None else 0.0, (replica and replica.seen) or 0.0)
        return NodeView(
            node_id=node_id,
            name=info.name if info is not None else self.node_name(node_id),
            roles=list(info.roles if info is not None else row.roles if row is not None else ("worker",)),
            state=state,
            is_leader=node_id == self._shell.leader,
            version=info.version if info is not None else "",
            address="local" if is_self else peer.address if peer is not None else "",
            slots=offer.slots if offer is not None else 0,
            running=running,
            waiting=len(worker.assigned) - running if worker is not None else 0,
            capacity=_amounts(offer.capacity) if offer is not None else {},
            used=_amounts(worker.used) if worker is not None else {},
            labels=offer.labels if offer is not None else {},
            types=sorted(worker.types) if worker is not None else [],
            clock_offset_s=0.0 if is_self else peer.clock_offset_s if peer is not None else None,
            round_trip_s=0.0 if is_self else peer.round_trip_s if peer is not None else None,
            drain_reason=(worker.drain_reason or "") if worker is not None else "",
            seen=self._shell.utc() if is_here else seen_s,
            replication=replica.replication if replica is not None else None,
            lag_commits=replica.lag_commits if replica is not None else None,
            lag_s=replica.lag_s if replica is not None else None,
            may_lead=replica is not None and replica.may_lead,
            fingerprint=peer.fingerprint if peer is not None else "",
        )

    # -- The whole -----------------------------------------------------------------------------------------------------

    def cluster(self) -> ClusterView:
        """The cluster as this node knows it."""
        info, leader, term = self._node.info, self._shell.leader, self._shell.term
        scheduler = self._node.scheduler
        tasks: dict[str, int] = {}
        here: list[Worker] = []
        if self._leads and scheduler is not None:
            for (state, _queue), count in scheduler.ledger.counts.as_dict().items():
                tasks[state.word] = tasks.get(state.word, 0) + count
            here = [worker for worker in scheduler.roster if worker.is_here]
        drained = [worker for worker in here if worker.drain_reason is not None]
        replicas = self.schedulers()
        health, why = self._health(scheduler, here, replicas)
        return ClusterView(
            cluster=self._cluster, node_id=info.node_id, name=info.name, roles=list(info.roles), leader=leader,
            leader_name=self.node_name(leader) if leader is not None else None,
            term=term.epoch if term is not None else None, health=health, why=why,
            durability=self._durability(scheduler),
            schedulers=sum(1 for view in replicas if view.replication != "away"), workers=len(here),
            slots=sum(worker.offer.slots for worker in here), running=tasks.get("running", 0), tasks=tasks,
            version=VERSION, replicas=replicas, by_leader=self._leads, refuses=self._why_refused(scheduler),
            workers_drained=len(drained), slots_drained=sum(worker.offer.slots for worker in drained),
            state_dir=self._state_dir,
        )  # fmt: skip

    def _durability(self, scheduler: Scheduler | None) -> Literal["local", "replicated"]:
        if scheduler is None:
            return "local"
        has_copy = scheduler.durability == "replicated" if self._leads else scheduler.is_in_sync
        return "replicated" if has_copy else "local"

    def _health(
        self, scheduler: Scheduler | None, workers: list[Worker], replicas: list[SchedulerView]
    ) -> tuple[Literal["ok", "degraded", "down"], str]:
        if self._shell.leader is None:
            return "down", self._why_nobody_leads(scheduler)
        wrong: list[str] = []
        if self._leads and scheduler is not None:
            if refused := self._why_refused(scheduler):
                wrong.append(refused)
            others = [view for view in replicas if view.replication != "leading"]
            if others and scheduler.durability == "local":
                stages = ", ".join(f"{view.name} is {_stage_words(view)}" for view in others)
                # What is refused is on no disk.
                what = "no standby is in sync" if refused else ONE_DISK
                wrong.append(f"{what} ({stages})")
            if not workers:
                wrong.append("no worker is connected")
            elif all(worker.drain_reason is not None for worker in workers):
                names = ", ".join(worker.name for worker in workers[:DRAINED_NAMED_MAX])
                more = ", …" if len(workers) > DRAINED_NAMED_MAX else ""
                wrong.append(f"every connected worker is drained ({names}{more}): no task begins")
        for peer in self._peers():
            offset_s = peer.clock_offset_s or 0.0
            if abs(offset_s) > CLOCK_OFFSET_S_MAX:
                side = "ahead of" if offset_s > 0 else "behind"
                own = self._node.info.name  # Who reads this may have asked another node.
                wrong.append(f"the clock of {peer.node.name} is {format_duration(abs(offset_s))} {side} that of {own}")
        return ("degraded", "; ".join(wrong)) if wrong else ("ok", "")

    def _why_refused(self, scheduler: Scheduler | None) -> str:
        """Why the leader, where that is us, takes no new tasks."""
        if not self._leads or scheduler is None:
            return ""
        feed = scheduler.feed
        if scheduler.settings.min_replicas and feed is not None and not feed.is_promising:
            return NO_STANDBY
        return DISK_FULL if self.is_disk_full else ""

    def _why_nobody_leads(self, scheduler: Scheduler | None) -> str:
        if scheduler is None:
            names = sorted(peer.node.name for peer in self._peers() if "scheduler" in peer.node.roles)
            return f"no scheduler leads yet, of those that are connected: {', '.join(names)}" if names else NO_SCHEDULER
        if scheduler.is_loading:
            return "this scheduler is about to lead: it collects what the others have and reads its tasks"
        return scheduler.election.why_not(monotonic())

    def ready(self) -> Ready:
        """Whether this node has a leader to serve with, be it itself."""
        if self._shell.is_stopping or self._shell.exited.done():
            return Ready(False, "this daemon is stopping")
        if self._shell.leader is None:
            return Ready(False, self._why_nobody_leads(self._node.scheduler))
        return Ready(True, "")


def _stage_words(view: SchedulerView) -> str:
    return "catching up" if view.replication == "catching_up" else "away"


def _amounts(units: dict[str, int]) -> dict[str, float]:
    return {name: amount / 1000 for name, amount in units.items()}
