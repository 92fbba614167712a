"""The cluster and its nodes: who is there, what they run, what happens, whether it is well."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
from msgspec.structs import replace

from taskd.api.bodies import answer, decode, encode
from taskd.api.cluster_types import (
    EVENT_KINDS,
    ClusterView,
    EventView,
    Handlers,
    Health,
    Nodes,
    NodeView,
    Pointer,
    Ready,
)
from taskd.api.parameters import Flag, Words
from taskd.api.selection import find_ids
from taskd.api.service import ApiRequest, ApiResponse, Service
from taskd.api.streams import close_stream
from taskd.api.types import DrainRequest
from taskd.errors import Ambiguous, InvalidRequest, NotFound, TaskdError
from taskd.protocol.messages import id_text
from taskd.version import VERSION

LEADER_TIMEOUT_S = 2.0  # People wait for this answer, and it is of use without the leader's word too.
TAR_TYPE = "application/x-tar"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
EVENTS_TYPE = "text/event-stream"
LEADER_CHANGED = "leader.changed"
RECONNECT_MS = 1000  # What a browser waits before it asks again, after a change of leaders say.

OWN = Flag("own", "What the node that is asked knows, without asking the leader")
KIND = Words("kind", "Kinds of events, or how they begin: task, task.failed, node, leader")
TASK = Words("task", "Events of these tasks only")

_read_view = msgspec.json.Decoder(ClusterView).decode
_drain_request = msgspec.json.Decoder(DrainRequest)
_POINTER = Pointer("taskd", VERSION, "/openapi.json", "/v1/cluster", "/v1/tasks")


# -- Nodes -------------------------------------------------------------------------------------------------------------


async def nodes(request: ApiRequest, service: Service) -> ApiResponse:
    """All nodes, those that are away included."""
    return answer(Nodes(service.nodes()))


async def node(request: ApiRequest, service: Service) -> ApiResponse:
    """One node, by its id or name."""
    return answer(_find_node(request.argument, service))


async def drain(request: ApiRequest, service: Service) -> ApiResponse:
    """Give a node no new tasks; what runs there goes on."""
    view = _find_node(request.argument, service)
    reason = decode(_drain_request, request.body).reason if request.body else ""
    await service.drain(view.node_id, reason)
    return answer(_find_node(str(view.node_id), service))


async def resume(request: ApiRequest, service: Service) -> ApiResponse:
    """Use a drained node again."""
    view = _find_node(request.argument, service)
    await service.drain(view.node_id, None)
    return answer(_find_node(str(view.node_id), service))


def _find_node(text: str, service: Service) -> NodeView:
    """The node of that id, else of that name. Raises NotFound, Ambiguous."""
    views = service.nodes()
    found = [view for view in views if str(view.node_id) == text] or [view for view in views if view.name == text]
    if not found:
        raise NotFound(f"there is no node {text}", field="id")
    if len(found) > 1:
        ids = ", ".join(str(view.node_id) for view in found)
        raise Ambiguous(f"several nodes are called {text}; give one of their ids: {ids}", field="id")
    return found[0]


# -- The whole ---------------------------------------------------------------------------------------------------------


async def cluster(request: ApiRequest, service: Service) -> ApiResponse:
    """The cluster as the leader sees it; as the node that is asked does, where it cannot tell."""
    return answer(await _find_view(request, service))


async def _find_view(request: ApiRequest, service: Service) -> ClusterView:
    own = service.cluster()
    if OWN.read(request.query) or own.leader is None or own.by_leader:
        return own
    ask = ApiRequest("GET", "/v1/cluster", {OWN.name: "1"}, request.caller)
    try:
        async with asyncio.timeout(LEADER_TIMEOUT_S):
            response = await service.relay(ask)
        seen = _read_view(response.body)
        if seen.by_leader:
            return replace(
                seen, node_id=own.node_id, name=own.name, roles=own.roles, version=own.version, state_dir=own.state_dir
            )  # fmt: skip
    except (TaskdError, TimeoutError, msgspec.DecodeError):
        pass  # Being in trouble is what it is asked about most.
    own = service.cluster()
    if own.leader is None or own.by_leader:
        return own
    return replace(own, health="down", why=f"the leader, {own.leader_name}, does not answer")


async def handlers(request: ApiRequest, service: Service) -> ApiResponse:
    """The types of tasks that handlers run, with the schemas of their params."""
    return answer(Handlers(service.handlers()))


async def events(request: ApiRequest, service: Service) -> ApiResponse:
    """Everything that changes from now on, as server-sent events. Who falls too far behind is cut off."""
    kinds = KIND.read(request.query)
    for kind in kinds:
        if not any(known.startswith(kind) for known in EVENT_KINDS):
            raise InvalidRequest(f"{kind!r} begins no kind of events: {', '.join(EVENT_KINDS)}", field=KIND.name)
    tasks = {id_text(task_id) for task_id in await find_ids(TASK.read(request.query), request, service)}
    return ApiResponse(content_type=EVENTS_TYPE, stream=_events(service, kinds, tasks))


async def _events(service: Service, kinds: tuple[str, ...], tasks: set[str]) -> AsyncIterator[bytes]:
    stream = service.events()
    first = asyncio.create_task(_next(stream))
    try:
        await asyncio.sleep(0)  # A stream listens from its first step on: nothing after the first line is missed.
        yield b"retry: %d\n\n" % RECONNECT_MS
        event = await first
        while event is not None:
            if (not kinds or event.kind.startswith(kinds)) and (not tasks or event.id in tasks):
                yield _block(event)
            event = await _next(stream)
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await close_stream(stream)


def leader_changed(request: ApiRequest, leader: int, epoch: int, at_s: float) -> bytes:
    """The event that another scheduler leads, as a stream asked for like this shows it; nothing where it does not."""
    kinds = KIND.read(request.query)
    if TASK.read(request.query) or (kinds and not LEADER_CHANGED.startswith(kinds)):
        return b""
    return _block(EventView(LEADER_CHANGED, at_s, node_id=leader, detail=f"term {epoch}"))


def _block(event: EventView) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event.kind.encode(), encode(event))


async def _next(stream: AsyncIterator[EventView]) -> EventView | None:
    return await anext(stream, None)


# -- This node ---------------------------------------------------------------------------------------------------------


async def health(request: ApiRequest, service: Service) -> ApiResponse:
    """Whether the daemon answers at all."""
    return answer(Health())


async def ready(request: ApiRequest, service: Service) -> ApiResponse:
    """Whether a request would be served now: 200, or 503 with the reason."""
    own = service.ready()
    if own.ready:
        view = await _find_view(request, service)
        why = view.why if view.health == "down" else view.refuses
        own = Ready(not why, why)
    return answer(own, 200 if own.ready else 503)


async def metrics(request: ApiRequest, service: Service) -> ApiResponse:
    """This node's figures in the Prometheus text format."""
    return ApiResponse(content_type=METRICS_TYPE, body=service.metrics())


async def backup(request: ApiRequest, service: Service) -> ApiResponse:
    """A consistent copy of what this scheduler keeps."""
    return ApiResponse(content_type=TAR_TYPE, stream=service.backup(), did="gave a backup")


async def root(request: ApiRequest, service: Service) -> ApiResponse:
    """Where to look."""
    return answer(_POINTER)
