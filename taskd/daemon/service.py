"""The daemon as the API sees it: wishes become events of the node; views are its state, history is the store's."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal, Protocol

import msgspec

from taskd.api.dispatch import dispatch
from taskd.api.service import ApiRequest, ApiResponse, HandlerDefaults, Watch
from taskd.api.streams import close_stream
from taskd.api.types import ClusterView, EventView, Explanation, HandlerView, NodeFit, NodeView, Ready
from taskd.core import events as ev
from taskd.core.effects import Change
from taskd.core.explain import explain
from taskd.core.roster import Worker
from taskd.core.scheduler import Scheduler
from taskd.core.signature import Checker
from taskd.core.task import TaskState, decode_record, deciding_attempt
from taskd.daemon.calls import Calls
from taskd.daemon.hub import TaskWatch
from taskd.daemon.ids import IdSource, text_of
from taskd.daemon.outputs import ReadOutput, error_of, output_request
from taskd.daemon.shell import Shell
from taskd.errors import DiskFull, InvalidRequest, NoLeader
from taskd.protocol.messages import NodeInfo, TaskRow
from taskd.store.base import Query, Store
from taskd.version import VERSION

LEADER_WAIT_S = 5.0  # A request during a change of leaders waits this long before it is refused.
ROWS_MAX = 1000


class PeerView(Protocol):
    """What the mesh knows of a connected peer."""

    @property
    def node(self) -> NodeInfo: ...
    @property
    def address(self) -> str: ...
    @property
    def round_trip_s(self) -> float | None: ...
    @property
    def clock_offset_s(self) -> float | None: ...


class DaemonService:
    """Implements taskd.api.service.Service."""

    def __init__(
        self,
        shell: Shell,
        calls: Calls,
        cluster: str,
        peers: Callable[[], Sequence[PeerView]],
        read_output: ReadOutput | None,
        metrics: Callable[[], bytes],
        free_disk_min_bytes: int,
        newest_id: bytes,
    ) -> None:
        self._shell = shell
        self._node = shell.node
        self._calls = calls
        self._cluster = cluster
        self._peers = peers
        self._read_output = read_output
        self._metrics = metrics
        self._free_disk_min_bytes = free_disk_min_bytes
        self._free_checked_s = 0.0
        self._is_disk_full = False
        self._newest_id = newest_id
        self._ids = IdSource()
        self._checkers: dict[bytes, Checker] = {}

    # -- The leader ----------------------------------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """Whether this node is the leader."""
        return self._node.scheduler is not None and self._shell.leader == self._node.info.node_id

    async def relay(self, request: ApiRequest) -> ApiResponse:
        """Have the leader answer; wait a moment for one."""
        leader = self._shell.leader
        if leader is None:
            await self._shell.hub.wait_for_leader(LEADER_WAIT_S)
            leader = self._shell.leader
            if leader is None:
                raise NoLeader()
        if leader == self._node.info.node_id:
            return await dispatch(request, self, is_relayed=True)  # It is us by now.
        return await self._calls.ask(leader, request)

    def now_s(self) -> float:
        """UTC."""
        return self._shell.utc()

    def new_task_id(self) -> bytes:
        """A fresh UUIDv7."""
        return self._ids.next(self._shell.utc())

    @property
    def _scheduler(self) -> Scheduler:
        assert self._node.scheduler is not None
        return self._node.scheduler

    @property
    def _store(self) -> Store:
        assert self._shell.store is not None
        return self._shell.store

    # -- Tasks ---------------------------------------------------------------------------------------------------------

    def check_params(self, type: str, params: bytes) -> None:
        """Raise InvalidRequest where handlers of this type are known and none takes these params."""
        wrong: str | None = None
        for worker in self._scheduler.roster:
            if not worker.is_here or type not in worker.types:
                continue
            for handler in worker.offer.handlers:
                if handler.type == type:
                    wrong = self._checker(handler.schema).check(params)
                    if wrong is None:
                        return
        if wrong is not None:
            raise InvalidRequest(f"the params do not fit the handler {type!r}: {wrong}", field="params")

    def handler_defaults(self, type: str) -> HandlerDefaults:
        """What the handlers of this type want; the most patient, where those of several workers differ."""
        found = [
            handler
            for worker in self._scheduler.roster
            if worker.is_here
            for handler in worker.offer.handlers
            if handler.type == type
        ]
        if not found:
            return HandlerDefaults()
        times_s = [handler.timeout_s for handler in found]
        return HandlerDefaults(max(handler.retries for handler in found), max(times_s) if all(times_s) else 0.0)

    def _checker(self, schema: bytes) -> Checker:
        checker = self._checkers.get(schema)
        if checker is None:
            if len(self._checkers) > ROWS_MAX:
                self._checkers.clear()
            checker = self._checkers[schema] = Checker(schema)
        return checker

    async def submit(self, tasks: list[ev.NewTask]) -> set[bytes]:
        """Take all or none, durably; returns the ids that were known before."""
        self._check_disk()
        known: set[bytes] = set()
        ids = [task.id for task in tasks]
        # Ids are time-ordered: those above every id that was ever taken are new, without a look at the disk.
        if min(ids) <= self._newest_id:
            known = self._store.existing(ids)
            tasks = [task for task in tasks if task.id not in known]
        self._newest_id = max(self._newest_id, *ids)
        if tasks:
            known |= set(await self._shell.ask(lambda call: ev.Submitted(call, tasks)))
        return known

    def _check_disk(self) -> None:
        now = time.monotonic()
        if now - self._free_checked_s > 1.0:
            self._free_checked_s = now
            self._is_disk_full = self._store.free_bytes() < self._free_disk_min_bytes
        if self._is_disk_full:
            raise DiskFull()

    async def cancel(self, ids: list[bytes]) -> list[bytes]:
        """Want these cancelled; returns those that were unfinished."""
        found: list[bytes] = await self._shell.ask(lambda call: ev.CancelWanted(call, ids))
        return found

    def rows(self, ids: list[bytes]) -> list[TaskRow]:
        """Durable state of those that exist."""
        return self._store.get(ids)

    async def ending_in(self, suffix: str, limit: int) -> list[bytes]:
        """Ids that end in these hexadecimal digits."""
        return await self._store.ending_in(suffix, limit)

    async def newest(self, owner: str) -> bytes | None:
        """The newest task of a user."""
        return await self._store.newest(owner)

    def watch(self, ids: list[bytes]) -> Watch:
        """Hear when these tasks end."""
        watch = TaskWatch(self._shell.hub)
        ledger, outbox = self._scheduler.ledger, self._scheduler.outbox
        settled = []
        for task_id in ids:
            if task_id in ledger.tasks or task_id in outbox:
                watch.add_open(task_id)
            else:
                settled.append(task_id)
        for start in range(0, len(settled), ROWS_MAX):
            for row in self._store.get(settled[start : start + ROWS_MAX]):
                watch.add_ended(_change_of(row))
        return watch

    def explain(self, id: bytes) -> Explanation | None:
        """Why a task stands where it stands."""
        task = self._scheduler.ledger.tasks.get(id)
        if task is None:
            return None
        why = explain(self._scheduler, task)
        nodes = [NodeFit(fit.node_id, fit.name, fit.fits, fit.ever, fit.why) for fit in why.fits]
        return Explanation(text_of(id), task.state.word, why.reason, why.text, why.position, why.until_s, nodes)

    async def output(
        self, id: bytes, attempt: int, worker: int, stream: str, offset: int, follow: bool
    ) -> AsyncIterator[bytes]:
        """What a task wrote, read where it ran."""
        if worker == self._node.info.node_id and self._read_output is not None:
            source = self._read_output(id, attempt, stream, offset, follow)
        else:
            response = await self._calls.ask(worker, output_request(id, attempt, stream, offset, follow))
            if response.stream is None:
                if response.status != 200:
                    raise error_of(response)
                yield response.body
                return
            source = response.stream
        try:
            async for chunk in source:
                yield chunk
        finally:
            await close_stream(source)

    # -- Nodes ---------------------------------------------------------------------------------------------------------

    async def drain(self, node_id: int, reason: str | None) -> None:
        """Give a node no new tasks, or use it again."""
        await self._shell.ask(lambda call: ev.DrainWanted(call, node_id, reason))

    def nodes(self) -> list[NodeView]:
        """All known nodes, schedulers first."""
        peers = {peer.node.node_id: peer for peer in self._peers()}
        views = []
        infos = [self._node.info, *(peer.node for peer in peers.values())]
        workers = {worker.node_id: worker for worker in self._scheduler.roster}
        for info in infos:
            worker = workers.pop(info.node_id, None)
            views.append(self._node_view(info.node_id, info, worker, peers.get(info.node_id)))
        for worker in workers.values():
            views.append(self._node_view(worker.node_id, worker.info, worker, None))
        return sorted(views, key=lambda view: (not view.is_leader, "scheduler" not in view.roles, view.node_id))

    def _node_view(self, node_id: int, info: NodeInfo | None, worker: Worker | None, peer: PeerView | None) -> NodeView:
        is_self = node_id == self._node.info.node_id
        is_here = is_self or peer is not None
        state = "up" if is_here else "lost"
        running = 0
        if worker is not None and is_here and worker.drain_reason is not None:
            state = "draining" if worker.assigned else "drained"
        if worker is not None:
            running = sum(1 for task in worker.assigned.values() if task.state is not TaskState.ASSIGNED)
        offer = worker.offer if worker is not None else None
        return NodeView(
            node_id=node_id,
            name=info.name if info is not None else self.node_name(node_id),
            roles=list(info.roles) if info is not None else ["worker"],
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
            seen=self.now_s() if is_here else worker.seen_s if worker is not None else 0.0,
        )

    def node_name(self, node_id: int) -> str:
        """A node's name, or its id as text."""
        if node_id == self._node.info.node_id:
            return self._node.info.name
        worker = self._node.scheduler.roster.get(node_id) if self._node.scheduler is not None else None
        if worker is not None:
            return worker.name
        return next((peer.node.name for peer in self._peers() if peer.node.node_id == node_id), str(node_id))

    def handlers(self) -> list[HandlerView]:
        """All types of handlers on offer, by type and version."""
        found: dict[tuple[str, str, bytes, int, float], HandlerView] = {}
        for worker in self._scheduler.roster:
            if not worker.is_here:
                continue
            for handler in worker.offer.handlers:
                key = (handler.type, handler.version, handler.schema, handler.retries, handler.timeout_s)
                view = found.get(key)
                if view is None:
                    schema = msgspec.Raw(handler.schema)
                    view = found[key] = HandlerView(
                        handler.type, handler.summary, handler.version, schema, [], handler.retries, handler.timeout_s
                    )  # fmt: skip
                view.nodes.append(worker.node_id)
        return [found[key] for key in sorted(found)]

    def events(self) -> AsyncIterator[EventView]:
        """Everything that changes from now on."""
        return self._shell.hub.stream()

    # -- Any node ------------------------------------------------------------------------------------------------------

    def cluster(self) -> ClusterView:
        """The cluster as this node knows it."""
        info, peers, leader, term = self._node.info, self._peers(), self._shell.leader, self._shell.term
        health: Literal["ok", "degraded", "down"] = "ok"
        why = ""
        tasks: dict[str, int] = {}
        workers = slots = running = 0
        if leader is None:
            health, why = "down", "no scheduler leads: none is connected, or they are still looking for each other"
        if self.leads:
            for (state, _queue), count in self._scheduler.ledger.counts.items():
                tasks[state.word] = tasks.get(state.word, 0) + count
            here = [worker for worker in self._scheduler.roster if worker.is_here]
            workers, slots = len(here), sum(worker.offer.slots for worker in here)
            running = tasks.get("running", 0)
            if not here:
                health, why = "degraded", "no worker is connected"
            if self._is_disk_full:
                health, why = "degraded", "the scheduler's disk is nearly full: no new tasks are taken"
        schedulers = sum(1 for node in (info, *(peer.node for peer in peers)) if "scheduler" in node.roles)
        return ClusterView(
            cluster=self._cluster, node_id=info.node_id, name=info.name, roles=list(info.roles), leader=leader,
            leader_name=self.node_name(leader) if leader is not None else None,
            term=term.epoch if term is not None else None, health=health, why=why, durability="local",
            schedulers=schedulers, workers=workers, slots=slots, running=running, tasks=tasks, version=VERSION,
        )  # fmt: skip

    def ready(self) -> Ready:
        """Whether this node serves."""
        if self._shell.exited.done():
            return Ready(False, "stopping")
        if self._shell.leader is None:
            return Ready(False, "no leader is known")
        return Ready(True, "")

    def metrics(self) -> bytes:
        """This node's figures."""
        return self._metrics()

    # Last in the class: after it, the word `list` means this method and no longer the type.

    async def list(self, query: Query) -> list[TaskRow]:
        """One page, newest first."""
        return await self._store.list(query)


def _change_of(row: TaskRow) -> Change:
    record = decode_record(row.record)
    last = deciding_attempt(record)
    return Change(
        row.id, TaskState(row.state), row.changed_s, last.number if last else 0, last.worker if last else 0,
        last.report if last else b"", record.reason or (last.reason if last else ""),
    )  # fmt: skip


def _amounts(units: dict[str, int]) -> dict[str, float]:
    return {name: amount / 1000 for name, amount in units.items()}
