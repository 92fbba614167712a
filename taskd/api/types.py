"""The JSON of the local API: what requests may hold and what answers look like. The OpenAPI text is made from these.

Task ids are written as UUIDs. Times are UTC seconds since 1970 in answers; requests also take ISO 8601. Durations are
seconds or text such as "1h30m", sizes bytes or text such as "2GiB".
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from taskd.core.task import PRIORITY_MAX, RETRIES_MAX

Name = Annotated[str, Meta(max_length=255)]
Duration = Annotated[float, Meta(ge=0, le=10 * 366 * 86400)] | Annotated[str, Meta(max_length=64)]
Size = Annotated[int, Meta(ge=0, le=1 << 50)] | Annotated[str, Meta(max_length=64)]
Instant = Annotated[float, Meta(ge=0, le=1e11)] | Annotated[str, Meta(max_length=64)]
Amount = Annotated[float, Meta(ge=0, le=1_000_000)]


class Wire(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, gc=False):
    """A JSON object of the API."""


# -- Requests ----------------------------------------------------------------------------------------------------------


class HttpTarget(Wire, frozen=True):
    """The microservice that an `http` task calls."""

    url: Annotated[str, Meta(max_length=8192, pattern="^https?://")]
    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"] = "POST"
    headers: dict[Name, Annotated[str, Meta(max_length=8192)]] = {}
    expect_status: tuple[Annotated[int, Meta(ge=100, le=599)], ...] = ()


class BackoffRequest(Wire, frozen=True):
    """The wait before the next attempt: initial x factor^(n-1), at most max, give or take jitter (0..1) of itself."""

    initial: Duration = 1.0
    factor: Annotated[float, Meta(ge=1, le=100)] = 2.0
    max: Duration = 300.0
    jitter: Annotated[float, Meta(ge=0, le=1)] = 0.1


class Submission(Wire, frozen=True):
    """One task to run. `type` is `command` (with argv or shell), `http` (with http), or a handler's (with params)."""

    type: Annotated[str, Meta(min_length=1, max_length=255)] = "command"
    argv: tuple[str, ...] = ()
    shell: str = ""
    http: HttpTarget | None = None
    params: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    id: Annotated[str, Meta(max_length=36)] = ""  # a UUID of the client's own: sending it again makes no second task
    name: Name = ""
    queue: Annotated[str, Meta(min_length=1, max_length=255)] = "default"
    priority: Annotated[int, Meta(ge=-PRIORITY_MAX, le=PRIORITY_MAX)] = 0
    cpus: Amount = 0.0
    memory: Size = 0
    gpus: Amount = 0.0
    resources: dict[Name, Amount] = {}
    constraints: Annotated[tuple[Name, ...], Meta(max_length=32)] = ()
    delay: Duration = 0.0
    at: Instant = 0.0
    deadline: Duration = 0.0  # from submission: must have begun by then
    timeout: Duration | msgspec.UnsetType = msgspec.UNSET  # 0: none; left out: as the handler says, or none
    grace: Duration = 5.0
    retries: Annotated[int, Meta(ge=0, le=RETRIES_MAX)] | msgspec.UnsetType = msgspec.UNSET  # left out: the same
    backoff: BackoffRequest = BackoffRequest()
    on_lost: Literal["retry", "fail"] = "retry"
    env: dict[Name, str] = {}
    secrets: Annotated[
        dict[Name, Name], Meta(max_length=32)
    ] = {}  # variable (or ${VARIABLE} in headers): secret's name
    cwd: Annotated[str, Meta(max_length=4096)] = ""
    labels: Annotated[dict[Name, Name], Meta(max_length=64)] = {}


class Selection(Wire, frozen=True):
    """Tasks by id (or an unambiguous end of one, or `last`), or by what they have in common. Everything given must
    hold; several values of one field match any. `states` also takes `unfinished` and `finished`."""

    ids: tuple[Name, ...] = ()
    states: tuple[Name, ...] = ()
    queues: tuple[Name, ...] = ()
    types: tuple[Name, ...] = ()
    owners: tuple[Name, ...] = ()
    names: tuple[Name, ...] = ()
    labels: dict[Name, Name] = {}
    cursor: Annotated[str, Meta(max_length=36)] = ""  # where an earlier call stopped, to go on from there


class WaitRequest(Wire, frozen=True):
    """Wait until these tasks have ended, at most `timeout` seconds. With `stream`, each is a line as it ends."""

    ids: tuple[Name, ...]
    timeout: Annotated[float, Meta(ge=0, le=86400)] = 30.0
    stream: bool = False


class DrainRequest(Wire, frozen=True):
    """Why a node is to get no new tasks."""

    reason: Annotated[str, Meta(max_length=1000)] = ""


# -- Answers -----------------------------------------------------------------------------------------------------------


class Accepted(Wire, frozen=True, omit_defaults=False):
    """The tasks taken, in the order of the request. `durability`: on one disk (`local`) or more (`replicated`)."""

    ids: list[str]
    durability: Literal["local", "replicated"] = "local"
    existing: int = 0  # how many of them were already known, by an id or key of the client's own


