"""What the API asks of the daemon behind it. The shell implements this; tests of the API bring their own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from enum import Enum
from typing import Literal, Protocol

from msgspec import Struct

from taskd.api.cluster_types import ClusterView, EventView, HandlerView, NodeView, Ready
from taskd.api.types import Explanation
from taskd.core.effects import Change
from taskd.core.events import NewTask
from taskd.protocol.messages import TaskRow
from taskd.store.base import Query


class Caller(Struct, frozen=True):
    """Who makes a request: a user of the machine whose socket was used, or of whom a token says that it is his."""

    user: str
    is_admin: bool  # root, the daemon's own user, a member of taskd-admin, a token with that role
    may_change: bool = True  # else it only reads


class ApiRequest(Struct, frozen=True):
    """A request, whether it came over the socket or was relayed by another node. `path` has no query and is still
    percent-encoded; of a query field given several times the values are joined by commas. Headers do not travel: the
    Idempotency-Key comes as the query field `idempotency_key`."""

    method: str
    path: str
    query: dict[str, str]
    caller: Caller
    body: bytes = b""
    argument: str = ""  # what the path names, e.g. a task's id: filled in by dispatch
    # Names the tasks that it makes (ids.py): given by dispatch where the request arrives, kept when it is sent again.
    first_id: bytes = b""
    source: str = ""  # for the audit: the process at our socket, or the node that relayed it


class ApiResponse(Struct, frozen=True):
    """An answer: a body, or a stream of body parts to be passed on as they come. A stream that raises was broken off:
    whoever passes it on must not let it look complete."""

    status: int = 200
    content_type: str = "application/json"
    body: bytes = b""
    stream: AsyncIterator[bytes] | None = None
    did: str = ""  # for the audit: what was changed or given; known where it was


class HandlerDefaults(Struct, frozen=True):
    """What a handler wants for tasks that are submitted without it."""

    retries: int = 0
    timeout_s: float = 0.0  # 0: none


ParamsCheck = Callable[[bytes], None]
"""Raises InvalidRequest for params (JSON text) that no handler takes."""


class Receipt(Struct, frozen=True):
    """What became of a submission: ids that were `known` before, and on how many disks all of it is now."""

    known: set[bytes]
    durability: Literal["local", "replicated"]


class OwnReads(Enum):
    """What a node that does not lead may answer from a store of its own."""

    NOTHING = 0
    SETTLED = 1  # tasks that have ended: it is in sync with the leader, and those change no more
    ALL = 2  # whatever it has: nobody leads


class Service(Protocol):
    """The daemon as the API sees it."""

    @property
    def leads(self) -> bool:
        """Whether this node is the leader, so that it answers itself."""

    async def relay(self, request: ApiRequest) -> ApiResponse:
        """Have the leader answer, or the next one where there is none or it goes away meanwhile. Raises NoLeader,
        Unavailable."""

    async def own_reads(self) -> OwnReads:
        """What this node may answer itself, where it does not lead; waits a moment where a leader may be about to."""

    def now_s(self) -> float:
        """UTC, seconds."""

    def new_task_id(self) -> bytes:
        """A fresh UUIDv7. Those that count on from it in its last 31 bits are fresh too."""

    def audit(self, request: ApiRequest, response: ApiResponse) -> None:
        """Note a request that was to change something, or to have all that there is."""

    # The following are only called while `leads`; those that read tasks also where `own_reads` allows it.

    def params_check(self, type: str) -> ParamsCheck | None:
        """What params (JSON text) of handlers of this type have to pass: it raises InvalidRequest(field="params...")
        where none takes them. None: there is nothing to check, above all where no such handler is known."""

    def handler_defaults(self, type: str) -> HandlerDefaults:
        """What the handlers of this type want; the most patient, where those of several workers differ."""

    async def submit(self, tasks: list[NewTask]) -> Receipt:
        """Take all that are not known yet, or none, durably. Raises Overloaded, DiskFull, NoLeader, Unavailable."""

    async def cancel(self, ids: list[bytes]) -> list[bytes]:
        """Want these cancelled; returns those that were unfinished. Raises NoLeader."""

    async def drain(self, node_id: int, reason: str | None) -> None:
        """Give a node no new tasks (`reason`), or use it again (None). Raises NotFound, NoLeader."""

    def rows(self, ids: list[bytes]) -> list[TaskRow]:
        """Durable state of those that exist, in the order asked; up to 1,000 ids."""

    async def ending_in(self, suffix: str, limit: int) -> list[bytes]:
        """Ids that end in these hexadecimal digits."""

    async def newest(self, owner: str) -> bytes | None:
        """The newest task of a user."""

    def watch(self, ids: list[bytes]) -> Watch:
        """Hear when these tasks end, those that have ended included. Close it when done."""

    def is_provisional(self, row: TaskRow) -> bool:
        """Whether a task's end may still be superseded: it was decided while a scheduler was away, which still is."""

    def explain(self, id: bytes) -> Explanation | None:
        """Why a task stands where it stands; None for one that is not held in memory (finished or unknown)."""

    def output(
        self, id: bytes, attempt: int, worker: int, stream: str, offset: int, follow: bool
    ) -> AsyncIterator[bytes]:
        """The bytes a task wrote (`stdout` or `stderr`) from `offset` on; with `follow` until the attempt has ended."""

    def nodes(self) -> list[NodeView]:
        """All known nodes."""

    def node_name(self, node_id: int) -> str:
        """A node's name, or its id as text where it is not known."""

    def handlers(self) -> list[HandlerView]:
        """All types of handlers on offer."""

    def events(self) -> AsyncIterator[EventView]:
        """Everything that changes from now on, until closed. A reader that falls 10,000 behind is ended."""

    # Answered by any node.

    def cluster(self) -> ClusterView:
        """The cluster as this node knows it."""

    def ready(self) -> Ready:
        """Whether this node serves."""

    def metrics(self) -> bytes:
        """This node's figures in the Prometheus text format."""

    def backup(self) -> AsyncIterator[bytes]:
        """A consistent copy of what this scheduler keeps (backup_file.py); nothing comes before it is made. Raises
        Conflict where this node is no scheduler or makes one already, DiskFull, StoreError."""

    # Last in the class: after it, the word `list` means this method and no longer the type. Called as `rows` is.

    async def list(self, query: Query) -> list[TaskRow]:
        """One page of tasks, newest first."""


class Watch(Protocol):
    """Waits for tasks to end."""

    async def next(self, timeout_s: float) -> list[Change]:
        """Those that ended since the last call, at least one; empty when the time is up."""

    @property
    def open(self) -> int:
        """How many have not ended yet. Unknown ids never count."""

    def close(self) -> None:
        """Stop waiting."""
