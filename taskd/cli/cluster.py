"""taskd cluster: the whole in one look."""

from __future__ import annotations

from typing import Any

import click

from taskd.cli.output import duration_text, plural, print_fields, print_json, print_table, state_text
from taskd.cli.session import Session, talks
from taskd.client import calls


@click.group("cluster")
def cluster() -> None:
    """Say how the cluster is."""


@cluster.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@talks
def status(session: Session, as_json: bool) -> int:
    """Say who leads, who has a copy, who works, and what there is to do. The exit code is 1 while nobody leads."""
    found = session.ask(calls.cluster())
    code = 1 if found["health"] == "down" else 0
    if as_json:
        print_json(found)
        return code
    why = f": {found['why']}" if found["why"] else ""
    click.echo(f"cluster {click.style(found['cluster'], bold=True)} is {state_text(found['health'])}{why}")
    leader = "nobody" if found["leader"] is None else f"{found['leader_name']} (id {found['leader']})"
    tasks = ", ".join(f"{count:,} {state.replace('_', ' ')}" for state, count in found["tasks"].items())
    has_leader = found["leader"] is not None
    print_fields([
        ("leader", leader + (f", term {found['term']}" if found["term"] is not None else "")),
        ("nodes", f"{plural(found['schedulers'], 'scheduler')}, {plural(found['workers'], 'worker')}"),
        # Only the leader counts workers and tasks.
        ("slots", f"{found['slots']:,}, {found['running']:,} busy" if has_leader else ""),
        ("unfinished", (tasks or "no tasks") if has_leader else ""),
        ("tasks kept", _DURABILITY[found["durability"]] if has_leader else ""),
        ("asked", f"{found['name']} (id {found['node_id']}, {'+'.join(found['roles'])}), version {found['version']}"),
    ])  # fmt: skip
    if found["replicas"]:
        click.echo()
        rows = [
            [str(replica["node_id"]), replica["name"], _replication_text(replica), _lag_text(replica)]
            for replica in found["replicas"]
        ]
        print_table(["ID", "SCHEDULER", "COPY", "BEHIND"], rows)
    return code


_DURABILITY = {
    "replicated": "replicated: on more than one disk before they are acknowledged",
    "local": "local: on one disk",
}


def _replication_text(replica: dict[str, Any]) -> str:
    return "-" if replica["replication"] is None else state_text(replica["replication"])


def _lag_text(replica: dict[str, Any]) -> str:
    if replica["lag_commits"] is None or replica["replication"] == "leading":
        return "-"
    if not replica["lag_commits"]:
        return "nothing"
    return f"{plural(replica['lag_commits'], 'commit')}, for {duration_text(replica['lag_s'])}"
