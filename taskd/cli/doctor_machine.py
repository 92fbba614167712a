"""What `taskd doctor` looks at on this machine: settings, key, disk, permissions, SQLite, mDNS, control groups."""

from __future__ import annotations

import os
import stat
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from taskd.cli.finding import FAIL, OK, WARN, Finding
from taskd.cli.output import plural, size_text
from taskd.errors import TaskdError

if TYPE_CHECKING:
    from taskd.config import Config

# A bug of the write-ahead log that can lose commits is mended in these and in all newer ones.
SQLITE_GOOD = (3, 51, 3)
SQLITE_MENDED = {(3, 50): 7, (3, 44): 6}
DISK_WARN_FACTOR = 4  # Warn when free space is below this many times the mark where a scheduler stops taking tasks.
SYNCS = 9  # The median of this many is told.
SYNC_WARN_S, SYNC_FAIL_S = 0.05, 1.0  # Each submission that is waited for pays one of these.
LISTEN_S = 0.7  # Schedulers on the LAN answer within a few hundredths; a query may be lost once.
CGROUPS = Path("/sys/fs/cgroup")
CONTROLLERS = ("cpu", "memory", "pids")


# -- This machine ------------------------------------------------------------------------------------------------------


def look_at_machine(file: Path | None, state_dir: str) -> Iterator[Finding]:
    """All findings about this machine. `file`: the settings, None for the usual ones. `state_dir`: where the state is,
    empty for what they say."""
    from taskd import config

    overrides = {"node.state_dir": state_dir} if state_dir else {}
    try:
        settings = config.load(file, os.environ, overrides)
    except TaskdError as error:
        yield Finding(FAIL, "settings", error.message, "mend the file or the variable, then: taskd config check")
        settings = config.Config(config.NodeSettings(state_dir=state_dir))
    else:
        yield Finding(OK, "settings", "fine")
    checks: tuple[Callable[[Config], Finding], ...] = (
        _key,
        _state,
        _secrets,
        _disk,
        _sync,
        _sqlite,
        _interfaces,
        _discovery,
        _port,
        _cgroups,
        _event_loop,
    )
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


def _state_dir(settings: Config) -> Path:
    from taskd import paths

    return Path(settings.node.state_dir or paths.places().state)


def _existing(path: Path) -> Path:
    """The path, or what of it exists."""
    return next(there for there in (path, *path.parents) if there.exists())


def _state(settings: Config) -> Finding:
    directory = _state_dir(settings)
    if not directory.exists():
        return Finding(OK, "state", f"{directory} is made at the first start")
    for path in (directory, *(directory / role for role in ("scheduler", "worker"))):
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            continue
        except PermissionError:
            return Finding(WARN, "state", f"{path} cannot be looked at by this user", "run taskd doctor as root")
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            return Finding(FAIL, "state", f"{path} can be written by others", f"chmod 700 {path}")
    return Finding(OK, "state", f"{directory} is private")


def _secrets(settings: Config) -> Finding:
    """Whether the worker's secrets are for its own user alone, as they must be to be given to tasks."""
    from taskd import paths

    directory = Path(settings.worker.secrets_dir or paths.secrets_directory())
    try:
        owner = directory.stat().st_uid
        for path in (directory, *sorted(directory.iterdir())):
            status = path.lstat()
            if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                mode = "700" if path == directory else "600"
                return Finding(FAIL, "secrets", f"{path} is open to others than its owner", f"chmod {mode} {path}")
            if status.st_uid != owner:
                advice = f"chown --reference={directory} {path}"
                return Finding(FAIL, "secrets", f"{path} does not belong to the owner of its directory", advice)
    except FileNotFoundError:
        return Finding(OK, "secrets", f"there is no directory {directory}")
    except OSError as error:
        return Finding(WARN, "secrets", f"{directory}: {error.strerror}", "run taskd doctor as root")
    return Finding(OK, "secrets", f"{directory} is private")


def _sync(settings: Config) -> Finding:
    """How long it takes to make a little data durable, where the state is or will be."""
    directory = _existing(_state_dir(settings))
    took_s = []
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".taskd-doctor-") as file:
            for _ in range(SYNCS):
                file.write(bytes(4096))
                file.flush()
                begun = time.perf_counter()
                os.fdatasync(file.fileno())
                took_s.append(time.perf_counter() - begun)
    except OSError as error:
        return Finding(WARN, "sync", f"cannot be tried in {directory}: {error.strerror}", "run taskd doctor as root")
    median_s = statistics.median(took_s)
    text = f"{median_s * 1000:.1f}ms to make a page durable in {directory}"
    if median_s >= SYNC_WARN_S:
        advice = "every acceptance waits for this: use a local disk, and see whether others keep it busy"
        return Finding(FAIL if median_s >= SYNC_FAIL_S else WARN, "sync", text, advice)
    return Finding(OK, "sync", text)


