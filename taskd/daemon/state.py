"""The state directory: one daemon for each role in it, who this node is, and which socket it answers on.

Locks are flocks, held for the life of the process: the kernel lets go of them whatever kills it, and no task inherits
them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from taskd import paths
from taskd.config import NodeSettings
from taskd.daemon.logs import log
from taskd.errors import AlreadyRunning, ConfigError
from taskd.protocol.messages import Role
from taskd.values import format_instant, instant_s

YEAR_2025_S = 1_735_689_600  # Node ids count from here, so that they stay short.
NODE_ID_MAX = (1 << 63) - 1

_LOCK_NAME = "lock"
_IDENTITY_NAME = "node.json"


class StateDirectory:
    """The directories of the roles that this process has, locked. Raises ConfigError where they cannot be used, and
    AlreadyRunning where another daemon does."""

    def __init__(self, path: Path, roles: Sequence[Role]) -> None:
        self.path = path
        self.roles = tuple(roles)
        self._locks: list[int] = []
        try:
            with _explained(path):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            for role in self.roles:
                self._take(self.of(role))
        except BaseException:
            self.close()
            raise

    @classmethod
    def opened(cls, settings: NodeSettings, roles: Sequence[Role]) -> StateDirectory:
        """The directory that the settings name, or the usual one."""
        return cls(Path(settings.state_dir or paths.places().state), roles)

    def of(self, role: Role) -> Path:
        """Where a role keeps its state."""
        return self.path / role

    @property
    def main(self) -> Path:
        """Where the identity is: the scheduler's directory, where this node is one."""
        return self.of("scheduler" if "scheduler" in self.roles else self.roles[0])

    def close(self) -> None:
        """Let others use it."""
        for lock in self._locks:
            os.close(lock)
        self._locks.clear()

    def _take(self, directory: Path) -> None:
        with _explained(directory):
            directory.mkdir(mode=0o700, exist_ok=True)
            status = directory.lstat()
            if stat.S_ISLNK(status.st_mode) and status.st_uid not in (0, os.geteuid()):
                raise ConfigError(f"{directory} is a link that another user has made: put the directory in its place")
            mode = directory.stat().st_mode
            if mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise ConfigError(f"{directory} can be written by others: make it private with chmod 700 {directory}")
            lock = _lock(directory / _LOCK_NAME)
        if lock is None:
            raise AlreadyRunning(
                f"another daemon{_holder(directory / _LOCK_NAME)} uses {directory}: "
                "stop it first, or give this one a directory of its own with --state-dir"
            )
        self._locks.append(lock)


# -- Identity ----------------------------------------------------------------------------------------------------------


class Identity(Struct, frozen=True, forbid_unknown_fields=True):
    """Who a node is, from its first start on. `store_id` is 32 hexadecimal digits at a worker; a scheduler's is in its
    database, and empty here."""

    node_id: Annotated[int, Meta(ge=1, le=NODE_ID_MAX)]
    first_start: str  # ISO 8601, UTC
    store_id: Annotated[str, Meta(pattern="^([0-9a-f]{32})?$")] = ""


def identify(state: StateDirectory, wanted_id: int, now_s: float) -> Identity:
    """The identity kept in the state directory, made at UTC `now_s` where it is new. `wanted_id` is the node id asked
    for, 0 for any. Raises ConfigError where that is another one, or the file is damaged."""
    identity = known_identity(state, now_s)
    if identity is None:
        identity = _new_identity(state, wanted_id, now_s)
        _write_identity(state, identity)
        return identity
    if wanted_id not in (0, identity.node_id):
        raise ConfigError(
            f"node id {wanted_id} is asked for, but {state.main} belongs to node {identity.node_id}: "
            "leave the id out, or give the new node a directory of its own with --state-dir",
            field="node.id",
        )
    return identity


def known_identity(state: StateDirectory, now_s: float) -> Identity | None:
    """The identity kept in the state directory; None where it is new. Raises ConfigError where the file is damaged."""
    path = state.main / _IDENTITY_NAME
    with _explained(path):
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
    try:
        identity = msgspec.json.decode(raw, type=Identity)
        instant_s(identity.first_start, now_s)
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}): restore it, or remove it and start once with --node-id and this node's id"
        ) from None
    return identity


def set_scheduler_identity(state: StateDirectory, node_id: int, first_start: str) -> None:
    """Have a scheduler be this node from its next start on; 0: a new one. Raises ConfigError."""
    if node_id:
        _write_identity(state, Identity(node_id, first_start))
        return
    path = state.main / _IDENTITY_NAME
    with _explained(path):
        path.unlink(missing_ok=True)


