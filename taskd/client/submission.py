"""Tasks to submit, as JSON: what a task is, the options that go with it, and many of them in few requests. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, Literal, NamedTuple, TypedDict

import msgspec

from taskd.client.calls import BODY_BYTES_MAX
from taskd.client.ids import new_id

Duration = float | str | timedelta
Instant = float | str | datetime

# Of one request for many tasks: large enough for group commits, small enough that results of the first come early.
CHUNK_TASKS_MAX = 2000
CHUNK_BYTES_MAX = 4 << 20
IDS_MAX = 100_000  # Of one request that names tasks.
_TASK_OVERHEAD_BYTES = 2


class Options(TypedDict, total=False):
    """What can be said of any task beside what it does. Durations are seconds, text such as "1h30m", or timedelta."""

    name: str
    queue: str
    priority: int  # higher first
    cpus: float
    memory: int | str  # bytes, or text such as "2GiB"
    gpus: float
    resources: Mapping[str, float]
    constraints: Sequence[str]  # such as "os=debian" or "arch!=arm64"
    delay: Duration
    at: Instant  # not before; datetime, ISO 8601, or UTC seconds
    deadline: Duration  # from now: must have begun by then
    timeout: Duration  # of one attempt
    grace: Duration  # between TERM and KILL
    retries: int
    backoff: Duration | Mapping[str, Any]  # the first delay, or initial, factor, max and jitter
    on_lost: Literal["retry", "fail"]
    env: Mapping[str, str]
    secrets: Mapping[str, str]  # names of secrets on the workers, by variable
    cwd: str
    labels: Mapping[str, str]


OPTION_NAMES = frozenset(Options.__annotations__)


class Chunk(NamedTuple):
    """Some tasks that are asked for in one request; None for the body of those that were submitted before."""

    ids: list[str]
    body: bytes | None


def task_type(task: object) -> str:
    """The type of a task given by its name, as a function declared with @task, or as a TaskHandler."""
    if isinstance(task, str):
        return task
    for name in ("task_type", "type"):
        found = getattr(task, name, None)
        if isinstance(found, str) and found:
            return found
    raise TypeError(f"{task!r} is no task: give the name of a handler, or a function declared with @task")


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as the API takes them. Raises TypeError for one that does not exist."""
    unknown = options.keys() - OPTION_NAMES
    if unknown:
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}; there are {', '.join(sorted(OPTION_NAMES))}")
    return {name: _plain(name, value) for name, value in options.items() if value is not None}


def head(type: str, options: Mapping[str, Any], **work: Any) -> bytes:
    """The part that many tasks share, as JSON that lacks its closing brace. `options` are checked ones."""
    return msgspec.json.encode({"type": type, **work, **options})[:-1]


def command(command: Sequence[str] | str, options: Mapping[str, Any]) -> bytes:
    """A command's head: a list is a program with its arguments, text is a line for the shell."""
    if isinstance(command, str):
        return head("command", options, shell=command)
    return head("command", options, argv=[str(part) for part in command])


def http_target(
    url: str, method: str, headers: Mapping[str, str] | None, expect_status: Sequence[int]
) -> dict[str, Any]:
    """What an http task calls."""
    target: dict[str, Any] = {"url": url, "method": method}
    if headers:
        target["headers"] = dict(headers)
    if expect_status:
        target["expect_status"] = list(expect_status)
    return target


def http(target: Mapping[str, Any], params: Any, options: Mapping[str, Any]) -> bytes:
    """An http task's head."""
    work = {"http": target} if params is None else {"http": target, "params": params}
    return head("http", options, **work)


def one(head: bytes, params: Mapping[str, Any] | None = None) -> tuple[str, bytes]:
    """One task with an id of its own: the id, and the JSON."""
    task_id = new_id()
    if params is None:
        return task_id, b'%b,"id":"%b"}' % (head, task_id.encode())
    if not isinstance(params, Mapping):
        raise TypeError(f"the parameters of a task are a dict of names and values, not {params!r:.100}")
    return task_id, b'%b,"id":"%b","params":%b}' % (head, task_id.encode(), msgspec.json.encode(params))


def chunks(head: bytes, params: Iterable[Mapping[str, Any]]) -> Iterator[Chunk]:
    """Tasks that differ by their params, in requests of a bounded size; `params` is read no further than needed.

    Raises TypeError for what JSON cannot say, and ValueError for a task larger than any request.
    """
    ids: list[str] = []
    tasks: list[bytes] = []
    size = 0
    for item in params:
        task_id, task = one(head, item)
        if len(task) + _TASK_OVERHEAD_BYTES > BODY_BYTES_MAX:
            raise ValueError(f"the parameters of one task have {len(task):,} bytes, more than a request may hold")
        if tasks and (len(tasks) == CHUNK_TASKS_MAX or size + len(task) > CHUNK_BYTES_MAX):
            yield Chunk(ids, b"[%b]" % b",".join(tasks))
            ids, tasks, size = [], [], 0
        ids.append(task_id)
        tasks.append(task)
        size += len(task) + _TASK_OVERHEAD_BYTES
    if tasks:
        yield Chunk(ids, b"[%b]" % b",".join(tasks))


def groups_of(ids: Iterable[str]) -> Iterator[Chunk]:
    """Tasks to wait for, in requests of a bounded size."""
    rest = iter(ids)
    while group := list(islice(rest, IDS_MAX)):
        yield Chunk(group, None)


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, datetime):
        return value.timestamp()  # One without a zone is local time, as everywhere in Python.
    if name == "backoff":
        if not isinstance(value, Mapping):
            return {"initial": value}
        return {part: _plain(part, amount) for part, amount in value.items()}
    return value
