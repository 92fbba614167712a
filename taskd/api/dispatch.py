"""From a request to its answer: finds the route, checks rights, relays to the leader where it must, and turns every
error into the one form that clients know.
"""

from __future__ import annotations

import logging
import secrets
from urllib.parse import urlencode

from msgspec.structs import replace

from taskd.api.bodies import error_body
from taskd.api.routes import Route, find_route
from taskd.api.service import ApiRequest, ApiResponse, Service
from taskd.api.streams import begin
from taskd.errors import Forbidden, InvalidRequest, NoLeader, TaskdError, TooLarge

TARGET_CHARS_MAX = 8192  # Of path and query together: what a relayed request can carry.

_log = logging.getLogger("taskd.api")


async def dispatch(request: ApiRequest, service: Service, *, is_relayed: bool = False) -> ApiResponse:
    """Answer a request. Never raises but for cancellation; a stream in the answer raises TaskdError where it breaks.

    A request that another node relayed (`is_relayed`) is not relayed again: nodes that disagree about the leader would
    pass it round for ever.
    """
    try:
        route, argument = find_route(request.method, request.path)
        _check(route, request)
        if route.by_leader and not service.leads:
            if is_relayed:
                raise NoLeader("the node that was taken for the leader does not lead; try again")
            _check_target(request)
            return await service.relay(request)
        if argument:
            request = replace(request, argument=argument)
        response = await route.handler(request, service)
        if response.stream is not None:
            stream = await begin(response.stream, lambda: _unexpected(request))
            return ApiResponse(response.status, response.content_type, stream=stream)
    except TaskdError as error:
        return error_response(error)
    except Exception:
        return error_response(_unexpected(request))
    return response


def error_response(error: TaskdError) -> ApiResponse:
    """The answer that an error is."""
    return ApiResponse(error.status, body=error_body(error))


def _check(route: Route, request: ApiRequest) -> None:
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
