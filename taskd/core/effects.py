"""What to do, imperative: everything that a Node asks of its shell. Obeyed in order."""

from __future__ import annotations

from msgspec import Struct

from taskd.core.task import TaskSpec, TaskState
from taskd.protocol.messages import AttemptEnded, AttemptKey, Dot, Message, NodeRow, TaskRow, Term


class Effect(Struct, frozen=True):
    """Something for the shell to do."""


class Send(Effect, frozen=True):
    """Send a message to a peer; dropped where the peer is gone, which the core hears as PeerDown."""

    node_id: int
    message: Message


class Disconnect(Effect, frozen=True):
    """End the connection to a peer that breaks the protocol; the core hears of it as PeerDown."""

    node_id: int
    reason: str


class Purge(Struct, frozen=True):
    """Remove what another scheduler does not have any more: tasks above `after`, up to `until` (empty: no bound), not
    among `present`, whose last change is covered by `seen`."""

    after: bytes
    until: bytes
    present: tuple[bytes, ...]
    seen: tuple[Dot, ...]


class Commit(Effect, frozen=True):
    """Make this durable, all or none; answer Committed or CommitFailed. One is in flight at a time."""

    seq: int
    term: Term | None = None  # the greatest term this node has seen, where it changed
    inserted: list[TaskRow] = []
    updated: list[TaskRow] = []
    nodes: list[NodeRow] = []
    # Rows of other schedulers: each is taken where the task is new here or its dot ranks above that of ours.
    taken: list[TaskRow] = []
    purged: list[bytes] = []
    purges: list[Purge] = []
    seen: list[Dot] = []  # of each term that has advanced, the greatest lsn; never lower than before
    last_purge: Dot | None = None  # where it changed
    has_strays: bool | None = None  # where it changed: whether rows are held that `seen` does not cover


class ReadBacklog(Effect, frozen=True):
    """Read unfinished tasks by id, above `after`, some thousands at a time; answer BacklogRead."""

    call: int
    after: bytes


class ReadLacking(Effect, frozen=True):
    """Read tasks by id, above `after`, whose last change `seen` does not cover; answer RowsRead: at most about 500
    rows or 1 MiB, none where a part of the table had none."""

    call: int
    seen: tuple[Dot, ...]
    after: bytes


class ReadRows(Effect, frozen=True):
    """Read these tasks, of any number; answer RowsRead, without those that do not exist."""

    call: int
    ids: list[bytes]


class ReadIds(Effect, frozen=True):
    """Read the ids of all tasks above `after`, about 20,000 at a time; answer IdsRead."""

    call: int
    after: bytes


class ReadOld(Effect, frozen=True):
    """Read the ids of tasks that had ended before `before_s` (UTC), at most 5,000; answer IdsRead."""

    call: int
    before_s: float


class Reply(Effect, frozen=True):
    """Answer a client's call: a value, or the error it gets. Where it `promises` to keep something, `durability` says
    how: "local", or "replicated" where a standby has it too."""

    call: int
    answer: object
    durability: str = ""
    promises: bool = False


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


class AnnounceRows(Effect, frozen=True):
    """A standby took these rows, which are durable: tell waiters and event streams. Nothing is decoded unless somebody
    watches."""

    rows: list[TaskRow]


class Superseded(Effect, frozen=True):
    """Tell event streams that another leader's result of a task, decided while the cluster was divided, has taken the
    place of the one that was told before."""

    id: bytes
    before: TaskState
    after: TaskState


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
    """Write down at a worker what must outlive its process: attempts begun, outcomes, acknowledgements, the term
    with its leader's seal."""

    term: Term | None
    begun: list[AttemptKey]
    ended: list[AttemptEnded]
    acknowledged: list[AttemptKey]
    proof: bytes = b""


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
