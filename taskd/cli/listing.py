"""taskd list: tasks in a table, newest first."""

from __future__ import annotations

import time
from typing import Any

import click

from taskd.cli.output import clean, duration_text, note, print_lines, print_table, short, state_text
from taskd.cli.selection import filters
from taskd.cli.session import Session, talks

LIMIT = 30

Json = dict[str, Any]


@click.command(
    "list",
    epilog="""\b
Examples:
  taskd list
  taskd list --state unfinished --queue bulk
  taskd list --all --state failed --json | jq -r .id""",
)
@filters
@click.option(
    "-n", "--limit", type=click.IntRange(min=1), default=LIMIT, metavar="N", help=f"So many, {LIMIT} by default."
)
@click.option("-a", "--all", "is_all", is_flag=True, help="All of them.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document a line.")
@talks
def list_tasks(session: Session, *, filters: dict[str, Any], limit: int, is_all: bool, as_json: bool) -> None:
    """List tasks, newest first."""
    wanted = None if is_all else limit
    if as_json:
        print_lines(session.tasks(filters, wanted))
        return
    tasks = list(session.tasks(filters, None if wanted is None else wanted + 1))
    if not tasks:
        note("there are no such tasks" if filters else "there are no tasks yet; submit one with taskd submit -- CMD")
        return
    now_s = time.time()
    shown = tasks if wanted is None else tasks[:wanted]
    rows = [_row(task, now_s) for task in shown]
    print_table(["ID", "STATE", "TASK", "NODE", "AGE", "TOOK", "NOTE"], rows, flexible="TASK")
    if len(shown) < len(tasks):
        note(f"these are the newest {len(shown)}; see more with --limit N or --all")


def _row(task: Json, now_s: float) -> list[str]:
    return [
        short(task["id"]),
        state_text(task["state"]),
        clean(task["name"] or task["command"]),
        clean(task["worker_name"] or "-"),
        duration_text(now_s - task["submitted"]),
        duration_text(took_s(task, now_s)),
        _note(task),
    ]


def took_s(task: Json, now_s: float) -> float | None:
    """How long the newest attempt has run, or ran."""
    if task["started"] is None:
        return None
    if task["finished"] is not None:
        return float(task["finished"] - task["started"])
    return now_s - task["started"] if task["state"] in ("running", "cancelling") else None


def _note(task: Json) -> str:
    parts = []
    if task["exit_code"]:
        parts.append(f"exit {task['exit_code']}")
    if task["attempt"] > 1:
        parts.append(f"attempt {task['attempt']}")
    if task["reason"]:
        parts.append(clean(task["reason"]))
    return ", ".join(parts)
