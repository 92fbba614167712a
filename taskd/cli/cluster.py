"""taskd cluster: the whole in one look."""

from __future__ import annotations

import click

from taskd.cli.output import plural, print_fields, print_json, state_text
from taskd.cli.session import Session, talks
from taskd.client import calls


@click.group("cluster")
def cluster() -> None:
    """Say how the cluster is."""


@cluster.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@talks
def status(session: Session, as_json: bool) -> int:
    """Say who leads, who works, and what there is to do. The exit code is 1 while nobody leads."""
    found = session.ask(calls.cluster())
    code = 1 if found["health"] == "down" else 0
    if as_json:
        print_json(found)
        return code
    why = f": {found['why']}" if found["why"] else ""
    click.echo(f"cluster {click.style(found['cluster'], bold=True)} is {state_text(found['health'])}{why}")
    leads = found["leader"] == found["node_id"]
    leader = "nobody" if found["leader"] is None else f"{found['leader_name']} (id {found['leader']})"
    tasks = ", ".join(f"{count:,} {state.replace('_', ' ')}" for state, count in found["tasks"].items())
    print_fields([
        ("leader", leader + (f", term {found['term']}" if found["term"] is not None else "")),
        ("nodes", f"{plural(found['schedulers'], 'scheduler')}, {plural(found['workers'], 'worker')}"),
        # Only the leader counts workers and tasks; another node that is asked knows but itself.
        ("slots", f"{found['slots']:,}, {found['running']:,} busy" if leads else ""),
        ("unfinished", (tasks or "no tasks") if leads else ""),
        ("tasks kept", f"on {'more than one disk' if found['durability'] == 'replicated' else 'one disk'}"),
        ("asked", f"{found['name']} (id {found['node_id']}, {'+'.join(found['roles'])}), version {found['version']}"),
    ])  # fmt: skip
    return code
