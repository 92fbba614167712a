"""A task: what was asked for (TaskSpec), what became of it (Task), and the only place where a state changes (move).

Times are UTC seconds since 1970, durations seconds, memory bytes. Resource amounts inside the core are integers in
thousandths (`units`), so that sums stay exact; memory too, in thousandths of a byte.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Literal

import msgspec
from msgspec import Struct

from taskd.protocol.messages import AttemptKey, Dot, TaskRow, Term

if TYPE_CHECKING:
    from taskd.core.queue import Shape

PARAMS_BYTES_MAX = 1 << 20
RESULT_BYTES_MAX = 1 << 20
OUTPUT_TAIL_BYTES = 64 << 10
PRIORITY_MAX = 1_000_000
RETRIES_MAX = 10_000
REPORTS_KEPT = 10  # Attempts whose full report stays in the record; of earlier ones the outcome and times remain.


class TaskState(IntEnum):
    """Where a task stands. The numbers are stored: never reuse one. From SUCCEEDED on a state is final."""

    SCHEDULED = 1  # waiting for its time
    QUEUED = 3
    ASSIGNED = 5  # handed to a worker, not begun
    RUNNING = 6
    RETRYING = 7  # waiting for its next attempt
    CANCELLING = 8  # cancel wanted, an attempt still open
    SUCCEEDED = 20
    FAILED = 21
    CANCELLED = 22
    TIMED_OUT = 23
    EXPIRED = 24  # its deadline to begin has passed

    @property
    def is_final(self) -> bool:
        return self >= SUCCEEDED

    @property
    def word(self) -> str:
        """As users read and write it."""
        return self.name.lower()


# For where thousands of tasks pass: Python 3.11 takes as long for `TaskState.QUEUED` as for a call.
(
    SCHEDULED, QUEUED, ASSIGNED, RUNNING, RETRYING, CANCELLING, SUCCEEDED, FAILED, CANCELLED, TIMED_OUT, EXPIRED
) = TaskState  # fmt: skip
FINAL = frozenset(state for state in TaskState if state.is_final)
_ENDED = frozenset({SUCCEEDED, FAILED, TIMED_OUT})
TRANSITIONS: dict[TaskState, frozenset[TaskState]] = {
    # To SUCCEEDED: an attempt that was given up has succeeded nevertheless, or one of a leader whose clock is ahead.
    SCHEDULED: frozenset({QUEUED, CANCELLED, EXPIRED, SUCCEEDED}),
    QUEUED: frozenset({ASSIGNED, CANCELLED, EXPIRED, SUCCEEDED}),
    # Back to QUEUED: taken back unstarted, or lost with a worker. A result can arrive before the word that it began.
    ASSIGNED: _ENDED | {RUNNING, QUEUED, RETRYING, CANCELLING},
    RUNNING: _ENDED | {QUEUED, RETRYING, CANCELLING},
    RETRYING: frozenset({QUEUED, CANCELLED, SUCCEEDED}),
    # A success that came first wins over the wish to cancel.
    CANCELLING: frozenset({CANCELLED, SUCCEEDED}),
    **dict.fromkeys(FINAL, frozenset()),
}


class Outcome(IntEnum):
    """How one attempt ended. The numbers are stored: never reuse one."""

    OK = 0
    EXIT_NONZERO = 1
    EXCEPTION = 2  # a handler raised, or an HTTP service answered with an error
    SIGNAL = 3  # ended by a signal
    OOM = 4  # killed for want of memory
    TIMEOUT = 5
    LOST = 6  # its worker is gone
    SPAWN_FAILED = 7  # could not be started
    PREEMPTED = 8  # given back before it began

    @property
    def word(self) -> str:
        return self.name.lower()


class HttpCall(Struct, frozen=True, omit_defaults=True):
    """A call to a microservice. The body is the task's params as JSON; the answer's JSON body is the result."""

    url: str
    method: str = "POST"
    headers: dict[str, str] = {}
    # Which answers count as success; by default 200-299.
    expect_status: tuple[int, ...] = ()


class Backoff(Struct, frozen=True, omit_defaults=True):
    """The wait before attempt n + 1: initial_s x factor^(n-1), at most max_s, give or take `jitter` (0..1) of it."""

    initial_s: float = 1.0
    factor: float = 2.0
    max_s: float = 300.0
    jitter: float = 0.1


class TaskSpec(Struct, frozen=True, omit_defaults=True):
    """What was asked for. Written once, never changed; its msgpack travels and is stored as it is."""

    type: str  # "command", "http", or the type of a registered handler
    name: str = ""
    queue: str = "default"
    priority: int = 0  # higher first
    owner: str = ""  # user who submitted it
    submitted_s: float = 0.0
    # What to run: argv or shell for commands, http for calls, params (JSON text) for handlers and calls.
    argv: tuple[str, ...] = ()
    shell: str = ""
    http: HttpCall | None = None
    params: bytes = b""
    env: dict[str, str] = {}
    cwd: str = ""
    # Where: amounts in thousandths; cpus 0 means "one slot's share".
    resources: dict[str, int] = {}
    constraints: tuple[str, ...] = ()
    # When.
    not_before_s: float = 0.0
    deadline_s: float = 0.0  # must have begun by then; 0: none
    timeout_s: float = 0.0  # of one attempt; 0: none
    grace_s: float = 5.0  # between TERM and KILL
    # Again?
    retries: int = 0
    backoff: Backoff = Backoff()
    on_lost: Literal["retry", "fail"] = "retry"
    labels: dict[str, str] = {}
    retry_of: bytes = b""  # id of the task that this one repeats by hand
    # Secrets of the worker's by variable: names. Runners are given values in their place, which go no further.
    secrets: dict[str, str] = {}


class ErrorInfo(Struct, frozen=True, omit_defaults=True):
    """Why an attempt failed, for people: e.g. type "ValueError", the message, and a traceback."""

    type: str
    message: str = ""
    traceback: str = ""


class Report(Struct, frozen=True, omit_defaults=True):
    """What an attempt left behind. Output is raw bytes; tails are the last OUTPUT_TAIL_BYTES of each stream."""

    exit_code: int | None = None
    signal: int | None = None
    result: bytes = b""  # JSON text
    error: ErrorInfo | None = None
    stdout_tail: bytes = b""
    stderr_tail: bytes = b""
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    memory_peak_bytes: int = 0
    cpu_s: float = 0.0


class Attempt(Struct, array_like=True):
    """One attempt as the leader records it. `outcome` is None while it is open."""

    number: int
    term: Term
    lsn: int
    worker: int  # node id
    dispatched_s: float
    started_s: float = 0.0
    ended_s: float = 0.0
    outcome: Outcome | None = None
    report: bytes = b""  # msgpack of a Report
    reason: str = ""  # why it was lost, in words

    @property
    def is_open(self) -> bool:
        return self.outcome is None

    def key(self, task_id: bytes) -> AttemptKey:
        """Its name, as an attempt of this task."""
        return AttemptKey(task_id, self.number, self.term, self.lsn)

    @property
    def may_have_begun(self) -> bool:
        """Whether it began, or nobody can tell; not so if it was given back unstarted."""
        return self.started_s > 0 or self.outcome is not Outcome.PREEMPTED


class Record(Struct, array_like=True):
    """The part of a task that changes and is stored as one value beside the spec."""

    attempts: list[Attempt]
    cancel_wanted: bool = False
    due_s: float = 0.0  # when a SCHEDULED or RETRYING task becomes ready
    reason: str = ""  # why it ended so, where the attempts do not say it
    accepted: Dot | None = None  # the commit that took it: seen and yet absent, it was purged
    decided: Dot | None = None  # the commit that ended it

    @property
    def open_attempt(self) -> Attempt | None:
        attempts = self.attempts
        return attempts[-1] if attempts and attempts[-1].outcome is None else None

    @property
    def may_have_begun(self) -> bool:
        """Whether any attempt did."""
        return any(attempt.may_have_begun for attempt in self.attempts)


RAN_TWICE = "it was handed out twice while the cluster was divided"


class IllegalTransition(AssertionError):
    """Our own bug: a state change that the table does not have."""


class Task:
    """A task that the leader holds in memory: its spec, its record, and where it stands."""

    __slots__ = (
        "changed_s", "finished_s", "id", "is_recalled", "key", "record", "run_number", "shape", "spec", "spec_bytes",
        "state",
    )  # fmt: skip

    def __init__(self, id: bytes, spec: TaskSpec, spec_bytes: bytes, state: TaskState, record: Record) -> None:
        self.id = id
        self.spec = spec
        self.spec_bytes = spec_bytes
        self.state = state
        self.record = record
        self.changed_s = spec.submitted_s
        self.finished_s = 0.0
        self.key: AttemptKey | None = None  # of the open attempt
        self.shape: Shape | None = None  # set by the queue: tasks of one shape fit the same workers
        self.run_number = 0  # which Run message carried the open attempt
        self.is_recalled = False  # the open attempt was asked back

    def move(self, state: TaskState, now_s: float) -> None:
        """Change the state, at UTC `now_s`. The only place that does."""
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"task {self.id.hex()}: {self.state.name} -> {state.name}; record {self.record}")
        self.state = state
        self.changed_s = now_s
        if state >= SUCCEEDED:
            self.finished_s = now_s

    def attempt(self, key: AttemptKey) -> Attempt | None:
        """The attempt with this key, open or closed."""
        for attempt in self.record.attempts:
            if (attempt.number, attempt.term, attempt.lsn) == (key.number, key.term, key.lsn):
                return attempt
        return None

    def row(self, dot: Dot) -> TaskRow:
        """The row to store with this commit."""
        spec, record, term = self.spec, self.record, dot.term
        if record.accepted is None:
            record.accepted = dot
        if self.finished_s and record.decided is None:
            record.decided = dot
        return TaskRow(
            self.id, int(self.state), spec.priority, spec.queue, spec.type, spec.name, spec.owner, spec.submitted_s,
            self.changed_s, self.finished_s, term.epoch, term.node_id, term.boot, dot.lsn, self.spec_bytes,
            encode(record),
        )  # fmt: skip

    @classmethod
    def from_row(cls, row: TaskRow) -> Task:
        """The task again. Raises msgspec.DecodeError where the row is damaged."""
        task = cls(row.id, decode_spec(row.spec), row.spec, TaskState(row.state), decode_record(row.record))
        task.changed_s = row.changed_s
        task.finished_s = row.finished_s
        attempt = task.record.open_attempt
        if attempt is not None:
            task.key = attempt.key(row.id)
        return task


def deciding_attempt(record: Record) -> Attempt | None:
    """The attempt that speaks for the task: always the last one, whatever became of others later."""
    return record.attempts[-1] if record.attempts else None


_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
decode_spec = msgspec.msgpack.Decoder(TaskSpec).decode
decode_record = msgspec.msgpack.Decoder(Record).decode
_decode_report = msgspec.msgpack.Decoder(Report).decode


def decode_report(data: bytes) -> Report:
    """What a worker has said of an attempt. Raises msgspec.DecodeError, whatever is wrong with it."""
    try:
        return _decode_report(data)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(f"it cannot be read: {error}") from None


def units(amount: float) -> int:
    """An amount in thousandths, rounded to the nearest."""
    return round(amount * 1000)
