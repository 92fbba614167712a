"""What to do, imperative: everything that a Node asks of its shell. Obeyed in order."""

from __future__ import annotations

from msgspec import Struct

from taskd.core.task import NodeRow, TaskRow, TaskSpec, TaskState
from taskd.protocol.messages import AttemptEnded, AttemptKey, Message, Term


class Effect(Struct, frozen=True):
    """Something for the shell to do."""


class Send(Effect, frozen=True):
    """Send a message to a peer; dropped where the peer is gone, which the core hears as PeerDown."""

    node_id: int
    message: Message


class Commit(Effect, frozen=True):
    """Make these rows durable, all or none; answer Committed or CommitFailed. One is in flight at a time."""

    seq: int
    term: Term | None  # the greatest term this node has seen, where it changed
    inserted: list[TaskRow]
    updated: list[TaskRow]
    nodes: list[NodeRow]


class Reply(Effect, frozen=True):
    """Answer a client's call: a value, or the error it gets."""

    call: int
    answer: object


class Change(Struct, frozen=True, gc=False):
    """A task came to a new state. Final ones carry what waiters want to know."""

    id: bytes
    state: TaskState
    at_s: float
    attempt: int
    worker: int  # node id, 0 for none
    report: bytes = b""  # of the deciding attempt
    reason: str = ""


class Announce(Effect, frozen=True):
    """Tell waiters and event streams; only ever after the change is durable."""

    changes: list[Change]


class AnnounceNode(Effect, frozen=True):
    """Tell event streams of a node: kind is e.g. "node.up", "node.lost", "leader.changed"."""

    kind: str
    node_id: int
    detail: str


class Begin(Struct, frozen=True, gc=False):
    """One attempt to start now."""

    key: AttemptKey
    spec: TaskSpec


class Start(Effect, frozen=True):
    """Start these attempts; each will be heard of in Progressed."""

    attempts: list[Begin]


class Terminate(Effect, frozen=True):
    """Ask an attempt to end: TERM to its whole group."""

    key: AttemptKey


class Kill(Effect, frozen=True):
    """End an attempt: KILL to its whole group."""

    key: AttemptKey


class Journal(Effect, frozen=True):
    """Write down at a worker what must outlive its process: attempts begun, outcomes, acknowledgements, the term."""

    term: Term | None
    begun: list[AttemptKey]
    ended: list[AttemptEnded]
    acknowledged: list[AttemptKey]


class Log(Effect, frozen=True):
    """One log line: an event name, and the fields that explain it."""

    level: str  # debug, info, warning, error
    event: str
    fields: dict[str, object]


class Follow(Effect, frozen=True):
    """Relay clients' calls to this leader from now on; None: nobody leads."""

    leader: int | None
    term: Term | None


class Exit(Effect, frozen=True):
    """End the process: going on would break a promise. Or, with status 0: everything is done, in good order."""

    status: int
    reason: str
