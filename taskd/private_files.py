"""Files with secrets: their owner alone may read them, and they are written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from taskd.errors import ConfigError

FILE_CHARS_MAX = 1 << 20


def read_private(path: Path) -> str | None:
    """The text of a file with secrets; None where there is none. Raises ConfigError, also where others can read it."""
    try:
        with path.open() as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise ConfigError(f"{path} can be read by others than its owner: make it private with chmod 600 {path}")
            return file.read(FILE_CHARS_MAX)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def save_private(path: Path, text: str, force: bool, mode: int = 0o600) -> None:
    """Write a file that its owner alone may read, or has another mode, whole or not at all. Raises ConfigError where
    something else is there and not `force`."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            if os.geteuid() == 0:  # In the directory of a service's user, root writes what that user has to read.
                owner = path.parent.stat()
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            os.fchmod(file.fileno(), mode)
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        if force:
            temporary.replace(path)
        else:
            try:
                os.link(temporary, path)  # Fails where there is one already: two first schedulers make one key.
            except FileExistsError:
                there = read_private(path)
                if there is None or there.strip() != text:
                    raise ConfigError(f"{path} holds another key already; use --force to replace it") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def directory_lock(directory: Path) -> Iterator[None]:
    """Who changes several files of a directory, or reads one to change it, does so one after the other. The directory
    is made where it is missing. Raises ConfigError."""
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be used: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
