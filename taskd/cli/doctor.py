"""taskd doctor: what may be wrong with this machine and its daemon, and what to do about it."""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from taskd.cli.doctor_machine import CGROUPS, CONTROLLERS, look_at_machine
from taskd.cli.finding import FAIL, OK, WARN, Finding
from taskd.cli.nodes import CLOCK_OFFSET_S_MAX
from taskd.cli.output import duration_text, plural, print_json, state_text
from taskd.cli.session import Session, talks
from taskd.client import calls
from taskd.client.errors import ApiError
from taskd.errors import TaskdError
from taskd.version import VERSION

Json = dict[str, Any]


@click.command(
    "doctor",
    epilog="""\b
Examples:
  taskd doctor
  taskd doctor --state-dir /srv/taskd       of a daemon that does not answer, and has its state elsewhere
  taskd doctor --access laptop.access       what can be seen of a daemon and its cluster from another machine

The exit code is 1 where something fails.""",
)
@click.option("--config", metavar="F", type=click.Path(dir_okay=False), help="The file with the daemon's settings.")
@click.option(
    "--state-dir",
    metavar="D",
    type=click.Path(file_okay=False),
    help="Where its state is; else what the daemon says, or its settings.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@talks
def doctor(session: Session, *, config: str | None, state_dir: str | None, as_json: bool) -> int:
    """Check this machine and its daemon, and say what to do about what is wrong."""
    is_remote = session.transport.is_remote
    if is_remote and (config or state_dir):
        raise click.UsageError("--config and --state-dir are for a daemon of this machine, and --access names another")
    found = _ask(session)
    findings: list[Finding] = []
    if not is_remote:  # The machine of whoever looks at another one's daemon need be no node.
        told = "" if isinstance(found, Finding) else found.get("state_dir", "")
        findings += look_at_machine(Path(config) if config else None, state_dir or told)
    findings += [found] if isinstance(found, Finding) else _daemon(session, found)
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        width = max(len(finding.what) for finding in findings)
        for finding in findings:
            level = f"{state_text(finding.level)}{' ' * (4 - len(finding.level))}"
            click.echo(f"{level}  {finding.what:<{width}}  {finding.text}")
            if finding.advice:
                click.echo(f"{' ' * (width + 8)}{click.style(finding.advice, dim=True)}")
    return 1 if any(finding.level == FAIL for finding in findings) else 0


# -- The daemon and its cluster ----------------------------------------------------------------------------------------


def _ask(session: Session) -> Json | Finding:
    """What the daemon says of the cluster, or why it does not."""
    try:
        found: Json = session.ask(calls.cluster())
    except TaskdError as error:
        return Finding(FAIL, "daemon", error.message)
    return found


def _daemon(session: Session, found: Json) -> Iterator[Finding]:
    path = session.transport.path
    yield Finding(OK, "daemon", f"{found['name']} ({'+'.join(found['roles'])}) answers on {path}")
    if not session.transport.is_remote:
        yield _socket(path)
        if "worker" in found["roles"]:
            yield _delegation(path)
    if found["version"] != VERSION:
        advice = "restart the daemon after an upgrade"
        yield Finding(WARN, "version", f"the daemon has {found['version']}, this command {VERSION}", advice)
    if found["health"] == "down":
        yield Finding(FAIL, "leader", found["why"] or "nobody leads", "start a scheduler, or see its log")
        return
    text = f"{found['leader_name']} leads cluster {found['cluster']}"
    if found["health"] == OK:
        yield Finding(OK, "leader", text)
    else:
        yield Finding(WARN, "leader", f"{text}; {found['health']}: {found['why']}", "see: taskd cluster status")
    try:
        nodes = session.ask(calls.nodes())["nodes"]
    except ApiError as error:
        yield Finding(FAIL, "nodes", f"the leader does not answer: {error.message}", "see the logs of both daemons")
        return
    yield _workers(nodes)
    yield _clocks(nodes)
    yield _versions(nodes, found["version"])
    yield _keys(nodes)


def _workers(nodes: list[Json]) -> Finding:
    workers = [node for node in nodes if "worker" in node["roles"]]
    up = [node for node in workers if node["state"] == "up"]
    others = [f"{node['name']} is {node['state']}" for node in workers if node["state"] != "up"]
    drained = [node["name"] for node in workers if node["state"] in ("draining", "drained")]
    if not up and drained:
        return Finding(FAIL, "workers", "; ".join(others), f"use one again: taskd node resume {drained[0]}")
    if not up:
        return Finding(FAIL, "workers", "; ".join(others) or "there are none", "start one: taskd start --role worker")
    if any(node["state"] == "lost" for node in workers):
        return Finding(WARN, "workers", f"{len(up)} up; {'; '.join(others)}", "see whether those machines run")
    return Finding(OK, "workers", f"{len(up)} up" + (f"; {'; '.join(others)}" if others else ""))


def _clocks(nodes: list[Json]) -> Finding:
    offsets = {node["name"]: node["clock_offset_s"] for node in nodes if node["clock_offset_s"] is not None}
    wrong = [
        f"{name} is {duration_text(abs(offset_s))} {'ahead' if offset_s > 0 else 'behind'}"
        for name, offset_s in offsets.items()
        if abs(offset_s) >= CLOCK_OFFSET_S_MAX
    ]
    if wrong:
        return Finding(WARN, "clocks", "; ".join(wrong), "run chrony or systemd-timesyncd there")
    return Finding(OK, "clocks", f"{plural(len(offsets), 'node')} within {CLOCK_OFFSET_S_MAX:g}s")


def _versions(nodes: list[Json], own: str) -> Finding:
    others = [f"{node['name']} has {node['version']}" for node in nodes if node["version"] not in ("", own)]
    if others:
        advice = "fine while a cluster is upgraded; a node serves the version of the protocol before its own"
        return Finding(WARN, "versions", f"this node has {own}; {', '.join(others)}", advice)
    return Finding(OK, "versions", f"all have {own}")


def _keys(nodes: list[Json]) -> Finding:
    """Which keys nodes showed to the leader."""
    by_key: dict[str, list[str]] = {}
    for node in nodes:
        if node.get("fingerprint"):
            by_key.setdefault(node["fingerprint"], []).append(node["name"])
    if not by_key:
        return Finding(OK, "keys", "no other node is connected")
    text = "; ".join(f"{fingerprint}: {', '.join(names)}" for fingerprint, names in sorted(by_key.items()))
    if len(by_key) > 1:
        return Finding(
            WARN, "keys", text, "the key is being replaced: give all nodes the new one before the old one ends"
        )
    return Finding(OK, "keys", text)


def _socket(path: str) -> Finding:
    mode = os.stat(path).st_mode
    if mode & stat.S_IWOTH:
        advice = "every user may submit: see [api] socket_mode and socket_group"
        return Finding(WARN, "socket", f"{path} is open to every user ({stat.filemode(mode)})", advice)
    return Finding(OK, "socket", stat.filemode(mode))


def _delegation(path: str) -> Finding:
    """Whether the daemon may make control groups for its tasks: whether its own group is given to it."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            pid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError as error:
        return Finding(
            WARN, "delegation", f"the daemon's control group cannot be read: {error.strerror}", "run as root"
        )
    own = next((line[3:] for line in lines if line.startswith("0::")), "")
    controllers = CGROUPS / own.strip("/") / "cgroup.controllers"
    given = controllers.read_text().split() if controllers.exists() else []
    missing = [name for name in CONTROLLERS if name not in given]
    if missing:
        advice = (
            "limits of tasks are not enforced by groups: run the packaged unit (Delegate=), see taskd service install"
        )
        return Finding(WARN, "delegation", f"{own or 'no group of v2'} lacks {', '.join(missing)}", advice)
    return Finding(OK, "delegation", own)
