"""From a request to its answer: finds the route, checks rights, relays to the leader where it must, and turns every
error into the one form that clients know.
"""

from __future__ import annotations

import logging
import secrets
from urllib.parse import urlencode

import msgspec
from msgspec.structs import replace

from taskd.api.bodies import error_body
from taskd.api.routes import Route, find_route
from taskd.api.selection import ROWS_AT_ONCE
from taskd.api.service import ApiRequest, ApiResponse, OwnReads, Service
from taskd.api.streams import begin
from taskd.api.types import ErrorAnswer
from taskd.core.task import TaskState
from taskd.errors import Forbidden, InvalidRequest, NoLeader, NotFound, Stopping, TaskdError, TooLarge

TARGET_CHARS_MAX = 8192  # Of path and query together: what a relayed request can carry.

_read_error = msgspec.json.Decoder(ErrorAnswer).decode
_log = logging.getLogger("taskd.api")


async def dispatch(request: ApiRequest, service: Service, *, is_relayed: bool = False) -> ApiResponse:
    """Answer a request. Never raises but for cancellation; a stream in the answer raises TaskdError where it breaks.

    A request that another node relayed (`is_relayed`) is not relayed again: nodes that disagree about the leader would
    pass it round for ever. That node hears that we do not lead, or do so no longer, and asks whoever does next. What
    each node answers for itself is not relayed, and refused.
    """
    try:
        route, argument = find_route(request.method, request.path)
    except TaskdError as error:
        return error_response(error)
    response = await _by_route(route, argument, request, service, is_relayed=is_relayed)
    if route.changes or route.gives_all:
        service.audit(request, response)
    return response


async def _by_route(
    route: Route, argument: str, request: ApiRequest, service: Service, *, is_relayed: bool
) -> ApiResponse:
    try:
        _check(route, request, is_relayed=is_relayed)
        if route.by_leader and not is_relayed:
            return await _of_the_leader(route, argument, request, service)
        if route.by_leader and not service.leads:
            raise NoLeader("the node that was taken for the leader does not lead; try again")
        return await _answer(route, argument, request, service)
    except Stopping as error:
        return error_response(NoLeader(error.message) if is_relayed else error)
    except TaskdError as error:
        return error_response(error)
    except Exception:
        return error_response(_unexpected(request))


def says_no_leader(response: ApiResponse) -> bool:
    """Whether a relayed request was not answered because whoever was asked does not lead, or no longer."""
    if response.status != NoLeader.status or response.stream is not None:
        return False
    try:
        return _read_error(response.body).error.code == NoLeader.code
    except msgspec.DecodeError:
        return False


async def _of_the_leader(route: Route, argument: str, request: ApiRequest, service: Service) -> ApiResponse:
    """Answer a request of a local client that is the leader's to answer."""
    if route.makes_tasks:
        request = replace(request, first_id=service.new_task_id())
    if route.resumes == "events":
        return await service.relay(request)  # Ours to give now, perhaps, and another's before the reader has enough.
    try:
        if service.leads or await _is_known_here(route, argument, request, service):
            return await _answer(route, argument, request, service)
    except (NoLeader, Stopping):
        pass  # It has ceased to lead, just now, or is about to.
    except NotFound:
        if service.leads:
            raise
    _check_target(request)
    return await service.relay(request)


async def _is_known_here(route: Route, argument: str, request: ApiRequest, service: Service) -> bool:
    """Whether a node that does not lead can tell what a request asks, as well as the leader could."""
    if route.reads is None:
        return False
    allowed = await service.own_reads()
    if allowed is not OwnReads.SETTLED:
        return allowed is OwnReads.ALL
    ids = route.reads(replace(request, argument=argument))
    if not ids or len(ids) > ROWS_AT_ONCE:
        return False
    rows = service.rows(ids)
    return len(rows) == len(ids) and all(TaskState(row.state).is_final for row in rows)


async def _answer(route: Route, argument: str, request: ApiRequest, service: Service) -> ApiResponse:
    if argument:
        request = replace(request, argument=argument)
    response = await route.handler(request, service)
    if response.stream is None:
        return response
    stream = await begin(response.stream, lambda: _unexpected(request))
    return ApiResponse(response.status, response.content_type, stream=stream, did=response.did)


def error_response(error: TaskdError) -> ApiResponse:
    """The answer that an error is."""
    return ApiResponse(error.status, body=error_body(error))


def _check(route: Route, request: ApiRequest, *, is_relayed: bool) -> None:
    if is_relayed and not (route.by_leader or route.by_node_for_nodes):
        # No node asks this of another one: whoever does has a key, and wants more than that key is for.
        raise Forbidden(f"{route.path} is for the clients of this node alone: ask at its own socket")
    if route.changes and not request.caller.may_change:
        role = "admin" if route.needs_admin else "user"
        raise Forbidden(f"this token may only read; `taskd token create --role {role}` makes one that may do this")
    if route.needs_admin and not request.caller.is_admin:
        raise Forbidden()
    for name in request.query:
        if all(name != parameter.name for parameter in route.parameters):
            # A filter with a slip of the pen in its name would silently select everything.
            known = ", ".join(parameter.name for parameter in route.parameters)
            raise InvalidRequest(f"{route.path} takes {known or 'no fields'} in its query, not {name}", field=name)


def _check_target(request: ApiRequest) -> None:
    size = len(request.path) + len(urlencode(request.query)) + 1
    if size > TARGET_CHARS_MAX:
        raise TooLarge(f"path and query take {size} characters; {TARGET_CHARS_MAX} are allowed")


def _unexpected(request: ApiRequest) -> TaskdError:
    """Log the error being handled under a reference that its answer names."""
    reference = secrets.token_hex(4)
    _log.exception("request failed: reference=%s method=%s path=%s", reference, request.method, request.path)
    return TaskdError(f"something went wrong inside taskd; its log has the details under the reference {reference}")
