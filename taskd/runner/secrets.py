"""Secrets of a worker: small files in a directory that tasks cannot read, which tasks name and get the content of.

`NAME` holds the value, `NAME.access` says whose tasks may have it, as TOML:

    users = ["alice", "backup"]     # owners of tasks; "*" for anybody
    types = ["command", "resize"]   # types of tasks; left out: all

Without the second file nobody may. A task never says a value, so none is in its spec, its record, the database or a
message between nodes; the worker puts it in place when the attempt begins, and nowhere else.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from pathlib import Path

from msgspec import structs

from taskd.core.effects import Begin
from taskd.core.task import ErrorInfo, TaskSpec
from taskd.runner.base import error_info

VALUE_BYTES_MAX = 64 << 10
ACCESS_SUFFIX = ".access"
ANYBODY = "*"
_OTHERS = 0o077  # Bits of a mode. The group counts: that of taskd's user is everybody who may submit.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ACCESS_KEYS = frozenset({"users", "types"})


class SecretRefused(Exception):
    """A task does not get a secret that it names: why, in words without the secret."""


class Secrets:
    """The secrets in one directory. Files are read anew for each attempt: what was changed counts at once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def into(self, begin: Begin) -> Begin | ErrorInfo:
        """The same attempt with values in the place of the secrets' names, or why there is none."""
        try:
            values = self.values(begin.spec)
        except SecretRefused as error:
            return error_info("SecretRefused", str(error))
        return Begin(begin.key, structs.replace(begin.spec, secrets=values))

    def values(self, spec: TaskSpec) -> dict[str, str]:
        """What the task's variables are to hold. Raises SecretRefused."""
        if not spec.secrets:
            return {}
        directory = self._open()
        try:
            return {variable: _value(directory, name, spec) for variable, name in spec.secrets.items()}
        finally:
            os.close(directory)

    def _open(self) -> int:
        try:
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise SecretRefused(f"this worker has no secrets: there is no directory {self._directory}") from None
        except OSError as error:
            raise SecretRefused(f"the secrets of this worker cannot be read: {error.strerror}") from None
        try:
            _check_owner(os.fstat(directory), str(self._directory))
        except SecretRefused:
            os.close(directory)
            raise
        return directory


def _value(directory: int, name: str, spec: TaskSpec) -> str:
    if _NAME.fullmatch(name) is None or name.endswith(ACCESS_SUFFIX):
        raise SecretRefused(f"{name!r} cannot be the name of a secret")
    raw = _read(directory, name)
    if raw is None:
        raise SecretRefused(f"there is no secret {name!r} on this worker")
    _check_access(directory, name, spec)
    try:
        value = raw.decode().removesuffix("\n")
    except UnicodeDecodeError:
        raise SecretRefused(f"the secret {name!r} is no text: give it in base64") from None
    if "\0" in value:
        raise SecretRefused(f"the secret {name!r} holds a NUL character, which no variable can")
    return value


def _check_access(directory: int, name: str, spec: TaskSpec) -> None:
    raw = _read(directory, name + ACCESS_SUFFIX)
    if raw is None:
        raise SecretRefused(f"nobody may use the secret {name!r}: name its users in {name}{ACCESS_SUFFIX}")
    try:
        access = tomllib.loads(raw.decode())
        users, types = access.get("users"), access.get("types", [ANYBODY])
        if users is None or not access.keys() <= _ACCESS_KEYS:
            raise ValueError
        for items in (users, types):
            if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
                raise ValueError
    except ValueError:
        problem = 'must say users = ["…"], and may say types = ["…"], and nothing else'
        raise SecretRefused(f"the secret {name!r} cannot be used: {name}{ACCESS_SUFFIX} {problem}") from None
    if spec.owner not in users and ANYBODY not in users:
        raise SecretRefused(f"tasks of {spec.owner!r} may not use the secret {name!r}")
    if spec.type not in types and ANYBODY not in types:
        raise SecretRefused(f"tasks of type {spec.type!r} may not use the secret {name!r}")


def _read(directory: int, name: str) -> bytes | None:
    """The content of a file that belongs where it is; None where there is none. Raises SecretRefused."""
    try:
        # No link is followed and no pipe waited for: what is there has to be a file of its own.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SecretRefused(f"the secret file {name!r} cannot be read: {error.strerror}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SecretRefused(f"the secret file {name!r} is no file")
        _check_owner(status, name)
        raw = os.read(descriptor, VALUE_BYTES_MAX + 1)
    except OSError as error:
        raise SecretRefused(f"the secret file {name!r} cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)
    if len(raw) > VALUE_BYTES_MAX:
        raise SecretRefused(f"the secret file {name!r} is larger than {VALUE_BYTES_MAX} bytes")
    return raw


def _check_owner(status: os.stat_result, what: str) -> None:
    """A secret that others can read is none, and one that others can write is not to be trusted."""
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & _OTHERS:
        mode = "700" if stat.S_ISDIR(status.st_mode) else "600"
        raise SecretRefused(
            f"{what} must belong to root or taskd, and be open to nobody else and no group: give it the mode {mode}, "
            "see docs/configuration.md"
        )
