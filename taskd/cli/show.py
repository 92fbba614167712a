"""taskd show: everything about one task, on a page."""

from __future__ import annotations

import json
import shlex
import time
from itertools import pairwise
from typing import Any

import click

from taskd.cli.listing import took_s
from taskd.cli.outcome import signal_text
from taskd.cli.output import (
    amounts_text,
    clean,
    duration_text,
    instant_text,
    note,
    pairs_text,
    plural,
    print_fields,
    print_json,
    short,
    size_text,
    state_text,
)
from taskd.cli.selection import id_argument
from taskd.cli.session import Session, talks
from taskd.client import calls

TAIL_LINES = 10
TAB = "\t"
VALUE_CHARS_MAX = 2000  # Of params and results; --json has all.
PROVISIONAL = "it ended while a scheduler was away, which still is and may bring another end"
DIVIDED = "it was given out by leaders that did not know of each other"
TOO_OFTEN = "it ran more often than its retries allow: a worker or a scheduler that ran it too was out of reach"
UNCOUNTED = (None, "lost", "preempted")  # Outcomes of attempts that use up no retry.

Json = dict[str, Any]


@click.command("show", epilog="\b\nExamples:\n  taskd show last\n  taskd show 5b3f2a1c --json | jq .attempts")
@id_argument
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@talks
def show(session: Session, task_id: str, as_json: bool) -> None:
    """Show a task: what it is, how it stands, its attempts, its error, the end of its output."""
    task = session.ask(calls.task(task_id))
    if as_json:
        print_json(task)
        return
    now_s = time.time()
    click.echo(f"{click.style(task['id'], bold=True)}  {state_text(task['state'])}")
    print_fields((name, clean(value, "\n\t")) for name, value in (*_what(task), *_when(task, now_s)))
    for attempt in task["attempts"]:
        _show_attempt(attempt, now_s, with_leader=bool(_history(task)))
    if task["result"] is not None:
        _show_block("result", _cut(json.dumps(task["result"], indent=2, ensure_ascii=False)))
    if task["attempts"]:
        _show_tails(task)
    if task["state"] in ("queued", "scheduled", "retrying", "assigned"):
        note(f"why it waits: taskd explain {short(task['id'])}")


def _what(task: Json) -> list[tuple[str, str]]:
    what = {"command": "command", "http": "calls"}.get(task["type"], "handler")
    doing = task["shell"] or shlex.join(task["argv"]) or task["type"]
    if task["http"]:
        doing = f"{task['http'].get('method', 'POST')} {task['http']['url']}"
    has_params = task["params"] is not None
    return [
        ("name", task["name"]),
        (what, doing),
        ("params", _cut(json.dumps(task["params"], ensure_ascii=False)) if has_params else ""),
        ("directory", task["cwd"]),
        ("variables", pairs_text(task["env"])),
        ("secrets", pairs_text(task.get("secrets", {}))),
        ("queue", f"{task['queue']}, priority {task['priority']}"),
        ("owner", task["owner"]),
        ("labels", pairs_text(task["labels"])),
        ("needs", amounts_text(task["resources"])),
        ("only where", ", ".join(task["constraints"])),
        ("retry of", task["retry_of"] or ""),
    ]


def _when(task: Json, now_s: float) -> list[tuple[str, str]]:
    again = f"up to {plural(task['retries'], 'time')}" if task["retries"] else ""
    return [
        ("submitted", instant_text(task["submitted"], now_s)),
        ("not before", instant_text(task["not_before"], now_s)),
        ("to begin by", instant_text(task["deadline"], now_s)),
        ("next try", instant_text(task["due"], now_s) if task["finished"] is None else ""),
        ("finished", instant_text(task["finished"], now_s)),
        ("took", duration_text(took_s(task, now_s))),
        ("timeout", duration_text(task["timeout"]) if task["timeout"] else ""),
        ("retries", again),
        ("when lost", "fails" if task["on_lost"] == "fail" else ""),
        ("reason", task["reason"]),
        ("provisional", PROVISIONAL if task.get("provisional") else ""),
        ("history", _history(task)),
    ]


def _history(task: Json) -> str:
    """What is unusual about the attempts of a task; the last one of them is the one that counts."""
    attempts = task["attempts"]
    if any(later["number"] <= earlier["number"] for earlier, later in pairwise(attempts)):
        return f"{DIVIDED}; the last attempt counts"  # Each counts on from what it knew.
    if sum(attempt["outcome"] not in UNCOUNTED for attempt in attempts) > task["retries"] + 1:
        return f"{TOO_OFTEN}; the last attempt counts"
    return ""


def _show_attempt(attempt: Json, now_s: float, *, with_leader: bool) -> None:
    outcome = attempt["outcome"] or ("running" if attempt["started"] else "waiting at the worker")
    where = clean(attempt["worker_name"] or str(attempt["worker"]))
    if with_leader:
        term, leader = attempt["fence"].split(".")[:2]
        where += f", given out by node {leader} in term {term}"
    click.echo(f"attempt {attempt['number']} on {where}: {_outcome_text(outcome)}")
    end_s = attempt["ended"] or now_s
    error = attempt["error"]
    fields = [
        ("exit code", "" if attempt["exit_code"] is None else str(attempt["exit_code"])),
        ("signal", signal_text(attempt["signal"]) if attempt["signal"] else ""),
        ("ran for", duration_text(end_s - attempt["started"]) if attempt["started"] else ""),
        ("cpu time", duration_text(attempt["cpu_s"]) if attempt["cpu_s"] else ""),
        ("peak memory", size_text(attempt["memory_peak_bytes"]) if attempt["memory_peak_bytes"] else ""),
        ("reason", attempt["reason"]),
    ]
    if error:
        fields.append(("error", f"{error['type']}: {error.get('message', '')}".rstrip(": ")))
        fields.append(("", error.get("traceback", "").rstrip()))
    print_fields(((name, clean(value, "\n\t")) for name, value in fields), indent="  ")


def _outcome_text(outcome: str) -> str:
    colour = {"ok": "green", "running": "cyan"}.get(outcome, None if outcome.startswith("waiting") else "red")
    return click.style(outcome.replace("_", " "), fg=colour)


def _show_tails(task: Json) -> None:
    last = task["attempts"][-1]
    for stream in ("stdout", "stderr"):
        lines = last[f"{stream}_tail"].removesuffix("\n").split("\n")
        if lines != [""]:
            hidden = last[f"{stream}_bytes"] > len("\n".join(lines[-TAIL_LINES:]).encode()) + 1
            _show_block(stream + (", its end" if hidden else ""), "\n".join(lines[-TAIL_LINES:]))


def _show_block(heading: str, text: str) -> None:
    click.echo(f"{heading}:")
    for line in text.split("\n"):
        click.echo(f"  {clean(line, TAB)}")


def _cut(text: str) -> str:
    return (
        text if len(text) <= VALUE_CHARS_MAX else text[:VALUE_CHARS_MAX] + f"… ({len(text):,} characters; see --json)"
    )
