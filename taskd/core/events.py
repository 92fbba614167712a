"""What happened, past tense: everything that a Node is told. The shell makes these; the core decides what follows."""

from __future__ import annotations

from msgspec import Struct

from taskd.core.backlog import Backlog
from taskd.core.settings import SchedulerSettings
from taskd.core.task import TaskSpec
from taskd.protocol.messages import (
    AttemptEnded,
    AttemptKey,
    AttemptStarted,
    Dot,
    Message,
    NodeInfo,
    NodeRow,
    Offer,
    TaskRow,
    Term,
)


class Event(Struct, frozen=True):
    """Something that happened outside the core."""


# -- The disk ----------------------------------------------------------------------------------------------------------


class Loaded(Event, frozen=True):
    """A scheduler's database was opened at start. `term`: the greatest seen. `seen`: how much of each term's commits it
    holds, the greatest lsn of each. `purged`: its last commit that purged tasks. `is_empty`: it never
    held all that a leader held, or was restored from a backup and has known no leader since. `has_strays`: it may hold
    rows that `seen` does not cover."""

    term: Term | None
    seen: list[Dot]
    nodes: list[NodeRow]
    purged: Dot | None = None
    is_empty: bool = False
    has_strays: bool = False


class BacklogRead(Event, frozen=True):
    """The answer to ReadBacklog: unfinished tasks, and where to go on (`after`); None: that was all."""

    call: int
    backlog: Backlog
    after: bytes | None = None


class RowsRead(Event, frozen=True):
    """The answer to ReadLacking or ReadRows: durable rows, and where to go on (`after`); None: that was
    all."""

    call: int
    rows: list[TaskRow]
    after: bytes | None = None


class IdsRead(Event, frozen=True):
    """The answer to ReadIds or ReadOld: ids, ascending, and where to go on (`after`); None: that was all."""

    call: int
    ids: list[bytes]
    after: bytes | None = None


class ReadFailed(Event, frozen=True):
    """A reading could not be made."""

    call: int
    reason: str


class JournalLoaded(Event, frozen=True):
    """A worker's journal was read at start: the greatest term obeyed and its leader's seal, attempts that the last
    process left open (now dead), and outcomes that no leader has acknowledged."""

    term: Term | None
    interrupted: list[AttemptKey]
    unacknowledged: list[AttemptEnded]
    proof: bytes = b""


class Committed(Event, frozen=True):
    """The commit `seq` is durable."""

    seq: int


class CommitFailed(Event, frozen=True):
    """The commit `seq` is not known to be durable: nobody may act on it any more."""

    seq: int
    reason: str


# -- Other nodes -------------------------------------------------------------------------------------------------------


class PeerUp(Event, frozen=True):
    """An authenticated connection to `node` is open and its hello was good."""

    node: NodeInfo


class PeerDown(Event, frozen=True):
    """The connection is gone. `is_orderly`: the peer said Goodbye."""

    node_id: int
    reason: str
    is_orderly: bool = False


class Received(Event, frozen=True):
    """Messages from a peer, in order, none of the session's own (Hello, Ping, Pong, Goodbye) and no relayed calls."""

    node_id: int
    messages: list[Message]


class Collided(Event, frozen=True):
    """A live node has our node id, and is not us: its own store says so, or (`is_copy`) it has our store, and another
    process has opened that."""

    name: str
    address: str
    is_copy: bool = False

    def text(self, node_id: int) -> str:
        """What to tell the operator of this node."""
        if self.is_copy:
            return (
                f"a copy of this node's disk runs already, as {self.name} at {self.address}: stop one of the two, or "
                "give this one an empty state directory"
            )
        return f"node id {node_id} is taken by {self.name} at {self.address}: start with another --node-id"


# -- Task processes ----------------------------------------------------------------------------------------------------


class Progressed(Event, frozen=True):
    """Attempts that the runners began, then attempts that ended. `started` leaves out those that ended at once."""

    started: list[AttemptStarted]
    ended: list[AttemptEnded]


# -- Local clients -----------------------------------------------------------------------------------------------------


class NewTask(Struct, frozen=True, gc=False):
    """One task of a submission: the id, the spec and its msgpack."""

    id: bytes
    spec: TaskSpec
    spec_bytes: bytes


class Submitted(Event, frozen=True):
    """A client wants tasks run: all are taken or none. Answered by Reply(call, list of ids taken earlier)."""

    call: int
    tasks: list[NewTask]


class CancelWanted(Event, frozen=True):
    """A client wants these tasks cancelled. Unknown or finished ids are passed over."""

    call: int
    ids: list[bytes]


class DrainWanted(Event, frozen=True):
    """A node is to finish what it runs and get nothing new (`reason`), or to be used again (None)."""

    call: int
    node_id: int
    reason: str | None


# -- The node itself ---------------------------------------------------------------------------------------------------


class SettingsChanged(Event, frozen=True):
    """The leader's settings have changed."""

    settings: SchedulerSettings


class KeysChanged(Event, frozen=True):
    """The cluster key is being replaced: terms are sealed with the first of these secrets from now on, and seals of
    all of them are believed."""

    secrets: tuple[bytes, ...]


class OfferChanged(Event, frozen=True):
    """What this worker offers has changed."""

    offer: Offer


class ClockRead(Event, frozen=True):
    """What to add to the monotonic `now` to get UTC; told at start and whenever the clock was set."""

    utc_offset_s: float


class Stalled(Event, frozen=True):
    """This process stood still, or the whole machine, for so long that others may have gone on without it. Told before
    anything else that happened meanwhile."""

    duration_s: float


class Ticked(Event, frozen=True):
    """A deadline may have come."""


class StopWanted(Event, frozen=True):
    """Stop in good order: give back what has not begun; TERM to what runs, and KILL after `grace_s`."""

    grace_s: float