class ErrorView(Wire, frozen=True):
    """Why an attempt failed."""

    type: str
    message: str = ""
    traceback: str = ""


class AttemptView(Wire, frozen=True, omit_defaults=False):
    """One attempt of a task. `outcome` is null while it is open."""

    number: int
    worker: int
    worker_name: str
    dispatched: float
    started: float | None
    ended: float | None
    outcome: str | None
    fence: str  # the fencing token, as in the task's environment
    exit_code: int | None = None
    signal: int | None = None
    error: ErrorView | None = None
    reason: str = ""
    stdout_tail: str = ""
    stderr_tail: str = ""
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    memory_peak_bytes: int = 0
    cpu_s: float = 0.0


class TaskResult(Wire, frozen=True, omit_defaults=False):
    """How a task ended: what `result`, `wait` and submissions with `wait` answer. `result` is any JSON."""

    id: str
    state: str
    result: msgspec.Raw | None = None
    exit_code: int | None = None
    signal: int | None = None
    error: ErrorView | None = None
    reason: str = ""
    attempts: int = 0


class TaskView(Wire, frozen=True, omit_defaults=False):
    """A task as lists show it."""

    id: str
    type: str
    name: str
    state: str
    queue: str
    priority: int
    owner: str
    submitted: float
    changed: float
    finished: float | None
    attempt: int  # how many attempts there have been
    worker: int | None  # of the newest attempt
    worker_name: str | None
    started: float | None
    exit_code: int | None
    reason: str
    labels: dict[str, str]
    command: str  # the command line, URL, or handler type, shortened, for people
    provisional: bool = False  # it ended while a scheduler was away, which may bring another end


class TaskDetail(TaskView, frozen=True):
    """A task in full."""

    argv: list[str] = []
    shell: str = ""
    http: HttpTarget | None = None
    params: msgspec.Raw | None = None
    env: dict[str, str] = {}
    secrets: dict[str, str] = {}  # names, never values
    cwd: str = ""
    resources: dict[str, float] = {}  # memory in bytes
    constraints: list[str] = []
    not_before: float | None = None
    deadline: float | None = None
    timeout: float = 0.0
    grace: float = 0.0
    retries: int = 0
    backoff: BackoffRequest | None = None
    on_lost: str = "retry"
    retry_of: str | None = None
    due: float | None = None  # when it is tried next, while it waits for a time
    signal: int | None = None
    error: ErrorView | None = None
    result: msgspec.Raw | None = None
    attempts: list[AttemptView] = []


class TaskPage(Wire, frozen=True, omit_defaults=False):
    """One page of tasks, newest first. `cursor` asks for the next one; null at the end."""

    tasks: list[TaskView]
    cursor: str | None


class Plan(Wire, frozen=True, omit_defaults=False):
    """What a submission would become, each value as taskd understood it. Nothing was submitted: there are no ids."""

    tasks: list[TaskDetail]


class Attempts(Wire, frozen=True, omit_defaults=False):
    """All attempts of a task, the first one first."""

    attempts: list[AttemptView]


class Waited(Wire, frozen=True, omit_defaults=False):
    """Those of the tasks that have ended, in the order asked, and how many have not."""

    results: list[TaskResult]
    pending: int


class AcceptedResults(Accepted, frozen=True, omit_defaults=False):
    """What a submission with `wait` answers: the tasks taken, the results of those that ended in time, and how many did
    not."""

    results: list[TaskResult] = []
    pending: int = 0


class OutputPart(Wire, frozen=True, omit_defaults=False):
    """One line of the output of both streams: bytes that an attempt wrote, as base64."""

    stream: Literal["stdout", "stderr"]
    data: bytes
    attempt: int


class Acted(Wire, frozen=True, omit_defaults=False):
    """The tasks that a call acted on (for `retry`: the new ones). Where more are selected than one call takes, `cursor`
    says where the next one goes on; else it is null."""

    ids: list[str]
    cursor: str | None = None


class NodeFit(Wire, frozen=True, omit_defaults=False):
    """Why one node does not take a task just now. `ever`: whether it could when idle, and connected; null where it is
    away and nobody knows what it offers."""

    node_id: int
    name: str
    fits: bool
    ever: bool | None
    why: str
    connected: bool = True


class Explanation(Wire, frozen=True, omit_defaults=False):
    """Why a task stands where it stands. `reason` is one of a fixed set of words; `text` says it to people."""

    id: str
    state: str
    reason: str
    text: str
    position: int | None  # how many ready tasks come first, of those that a connected worker could run
    until: float | None  # when that changes by itself, where that is known
    nodes: list[NodeFit]


class ErrorBody(Wire, frozen=True):
    """What was wrong, where, and what to do."""

    code: str
    message: str
    field: str | None = None


class ErrorAnswer(Wire, frozen=True):
    """The form of every error."""

    error: ErrorBody
