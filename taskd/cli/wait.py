"""taskd wait: until tasks have ended."""

from __future__ import annotations

from typing import Any

import click

from taskd.cli.outcome import TIMED_OUT
from taskd.cli.output import note, warn
from taskd.cli.parameters import Duration
from taskd.cli.selection import filters, ids_argument, selection
from taskd.cli.session import Session, talks
from taskd.client.call import Deadline


@click.command(
    "wait",
    epilog="""\b
Examples:
  taskd wait last
  taskd wait 5b3f2a1c 77d0e9f4 --timeout 10m
  taskd wait --queue bulk

The exit code is that of the task; of several it is 0 if all succeeded, else 1. 124: the time was up.""",
)
@ids_argument()
@filters
@click.option("--timeout", type=Duration(), metavar="TIME", help="Wait no longer; the tasks go on.")
@click.option("--json", "as_json", is_flag=True, help="Print how the tasks ended, a line each where they are several.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing; the exit code says it.")
@talks
def wait(
    session: Session,
    *,
    ids: tuple[str, ...],
    filters: dict[str, Any],
    timeout: float | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Wait until tasks have ended. Filters mean those that have not, unless they name a state."""
    from taskd.cli.waiting import Waiting, whole_ids

    selection(ids, filters)
    deadline = Deadline(timeout)
    try:
        if ids:
            wanted = whole_ids(session, list(ids), deadline)
        else:
            unfinished = session.tasks({"states": ["unfinished"], **filters}, deadline=deadline)
            wanted = [task["id"] for task in unfinished]
    except TimeoutError:
        if not quiet:
            warn("the daemon has not said in time which tasks these are")
        return TIMED_OUT
    if not wanted:
        note("there is nothing to wait for")
        return 0
    waiting = Waiting(session, wanted, is_quiet=quiet or as_json)
    waiting.run(deadline)
    if as_json:
        waiting.print_json()
    return waiting.exit_code
