"""A small cluster in memory that stands behind the API in its tests: tasks move when a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

import msgspec

from taskd.api.cluster_types import ClusterView, EventView, HandlerView, NodeView, Ready, SchedulerView
from taskd.api.dispatch import dispatch
from taskd.api.service import (
    ApiRequest,
    ApiResponse,
    Caller,
    HandlerDefaults,
    OwnReads,
    ParamsCheck,
    Receipt,
    Service,
)
from taskd.api.types import Explanation, NodeFit
from taskd.core.effects import Change
from taskd.core.events import NewTask
from taskd.core.task import Attempt, Outcome, Record, Report, TaskState, decode_record, decode_spec, encode
from taskd.errors import InvalidRequest, NoLeader, NotFound, Stopping, TaskdError
from taskd.protocol.messages import TaskRow, Term, id_text
from taskd.store.base import Query

NOW_S = 1_800_000_000.0
TERM = Term(3, 7, 99)
ALICE = Caller("alice", False)
BOB = Caller("bob", False)
ROOT = Caller("root", True)


class FakeWatch:
    """Waits for tasks of a FakeService."""

    def __init__(self, service: FakeService, ids: list[bytes]) -> None:
        self._service = service
        self._news = asyncio.Event()
        self._ended: list[Change] = []
        self.waiting: set[bytes] = set()
        for task_id in ids:
            row = service.tasks.get(task_id)
            if row is None:
                continue
            if TaskState(row.state).is_final:
                self._ended.append(change_of(row))
            else:
                self.waiting.add(task_id)
        service.watches.append(self)

    async def next(self, timeout_s: float) -> list[Change]:
        if not self._ended and self.waiting and timeout_s > 0:
            self._service.looked.set()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._news.wait()
            except TimeoutError:
                pass
        self._news.clear()
        ended, self._ended = self._ended, []
        return ended

    def tell(self, change: Change) -> None:
        if change.id in self.waiting:
            self.waiting.discard(change.id)
            self._ended.append(change)
            self._news.set()

    def stop(self) -> None:
        """As when the daemon stops."""
        self.waiting.clear()
        self._news.set()

    @property
    def open(self) -> int:
        return len(self.waiting)

    def close(self) -> None:
        self._service.watches.remove(self)


def change_of(row: TaskRow) -> Change:
    record = decode_record(row.record)
    last = record.attempts[-1] if record.attempts else None
    return Change(
        row.id, TaskState(row.state), row.changed_s, last.number if last else 0, last.worker if last else 0,
        last.report if last else b"", record.reason or (last.reason if last else ""),
    )  # fmt: skip


class FakeService:
    """Implements taskd.api.service.Service."""

    def __init__(self, leads: bool = True) -> None:
        self.is_leader = leads
        self.is_stopping = False
        self.leader: FakeService | None = None  # whom relay() reaches
        self.relayed: list[ApiRequest] = []
        self.audited: list[tuple[ApiRequest, ApiResponse]] = []
        self.allowed_reads = OwnReads.NOTHING
        self.durability: Literal["local", "replicated"] = "local"
        self.provisional: set[bytes] = set()
        self.tasks: dict[bytes, TaskRow] = {}
        self.watches: list[FakeWatch] = []
        self.looked = asyncio.Event()  # set when somebody waits for a task
        self.nodes_by_id: dict[int, NodeView] = {7: node_view(7, "head", ["scheduler"]), 8: node_view(8, "worker-a")}
        self.node_views: list[NodeView] = list(self.nodes_by_id.values())
        self.wrong_params: dict[str, str] = {}
        self.defaults: dict[str, HandlerDefaults] = {}
        self.submit_error: TaskdError | None = None
        self.cancel_error: TaskdError | None = None
        self.submissions: list[list[NewTask]] = []
        self.queries: list[Query] = []
        self.outputs: dict[tuple[int, str], AsyncBytes] = {}  # by (attempt, stream)
        self.output_calls: list[tuple[int, str, int, bool]] = []
        self.event_queue: asyncio.Queue[EventView | None] = asyncio.Queue()
        self.open_streams = 0
        self.is_ready = True
        self.refuses = ""  # new tasks, for this reason
        self.now = NOW_S
        self._last = 0

    # -- What tests do -------------------------------------------------------------------------------------------------

    async def ask(
        self,
        method: str,
        target: str,
        body: Any = None,
        caller: Caller = ALICE,
        is_relayed: bool = False,
    ) -> tuple[int, Any]:
        """Dispatch a request: the status, and the decoded JSON, or the text of anything else, streams read to the
        end."""
        response = await self.response(method, target, body, caller, is_relayed=is_relayed)
        raw = response.body
        if response.stream is not None:
            raw = b"".join([part async for part in response.stream])
        if response.content_type == "application/x-ndjson":
            return response.status, [msgspec.json.decode(line) for line in raw.splitlines()]
        return response.status, msgspec.json.decode(raw) if "json" in response.content_type else raw.decode()

    async def response(
        self, method: str, target: str, body: Any = None, caller: Caller = ALICE, *, is_relayed: bool = False
    ) -> ApiResponse:
        """Dispatch a request."""
        path, _, text = target.partition("?")
        query = dict(field.split("=", 1) for field in text.split("&")) if text else {}
        raw = body if isinstance(body, bytes) else b"" if body is None else msgspec.json.encode(body)
        service: Service = self
        return await dispatch(ApiRequest(method, path, query, caller, raw), service, is_relayed=is_relayed)

    async def add(self, task: dict[str, Any] | None = None, caller: Caller = ALICE) -> str:
        """Submit one task; returns its id."""
        status, answer = await self.ask("POST", "/v1/tasks", task or {"argv": ["true"]}, caller)
        assert status == 200, answer
        task_id: str = answer["ids"][0]
        return task_id

    def start(self, task_id: str, worker: int = 8) -> None:
        """An attempt begins."""

        def change(record: Record) -> TaskState:
            number = len(record.attempts) + 1
            record.attempts.append(Attempt(number, TERM, 5, worker, self.now, self.now))
            return TaskState.RUNNING

        self._change(task_id, change)

    def end(
        self,
        task_id: str,
        report: Report | bytes = Report(exit_code=0),  # noqa: B008 (frozen)
        outcome: Outcome = Outcome.OK,
        state: TaskState = TaskState.SUCCEEDED,
        reason: str = "",
    ) -> None:
        """The attempt ends (one begins first, if none has); `state` may be one that lets another follow."""
        row = self.tasks[raw_id(task_id)]
        attempts = decode_record(row.record).attempts
        if not attempts or not attempts[-1].is_open:
            self.start(task_id)

        def change(record: Record) -> TaskState:
            last = record.attempts[-1]
            last.outcome, last.ended_s, last.reason = outcome, self.now, reason
            last.report = report if isinstance(report, bytes) else encode(report)
            return state

        self._change(task_id, change)

    def _change(self, task_id: str, change: Callable[[Record], TaskState]) -> None:
        row = self.tasks[raw_id(task_id)]
        record = decode_record(row.record)
        state = change(record)
        finished_s = self.now if state.is_final else 0.0
        changes = {"state": int(state), "changed_s": self.now, "finished_s": finished_s, "record": encode(record)}
        row = self.tasks[row.id] = msgspec.structs.replace(row, **changes)
        if state.is_final:
            for watch in list(self.watches):
                watch.tell(change_of(row))

    # -- Service -------------------------------------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        return self.is_leader

    def audit(self, request: ApiRequest, response: ApiResponse) -> None:
        self.audited.append((request, response))

    async def relay(self, request: ApiRequest) -> ApiResponse:
        if self.is_stopping:
            raise Stopping()
        if self.is_leader:
            return await dispatch(request, self, is_relayed=True)
        self.relayed.append(request)
        if self.leader is None:
            raise NoLeader()
        return await dispatch(request, self.leader, is_relayed=True)

    async def own_reads(self) -> OwnReads:
        return self.allowed_reads

    def now_s(self) -> float:
        return self.now

    def new_task_id(self) -> bytes:
        self._last += 1
        head = int(self.now * 1000).to_bytes(6) + b"\x70\x00\x80\x00"
        return head + (self._last << 8).to_bytes(6)  # With room for those that count on from it.

    def params_check(self, type: str) -> ParamsCheck | None:
        if type not in self.wrong_params:
            return None

        def check(params: bytes) -> None:
            raise InvalidRequest(self.wrong_params[type], field="params.width")

        return check

    def handler_defaults(self, type: str) -> HandlerDefaults:
        return self.defaults.get(type, HandlerDefaults())

    async def submit(self, tasks: list[NewTask]) -> Receipt:
        if self.submit_error is not None:
            raise self.submit_error
        self.submissions.append(tasks)
        known = {task.id for task in tasks if task.id in self.tasks}
        for task in tasks:
            if task.id not in known:
                self.tasks[task.id] = row_of(task)
        return Receipt(known, self.durability)

    async def cancel(self, ids: list[bytes]) -> list[bytes]:
        if self.cancel_error is not None:
            raise self.cancel_error
        unfinished = [task_id for task_id in ids if not TaskState(self.tasks[task_id].state).is_final]
        for task_id in unfinished:
            self._change(id_text(task_id), lambda record: TaskState.CANCELLED)
        return unfinished

    async def drain(self, node_id: int, reason: str | None) -> None:
        view = self.nodes_by_id[node_id]
        if "worker" not in view.roles:
            raise NotFound(f"no worker has the node id {node_id}")
        state = "up" if reason is None else "drained"
        changed = msgspec.structs.replace(view, state=state, drain_reason=reason or "")
        self.node_views[self.node_views.index(view)] = self.nodes_by_id[node_id] = changed

    def rows(self, ids: list[bytes]) -> list[TaskRow]:
        assert len(ids) <= 1000
        return [self.tasks[task_id] for task_id in ids if task_id in self.tasks]

    async def ending_in(self, suffix: str, limit: int) -> list[bytes]:
        return [task_id for task_id in sorted(self.tasks, reverse=True) if task_id.hex().endswith(suffix)][:limit]

    async def newest(self, owner: str) -> bytes | None:
        return max((row.id for row in self.tasks.values() if row.owner == owner), default=None)

    def watch(self, ids: list[bytes]) -> FakeWatch:
        return FakeWatch(self, ids)

    def is_provisional(self, row: TaskRow) -> bool:
        return row.id in self.provisional

    def explain(self, id: bytes) -> Explanation | None:
        row = self.tasks.get(id)
        if row is None or TaskState(row.state).is_final:
            return None
        fit = NodeFit(8, "worker-a", False, True, "all 2 slots are busy")
        return Explanation(id_text(id), TaskState(row.state).word, "Resources", "busy", 0, None, [fit])

    async def output(
        self, id: bytes, attempt: int, worker: int, stream: str, offset: int, follow: bool
    ) -> AsyncIterator[bytes]:
        self.output_calls.append((attempt, stream, offset, follow))
        source = self.outputs.get((attempt, stream))
        if source is None:
            return
        self.open_streams += 1
        try:
            async for part in source(offset, follow):
                yield part
        finally:
            self.open_streams -= 1

    def nodes(self) -> list[NodeView]:
        return self.node_views

    def node_name(self, node_id: int) -> str:
        view = self.nodes_by_id.get(node_id)
        return str(node_id) if view is None else view.name

    def handlers(self) -> list[HandlerView]:
        return [HandlerView("resize", "Resize an image.", "1", msgspec.Raw(b'{"type":"object"}'), [8])]

    async def events(self) -> AsyncIterator[EventView]:
        self.open_streams += 1
        try:
            while (event := await self.event_queue.get()) is not None:
                yield event
        finally:
            self.open_streams -= 1

    def cluster(self) -> ClusterView:
        own, replica = (7, "head") if self.is_leader else (9, "second"), SchedulerView(7, "head", "leading", 0, 0, True)
        return ClusterView(
            "default", *own, ["scheduler"], 7, "head", 3, "ok", "", self.durability, 1, 1, 2, 0, {"queued": 1}, "0",
            [replica], self.is_leader, self.refuses,
        )  # fmt: skip

    def ready(self) -> Ready:
        return Ready(self.is_ready, "" if self.is_ready else "no leader is known")

    def metrics(self) -> bytes:
        return b"taskd_is_leader 1\n"

    async def backup(self) -> AsyncIterator[bytes]:
        yield b"manifest"
        yield b"database"

    async def list(self, query: Query) -> list[TaskRow]:
        self.queries.append(query)
        rows = [self.tasks[task_id] for task_id in sorted(self.tasks, reverse=True)]
        return [row for row in rows if _matches(row, query)][: query.limit]


AsyncBytes = Callable[[int, bool], AsyncIterator[bytes]]


def _matches(row: TaskRow, query: Query) -> bool:
    labels = decode_spec(row.spec).labels
    return (
        (not query.states or row.state in query.states)
        and (not query.queues or row.queue in query.queues)
        and (not query.types or row.type in query.types)
        and (not query.owners or row.owner in query.owners)
        and (not query.names or row.name in query.names)
        and all(labels.get(name) == value for name, value in query.labels)
        and (not query.before or row.id < query.before)
    )


def row_of(task: NewTask) -> TaskRow:
    spec = task.spec
    state = TaskState.SCHEDULED if spec.not_before_s > spec.submitted_s else TaskState.QUEUED
    record = encode(Record([], due_s=spec.not_before_s))
    return TaskRow(
        task.id, int(state), spec.priority, spec.queue, spec.type, spec.name, spec.owner, spec.submitted_s,
        spec.submitted_s, 0.0, TERM.epoch, TERM.node_id, TERM.boot, 1, task.spec_bytes, record,
    )  # fmt: skip


def node_view(node_id: int, name: str, roles: list[str] | None = None) -> NodeView:
    return NodeView(
        node_id, name, roles or ["worker"], "up", node_id == 7, "0", "local", 2, 0, 0, {"cpus": 2.0}, {}, {},
        ["command"], 0.0, 0.0, "", NOW_S,
    )  # fmt: skip


def raw_id(task_id: str) -> bytes:
    return bytes.fromhex(task_id.replace("-", ""))


def written(data: bytes) -> AsyncBytes:
    """The output of an attempt that has written this."""

    async def read(offset: int, follow: bool) -> AsyncIterator[bytes]:
        for start in range(offset, len(data), 64 << 10):
            yield data[start : start + (64 << 10)]

    return read
