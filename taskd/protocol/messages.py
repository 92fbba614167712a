"""Every message between nodes: one tagged Struct each, and who may send it.

Encoded as msgpack arrays `[tag, field, ...]`. Schemas are closed: an unknown tag, a missing or surplus field or a
wrong type closes the connection. Ids of tasks are 16 bytes (UUIDv7); times are UTC seconds since 1970; sizes are bytes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct, structs

PROTOCOL_VERSION = 2  # See versions.py for what a new one may change, and what it must say there.

TaskId = Annotated[bytes, Meta(min_length=16, max_length=16)]
StoreId = Annotated[bytes, Meta(min_length=16, max_length=16)]
Unsigned = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
# No cluster changes its leader so often: beyond this a counter is damage or malice.
Epoch = Annotated[int, Meta(ge=0, le=(1 << 48) - 1)]
# UTC seconds until the year 5138: what is no number, and what no clock says, would end whoever writes it as a date.
Moment = Annotated[float, Meta(ge=0, le=1e11)]
Proof = Annotated[bytes, Meta(max_length=64)]
Name = Annotated[str, Meta(max_length=255)]
Text = Annotated[str, Meta(max_length=4096)]
Role = Literal["scheduler", "worker"]

CHUNK_BYTES_MAX = 1 << 20  # Of one relayed body part: small enough that heartbeats pass between two of them.
ANSWER_BYTES_AHEAD_MAX = 4 << 20  # Of a relayed answer that its reader has not taken yet.


class Part(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """A value inside messages."""


class Message(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False, tag=str.lower):
    """A message of its own."""


# -- Values ------------------------------------------------------------------------------------------------------------


def id_text(task_id: bytes) -> str:
    """A task's id as people write it: a UUID."""
    digits = task_id.hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


class Term(Part, frozen=True):
    """One reign of one leader. Higher epoch is greater; then the lower node id; `boot` makes it unrepeatable."""

    epoch: Epoch
    node_id: Unsigned
    boot: Unsigned

    def rank(self) -> tuple[int, int, int]:
        """The key to compare terms by: greater is newer."""
        return (self.epoch, -self.node_id, self.boot)


class AttemptKey(Part, frozen=True):
    """Names one attempt of one task, once and for ever: the fencing token. `lsn` counts the commits of its term."""

    task_id: TaskId
    number: Unsigned  # 1 is the first attempt.
    term: Term
    lsn: Unsigned

    @property
    def task_text(self) -> str:
        """The task's id as people write it."""
        return id_text(self.task_id)

    @property
    def fence(self) -> str:
        """The fencing token as text, epoch.node.boot.lsn.number.task: no two attempts ever have the same. Without the
        task those that were placed in one commit would share it."""
        term = self.term
        return f"{term.epoch}.{term.node_id}.{term.boot}.{self.lsn}.{self.number}.{self.task_id.hex()}"


class Dot(Part, frozen=True):
    """Names one commit of one leader: the `lsn`-th of its term. A row carries the dot of its last change."""

    term: Term
    lsn: Unsigned

    def rank(self) -> tuple[tuple[int, int, int], int]:
        """The key to compare dots by: greater is newer."""
        return (self.term.rank(), self.lsn)


class TaskRow(Part, frozen=True):
    """A task as it is stored and streamed. Plain columns are for listing; the whole truth is `spec` and `record`."""

    id: TaskId
    state: Annotated[int, Meta(ge=0, le=255)]
    priority: int
    queue: Name
    type: Name
    name: Text
    owner: Name
    submitted_s: float
    changed_s: float
    finished_s: float  # 0 while it is not
    # The dot of this row's last change.
    epoch: Epoch
    node_id: Unsigned
    boot: Unsigned
    lsn: Unsigned
    spec: bytes  # msgpack of a core.task.TaskSpec
    record: bytes  # msgpack of a core.task.Record

    @property
    def dot(self) -> Dot:
        """The commit of its last change."""
        return Dot(Term(self.epoch, self.node_id, self.boot), self.lsn)

    def at(self, dot: Dot) -> TaskRow:
        """The same, as the change of another commit."""
        term = dot.term
        return structs.replace(self, epoch=term.epoch, node_id=term.node_id, boot=term.boot, lsn=dot.lsn)


