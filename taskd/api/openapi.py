"""The OpenAPI 3.1 description, made from the table of routes and the very types that decode the requests."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec

from taskd.api.bodies import encode
from taskd.api.types import ErrorAnswer
from taskd.version import VERSION

if TYPE_CHECKING:
    from taskd.api.routes import Route

_REFERENCE = "#/components/schemas/{name}"
_ERRORS_OF_ALL = (400, 401, 403, 429, 500)
_ERRORS_OF_LEADER = (503,)
_ERROR_TEXTS = {
    400: "The request is not valid; `field` names the part that is wrong",
    401: "Over HTTPS: there is no valid token with it",
    403: "The caller may not do this",
    404: "There is no such thing",
    409: "The state does not allow this, or the id is ambiguous",
    413: "More than the limit",
    429: "Too much is waiting already; try again later",
    500: "Something went wrong inside taskd; the message has a reference to its log",
    503: "Not at the moment: no leader, or a part of the cluster does not answer",
    507: "The scheduler's disk is nearly full",
}
_ID = {
    "tasks": "A task's id, at least the last 4 characters of it, or `last` for the caller's newest",
    "nodes": "A node's id or name",
}
_ABOUT = (
    "The HTTP interface of a taskd daemon, on its Unix socket. Any node answers; it relays to the leader what only the "
    "leader can do. Times are UTC seconds since 1970; requests also take ISO 8601 (UTC where no zone is named). "
    "Durations are seconds or text such as 1h30m, sizes bytes or text such as 2GiB. Who calls is known from the "
    "socket's peer credentials. A streamed answer that breaks off ends without its closing chunk."
)


def describe(routes: Iterable[Route]) -> bytes:
    """The description of these routes as JSON."""
    routes = tuple(routes)
    types = [kind for route in routes for kind in _types(route)] + [ErrorAnswer]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    schema_of = {id(kind): schema for kind, schema in zip(types, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema_of)
    statuses = sorted({status for route in routes for status in _errors(route)})
    document = {
        "openapi": "3.1.0",
        "info": {"title": "taskd", "version": VERSION, "description": _ABOUT, "license": {"name": "Apache-2.0"}},
        "servers": [{"url": "http://taskd", "description": "The Unix socket; the host's name does not matter"}],
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": {
                f"Error{status}": {
                    "description": _ERROR_TEXTS[status],
                    "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(name="ErrorAnswer")}}},
                }
                for status in statuses
            },
        },
    }
    return encode(document)


def _types(route: Route) -> list[Any]:
    kinds = [kind for alternatives in route.answers.values() for kind in alternatives] + list(route.otherwise.values())
    return kinds if route.body is None else [*kinds, route.body]


def _schema(kinds: tuple[object, ...], schema_of: dict[int, dict[str, Any]]) -> dict[str, Any]:
    if not kinds:
        return {"type": "string"}
    schemas = [schema_of[id(kind)] for kind in kinds]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _operation(route: Route, schema_of: dict[int, dict[str, Any]]) -> dict[str, Any]:
    group = route.path.split("/")[2] if route.path.startswith("/v1/") else "node"
    operation: dict[str, Any] = {
        "operationId": route.handler.__name__,
        "summary": route.summary,
        "tags": [group],
        "responses": {
            "200": {
                "description": "What was asked for",
                "content": {
                    content_type: {"schema": _schema(kinds, schema_of)} for content_type, kinds in route.answers.items()
                },
            },
            **{str(status): {"$ref": f"#/components/responses/Error{status}"} for status in _errors(route)},
            **{
                str(status): {
                    "description": HTTPStatus(status).phrase,
                    "content": {"application/json": {"schema": schema_of[id(kind)]}},
                }
                for status, kind in route.otherwise.items()
            },
        },
    }
    parameters = _parameters(route, group)
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        operation["requestBody"] = {
            "required": not route.body_may_be_empty,
            "content": {"application/json": {"schema": schema_of[id(route.body)]}},
        }
    if route.needs_admin:
        operation["description"] = "Only for root, the daemon's own user, and members of the group taskd-admin."
    return operation


def _parameters(route: Route, group: str) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = []
    if "{id}" in route.path:
        described = {"name": "id", "in": "path", "required": True, "description": _ID[group]}
        parameters.append(described | {"schema": {"type": "string"}})
    for parameter in route.parameters:
        schema = parameter.schema()
        described = {"name": parameter.name, "in": "query", "description": parameter.summary, "schema": schema}
        if schema["type"] == "array":
            described |= {"style": "form", "explode": False}
        parameters.append(described)
        if parameter.name == "idempotency_key":
            text = "The same key names the same tasks for a day: sent again, a submission makes no second ones"
            parameters.append({"name": "Idempotency-Key", "in": "header", "description": text, "schema": schema})
    return parameters


def _errors(route: Route) -> list[int]:
    return sorted({*_ERRORS_OF_ALL, *route.errors, *(_ERRORS_OF_LEADER if route.by_leader else ())})
