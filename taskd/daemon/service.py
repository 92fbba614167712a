"""The daemon as the API sees it: wishes become events of the node; views are its state, history is the store's."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import lru_cache

import msgspec

from taskd.api.cluster_types import ClusterView, EventView, HandlerView, NodeView, Ready
from taskd.api.dispatch import dispatch
from taskd.api.service import ApiRequest, ApiResponse, HandlerDefaults, OwnReads, ParamsCheck, Receipt, Watch
from taskd.api.streams import close_stream
from taskd.api.types import Explanation, NodeFit
from taskd.core import events as ev
from taskd.core.explain import explain
from taskd.core.nodes import is_doubtful
from taskd.core.scheduler import Scheduler
from taskd.core.signature import Checker
from taskd.core.task import TaskState
from taskd.daemon.audit import AuditLog
from taskd.daemon.backups import Backups
from taskd.daemon.calls import Calls
from taskd.daemon.hub import TaskWatch, change_of
from taskd.daemon.ids import IdSource, text_of
from taskd.daemon.outputs import ReadOutput, error_of, output_request
from taskd.daemon.relay import Relay
from taskd.daemon.shell import Shell, monotonic
from taskd.daemon.views import PeerView, Views
from taskd.errors import Conflict, DiskFull, InvalidRequest
from taskd.protocol.messages import HandlerInfo, NodeRow, TaskRow
from taskd.store.base import Query, Store

READ_WAIT_S = 1.0  # A read during a change of leaders waits for the next one: our own copy may lack what it has.
AWAY_CHECK_S = 1.0
ROWS_MAX = 1000
SCHEMAS_REMEMBERED = 1000  # Of which we know whether they are any; up to 64 KiB each.


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
        backups: Backups | None = None,
        audit_log: AuditLog | None = None,
        state_dir: str = "",
    ) -> None:
        self._shell = shell
        self._node = shell.node
        self._calls = calls
        self._views = Views(shell, cluster, peers, state_dir)
        self._peers = peers
        self._relay = Relay(shell, calls, lambda request: dispatch(request, self, is_relayed=True))
        self._read_output = read_output
        self._metrics = metrics
        self._free_disk_min_bytes = free_disk_min_bytes
        self._backups = backups
        self._free_checked_s = 0.0
        self._away_checked_s = 0.0
        self._away: list[NodeRow] = []  # schedulers that are
        self._audit_log = audit_log
        self._ids = IdSource()
        self._checkers: dict[bytes, Checker] = {}

    # -- The leader ----------------------------------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """Whether this node is the leader."""
        return self._node.scheduler is not None and self._shell.leader == self._node.info.node_id

    async def relay(self, request: ApiRequest) -> ApiResponse:
        """Have the leader answer, or the next one."""
        return await self._relay.ask(request)

    async def own_reads(self) -> OwnReads:
        """What this node may answer itself, where it does not lead."""
        shell = self._shell
        if shell.store is None:
            return OwnReads.NOTHING
        if shell.leader is None:
            left_s = shell.leaderless_since + READ_WAIT_S - monotonic()
            if left_s > 0:
                await shell.hub.wait_for_leader(left_s)
        if shell.leader is None or self.leads:
            return OwnReads.ALL
        # Where one of them is missing, only the leader can tell which results may be superseded.
        return OwnReads.SETTLED if self._scheduler.is_in_sync and self._sees_all_schedulers() else OwnReads.NOTHING

    def _sees_all_schedulers(self) -> bool:
        here = {self._node.info.node_id, *(peer.node.node_id for peer in self._peers())}
        return all(row.node_id in here for row in self._scheduler.nodes.schedulers(self.now_s()))

    def now_s(self) -> float:
        """UTC."""
        return self._shell.utc()

    def audit(self, request: ApiRequest, response: ApiResponse) -> None:
        """Note a request that was to change something, or to have all that there is."""
        if self._audit_log is not None:
            self._audit_log.record(request, response, self.now_s())

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

    def params_check(self, type: str) -> ParamsCheck | None:
        """What raises InvalidRequest where no known handler of this type takes the params."""
        checkers = [self._checker(schema) for schema in {handler.schema for handler in self._handlers(type)}]
        if not checkers:
            return None

        def check(params: bytes) -> None:
            wrong: str | None = None
            for checker in checkers:
                wrong = checker.check(params)
                if wrong is None:
                    return
            raise InvalidRequest(f"the params do not fit the handler {type!r}: {wrong}", field="params")

        return check

    def handler_defaults(self, type: str) -> HandlerDefaults:
        """What the handlers of this type want; the most patient, where those of several workers differ."""
        found = self._handlers(type)
        if not found:
            return HandlerDefaults()
        times_s = [handler.timeout_s for handler in found]
        return HandlerDefaults(max(handler.retries for handler in found), max(times_s) if all(times_s) else 0.0)

    def _handlers(self, type: str) -> list[HandlerInfo]:
        """Those of workers that are here."""
        return [
            handler
            for worker in self._scheduler.roster
            if worker.is_here and type in worker.types
            for handler in worker.offer.handlers
            if handler.type == type
        ]

    def _checker(self, schema: bytes) -> Checker:
        checker = self._checkers.get(schema)
        if checker is None:
            if len(self._checkers) > ROWS_MAX:
                self._checkers.clear()
            checker = self._checkers[schema] = Checker(schema)
        return checker

    async def submit(self, tasks: list[ev.NewTask]) -> Receipt:
        """Take all that are not known yet, or none, durably."""
        shell = self._shell
        known: set[bytes] = set()
        ids = [task.id for task in tasks]
        # Ids are time-ordered: those above every id that the store has are new, without a look at the disk.
        if min(ids) <= shell.newest_id:
            known = self._store.existing(ids)
            tasks = [task for task in tasks if task.id not in known]
        shell.newest_id = max(shell.newest_id, *ids)
        if tasks:
            self._check_disk()
        # Asked where all are known too: what was taken a moment ago may have to wait for its copy.
        answered = await shell.ask(lambda call: ev.Submitted(call, tasks))
        known.update(answered.value)
        durability = answered.durability or self._scheduler.durability
        return Receipt(known, "replicated" if durability == "replicated" else "local")

    def _check_disk(self) -> None:
        self._look_at_disk()
        if self._views.is_disk_full:
            raise DiskFull()

    def _look_at_disk(self) -> None:
        now = time.monotonic()
        if now - self._free_checked_s > 1.0:
            self._free_checked_s = now
            self._views.is_disk_full = self._store.free_bytes() < self._free_disk_min_bytes

    async def cancel(self, ids: list[bytes]) -> list[bytes]:
        """Want these cancelled; returns those that were unfinished."""
        found: list[bytes] = (await self._shell.ask(lambda call: ev.CancelWanted(call, ids))).value
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
                if TaskState(row.state).is_final:
                    watch.add_ended(change_of(row))
                else:  # Decided elsewhere: the hub hears of it with the row.
                    watch.add_open(row.id)
        return watch

    def is_provisional(self, row: TaskRow) -> bool:
        """Whether a task's end may still be superseded: it was decided while a scheduler was away, which still is."""
        if self._shell.leader is not None and not self.leads:
            return False  # `own_reads` saw to it.
        now = monotonic()
        if now - self._away_checked_s > AWAY_CHECK_S:  # Lists ask for a thousand rows at once.
            self._away_checked_s = now
            self._away = self._scheduler.away(now)
        return is_doubtful(row, self._away)

    def explain(self, id: bytes) -> Explanation | None:
        """Why a task stands where it stands."""
        ledger = self._scheduler.ledger
        task = ledger.tasks.get(id)
        if task is None:
            unfinished = [row for row in self._store.get([id]) if row.state < TaskState.SUCCEEDED]
            if not unfinished or not self.leads:
                return None
            task = ledger.looked_up(unfinished[0])
        why = explain(self._scheduler, task)
        nodes = [NodeFit(fit.node_id, fit.name, fit.fits, fit.ever, fit.why, fit.is_here) for fit in why.fits]
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
        return self._views.nodes()

    def node_name(self, node_id: int) -> str:
        """A node's name, or its id as text."""
        return self._views.node_name(node_id)

    def handlers(self) -> list[HandlerView]:
        """All types of handlers on offer, by type and version; those whose schema is none are left out."""
        found: dict[tuple[str, str, bytes, int, float], HandlerView] = {}
        for worker in self._scheduler.roster:
            if not worker.is_here:
                continue
            for handler in worker.offer.handlers:
                if not _is_json_object(handler.schema):
                    continue  # Of a worker that means no good: it would break this answer for everybody.
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
        if self.leads:
            self._look_at_disk()
        return self._views.cluster()

    def ready(self) -> Ready:
        """Whether this node serves."""
        return self._views.ready()

    def metrics(self) -> bytes:
        """This node's figures."""
        return self._metrics()

    def backup(self) -> AsyncIterator[bytes]:
        """A copy of what this scheduler keeps."""
        if self._backups is None:
            raise Conflict("this node is a worker only, and keeps nothing that outlives it: ask a scheduler's daemon")
        return self._backups.parts()

    # Last in the class: after it, the word `list` means this method and no longer the type.

    async def list(self, query: Query) -> list[TaskRow]:
        """One page, newest first."""
        return await self._store.list(query)


@lru_cache(SCHEMAS_REMEMBERED)
def _is_json_object(text: bytes) -> bool:
    """Whether bytes that another node sent can be passed on as a JSON object."""
    try:
        return isinstance(msgspec.json.decode(text), dict)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
