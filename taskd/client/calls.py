"""Every request of the local API that clients make, in one place. Imports no more than the command line can afford."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from taskd.client.call import TIMEOUT_S, Call
from taskd.client.http1 import query, quote

BODY_BYTES_MAX = 16 << 20  # Of a request; the daemon refuses more.
WAIT_S_MAX = 86_400.0  # Of one request that waits; whoever waits longer asks again.
PAGE_TASKS_MAX = 1000

Selection = Mapping[str, Sequence[str] | Mapping[str, str]]  # ids, states, queues, types, labels


def encode(document: object) -> bytes:
    """JSON without blanks."""
    return json.dumps(document, separators=(",", ":")).encode()


def submit(body: bytes, *, wait_s: float | None = None, is_stream: bool = False) -> Call:
    """Submit one task or a list. Repeatable: the tasks carry ids of the client's own.

    `wait_s` asks for the results in the same answer, at most so much later; `is_stream` for lines as the tasks end.
    """
    if is_stream:
        return Call("POST", "/v1/tasks?stream=1", body)
    if wait_s is not None:
        return Call("POST", f"/v1/tasks?wait={wait_s:.3f}", body, timeout_s=wait_s + TIMEOUT_S)
    return Call("POST", "/v1/tasks", body)


def wait(ids: Sequence[str], timeout_s: float | None = None) -> Call:
    """Lines with the results of tasks as they end, until all have or the time is up."""
    limit_s = WAIT_S_MAX if timeout_s is None else min(max(timeout_s, 0.0), WAIT_S_MAX)
    body = encode({"ids": list(ids), "timeout": limit_s, "stream": True})
    return Call("POST", "/v1/tasks/wait", body, timeout_s=limit_s + TIMEOUT_S)


def plan(body: bytes) -> Call:
    """What a submission would become; nothing is submitted."""
    return Call("POST", "/v1/tasks/plan", body)


def tasks(
    *,
    states: Sequence[str] = (),
    queues: Sequence[str] = (),
    types: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
    owner: str = "",
    name: str = "",
    cursor: str = "",
    limit: int = PAGE_TASKS_MAX,
) -> Call:
    """One page of tasks, newest first."""
    return Call(
        "GET",
        "/v1/tasks"
        + query(
            state=",".join(states),
            queue=",".join(queues),
            type=",".join(types),
            label=",".join(f"{key}={value}" for key, value in (labels or {}).items()),
            owner=owner,
            name=name,
            cursor=cursor,
            limit=limit,
        ),
    )


def task(task_id: str) -> Call:
    """One task in full. Here as everywhere an id may be an unambiguous end of one, or `last`."""
    return Call("GET", f"/v1/tasks/{quote(task_id)}")


def result(task_id: str, wait_s: float) -> Call:
    """How a task ended, or after `wait_s` how it stands."""
    target = f"/v1/tasks/{quote(task_id)}/result" + query(wait=f"{wait_s:.3f}")
    return Call("GET", target, timeout_s=wait_s + TIMEOUT_S)


def explain(task_id: str) -> Call:
    """Why a task stands where it stands."""
    return Call("GET", f"/v1/tasks/{quote(task_id)}/explain")


def output(task_id: str, stream: str, *, follow: bool = False, offset: int = 0, attempt: int | None = None) -> Call:
    """What a task wrote: the raw bytes of `stdout` or `stderr`, or lines of `both`."""
    target = f"/v1/tasks/{quote(task_id)}/output"
    fields = query(stream=stream, follow=1 if follow else None, offset=offset or None, attempt=attempt)
    return Call("GET", target + fields, timeout_s=None if follow else TIMEOUT_S)


def cancel(selection: Selection) -> Call:
    """Cancel all tasks of a selection."""
    return Call("POST", "/v1/tasks/cancel", encode(selection))


def retry(selection: Selection) -> Call:
    """Run tasks that did not succeed again, as new tasks: not to be sent twice."""
    return Call("POST", "/v1/tasks/retry", encode(selection), is_repeatable=False)


def nodes() -> Call:
    """All nodes that the leader knows."""
    return Call("GET", "/v1/nodes")


def node(node: str) -> Call:
    """One node, by its id or name."""
    return Call("GET", f"/v1/nodes/{quote(node)}")


def drain(node: str, reason: str) -> Call:
    """Give a node no new tasks."""
    return Call("POST", f"/v1/nodes/{quote(node)}/drain", encode({"reason": reason}))


def resume(node: str) -> Call:
    """Use a node again."""
    return Call("POST", f"/v1/nodes/{quote(node)}/resume", b"{}")


def cluster() -> Call:
    """The cluster as the node that is asked sees it."""
    return Call("GET", "/v1/cluster")


def handlers() -> Call:
    """All types of handlers on offer."""
    return Call("GET", "/v1/handlers")


def events(*, kinds: Sequence[str] = (), tasks: Sequence[str] = ()) -> Call:
    """Everything that changes from now on, or a part of it, as server-sent events."""
    return Call("GET", "/v1/events" + query(kind=",".join(kinds), task=",".join(tasks)), timeout_s=None)


def backup() -> Call:
    """A copy of what this scheduler keeps, as a stream. Making it takes a second for some hundred MiB."""
    return Call("GET", "/v1/backup", is_repeatable=False, timeout_s=None)


def ready() -> Call:
    """Whether the daemon serves: a leader is known and answers."""
    return Call("GET", "/readyz")