class NodeRow(Part, frozen=True):
    """What the cluster remembers of a node across restarts."""

    node_id: Unsigned
    name: Name
    roles: tuple[Role, ...]
    drain_reason: Text | None  # None: not drained
    seen_s: float


class NodeInfo(Part, frozen=True):
    """Who a node says it is. `node_id` and `roles` must agree with its certificate."""

    node_id: Unsigned
    name: Name
    roles: Annotated[tuple[Role, ...], Meta(min_length=1, max_length=2)]
    store_id: StoreId
    boot: Unsigned  # Random, new with every start of the process.
    version: Name


class HandlerInfo(Part, frozen=True):
    """One Python handler that a worker offers. `schema` is the JSON Schema of its params, `{}` for anything; `retries`
    and `timeout_s` (0: none) are for tasks submitted without their own."""

    type: Name
    schema: Annotated[bytes, Meta(max_length=1 << 16)]
    summary: Text = ""
    version: Name = ""
    retries: Annotated[int, Meta(ge=0, le=10_000)] = 0
    timeout_s: Annotated[float, Meta(ge=0)] = 0.0


class Offer(Part, frozen=True):
    """What a worker can run. Amounts are thousandths: 1500 of `cpus` are one and a half; memory is in bytes x 1000."""

    slots: Annotated[int, Meta(ge=0, le=1_000_000)]
    capacity: Annotated[dict[Name, Unsigned], Meta(max_length=1000)]
    labels: Annotated[dict[Name, Name], Meta(max_length=1000)]
    types: Annotated[tuple[Name, ...], Meta(max_length=100)]  # Built-in types: command, http.
    handlers: Annotated[tuple[HandlerInfo, ...], Meta(max_length=4096)] = ()


class Assignment(Part, frozen=True):
    """One attempt handed to a worker. `spec` is the msgpack of a core.task.TaskSpec, encoded once at submission."""

    key: AttemptKey
    spec: bytes


class AttemptStarted(Part, frozen=True):
    """A worker began an attempt."""

    key: AttemptKey
    started_s: Moment


class AttemptEnded(Part, frozen=True):
    """How an attempt ended. `outcome` is a core.task.Outcome, `report` the msgpack of a core.task.Report."""

    key: AttemptKey
    outcome: Annotated[int, Meta(ge=0, le=255)]
    started_s: Moment  # 0 where it never began.
    ended_s: Moment
    report: bytes = b""


# -- Both ways ---------------------------------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """The first message on a connection, both ways: nothing else counts before it."""

    version: Unsigned
    cluster: Name
    node: NodeInfo


class Ping(Message, frozen=True):
    """Asks for a Pong; also says that the sender lives. `sent_s` is the sender's clock, UTC."""

    number: Unsigned
    sent_s: float


class Pong(Message, frozen=True):
    """Answers a Ping by its number; `sent_s` is the answering node's clock, from which skew is estimated."""

    number: Unsigned
    sent_s: float


class Goodbye(Message, frozen=True):
    """The sender is about to close, in good order: it will not come back on this connection. `taken_by`: it has another
    node of the receiver's node id, which has this name; `is_copy`: and its store, so that one of them is a copy."""

    reason: Text
    taken_by: Name = ""
    is_copy: bool = False


class Request(Message, frozen=True):
    """An API request relayed to the node that can answer it. `user` made it on the sender's socket; the body follows
    in parts until `last`. The tasks that it makes are named from `first_id` on, so that sending it again, to the next
    leader say, makes no second ones."""

    call: Unsigned
    user: Name
    is_admin: bool
    method: Annotated[str, Meta(max_length=8)]
    target: Annotated[str, Meta(max_length=8192)]  # Path and query.
    body: bytes
    last: bool
    first_id: Annotated[bytes, Meta(max_length=16)] = b""


