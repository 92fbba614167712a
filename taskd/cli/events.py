"""taskd events: what happens in the cluster, a line each."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from taskd.cli.output import clean, short, state_text
from taskd.cli.session import Session, talks
from taskd.client import calls
from taskd.client.errors import ConnectionLost
from taskd.client.lines import LineSplitter

WORD_CHARS = len("replicated")  # of the longest state
SUBJECT_CHARS = len("standby")

Json = dict[str, Any]


@click.command(
    "events",
    epilog="""\b
Examples:
  taskd events
  taskd events --kind task.failed --kind node --json | while read event; do …; done

There is no history: events are those from now on, until Ctrl-C.""",
)
@click.option("-f", "--follow", is_flag=True, help="Go on for ever, also over restarts and changes of leaders.")
@click.option(
    "--kind",
    multiple=True,
    metavar="KIND",
    help="Only this kind: task, task.failed, node, leader, standby, durability; repeatable.",
)
@click.option("--task", multiple=True, metavar="ID", help="Only events of this task; may be repeated.")
@click.option("-n", "--count", type=click.IntRange(min=1), metavar="N", help="End after so many.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document a line.")
@talks
def events(
    session: Session, *, follow: bool, kind: tuple[str, ...], task: tuple[str, ...], count: int | None, as_json: bool
) -> None:
    """Print what happens: tasks begin and end, nodes come and go, a leader takes over, copies are lost or complete."""
    if follow:
        session.be_patient()
    call = calls.events(kinds=kind, tasks=task)
    while True:
        lines = LineSplitter()
        try:
            with session.transport.open(call) as stream:
                while data := stream.read():
                    for line in lines.feed(data):
                        if not line.startswith(b"data:"):
                            continue
                        _print(json.loads(line[5:]), as_json)
                        count = None if count is None else count - 1
                        if count == 0:
                            return
        except ConnectionLost:
            if not follow:
                raise
        if not follow:
            return


def _print(event: Json, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(event, ensure_ascii=False))
        return
    at = time.strftime("%H:%M:%S", time.localtime(event["at"]))
    subject, _, word = event["kind"].partition(".")
    about = short(event["id"]) if event.get("id") else ""
    if event.get("node_id") is not None:
        about = f"{about} on node {event['node_id']}" if about else f"node {event['node_id']}"
    detail = clean(event["detail"]) if event.get("detail") else ""
    if event["kind"] == "leader.changed":
        about, detail = f"{about} leads from now on", f"({detail})" if detail else ""
    elif subject == "durability":
        about, subject = "", "copies"
    text = "  ".join(part for part in (about, detail) if part)
    padding = " " * (WORD_CHARS - len(word))
    click.echo(f"{click.style(at, dim=True)}  {subject:<{SUBJECT_CHARS}}  {state_text(word)}{padding}  {text}".rstrip())
