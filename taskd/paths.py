"""Where things are on this machine: configuration, state, sockets. Imports next to nothing, for the shell's sake.

As root: /etc/taskd, /var/lib/taskd, /run/taskd. As a service of systemd: the directories that its unit names. As a
user: the XDG folders, and for the sockets a private directory below the state folder where there is no XDG_RUNTIME_DIR.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from taskd.errors import ConfigError, NoDaemon

CONFIG_NAME = "taskd.toml"
KEY_NAME = "cluster.key"
SOCKET_NAME = "taskd.sock"  # The first daemon on a machine; one that finds it held binds the socket of its role.
ROLE_SOCKET_NAMES = {"scheduler": "taskd-scheduler.sock", "worker": "taskd-worker.sock"}
SOCKET_NAMES = (SOCKET_NAME, *ROLE_SOCKET_NAMES.values())
SOCKET_VARIABLE = "TASKD_SOCKET"
ACCESS_VARIABLE = "TASKD_ACCESS"  # A file that leads to a daemon on another machine.

NAMED = f"with --socket or {SOCKET_VARIABLE}"

SOCKET_PATH_BYTES_MAX = 107  # The kernel's sun_path holds 108, the last of them zero.
CONNECT_TIMEOUT_S = 2.0  # A daemon too busy to accept within this time still counts as alive.


class Places(NamedTuple):
    """The directories of one user: `config` holds the settings and the key, `state` what must survive, `runtime` the
    sockets."""

    config: str
    state: str
    runtime: str


SYSTEM = Places("/etc/taskd", "/var/lib/taskd", "/run/taskd")


def places(environ: Mapping[str, str] | None = None, is_root: bool | None = None) -> Places:
    """The directories of the user who asks. The arguments stand in for the process's own surroundings in tests."""
    if os.geteuid() == 0 if is_root is None else is_root:
        return SYSTEM
    environ = os.environ if environ is None else environ
    state = _xdg(environ, "XDG_STATE_HOME") or _home(environ, ".local/state")
    config = _xdg(environ, "XDG_CONFIG_HOME") or _home(environ, ".config")
    runtime = _xdg(environ, "XDG_RUNTIME_DIR")
    of_user = f"{state}/taskd"
    state_taskd = _of_service(environ, "STATE_DIRECTORY") or of_user
    runtime_taskd = f"{runtime}/taskd" if runtime else f"{of_user}/run"
    return Places(
        _of_service(environ, "CONFIGURATION_DIRECTORY") or f"{config}/taskd",
        state_taskd,
        _of_service(environ, "RUNTIME_DIRECTORY") or runtime_taskd,
    )


def config_file() -> str:
    """The settings of a daemon that is told no other."""
    return f"{places().config}/{CONFIG_NAME}"


def key_file() -> str:
    """The cluster key of a daemon that is told no other."""
    return f"{places().config}/{KEY_NAME}"


def secrets_directory() -> str:
    """The secrets of a worker that is told no other place."""
    return f"{places().config}/secrets"


def checked_socket_path(path: str) -> str:
    """The absolute path of a socket. Raises ConfigError where the kernel could not take it."""
    absolute = os.path.abspath(path)
    size = len(os.fsencode(absolute))
    if size > SOCKET_PATH_BYTES_MAX:
        raise ConfigError(
            f"the socket path {absolute} has {size} bytes, and the kernel takes at most {SOCKET_PATH_BYTES_MAX}: "
            "choose a shorter one with --socket"
        )
    return absolute


def socket_candidates(explicit: str | None = None, environ: Mapping[str, str] | None = None) -> list[str]:
    """Where a client looks for a daemon, in this order: only the socket it is told (`explicit`, else TASKD_SOCKET), or
    the user's own daemons and then the system's. Raises ConfigError for a path that no socket can have."""
    environ = os.environ if environ is None else environ
    told = explicit or environ.get(SOCKET_VARIABLE)
    if told:
        return [checked_socket_path(told)]
    directories = dict.fromkeys((places(environ).runtime, SYSTEM.runtime))
    return [f"{directory}/{name}" for directory in directories for name in SOCKET_NAMES]


def find_access(explicit: str | None = None, socket: str | None = None) -> str | None:
    """The access file to use, if any: the one that is told, else TASKD_ACCESS where no socket is told in any way."""
    if explicit or socket or os.environ.get(SOCKET_VARIABLE):
        return explicit
    return os.environ.get(ACCESS_VARIABLE) or None


def find_socket(explicit: str | None = None) -> str:
    """The first socket that a live daemon answers on. Raises NoDaemon, which says where it looked and what to do."""
    refused = []
    candidates = socket_candidates(explicit)
    for path in candidates:
        try:
            if answers(path):
                return path
        except PermissionError:
            refused.append(path)
    if refused:
        raise NoDaemon(f"you may not use {refused[0]}: have root add you to the group taskd, and log in again")
    hint = "start one with `taskd start --role scheduler,worker`"
    if len(candidates) == 1:
        missing = "there is no such file" if not os.path.exists(candidates[0]) else "nothing listens on it"
        raise NoDaemon(f"no daemon answers on {candidates[0]} ({missing}); {hint}, or name another socket {NAMED}")
    looked = " and ".join(dict.fromkeys(os.path.dirname(path) for path in candidates))
    where = f"say where it is {NAMED}: one with a --state-dir has its socket there"
    raise NoDaemon(f"no daemon answers in {looked}; {hint}, or {where}")


def answers(path: str) -> bool:
    """Whether a live process listens on this socket. Raises PermissionError where that must not be tried."""
    import socket  # noqa: PLC0415  # the daemon's configuration needs the paths and no sockets

    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(CONNECT_TIMEOUT_S)
        try:
            probe.connect(path)
        except (BlockingIOError, TimeoutError):
            return True  # Its queue of connections is full: busy, not dead.
        except PermissionError:
            raise
        except OSError:
            return False
    return True


def _xdg(environ: Mapping[str, str], name: str) -> str:
    """A folder from the environment; relative ones are invalid by the XDG specification."""
    value = environ.get(name, "")
    return value.rstrip("/") if value.startswith("/") else ""


def _of_service(environ: Mapping[str, str], name: str) -> str:
    """The first directory that systemd made for the service that we are; empty where it made none."""
    return _xdg(environ, name).partition(":")[0]


def _home(environ: Mapping[str, str], below: str) -> str:
    home = environ.get("HOME") or os.path.expanduser("~")
    return f"{home.rstrip('/')}/{below}"
