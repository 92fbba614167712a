"""taskd doctor: what may be wrong with this machine and its daemon, and what to do about it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from taskd.cli.nodes import CLOCK_OFFSET_S_MAX
from taskd.cli.output import duration_text, plural, print_json, size_text, state_text
from taskd.cli.session import Session, talks
from taskd.client import calls
from taskd.client.errors import ApiError
from taskd.errors import TaskdError
from taskd.version import VERSION

if TYPE_CHECKING:
    from taskd.config import Config

OK, WARN, FAIL = "ok", "warn", "fail"

# A bug of the write-ahead log that can lose commits is mended in these and in all newer ones.
SQLITE_GOOD = (3, 51, 3)
SQLITE_MENDED = {(3, 50): 7, (3, 44): 6}
DISK_WARN_FACTOR = 4  # Free space below so many times the mark where a scheduler stops taking tasks.

Json = dict[str, Any]


class Finding(NamedTuple):
    """One line: how it is, what was looked at, what was found, and what to do where it is not well."""

    level: str
    what: str
    text: str
    advice: str = ""


@click.command("doctor", epilog="\b\nThe exit code is 1 where something fails.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@talks
def doctor(session: Session, *, as_json: bool) -> int:
    """Check this machine and its daemon, and say what to do about what is wrong."""
    findings = [finding for check in (_local, _daemon) for finding in check(session)]
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


# -- This machine ------------------------------------------------------------------------------------------------------


def _local(session: Session) -> Iterator[Finding]:
    from taskd import config

    try:
        settings = config.load(None, os.environ, {})
    except TaskdError as error:
        yield Finding(FAIL, "settings", error.message, "mend the file or the variable, then: taskd config check")
        settings = config.Config()
    else:
        yield Finding(OK, "settings", "fine")
    checks: tuple[Callable[[Config], Finding], ...] = (_key, _disk, _sqlite, _discovery, _event_loop)
    for check in checks:
        yield check(settings)


def _key(settings: Config) -> Finding:
    from taskd import paths
    from taskd.net.security import SchedulerKey, load_key

    path = Path(settings.node.key_file or paths.key_file())
    try:
        key = load_key(path)
    except TaskdError as error:
        return Finding(FAIL, "key", error.message, f"chmod 600 {path}, or import it again: taskd key import --force")
    if key is None:
        advice = "a scheduler makes one at its first start; a worker needs: taskd key import"
        return Finding(WARN, "key", f"there is none in {path}", advice)
    kind = "scheduler" if isinstance(key, SchedulerKey) else "worker"
    return Finding(OK, "key", f"{kind} key of cluster {key.fingerprint} in {path}")


def _disk(settings: Config) -> Finding:
    from taskd import paths

    directory = Path(settings.node.state_dir or paths.places().state)
    there = next(path for path in (directory, *directory.parents) if path.exists())
    disk = os.statvfs(there)
    free_bytes, least_bytes = disk.f_bavail * disk.f_frsize, settings.scheduler.free_disk_min_bytes
    text = f"{size_text(free_bytes)} free for {directory}"
    if free_bytes < least_bytes:
        return Finding(FAIL, "disk", text, f"a scheduler takes no tasks below {size_text(least_bytes)}: make room")
    if free_bytes < least_bytes * DISK_WARN_FACTOR:
        return Finding(WARN, "disk", text, f"a scheduler takes no more tasks below {size_text(least_bytes)}")
    return Finding(OK, "disk", text)


def _sqlite(settings: Config) -> Finding:
    try:
        import apsw
    except ImportError as error:
        return Finding(FAIL, "sqlite", f"apsw cannot be loaded: {error}", "install taskd again: pip install taskd")
    text: str = apsw.sqlite_lib_version()
    major, minor, patch, *_ = (int(part) for part in text.split("."))
    mended = SQLITE_MENDED.get((major, minor))
    if (major, minor, patch) >= SQLITE_GOOD or (mended is not None and patch >= mended):
        return Finding(OK, "sqlite", f"version {text}")
    return Finding(FAIL, "sqlite", f"version {text} can lose commits", "pip install --upgrade apsw")


def _discovery(settings: Config) -> Finding:
    from ipaddress import ip_address

    from taskd.net.discovery import lan_addresses

    if not settings.network.mdns:
        return Finding(OK, "discovery", "mDNS is off; schedulers are found by [network] join only")
    addresses = lan_addresses(settings.network.interfaces)
    shown = ", ".join(addresses)
    if not addresses:
        wanted = ", ".join(settings.network.interfaces) or "none"
        return Finding(FAIL, "discovery", f"no usable interface (wanted: {wanted})", "see [network] interfaces")
    if all(ip_address(address.partition("%")[0]).is_loopback for address in addresses):
        return Finding(
            WARN, "discovery", f"only this machine: {shown}", "for other machines name one: --join HOST:PORT"
        )
    return Finding(OK, "discovery", f"mDNS on {shown}")


def _event_loop(settings: Config) -> Finding:
    from importlib.util import find_spec

    if find_spec("uvloop") is None:
        return Finding(WARN, "event loop", "asyncio's own, which is slower", "pip install uvloop")
    return Finding(OK, "event loop", "uvloop")


# -- The daemon and its cluster ----------------------------------------------------------------------------------------


def _daemon(session: Session) -> Iterator[Finding]:
    try:
        found = session.ask(calls.cluster())
    except TaskdError as error:
        yield Finding(FAIL, "daemon", error.message)
        return
    yield Finding(OK, "daemon", f"{found['name']} ({'+'.join(found['roles'])}) answers on {session.transport.path}")
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


def _workers(nodes: list[Json]) -> Finding:
    workers = [node for node in nodes if "worker" in node["roles"]]
    up = [node for node in workers if node["state"] == "up"]
    others = [f"{node['name']} is {node['state']}" for node in workers if node["state"] != "up"]
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
