"""Which tasks a command means: ids, ends of ids, `last`, or what they have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from taskd.cli.parameters import Pair

STATES = (
    "unfinished", "finished", "scheduled", "queued", "assigned", "running", "retrying", "cancelling", "succeeded",
    "failed", "cancelled", "timed_out", "expired",
)  # fmt: skip
RECENT_TASKS = 50  # Offered by the shell's completion.

Function = Callable[..., Any]


def filters(function: Function) -> Function:
    """Adds --state, --queue, --type, --label, --name, --owner, handed on as `filters` in the words of `calls.tasks`."""

    @functools.wraps(function)
    def command(*args: Any, **options: Any) -> Any:
        found = {
            "states": [word for text in options.pop("state") for word in text.split(",") if word],
            "queues": list(options.pop("queue")),
            "types": list(options.pop("type")),
            "labels": dict(options.pop("label")),
            "name": options.pop("name") or "",
            "owner": options.pop("owner") or "",
        }
        return function(*args, filters={key: value for key, value in found.items() if value}, **options)

    wrapped: Function = command
    for option in (
        click.option("--owner", metavar="USER", help="Tasks of this user; `me` for your own."),
        click.option("--name", help="Tasks of this name."),
        click.option("--label", multiple=True, type=Pair(), help="Tasks that have this label; may be repeated."),
        click.option("--type", multiple=True, metavar="TYPE", help="Tasks of this type."),
        click.option("--queue", multiple=True, metavar="QUEUE", help="Tasks of this queue."),
        click.option(
            "-s", "--state", multiple=True, metavar="STATE", shell_complete=_complete_state,
            help="Tasks in this state, such as failed, running, unfinished; may be repeated.",
        ),
    ):  # fmt: skip
        wrapped = option(wrapped)
    return wrapped


def ids_argument(required: bool = False) -> Callable[[Function], Function]:
    """Adds ID..., handed on as `ids`."""
    return click.argument("ids", nargs=-1, required=required, metavar="ID...", shell_complete=complete_id)


def id_argument(function: Function) -> Function:
    """Adds ID, handed on as `task_id`."""
    return click.argument("task_id", metavar="ID", shell_complete=complete_id)(function)


def selection(ids: tuple[str, ...], filters: dict[str, Any]) -> dict[str, Any]:
    """A selection as the API takes it. Raises UsageError where nothing is selected, or both ways are used."""
    if ids and filters:
        raise click.UsageError("give either ids or filters such as --state, not both")
    if ids:
        return {"ids": list(ids)}
    if not filters:
        raise click.UsageError("say which tasks: ids, ends of ids, `last`, or filters such as --state and --queue")
    chosen = dict(filters)
    for one, many in (("name", "names"), ("owner", "owners")):
        if one in chosen:
            chosen[many] = [chosen.pop(one)]
    return chosen


def complete_id(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """The newest tasks, for the shell's completion; nothing where no daemon answers."""
    from click.shell_completion import CompletionItem

    from taskd.cli.output import short
    from taskd.cli.session import Session
    from taskd.errors import TaskdError

    try:
        with Session(ctx.params.get("socket"), ctx.params.get("access")) as session:
            tasks = list(session.tasks({}, RECENT_TASKS))
    except TaskdError:
        return []
    found = [CompletionItem("last", help="the newest")]
    found += [
        CompletionItem(short(task["id"]), help=f"{task['state']}: {task['name'] or task['command']}") for task in tasks
    ]
    return [item for item in found if item.value.startswith(incomplete)]


def _complete_state(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(state) for state in STATES if state.startswith(incomplete)]
