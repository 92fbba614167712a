"""taskd events: what happens in the cluster, a line each."""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from contextlib import closing
from math import inf
from typing import Any

import click

from taskd.cli.output import clean, json_text, short, state_text, warn
from taskd.cli.session import Session, talks
from taskd.client import calls
from taskd.client.call import Call
from taskd.client.errors import ConnectionLost
from taskd.client.lines import LineSplitter
from taskd.errors import TaskdError

SUBJECT_CHARS = len("durability")
WORD_CHARS = len("replicated")  # of the longest state
NAMES_TIMEOUT_S = 2.0  # An event without the name of its node is better than one that comes late.
REOPEN_S = 0.2  # A daemon that stops ends its streams before its socket is gone.

Json = dict[str, Any]


@click.command(
    "events",
    epilog="""\b
Examples:
  taskd events -f
  taskd events --kind leader --kind standby --kind durability
  taskd events --kind task.failed --kind node --json | while read event; do …; done

There is no history: events are those from now on, until Ctrl-C.""",
)
@click.option("-f", "--follow", is_flag=True, help="Go on for ever, also when the daemon is away for a time.")
@click.option(
    "--kind",
    multiple=True,
    metavar="KIND",
    help="Only this kind: task, task.failed, node, leader, standby, durability; repeatable.",
)
@click.option("--task", multiple=True, metavar="ID", help="Only events of this task; may be repeated.")
@click.option("-n", "--count", type=click.IntRange(min=1), metavar="N", help="End after this many events.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document a line.")
@talks
def events(
    session: Session, *, follow: bool, kind: tuple[str, ...], task: tuple[str, ...], count: int | None, as_json: bool
) -> None:
    """Print what happens: tasks begin and end, nodes come and go, a leader takes over, copies are lost or complete."""
    # Names are asked for without patience, beside the stream.
    with (
        closing(_read(session, calls.events(kinds=kind, tasks=task), follow)) as found,
        session.beside() as other,
    ):
        names = _Names(other)
        for event in found:
            if as_json:
                click.echo(json_text(event))
            else:
                _print(event, names)
            count = None if count is None else count - 1
            if count == 0:
                return


def _read(session: Session, call: Call, follow: bool) -> Generator[Json]:
    """Events as they come; with `follow` those of the next stream too, whenever one has ended."""
    if follow:
        session.be_patient(inf)
    is_first = True
    while True:
        lines = LineSplitter()
        try:
            with session.transport.open(call) as stream:
                if not is_first:
                    warn(f"events go on here, some may be missing{_leader_text(session)}")
                    session.has_recovered()
                while data := stream.read():
                    for line in lines.feed(data):
                        if line.startswith(b"data:"):
                            yield json.loads(line[5:])
        except ConnectionLost:
            if not follow:
                raise
        if not follow:
            return
        is_first = False
        time.sleep(REOPEN_S)


def _leader_text(session: Session) -> str:
    """Who leads by now: that may be what was missed."""
    try:
        found = session.ask(calls.cluster())
    except TaskdError:
        return ""
    return "" if found["leader"] is None else f"; {clean(found['leader_name'])} leads, term {found['term']}"


class _Names:
    """What nodes are called: learned from events, and asked for where they do not say."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._names: dict[int, str] = {}
        self._is_asked = False  # since somebody new was heard of

    def learn(self, event: Json) -> None:
        """An event may bring a name, or somebody who knows more of them."""
        if event["kind"] in ("node.up", "standby.in_sync", "standby.behind", "standby.gone") and event.get("detail"):
            self._names[event["node_id"]] = event["detail"]
        elif event["kind"] == "leader.changed":
            self._is_asked = False

    def of(self, node_id: int) -> str:
        """A node's name with its id, or the id alone."""
        if node_id not in self._names and not self._is_asked:
            self._ask()
        name = self._names.get(node_id)
        return f"node {node_id}" if name is None else f"{clean(name)} (id {node_id})"

    def _ask(self) -> None:
        self._is_asked = True
        try:
            answer = self._session.ask(calls.nodes()._replace(timeout_s=NAMES_TIMEOUT_S))
        except TaskdError:
            return
        self._names.update((node["node_id"], node["name"]) for node in answer["nodes"])


def _print(event: Json, names: _Names) -> None:
    names.learn(event)
    at = time.strftime("%H:%M:%S", time.localtime(event["at"]))
    subject, _, word = event["kind"].partition(".")
    padding = " " * (WORD_CHARS - len(word))
    text = _text(event, names)
    click.echo(f"{click.style(at, dim=True)}  {subject:<{SUBJECT_CHARS}}  {state_text(word)}{padding}  {text}".rstrip())


def _text(event: Json, names: _Names) -> str:
    """An event in a sentence; in what the daemon says of it, where there are no better words."""
    detail = clean(event.get("detail") or "")
    node = names.of(event["node_id"]) if event.get("node_id") is not None else ""
    match event["kind"]:
        case "leader.changed":
            return f"{node} leads from now on" + (f", {detail}" if detail else "")
        case "standby.in_sync":
            return f"{node} has a copy of everything"
        case "standby.behind":
            return f"{node} does not keep up: its copy does not count for now"
        case "standby.gone":
            return f"{node} keeps no copy any more"
        case "standby.behind":
            return f"{node} does not keep up: its copy does not count until it has caught up"
        case "durability.replicated":
            return "a standby keeps a copy of everything from now on"
        case "durability.local":
            return "no standby is in sync any more: there is one copy of what comes now"
        case "node.up":
            return node
    about = short(event["id"]) if event.get("id") else ""
    if node:
        about = f"{about} on {node}" if about else node
    return "  ".join(part for part in (about, detail) if part)