class RequestPart(Message, frozen=True):
    """More of a Request's body."""

    call: Unsigned
    body: bytes
    last: bool


class Response(Message, frozen=True):
    """The answer to a Request, first part."""

    call: Unsigned
    status: Annotated[int, Meta(ge=100, le=599)]
    content_type: Name
    body: bytes
    last: bool


class ResponsePart(Message, frozen=True):
    """More of a Response's body."""

    call: Unsigned
    body: bytes
    last: bool


class Taken(Message, frozen=True):
    """So many more bytes of an answer's body have been read: as many more may come. Whoever answers keeps at most
    ANSWER_BYTES_AHEAD_MAX on their way, so that a slow reader holds up its own answer and nothing else."""

    call: Unsigned
    size_bytes: Unsigned


class Abandon(Message, frozen=True):
    """The sender no longer wants the rest of a call that it made (`is_caller`), or cannot give it. Each side counts its
    own calls, so the number alone does not say whose it is."""

    call: Unsigned
    is_caller: bool


# -- Everybody to schedulers, schedulers to everybody ------------------------------------------------------------------


class Leading(Message, frozen=True):
    """Says whom the sender follows as the leader: itself with its own term, another, or nobody. Sent to every
    scheduler, and by schedulers to every worker, at the begin of a connection and whenever it changes. `may_lead`: the
    sender is a scheduler that would lead if it were the lowest. `proof`: the leader's seal of its term, passed on by
    workers, which are not believed without it."""

    term: Term | None
    may_lead: bool = False
    proof: Proof = b""


# -- Schedulers among themselves ---------------------------------------------------------------------------------------


class Claim(Message, frozen=True):
    """The sender wants to lead under `term`, which is durable at it, and has `seen` so much. Answered by Pages of the
    rows that it lacks, or by Denied."""

    term: Term
    seen: tuple[Dot, ...]


class Denied(Message, frozen=True):
    """A Claim is not granted, or nobody obeys a leader any more: a term at least as great is known. `greatest` is the
    greatest term known, `leader` the term of whom the sender follows."""

    term: Term
    greatest: Term | None
    leader: Term | None


class Attach(Message, frozen=True):
    """A standby follows the leader of `term` from now on, and has `seen` so much; `has_strays`: and rows beyond that,
    of which the leader may know nothing. Answered by Wanted where the leader lacks something; then by Pages; and with
    every commit by Replicate."""

    term: Term
    seen: tuple[Dot, ...]
    has_strays: bool = False


class Wanted(Message, frozen=True):
    """A leader lacks what its standby has beyond `seen`. Answered by Pages."""

    term: Term
    seen: tuple[Dot, ...]


class Page(Message, frozen=True):
    """Rows that the receiver lacks, in answer to Claim, Attach or Wanted of `term`; `seen` is the sender's, when it
    began to answer. Each page is answered by PageTaken before the next comes. `present`, where it is not None, are the
    ids of all tasks that the sender has above `after` and up to `until` (empty: no bound): what else the receiver has
    there was purged, unless the sender's `seen` does not cover it."""

    term: Term
    number: Unsigned
    rows: tuple[TaskRow, ...]
    nodes: tuple[NodeRow, ...]
    seen: tuple[Dot, ...]
    is_last: bool
    present: tuple[TaskId, ...] | None = None
    after: Annotated[bytes, Meta(max_length=16)] = b""
    until: Annotated[bytes, Meta(max_length=16)] = b""


class PageTaken(Message, frozen=True):
    """The page of that number is durable."""

    term: Term
    number: Unsigned


class Replicate(Message, frozen=True):
    """The commit `lsn` of `term`, or a part of it: the last part ends it. With it the leader's data cover what it has
    `seen` of other terms."""

    term: Term
    lsn: Unsigned
    rows: tuple[TaskRow, ...]
    nodes: tuple[NodeRow, ...]
    purged: tuple[TaskId, ...]
    seen: tuple[Dot, ...]
    is_last: bool


class Replicated(Message, frozen=True):
    """Every commit of `term` up to `lsn` is durable at the sender, and everything that came before the term."""

    term: Term
    lsn: Unsigned


