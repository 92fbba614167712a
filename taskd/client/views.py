"""What a daemon answers, as Python sees it. Times are UTC seconds since 1970, durations seconds, memory bytes.

Fields that a newer daemon adds are passed over, those that an older one lacks have their defaults.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from taskd.client.errors import TaskCancelled, TaskError, TaskExpired, TaskFailed, TaskTimedOut

UNFINISHED = frozenset({"scheduled", "blocked", "queued", "held", "assigned", "running", "retrying", "cancelling"})


class View(Struct, frozen=True):
    """An answer, or a part of one."""


class Fault(View, frozen=True):
    """Why an attempt failed: what was raised, and where."""

    type: str = ""
    message: str = ""
    traceback: str = ""


class Result(View, frozen=True):
    """How a task ended. `result` is what its handler or service returned."""

    id: str = ""
    state: str = ""
    result: Any = None
    exit_code: int | None = None
    signal: int | None = None
    error: Fault | None = None
    reason: str = ""
    attempts: int = 0

    @property
    def is_success(self) -> bool:
        """Whether it ended well."""
        return self.state == "succeeded"

    def value(self) -> Any:
        """What the task returned. Raises TaskFailed, TaskCancelled, TaskTimedOut, TaskExpired."""
        error = self.exception()
        if error is not None:
            raise error
        return self.result

    def exception(self) -> TaskError | None:
        """The error that `value` raises, None after a success."""
        who = f"task {self.id[-8:]}"
        because = f": {self.reason}" if self.reason else ""
        if self.state == "succeeded":
            return None
        if self.state == "cancelled":
            return TaskCancelled(f"{who} was cancelled{because}", self.id, self.reason)
        if self.state == "timed_out":
            return TaskTimedOut(f"{who} ran longer than its timeout{because}", self.id, self.reason)
        if self.state == "expired":
            return TaskExpired(f"{who} had not begun by its deadline{because}", self.id, self.reason)
        fault = self.error or Fault()
        if fault.type:
            because = f": {fault.type}: {fault.message}" if fault.message else f": {fault.type}"
        elif self.signal is not None:
            because = f": ended by signal {self.signal}"
        elif self.exit_code is not None:
            because = f": exit code {self.exit_code}"
        return TaskFailed(
            f"{who} {self.state or 'failed'}{because}", self.id, self.reason, error_type=fault.type,
            error_message=fault.message, traceback=fault.traceback, exit_code=self.exit_code, signal=self.signal,
        )  # fmt: skip


class Attempt(View, frozen=True):
    """One attempt of a task. `outcome` is None while it is open; the tails are the last of what it wrote."""

    number: int
    worker: int = 0
    worker_name: str = ""
    dispatched: float = 0.0
    started: float | None = None
    ended: float | None = None
    outcome: str | None = None
    fence: str = ""
    exit_code: int | None = None
    signal: int | None = None
    error: Fault | None = None
    reason: str = ""
    stdout_tail: str = ""
    stderr_tail: str = ""
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    memory_peak_bytes: int = 0
    cpu_s: float = 0.0


class Task(View, frozen=True):
    """A task as lists show it. `attempt` counts the attempts so far; worker and `started` are of the newest."""

    id: str
    type: str
    state: str
    name: str = ""
    queue: str = "default"
    priority: int = 0
    owner: str = ""
    submitted: float = 0.0
    changed: float = 0.0
    finished: float | None = None
    attempt: int = 0
    worker: int | None = None
    worker_name: str | None = None
    started: float | None = None
    exit_code: int | None = None
    reason: str = ""
    labels: dict[str, str] = {}
    command: str = ""
    provisional: bool = False  # it ended while a scheduler was away, which may bring another end

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state not in UNFINISHED


class TaskDetail(Task, frozen=True):
    """A task in full."""

    argv: list[str] = []
    shell: str = ""
    http: dict[str, Any] | None = None
    params: Any = None
    env: dict[str, str] = {}
    secrets: dict[str, str] = {}  # names, never values
    cwd: str = ""
    resources: dict[str, float] = {}
    constraints: list[str] = []
    not_before: float | None = None
    deadline: float | None = None
    timeout: float = 0.0
    grace: float = 0.0
    retries: int = 0
    backoff: dict[str, Any] | None = None
    on_lost: str = "retry"
    retry_of: str | None = None
    due: float | None = None
    signal: int | None = None
    error: Fault | None = None
    result: Any = None
    attempts: list[Attempt] = []


class NodeFit(View, frozen=True):
    """Why one node does not take a task just now. `ever`: whether it could when idle, and connected; None where it is
    away and nobody knows what it offers."""

    node_id: int
    name: str = ""
    fits: bool = False
    ever: bool | None = False
    why: str = ""
    connected: bool = True


class Explanation(View, frozen=True):
    """Why a task stands where it stands: `reason` is one of a fixed set of words, `text` says it to people."""

    id: str
    state: str
    reason: str = ""
    text: str = ""
    position: int | None = None
    until: float | None = None
    nodes: list[NodeFit] = []


class Node(View, frozen=True):
    """One node of the cluster, as the leader sees it. `waiting` tasks were handed to it and have not begun."""

    node_id: int
    name: str
    roles: list[str]
    state: str  # up, draining, drained, lost
    is_leader: bool = False
    version: str = ""
    address: str = ""
    slots: int = 0
    running: int = 0
    waiting: int = 0
    capacity: dict[str, float] = {}
    used: dict[str, float] = {}
    labels: dict[str, str] = {}
    types: list[str] = []
    clock_offset_s: float | None = None
    round_trip_s: float | None = None
    drain_reason: str = ""
    seen: float = 0.0
    replication: str | None = None  # of schedulers: leading, in_sync, catching_up, away
    lag_commits: int | None = None
    lag_s: float | None = None
    may_lead: bool = False


class Scheduler(View, frozen=True):
    """One scheduler, and how far its copy of the tasks is behind the leader's; None where that cannot be told. `seen`:
    when one that is away was last known to be here; `copied`: how many tasks one that catches up was sent so far."""

    node_id: int
    name: str = ""
    replication: str | None = None  # leading, in_sync, catching_up, away
    lag_commits: int | None = None
    lag_s: float | None = None
    may_lead: bool = False
    seen: float | None = None
    copied: int | None = None


class Cluster(View, frozen=True):
    """The cluster in one look, as the leader sees it, or the node that is asked where it reaches none. `tasks` counts
    the unfinished ones by state, `term` the changes of leaders; `durability` is local or replicated. Only the leader
    can tell (`by_leader`) how many workers, slots and tasks there are, and why it takes no new ones (`refuses`). Of the
    workers and slots, those `drained` get no new tasks. `state_dir` is of the node that was asked."""

    cluster: str
    node_id: int
    name: str = ""
    roles: list[str] = []
    leader: int | None = None
    leader_name: str | None = None
    term: int | None = None
    health: str = ""  # ok, degraded, down
    why: str = ""
    durability: str = ""
    schedulers: int = 0
    workers: int = 0
    slots: int = 0
    running: int = 0
    tasks: dict[str, int] = {}
    version: str = ""
    replicas: list[Scheduler] = []
    by_leader: bool = True
    refuses: str = ""
    workers_drained: int = 0
    slots_drained: int = 0
    state_dir: str = ""


class Handler(View, frozen=True):
    """A type of task, what its params must look like (JSON Schema), and which nodes run it. `retries` and `timeout`
    (seconds; 0: none) hold for tasks submitted without their own."""

    type: str
    summary: str = ""
    version: str = ""
    schema: Any = None
    nodes: list[int] = []
    retries: int = 0
    timeout: float = 0.0


class Page(View, frozen=True):
    """One page of tasks. `cursor` asks for the next one."""

    tasks: list[Task]
    cursor: str | None = None


class Acted(View, frozen=True):
    """The tasks that a call acted on; for `retry` the new ones. `cursor` is where the next call goes on, if any."""

    ids: list[str]
    cursor: str | None = None


class Nodes(View, frozen=True):
    """All nodes."""

    nodes: list[Node]


class Handlers(View, frozen=True):
    """All types of handlers."""

    handlers: list[Handler]


decode_acted = msgspec.json.Decoder(Acted).decode
decode_cluster = msgspec.json.Decoder(Cluster).decode
decode_detail = msgspec.json.Decoder(TaskDetail).decode
decode_explanation = msgspec.json.Decoder(Explanation).decode
decode_handlers = msgspec.json.Decoder(Handlers).decode
decode_nodes = msgspec.json.Decoder(Nodes).decode
decode_page = msgspec.json.Decoder(Page).decode
decode_result = msgspec.json.Decoder(Result).decode
