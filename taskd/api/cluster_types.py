"""The JSON of the local API about the cluster: nodes, handlers, events, how it is. See types.py."""

from __future__ import annotations

from typing import Literal

import msgspec

from taskd.api.types import Wire
from taskd.core.task import TaskState

Replication = Literal["leading", "in_sync", "catching_up", "away"]


EVENT_KINDS = (
    *(f"task.{state.word}" for state in TaskState), "task.superseded", "node.up", "node.lost", "node.drained",
    "node.resumed", "leader.changed", "standby.in_sync", "standby.behind", "standby.gone", "durability.replicated",
    "durability.local",
)  # fmt: skip


class NodeView(Wire, frozen=True, omit_defaults=False):
    """One node of the cluster, as the leader sees it."""

    node_id: int
    name: str
    roles: list[str]
    state: str  # up, draining, drained, lost
    is_leader: bool
    version: str
    address: str
    slots: int
    running: int
    waiting: int  # handed to it, not begun
    capacity: dict[str, float]
    used: dict[str, float]
    labels: dict[str, str]
    types: list[str]
    clock_offset_s: float | None
    round_trip_s: float | None
    drain_reason: str
    seen: float
    # Of schedulers: how far their copy of the tasks is, null where the node that answers cannot tell.
    replication: Replication | None = None
    lag_commits: int | None = None
    lag_s: float | None = None
    may_lead: bool = False
    fingerprint: str = ""  # of the cluster key that its connection to the node that answers was opened with


class Nodes(Wire, frozen=True, omit_defaults=False):
    """All nodes that the cluster remembers."""

    nodes: list[NodeView]


class SchedulerView(Wire, frozen=True, omit_defaults=False, forbid_unknown_fields=False):
    """One scheduler, and how far its copy of the tasks is behind the leader's: in commits, and for how many seconds.
    Null where the node that answers cannot tell. `seen` says of one that is away when it was last known to be here, and
    `copied` of one that catches up how many tasks it was sent so far."""

    node_id: int
    name: str
    replication: Replication | None
    lag_commits: int | None
    lag_s: float | None
    may_lead: bool  # would lead, were it the one with the lowest id
    seen: float | None = None
    copied: int | None = None


class ClusterView(Wire, frozen=True, omit_defaults=False, forbid_unknown_fields=False):
    """The cluster in one look, as the leader sees it; where none is reached, as the node that is asked does. `term`
    counts changes of leaders, `why` says what is wrong where `health` is not ok. Only the leader can tell (`by_leader`)
    how many workers, slots and tasks there are, and why it takes no new tasks (`refuses`, empty where it does). Of the
    workers and slots, those `drained` get no new tasks. `state_dir` is of the node that was asked.

    A leader that is newer than the node that asks it may say more."""

    cluster: str
    node_id: int  # of the node that was asked
    name: str
    roles: list[str]
    leader: int | None
    leader_name: str | None
    term: int | None
    health: Literal["ok", "degraded", "down"]
    why: str
    durability: Literal["local", "replicated"]
    schedulers: int
    workers: int
    slots: int
    running: int
    tasks: dict[str, int]  # by state, unfinished ones
    version: str
    replicas: list[SchedulerView]  # every scheduler that is known, the leader first
    by_leader: bool = True
    refuses: str = ""
    workers_drained: int = 0
    slots_drained: int = 0
    state_dir: str = ""


class HandlerView(Wire, frozen=True, omit_defaults=False):
    """A type of task, what its params must look like (JSON Schema), and who runs it. `retries` and `timeout` (0: none)
    hold for tasks submitted without their own."""

    type: str
    summary: str
    version: str
    schema: msgspec.Raw
    nodes: list[int]
    retries: int = 0
    timeout: float = 0.0


class Handlers(Wire, frozen=True, omit_defaults=False):
    """All types of handlers on offer."""

    handlers: list[HandlerView]


class EventView(Wire, frozen=True, omit_defaults=False):
    """One line of the event stream: a task, a node, or who leads has changed."""

    kind: str  # one of EVENT_KINDS
    at: float
    id: str = ""
    node_id: int | None = None
    detail: str = ""


class Health(Wire, frozen=True, omit_defaults=False):
    """This daemon answers."""

    status: Literal["ok"] = "ok"


class Pointer(Wire, frozen=True, omit_defaults=False):
    """Where to look: what the root of the socket answers."""

    name: str
    version: str
    openapi: str
    cluster: str
    tasks: str


class Ready(Wire, frozen=True, omit_defaults=False):
    """Whether a request to this node would be served now: it is not stopping, and it leads or its leader answers and
    takes tasks."""

    ready: bool
    why: str
