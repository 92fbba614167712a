"""Begins anew from a backup: puts a checked copy of the database into a state directory that no daemon uses."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from pathlib import Path

from msgspec import Struct

from taskd.backup_file import BackupFile, Manifest
from taskd.daemon.state import StateDirectory, known_identity, set_scheduler_identity
from taskd.errors import Conflict, StoreError
from taskd.store.snapshot import adopt, settle

_DATABASE = "taskd.db"
_PARTS = ("", "-wal", "-shm", "-journal")  # SQLite's files of one database.


class Restored(Struct, frozen=True):
    """What was done. `moved_to`: where the database is that was there before."""

    manifest: Manifest
    directory: Path
    node_id: int  # 0: a new one is made at the next start
    moved_to: Path | None


def restore(backup: Path, state_dir: Path, *, is_forced: bool, is_new_node: bool) -> Restored:
    """Put the database of a backup into a scheduler's state directory, which is made where it is missing. All of it is
    checked before anything there is touched, and what was there is moved aside, never removed.

    `is_new_node`: the node gets an id of its own at its next start, because the one of the backup lives on elsewhere.
    Raises AlreadyRunning, Conflict where there is a state and it is not forced, StoreError, ConfigError.
    """
    with BackupFile(backup) as source, contextlib.closing(StateDirectory(state_dir, ["scheduler"])) as state:
        directory, manifest = state.main, source.manifest
        database = directory / _DATABASE
        is_there = database.exists()
        identity = known_identity(state, time.time())
        if is_there and not is_forced:
            raise Conflict(
                f"{directory} holds a scheduler's state: with --force it is moved aside and replaced by the backup"
            )
        if identity is not None and not is_new_node and identity.node_id != manifest.node_id and not is_forced:
            raise Conflict(
                f"{directory} belongs to node {identity.node_id}, and the backup to node {manifest.node_id}: "
                "restore it into another directory, or with --new-node, or replace the node with --force"
            )
        copy = _copy(source, directory)
        try:
            moved_to = _move_aside(database) if is_there else None
            copy.replace(database)
        except OSError as error:
            copy.unlink(missing_ok=True)
            raise StoreError(f"{error.filename or copy} cannot be put in place: {error.strerror}") from None
        node_id = 0 if is_new_node else manifest.node_id
        set_scheduler_identity(state, node_id, manifest.made)
        _give_to_owner(state_dir, directory)
        _sync(directory)
    return Restored(manifest, directory, node_id, moved_to)


def _copy(source: BackupFile, directory: Path) -> Path:
    """The database of a backup as a file beside its future place, checked and durable."""
    copy = directory / f"restoring-{secrets.token_hex(4)}"
    try:
        with open(copy, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            source.check(file)
            file.flush()
            os.fsync(file.fileno())
        adopt(copy)
    except OSError as error:
        copy.unlink(missing_ok=True)
        raise StoreError(f"{copy} cannot be written: {error.strerror}") from None
    except BaseException:
        copy.unlink(missing_ok=True)
        raise
    return copy


def _move_aside(database: Path) -> Path:
    """Give a database a name under which nobody opens it by mistake. Its log goes with it: both are one."""
    settle(database)
    number = 1
    while (aside := database.with_name(f"{database.name}.before-restore-{number}")).exists():
        number += 1
    for part in _PARTS[1:]:
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{database}{part}", f"{aside}{part}")
    os.rename(database, aside)
    return aside


def _give_to_owner(state_dir: Path, directory: Path) -> None:
    """Root may restore what the daemon's own user is to use."""
    if os.geteuid() != 0:
        return
    owner = state_dir.stat()
    # By the directory itself and not by its path: it is that user's, who could put a link in its place meanwhile.
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
        for name in os.listdir(descriptor):
            os.chown(name, owner.st_uid, owner.st_gid, dir_fd=descriptor, follow_symlinks=False)
    finally:
        os.close(descriptor)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
