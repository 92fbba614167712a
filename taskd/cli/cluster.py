"""taskd cluster: the whole in one look."""

from __future__ import annotations

import time
from typing import Any

import click

from taskd.cli.output import clean, duration_text, plural, print_fields, print_json, print_table, state_text
from taskd.cli.session import Session, talks
from taskd.client import calls

Json = dict[str, Any]


@click.group("cluster")
def cluster() -> None:
    """Say how the cluster is."""


@cluster.command(
    "status",
    epilog="""\b
Exit codes: 0 while a leader answers, be the cluster well or degraded; 1 while none does; 3 when no daemon answers.

\b
Example:
  until taskd cluster status --json | jq -e '.durability == "replicated"'; do sleep 1; done""",
)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@talks
def status(session: Session, as_json: bool) -> int:
    """Say who leads, who has a copy, who works, and what there is to do. Any node can be asked."""
    found = session.ask(calls.cluster())
    if as_json:
        print_json(found)
    else:
        _print_status(found)
    return 1 if found["health"] == "down" else 0


def _print_status(found: Json) -> None:
    click.echo(f"cluster {click.style(clean(found['cluster']), bold=True)} is {state_text(found['health'])}")
    leader = "nobody" if found["leader"] is None else f"{clean(found['leader_name'])} (id {found['leader']})"
    tasks = ", ".join(f"{count:,} {state.replace('_', ' ')}" for state, count in found["tasks"].items())
    nodes = [plural(found["schedulers"], "scheduler")]
    is_told = found["by_leader"]  # Only the leader counts workers and tasks.
    if is_told:
        nodes.append(_workers_text(found))
    alone = "" if is_told else ", which knows no more without a leader"
    print_fields([
        ("why", clean(found["why"]).replace("; ", "\n")),
        ("leader", leader + (f", term {found['term']}" if found["term"] is not None else "")),
        ("nodes", ", ".join(nodes)),
        ("slots", _slots_text(found) if is_told else ""),
        ("unfinished", (tasks or "no tasks") if is_told else ""),
        ("durability", _durability_text(found) if is_told else ""),
        ("asked", f"{clean(found['name'])} (id {found['node_id']}, {'+'.join(found['roles'])}){alone}"),
        ("version", found["version"]),
    ])  # fmt: skip
    if found["replicas"]:
        click.echo()
        now_s = time.time()
        rows = [
            [
                str(replica["node_id"]),
                clean(replica["name"]),
                _stage_text(replica),
                _lag_text(replica),
                _note(replica, found, now_s),
            ]
            for replica in found["replicas"]
        ]
        columns = ["ID", "SCHEDULER", "STATE", "BEHIND", "NOTE"]
        if not any(row[-1] for row in rows):
            columns, rows = columns[:-1], [row[:-1] for row in rows]
        print_table(columns, rows, flexible=columns[-1])


def _workers_text(found: Json) -> str:
    drained = found.get("workers_drained", 0)  # A daemon that is yet to be upgraded does not say.
    return plural(found["workers"], "worker") + (f" ({drained:,} drained)" if drained else "")


def _slots_text(found: Json) -> str:
    drained = found.get("slots_drained", 0)
    return f"{found['slots']:,}, {found['running']:,} busy" + (f", {drained:,} drained" if drained else "")


def _durability_text(found: Json) -> str:
    state = state_text(found["durability"])
    if found["durability"] == "replicated":
        return f"{state}: what is accepted is on the disks of two schedulers or more"
    if found["refuses"]:
        return f"{state}: no standby is in sync"
    if len(found["replicas"]) > 1:
        return f"{state}: what is accepted is on one disk, until a standby is in sync"
    return f"{state}: what is accepted is on one disk; another scheduler would keep a copy"


def _stage_text(replica: Json) -> str:
    stage = replica["replication"]
    if stage in ("in_sync", "catching_up"):
        return f"standby, {state_text(stage)}"
    return "up" if stage is None else state_text(stage)


def _lag_text(replica: Json) -> str:
    if replica["lag_commits"] is None or replica["replication"] == "leading":
        return "-"
    if not replica["lag_commits"]:
        return "nothing"
    return f"{plural(replica['lag_commits'], 'commit')}, for {duration_text(replica['lag_s'])}"


def _note(replica: Json, found: Json, now_s: float) -> str:
    """What else there is to know of a scheduler."""
    stage = replica["replication"]
    if stage == "away":
        return f"last seen {duration_text(now_s - replica['seen'])} ago" if replica["seen"] is not None else ""
    if replica["copied"] is not None:
        return f"{plural(replica['copied'], 'task')} copied so far"
    is_next = stage == "in_sync" and replica["may_lead"] and found["leader"] is not None
    if is_next and replica["node_id"] < found["leader"]:
        return "is to lead soon, by its lower id"
    return ""
