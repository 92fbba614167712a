"""taskd node: the machines of the cluster."""

from __future__ import annotations

import time
from typing import Any

import click

from taskd.cli.output import (
    amounts_text,
    clean,
    duration_text,
    instant_text,
    note,
    pairs_text,
    print_fields,
    print_json,
    print_lines,
    print_table,
    size_text,
    state_text,
)
from taskd.cli.session import Session, talks
from taskd.client import calls

CLOCK_OFFSET_S_MAX = 1.0  # From here on a clock is worth a word.

Json = dict[str, Any]


def _complete_node(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    from click.shell_completion import CompletionItem

    from taskd.errors import TaskdError

    try:
        with Session(ctx.params.get("socket"), ctx.params.get("access")) as session:
            nodes = session.ask(calls.nodes())["nodes"]
    except TaskdError:
        return []
    return [CompletionItem(node["name"], help=node["state"]) for node in nodes if node["name"].startswith(incomplete)]


_node_argument = click.argument("node_id", metavar="NODE", shell_complete=_complete_node)


@click.group("node")
def node() -> None:
    """List, show, drain and resume nodes."""


@node.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document a line.")
@talks
def list_nodes(session: Session, as_json: bool) -> None:
    """List all nodes, those that are away included."""
    nodes = session.ask(calls.nodes())["nodes"]
    if as_json:
        print_lines(nodes)
        return
    now_s = time.time()
    rows = [
        [
            str(node["node_id"]),
            node["name"] + (click.style(" (leads)", dim=True) if node["is_leader"] else ""),
            "+".join(node["roles"]),
            state_text(node["state"]),
            f"{node['running']}/{node['slots']}" if node["slots"] else "-",
            amounts_text(node["capacity"]) or "-",
            _clock_text(node),
            _note(node, now_s),
        ]
        for node in nodes
    ]
    print_table(["ID", "NAME", "ROLES", "STATE", "BUSY", "HAS", "CLOCK", "NOTE"], rows, flexible="NOTE")


def _note(found: Json, now_s: float) -> str:
    is_away = found["state"] == "lost" and found["seen"]
    parts = [f"last seen {duration_text(now_s - found['seen'])} ago" if is_away else "", clean(found["drain_reason"])]
    return ", ".join(part for part in parts if part)


@node.command("show", epilog="\b\nExample:\n  taskd node show worker-7")
@_node_argument
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@talks
def show(session: Session, node_id: str, as_json: bool) -> None:
    """Show a node, given by its id or name."""
    found = session.ask(calls.node(node_id))
    if as_json:
        print_json(found)
    else:
        _print_node(found)


@node.command(
    "drain",
    epilog="""\b
Examples:
  taskd node drain worker-7 -m 'kernel update'
  taskd node drain worker-7 && taskd node show worker-7""",
)
@_node_argument
@click.option("-m", "--reason", default="", metavar="TEXT", help="Why; lists and `explain` show it.")
@click.option("--json", "as_json", is_flag=True, help="Print the node as JSON.")
@talks
def drain(session: Session, node_id: str, reason: str, as_json: bool) -> None:
    """Give a node no new tasks; those that run there go on. It stays drained, also over restarts, until resumed."""
    found = session.ask(calls.drain(node_id, reason))
    if as_json:
        print_json(found)
        return
    click.echo(f"{found['name']} is {state_text(found['state'])}" + _still_running(found))
    note(f"use it again: taskd node resume {found['name']}")


@node.command("resume")
@_node_argument
@click.option("--json", "as_json", is_flag=True, help="Print the node as JSON.")
@talks
def resume(session: Session, node_id: str, as_json: bool) -> None:
    """Use a drained node again."""
    found = session.ask(calls.resume(node_id))
    if as_json:
        print_json(found)
    else:
        click.echo(f"{found['name']} is {state_text(found['state'])}")


def _still_running(found: Json) -> str:
    return f"; {found['running']} still running there" if found["running"] else ""


def _clock_text(found: Json) -> str:
    offset_s = found["clock_offset_s"]
    if offset_s is None:
        return "-"
    text = (
        "ok" if abs(offset_s) < CLOCK_OFFSET_S_MAX else f"{'+' if offset_s > 0 else '-'}{duration_text(abs(offset_s))}"
    )
    return text if text == "ok" else click.style(text, fg="red")


def _print_node(found: Json) -> None:
    leads = ", leads" if found["is_leader"] else ""
    click.echo(f"{click.style(found['name'], bold=True)}  {state_text(found['state'])}{leads}")
    used = {name: f"{_amount(name, found['used'].get(name, 0))} of {_amount(name, has)}" for name, has in
            found["capacity"].items()}  # fmt: skip
    round_trip_s = found["round_trip_s"]
    print_fields([
        ("id", str(found["node_id"])),
        ("roles", ", ".join(found["roles"])),
        ("version", found["version"]),
        ("address", found["address"]),
        ("drained", found["drain_reason"]),
        ("slots", f"{found['slots']}, {found['running']} busy" if found["slots"] else ""),
        ("waiting there", str(found["waiting"] or "")),
        *((name, f"{text} used") for name, text in used.items()),
        ("labels", pairs_text(found["labels"])),
        ("runs", ", ".join(found["types"])),
        ("clock", _clock_text(found)),
        ("round trip", "" if round_trip_s is None else f"{round_trip_s * 1000:.1f}ms"),
        ("seen", instant_text(found["seen"]) if found["state"] == "lost" and found["seen"] else ""),
    ])  # fmt: skip


def _amount(name: str, amount: float) -> str:
    return size_text(amount) if name == "memory" else f"{amount:g}"