class HandOver(Message, frozen=True):
    """The leader of `term` has stopped deciding after its commit `lsn`: the receiver is to claim at once."""

    term: Term
    lsn: Unsigned


# -- Worker to leader --------------------------------------------------------------------------------------------------


class Register(Message, frozen=True):
    """A worker's whole state, first thing to a leader: what it offers, which attempts it still holds (waiting or
    running), and the greatest term it has obeyed, with its leader's seal. Outcomes not yet acknowledged follow as
    Finished."""

    offer: Offer
    held: tuple[AttemptKey, ...]
    unacknowledged: tuple[AttemptKey, ...]
    term: Term | None
    proof: Proof = b""


class Inventory(Message, frozen=True):
    """Every attempt a worker holds, waiting, running or unacknowledged, after it handled `runs_seen` Run messages of
    this registration. What the leader thinks is there and is not was lost."""

    runs_seen: Unsigned
    keys: tuple[AttemptKey, ...]


class Started(Message, frozen=True):
    """Attempts that began and are still running a moment later; short ones go straight to Finished."""

    attempts: tuple[AttemptStarted, ...]


class Finished(Message, frozen=True):
    """Outcomes, sent again after every reconnect until acknowledged."""

    attempts: tuple[AttemptEnded, ...]


class Offering(Message, frozen=True):
    """What the worker offers has changed (configuration, handlers)."""

    offer: Offer


# -- Leader to worker --------------------------------------------------------------------------------------------------


class Registered(Message, frozen=True):
    """The leader has taken the worker in. Attempts it held that the leader no longer wants follow as Cancel."""

    term: Term


class Run(Message, frozen=True):
    """Attempts to run, in order of importance: the worker keeps what it cannot run yet by priority, then age."""

    term: Term
    assignments: tuple[Assignment, ...]


class Cancel(Message, frozen=True):
    """End these attempts: TERM, grace, KILL. Each is answered by Finished."""

    term: Term
    keys: tuple[AttemptKey, ...]


class Recall(Message, frozen=True):
    """Give these attempts back if they have not begun. Those given back are Finished as preempted."""

    term: Term
    keys: tuple[AttemptKey, ...]


class Acknowledged(Message, frozen=True):
    """These outcomes are recorded: the worker may forget them."""

    term: Term
    keys: tuple[AttemptKey, ...]


Any = (
    Hello | Ping | Pong | Goodbye | Request | RequestPart | Response | ResponsePart | Taken | Abandon
    | Leading | Claim | Denied | Attach | Wanted | Page | PageTaken | Replicate | Replicated | HandOver
    | Register | Inventory | Started | Finished | Offering
    | Registered | Run | Cancel | Recall | Acknowledged
)  # fmt: skip

_BOTH: frozenset[Role] = frozenset({"scheduler", "worker"})
_WORKER: frozenset[Role] = frozenset({"worker"})
_SCHEDULER: frozenset[Role] = frozenset({"scheduler"})

MAY_SEND: dict[type[Message], frozenset[Role]] = {
    Hello: _BOTH, Ping: _BOTH, Pong: _BOTH, Goodbye: _BOTH,
    Request: _BOTH, RequestPart: _BOTH, Response: _BOTH, ResponsePart: _BOTH, Taken: _BOTH,
    Abandon: _BOTH,
    Leading: _BOTH,
    Claim: _SCHEDULER, Denied: _SCHEDULER, Attach: _SCHEDULER, Wanted: _SCHEDULER, Page: _SCHEDULER,
    PageTaken: _SCHEDULER, Replicate: _SCHEDULER, Replicated: _SCHEDULER, HandOver: _SCHEDULER,
    Register: _WORKER, Inventory: _WORKER, Started: _WORKER, Finished: _WORKER, Offering: _WORKER,
    Registered: _SCHEDULER, Run: _SCHEDULER, Cancel: _SCHEDULER, Recall: _SCHEDULER, Acknowledged: _SCHEDULER,
}  # fmt: skip
"""Which role may send which message; anything else closes the connection."""
