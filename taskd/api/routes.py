"""All routes of the API in one table: for dispatching, and for the OpenAPI description.

A path holds at most one variable, `{id}`, always as its third part; a fixed word in that place goes first.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any, Literal
from urllib.parse import unquote

from msgspec import Struct

from taskd.api import cluster, output, selection, tasks, waiting
from taskd.api import cluster_types as ct
from taskd.api import types as t
from taskd.api.bodies import LINES
from taskd.api.openapi import describe
from taskd.api.parameters import Parameter
from taskd.api.service import ApiRequest, ApiResponse, Service
from taskd.errors import MethodNotAllowed, NotFound

Handler = Callable[[ApiRequest, Service], Awaitable[ApiResponse]]

JSON = "application/json"
TEXT = "text/plain"
TAR = cluster.TAR_TYPE


class Route(Struct, frozen=True):
    """One thing that can be asked.

    `answers` gives for each content type, the usual one first, what the JSON can be; nothing stands for plain bytes.
    `errors` are the statuses besides those that any route may answer with; `otherwise` are statuses whose answer is
    not the error form.
    """

    method: Literal["GET", "POST"]
    path: str
    handler: Handler
    summary: str
    answers: dict[str, tuple[object, ...]]
    parameters: tuple[Parameter, ...] = ()
    body: object = None
    body_may_be_empty: bool = False
    by_leader: bool = True  # else by whichever node is asked, and then by that one for its own clients alone
    # By whichever node is asked, of another node too. Nothing is, that a node's word for its users should not open.
    by_node_for_nodes: bool = False
    makes_tasks: bool = False
    changes: bool = False  # something, so that it is audited
    gives_all: bool = False  # of what the cluster keeps: audited too, though it changes nothing
    # It only reads tasks: those that this names, any where it gives None. A standby may know enough to answer.
    reads: Callable[[ApiRequest], list[bytes] | None] | None = None
    # A stream that breaks off is asked for again, of the next leader, where its lines are results, each of which is
    # passed on once, or events, from then on.
    resumes: Literal["", "results", "events"] = ""
    needs_admin: bool = False
    errors: tuple[int, ...] = ()
    otherwise: dict[int, object] = {}


@cache
def openapi_document() -> bytes:
    """The OpenAPI description of everything here, as JSON."""
    return describe(ROUTES)


async def openapi(request: ApiRequest, service: Service) -> ApiResponse:
    """This description."""
    return ApiResponse(body=openapi_document())


_SUBMIT_ERRORS = (409, 413, 429, 507)
_TASK_ERRORS = (404, 409)

ROUTES: tuple[Route, ...] = (
    Route(
        "POST", "/v1/tasks", tasks.submit, "Submit one task or a list of them: all are taken or none",
        {JSON: (t.Accepted, t.AcceptedResults), LINES: (t.Accepted, t.TaskResult)},
        (tasks.WAIT, tasks.STREAM, tasks.KEY), t.Submission | list[t.Submission], errors=_SUBMIT_ERRORS,
        makes_tasks=True, resumes="results", changes=True,
    ),
    Route(
        "GET", "/v1/tasks", tasks.list_tasks, "List tasks, newest first", {JSON: (t.TaskPage,)},
        (tasks.STATE, tasks.QUEUE, tasks.TYPE, tasks.LABEL, tasks.OWNER, tasks.NAME, tasks.CURSOR, tasks.LIMIT),
        reads=selection.unnamed,
    ),
    Route(
        "POST", "/v1/tasks/plan", tasks.plan, "Check a submission and say what it would become; nothing is taken",
        {JSON: (t.Plan,)}, body=t.Submission | list[t.Submission], errors=(413,),
    ),
    Route(
        "POST", waiting.WAIT_PATH, waiting.wait, "Wait until tasks have ended",
        {JSON: (t.Waited,), LINES: (t.TaskResult,)}, body=t.WaitRequest, errors=(404, 409, 413),
        reads=waiting.awaited_ids, resumes="results",
    ),
    Route(
        "POST", "/v1/tasks/cancel", tasks.cancel_selected, "Cancel the unfinished tasks of a selection",
        {JSON: (t.Acted,)}, body=t.Selection, errors=(404, 409, 413), changes=True,
    ),
    Route(
        "POST", "/v1/tasks/retry", tasks.retry_selected, "Submit the finished tasks of a selection again, as new ones",
        {JSON: (t.Acted,)}, body=t.Selection, errors=(404, *_SUBMIT_ERRORS), makes_tasks=True, changes=True,
    ),
    Route(
        "GET", "/v1/tasks/{id}", tasks.show, "Show a task in full", {JSON: (t.TaskDetail,)}, errors=_TASK_ERRORS,
        reads=selection.named_ids,
    ),
    Route(
        "GET", "/v1/tasks/{id}/attempts", tasks.attempts, "All attempts of a task", {JSON: (t.Attempts,)},
        errors=_TASK_ERRORS, reads=selection.named_ids,
    ),
    Route(
        "GET", "/v1/tasks/{id}/output", output.output, "What a task wrote to its standard streams",
        {TEXT: (), LINES: (t.OutputPart,)}, (output.STREAM, output.FOLLOW, output.OFFSET, output.ATTEMPT),
        errors=_TASK_ERRORS, reads=selection.named_ids,
    ),
    Route(
        "GET", "/v1/tasks/{id}/result", waiting.result, "How a task ended, or how it stands", {JSON: (t.TaskResult,)},
        (waiting.WAIT,), errors=_TASK_ERRORS, reads=selection.named_ids,
    ),
    Route(
        "GET", "/v1/tasks/{id}/explain", tasks.explain, "Why a task stands where it stands", {JSON: (t.Explanation,)},
        errors=_TASK_ERRORS,
    ),
    Route(
        "POST", "/v1/tasks/{id}/cancel", tasks.cancel, "Cancel a task", {JSON: (t.Acted,)}, errors=_TASK_ERRORS,
        changes=True,
    ),
    Route(
        "POST", "/v1/tasks/{id}/retry", tasks.retry, "Submit a finished task again, as a new one", {JSON: (t.Acted,)},
        errors=(404, *_SUBMIT_ERRORS), makes_tasks=True, changes=True,
    ),
    Route("GET", "/v1/nodes", cluster.nodes, "All nodes, those that are away included", {JSON: (ct.Nodes,)}),
    Route("GET", "/v1/nodes/{id}", cluster.node, "One node", {JSON: (ct.NodeView,)}, errors=_TASK_ERRORS),
    Route(
        "POST", "/v1/nodes/{id}/drain", cluster.drain, "Give a node no new tasks; what runs there goes on",
        {JSON: (ct.NodeView,)}, body=t.DrainRequest, body_may_be_empty=True, needs_admin=True, errors=_TASK_ERRORS,
        changes=True,
    ),
    Route(
        "POST", "/v1/nodes/{id}/resume", cluster.resume, "Use a drained node again", {JSON: (ct.NodeView,)},
        needs_admin=True, errors=_TASK_ERRORS,
        changes=True,
    ),
    Route("GET", "/v1/handlers", cluster.handlers, "The types of tasks that handlers run", {JSON: (ct.Handlers,)}),
    Route(
        "GET", "/v1/events", cluster.events, "Everything that changes from now on, as server-sent events",
        {cluster.EVENTS_TYPE: (ct.EventView,)}, (cluster.KIND, cluster.TASK), errors=_TASK_ERRORS,
        resumes="events",
    ),
    Route(
        "GET", "/v1/cluster", cluster.cluster, "The cluster in one look: who leads, who has a copy, how it is",
        {JSON: (ct.ClusterView,)}, (cluster.OWN,), by_leader=False, by_node_for_nodes=True,
    ),
    Route("GET", "/healthz", cluster.health, "Whether this daemon answers", {JSON: (ct.Health,)}, by_leader=False),
    Route(
        "GET", "/readyz", cluster.ready, "Whether a request would be served now", {JSON: (ct.Ready,)}, (cluster.OWN,),
        by_leader=False, otherwise={503: ct.Ready},
    ),
    Route(
        "GET", "/v1/backup", cluster.backup, "A consistent copy of what this scheduler keeps, as a tar file",
        {TAR: ()}, by_leader=False, needs_admin=True, gives_all=True, errors=(409, 507),
    ),
    Route("GET", "/metrics", cluster.metrics, "Figures for Prometheus", {TEXT: ()}, by_leader=False),
    Route("GET", "/openapi.json", openapi, "This description", {JSON: (dict[str, Any],)}, by_leader=False),
    Route("GET", "/", cluster.root, "Where to look", {JSON: (ct.Pointer,)}, by_leader=False),
)  # fmt: skip


def find_route(method: str, path: str) -> tuple[Route, str]:
    """The route for a request, and what its path's variable stands for. Raises NotFound, MethodNotAllowed."""
    methods, argument = _find_methods(path)
    if not methods:
        raise NotFound(f"there is nothing at {path}; GET /openapi.json tells what there is")
    route = methods.get(method)
    if route is None:
        raise MethodNotAllowed(f"{path} takes {' and '.join(methods)}, not {method}")
    return route, argument


def allowed_methods(path: str) -> tuple[str, ...]:
    """The methods that a path takes, none where there is nothing."""
    return tuple(_find_methods(path)[0])


def _find_methods(path: str) -> tuple[dict[str, Route], str]:
    methods = _FIXED.get(path)
    if methods is not None:
        return methods, ""
    parts = path.split("/", 4)
    if len(parts) < 4 or not parts[3]:
        return {}, ""
    argument, parts[3] = unquote(parts[3]), "{id}"
    return _VARIABLE.get("/".join(parts), {}), argument


_FIXED: dict[str, dict[str, Route]] = {}
_VARIABLE: dict[str, dict[str, Route]] = {}
for _route in ROUTES:
    (_VARIABLE if "{id}" in _route.path else _FIXED).setdefault(_route.path, {})[_route.method] = _route