def _disk(settings: Config) -> Finding:
    directory = _state_dir(settings)
    disk = os.statvfs(_existing(directory))
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
        return Finding(FAIL, "sqlite", f"apsw cannot be loaded: {error}", "install taskd again, with its wheel")
    text: str = apsw.sqlite_lib_version()
    major, minor, patch, *_ = (int(part) for part in text.split("."))
    mended = SQLITE_MENDED.get((major, minor))
    if (major, minor, patch) >= SQLITE_GOOD or (mended is not None and patch >= mended):
        return Finding(OK, "sqlite", f"version {text}")
    return Finding(FAIL, "sqlite", f"version {text} can lose commits", "pip install --upgrade apsw")


def _interfaces(settings: Config) -> Finding:
    from ipaddress import ip_address

    from taskd.net.discovery import lan_addresses

    addresses = lan_addresses(settings.network.interfaces)
    shown = ", ".join(addresses)
    if not addresses:
        wanted = ", ".join(settings.network.interfaces) or "none"
        return Finding(FAIL, "interfaces", f"no usable interface (wanted: {wanted})", "see [network] interfaces")
    if all(ip_address(address.partition("%")[0]).is_loopback for address in addresses):
        return Finding(
            WARN, "interfaces", f"only this machine: {shown}", "for other machines name one: --join HOST:PORT"
        )
    return Finding(OK, "interfaces", shown)


def _discovery(settings: Config) -> Finding:
    """Whether schedulers are heard on the LAN; one on this machine must be, or what it announces gets nowhere."""
    if not settings.network.mdns:
        return Finding(OK, "discovery", "mDNS is off; schedulers are found by [network] join only")
    from taskd.net.discovery import heard_schedulers, lan_addresses

    addresses = lan_addresses(settings.network.interfaces)
    try:
        heard = heard_schedulers(addresses, LISTEN_S) if addresses else 0
    except OSError as error:
        return Finding(WARN, "discovery", f"mDNS cannot be used: {error}", "see what holds UDP port 5353, or set join")
    if not heard:
        advice = "where one runs: let UDP 5353 through the firewalls, or name schedulers with --join HOST:PORT"
        return Finding(WARN, "discovery", "no scheduler is heard by mDNS", advice)
    return Finding(OK, "discovery", f"{plural(heard, 'scheduler')} heard by mDNS")


def _port(settings: Config) -> Finding:
    """What is on the port where a scheduler of this machine takes peers."""
    import socket

    from taskd.config import PORT_DEFAULT

    host, _, number = (*settings.network.listen, f":{PORT_DEFAULT}")[0].rpartition(":")
    host, port = host.strip("[]"), int(number)
    if port == 0:
        return Finding(OK, "port", "any free one")
    where = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host  # noqa: S104  # compared, not bound
    try:
        with socket.create_connection((where, port), timeout=1.0) as connection:
            connection.settimeout(1.0)
            greeting = connection.recv(64)
    except (ConnectionRefusedError, TimeoutError):
        return Finding(OK, "port", f"nothing listens on TCP {port}: free for a scheduler")
    except OSError as error:
        return Finding(WARN, "port", f"TCP {where}:{port} cannot be reached: {error.strerror or error}", "see listen")
    if greeting.startswith(b"taskd"):
        return Finding(OK, "port", f"a scheduler listens on TCP {port}")
    return Finding(
        WARN, "port", f"another program has TCP port {port}", "give schedulers another one: [network] listen"
    )


def _cgroups(settings: Config) -> Finding:
    """Whether tasks can be held to what they ask for."""
    try:
        there = (CGROUPS / "cgroup.controllers").read_text().split()
    except OSError:
        text = "no cgroup v2: tasks are held by resource limits only, and out-of-memory ends are guessed"
        return Finding(WARN, "cgroups", text, "boot with systemd.unified_cgroup_hierarchy=1")
    missing = [name for name in CONTROLLERS if name not in there]
    if missing:
        return Finding(
            WARN, "cgroups", f"v2 without {', '.join(missing)}", "see cgroup_disable= in the kernel's options"
        )
    return Finding(OK, "cgroups", "v2, with " + ", ".join(CONTROLLERS))


def _event_loop(settings: Config) -> Finding:
    from importlib.util import find_spec

    if find_spec("uvloop") is None:
        return Finding(WARN, "event loop", "asyncio's own, which is slower", "pip install uvloop")
    return Finding(OK, "event loop", "uvloop")
