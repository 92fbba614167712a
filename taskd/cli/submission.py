"""The options of a task, shared by submit and run, and the JSON that they become."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import click

from taskd.cli.parameters import Amount, Backoff, Duration, Instant, Pair, Quantity, SecretName, Size, Variable
from taskd.client.calls import BODY_BYTES_MAX
from taskd.client.errors import ApiError
from taskd.client.ids import new_id

CHUNK_TASKS_MAX = 2000
CHUNK_BYTES_MAX = 4 << 20

Function = Callable[..., Any]
Json = dict[str, Any]

_OPTIONS = (
    click.option("--name", help="What the task is called in lists."),
    click.option("--queue", metavar="NAME", help="The queue it is counted in."),
    click.option("--priority", type=int, metavar="N", help="Higher goes first."),
    click.option("--cpus", type=Quantity(), metavar="N", help="CPUs to reserve."),
    click.option("--memory", type=Size(), metavar="SIZE", help="Memory to reserve, such as 2GiB."),
    click.option("--gpus", type=Quantity(), metavar="N", help="GPUs to reserve."),
    click.option("--resource", multiple=True, type=Amount(), help="Another resource to reserve."),
    click.option(
        "--constraint", multiple=True, metavar="TEXT", help="What the worker's labels must be: os=debian, arch!=arm64."
    ),
    click.option("--delay", type=Duration(), metavar="TIME", help="Begin no sooner than this long from now."),
    click.option("--at", type=Instant(), metavar="WHEN", help='Begin no sooner: ISO 8601, or "tomorrow 09:00".'),
    click.option(
        "--deadline", type=Duration(), metavar="TIME", help="Give up if it has not begun in this time; 0: never."
    ),
    click.option("--timeout", type=Duration(), metavar="TIME", help="End an attempt that runs longer than this."),
    click.option("--retries", type=click.IntRange(0, 10_000), metavar="N", help="How often to try again if it fails."),
    click.option(
        "--backoff", type=Backoff(), metavar="TIME", help="Wait before trying again: 5s, or initial=1s,factor=2,max=5m."
    ),
    click.option(
        "--on-lost", type=click.Choice(["retry", "fail"]), help="When its worker is lost: run it again, or fail."
    ),
    click.option(
        "--secret", multiple=True, type=SecretName(), help="A secret of the worker's: VARIABLE=NAME, or NAME for both."
    ),
    click.option("-e", "--env", multiple=True, type=Variable(), help="A variable; KEY alone takes over your own."),
    click.option("--cwd", metavar="DIR", help="Where it runs; without it in a directory of its own on the worker."),
    click.option("-l", "--label", multiple=True, type=Pair(), help="A label to find the task by."),
)

# What a field of the API is called on the command line, where that is not the same.
_FLAGS = {
    "resources": "--resource", "constraints": "--constraint", "on_lost": "--on-lost", "labels": "--label",
    "secrets": "--secret", "http.method": "--http-method", "http.headers": "--http-header",
    "http": "--http", "argv": "CMD", "shell": "--shell", "type": "--type", "params": "--params",
}  # fmt: skip


_SAME = frozenset({
    "name", "queue", "priority", "cpus", "memory", "gpus", "delay", "at", "deadline", "timeout", "retries", "backoff",
    "env", "cwd",
})  # fmt: skip


def task_options(function: Function) -> Function:
    """Adds all options of a task, handed on as `options`, in the API's words."""

    @functools.wraps(function)
    def command(*args: Any, **given: Any) -> Any:
        return function(*args, options=_fields(given), **given)

    wrapped: Function = command
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def _fields(given: Json) -> Json:
    """Takes the options of a task out of all that were given."""
    fields = {name: given.pop(name) for name in (*sorted(_SAME - {"env", "cwd"}), "on_lost")}
    cwd = given.pop("cwd")
    fields.update(
        resources=dict(given.pop("resource")),
        constraints=list(given.pop("constraint")),
        env=dict(given.pop("env")),
        secrets=dict(given.pop("secret")),
        cwd=os.path.abspath(cwd) if cwd else None,
        labels=dict(given.pop("label")),
    )
    return {name: value for name, value in fields.items() if value not in (None, [], {})}


def encode(task: Json) -> bytes:
    """A task as JSON, with an id of its own unless it has one."""
    return json.dumps({"id": new_id(), **task}, ensure_ascii=False, separators=(",", ":")).encode()


def chunks(tasks: Iterator[Json]) -> Iterator[tuple[int, bytes]]:
    """Many tasks as JSON lists of a bounded size, each with how many it holds. Raises UsageError for one too large."""
    bodies: list[bytes] = []
    size = 0
    for number, task in enumerate(tasks, 1):
        body = encode(task)
        if len(body) + 2 > BODY_BYTES_MAX:
            raise click.UsageError(f"task {number} has {len(body):,} bytes, more than a request may hold")
        if bodies and (len(bodies) == CHUNK_TASKS_MAX or size + len(body) > CHUNK_BYTES_MAX):
            yield len(bodies), b"[" + b",".join(bodies) + b"]"
            bodies, size = [], 0
        bodies.append(body)
        size += len(body) + 1
    if bodies:
        yield len(bodies), b"[" + b",".join(bodies) + b"]"


def refusal(error: ApiError, first: int = 0) -> Exception:
    """What the daemon found wrong with a task, in the words of the command line. `first` is how many tasks were taken
    before those of a list."""
    if error.status != 400 or not error.field:
        return error
    place, field = "", error.field
    if field.startswith("["):
        index, _, field = field[1:].partition("]")
        place = f"task {first + int(index) + 1}: " if index.isdigit() else ""
        field = field.lstrip(".")
    where = f"{_flag(field)}: " if field else ""
    return click.UsageError(f"{place}{where}{error.message}")


def _flag(field: str) -> str:
    """The option behind a field of the API; the field itself where only a file can have given it."""
    names = re.split(r"[.\[]", field)
    for known in (".".join(names[:2]), names[0]):
        if known in _FLAGS:
            return _FLAGS[known]
    return f"--{names[0]}" if names[0] in _SAME else field