def _write_identity(state: StateDirectory, identity: Identity) -> None:
    path = state.main / _IDENTITY_NAME
    with _explained(path):
        _write_durably(path, msgspec.json.format(msgspec.json.encode(identity)) + b"\n")


def _new_identity(state: StateDirectory, wanted_id: int, now_s: float) -> Identity:
    # Microseconds: machines that are switched on together must not come to the same id.
    node_id = wanted_id or int((now_s - YEAR_2025_S) * 1_000_000)
    if node_id <= 0:
        raise ConfigError(
            f"the clock says {format_instant(max(now_s, 0.0))}: set it, because a new node's id is made from the time, "
            "or choose the id with --node-id",
            field="node.id",
        )
    store_id = "" if "scheduler" in state.roles else secrets.token_hex(16)
    return Identity(node_id, format_instant(now_s), store_id)


def _write_durably(path: Path, content: bytes) -> None:
    """Have the whole content in the file, or none of it, whatever happens."""
    temporary = path.with_name(path.name + ".new")
    # What stands there may be a link: root writes here too (restore.py), in a directory that is another user's.
    temporary.unlink(missing_ok=True)
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(file, content)
        os.fsync(file)
    finally:
        os.close(file)
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


# -- The socket --------------------------------------------------------------------------------------------------------


class SocketPlace:
    """A path where a socket may be bound, ours until `close`."""

    def __init__(self, path: str, lock: int) -> None:
        self.path = path
        self._lock = lock

    def close(self) -> None:
        """Remove the socket, and let others have its place."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        os.close(self._lock)


def choose_socket(settings: NodeSettings, roles: Sequence[Role]) -> SocketPlace:
    """The place of this daemon's socket: the path that is set, else `taskd.sock` in the state directory that is set,
    else in the usual run directory; `taskd-<role>.sock` there where another daemon has the first.

    What a dead daemon left there is removed. Raises AlreadyRunning where all places are taken, and ConfigError where
    one cannot be used."""
    if settings.socket:
        wanted = [settings.socket]
    else:
        directory = settings.state_dir or paths.places().runtime
        with _explained(Path(directory)):
            os.makedirs(directory, mode=0o755 if directory == paths.SYSTEM.runtime else 0o700, exist_ok=True)
        role = "scheduler" if "scheduler" in roles else roles[0]
        wanted = [f"{directory}/{name}" for name in (paths.SOCKET_NAME, paths.ROLE_SOCKET_NAMES[role])]
    for path in wanted:
        place = _claim(paths.checked_socket_path(path))
        if place is not None:
            if path != wanted[0]:
                log("info", "another daemon answers on the usual socket", usual=wanted[0], socket=path)
            _tidy(wanted[wanted.index(path) + 1 :])
            return place
    raise AlreadyRunning(
        f"another daemon answers on {' and '.join(wanted)}: stop it first, or choose another place with --socket"
    )


def _tidy(paths_left: Sequence[str]) -> None:
    """Remove what a killed daemon of this role has left at the places that are not needed now."""
    for path in paths_left:
        if os.path.lexists(path):
            with contextlib.suppress(ConfigError):  # It is something else: not ours.
                place = _claim(path)
                if place is not None:
                    place.close()


def _claim(path: str) -> SocketPlace | None:
    """The place, cleaned of a dead daemon's socket; None where a live one has it."""
    with _explained(Path(path)):
        # The lock, not the answer, decides between daemons: one that has bound and does not listen yet answers nobody.
        lock = _lock(Path(path + ".lock"))
        if lock is None:
            return None
        try:
            if _is_held(path):
                os.close(lock)
                return None
            _remove_stale(path)
        except BaseException:
            os.close(lock)
            raise
    return SocketPlace(path, lock)


def _is_held(path: str) -> bool:
    """Whether somebody listens who takes no lock."""
    try:
        return paths.answers(path)
    except PermissionError:
        return True


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConfigError(f"{path} is in the way of the socket: it is another kind of file")
        os.unlink(path)
    except FileNotFoundError:
        pass


# -- Locks -------------------------------------------------------------------------------------------------------------


def _lock(path: Path) -> int | None:
    """An open file that holds the lock, with our process id in it; None where another process holds it. Raises OSError.

    The file stays for ever: whoever removed it could let two processes hold a lock of the same name."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(file, 0)
        os.write(file, b"%d\n" % os.getpid())
    except BlockingIOError:
        os.close(file)
        return None
    except BaseException:
        os.close(file)
        raise
    return file


def _holder(path: Path) -> str:
    """The process that holds a lock, as far as that can be told."""
    try:
        digits = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return f" (process {digits})" if digits.isdigit() else ""


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the machine does not permit into a ConfigError that names the path."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{error.filename or path} cannot be used: {error.strerror or error}") from None
