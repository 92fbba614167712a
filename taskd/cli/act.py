"""taskd cancel, taskd retry: something is done to tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from taskd.cli.output import note, plural, print_json, warn
from taskd.cli.selection import filters, ids_argument, selection
from taskd.cli.session import Session, talks
from taskd.client import calls
from taskd.client.call import Call

# What people mean by "run those again" when they name no state: a task that somebody cancelled is not among them.
RETRIED_STATES = ["failed", "timed_out", "expired"]


@click.command(
    "cancel",
    epilog="""\b
Examples:
  taskd cancel last
  taskd cancel 5b3f2a1c 77d0e9f4
  taskd cancel --queue bulk --state queued""",
)
@ids_argument()
@filters
@click.option("--json", "as_json", is_flag=True, help="Print the ids of the tasks that were cancelled.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing.")
@talks
def cancel(session: Session, *, ids: tuple[str, ...], filters: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Cancel tasks. One that runs is asked to end, and after its grace time made to."""
    acted = _act(session, calls.cancel, selection(ids, filters))
    if as_json:
        print_json({"ids": acted})
    elif not quiet:
        ended = len(set(ids)) - len(acted) if ids else 0
        click.echo(f"cancelled {plural(len(acted), 'task')}" + (f", {ended:,} had ended already" if ended > 0 else ""))


@click.command(
    "retry",
    epilog="""\b
Examples:
  taskd retry last
  taskd retry --state failed --label project=x

Filters mean tasks that failed, timed out or expired, unless they name a state.""",
)
@ids_argument()
@filters
@click.option("--json", "as_json", is_flag=True, help="Print the ids of the new tasks as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print the new ids alone.")
@talks
def retry(session: Session, *, ids: tuple[str, ...], filters: dict[str, Any], as_json: bool, quiet: bool) -> int:
    """Run ended tasks again, each as a new task, and print the new ids.

    The exit code is 1 where ids are given and none of those tasks has ended."""
    chosen = selection(ids, filters)
    if not ids:
        chosen.setdefault("states", RETRIED_STATES)
    acted = _act(session, calls.retry, chosen)
    if as_json:
        print_json({"ids": acted})
    else:
        for task_id in acted:
            click.echo(task_id)
    left = len(set(ids)) - len(acted) if ids else 0
    if left > 0:
        warn("it has not ended" if len(set(ids)) == 1 else f"{plural(left, 'task')} of {len(set(ids)):,} had not ended")
    elif not acted and not (as_json or quiet):
        note("there is nothing to retry")
    return 1 if ids and not acted else 0


def _act(session: Session, call: Callable[[dict[str, Any]], Call], chosen: dict[str, Any]) -> list[str]:
    """Do it to all tasks of a selection, however many there are; returns their ids."""
    acted: list[str] = []
    while True:
        answer = session.ask(call(chosen))
        acted += answer["ids"]
        if not answer["cursor"]:
            return acted
        chosen = {**chosen, "cursor": answer["cursor"]}
