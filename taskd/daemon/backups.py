"""Backups while the scheduler serves: a process makes the copy, beside the database, and it is sent and removed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from taskd import interpreter
from taskd.backup_file import FORMAT, READ_BYTES, Manifest, head, tail
from taskd.daemon.logs import log
from taskd.errors import Conflict, DiskFull, StoreError
from taskd.protocol.messages import NodeInfo
from taskd.store.snapshot import Snapshot
from taskd.store.sqlite import SQLiteStore
from taskd.values import format_instant

_NAME = "backup.tmp"
_ANSWER_BYTES_MAX = 1 << 16


class Backups:
    """Makes backups of one scheduler's database, one at a time."""

    def __init__(self, store: SQLiteStore, node: NodeInfo, cluster: str, free_min_bytes: int) -> None:
        """`free_min_bytes`: what a copy leaves free on the disk."""
        self._database = store.path
        self._target = store.path.with_name(_NAME)
        self._store = store
        self._node = node
        self._cluster = cluster
        self._free_min_bytes = free_min_bytes
        self._is_busy = False
        _remove(self._target)  # Of a process that was killed.

    async def parts(self) -> AsyncIterator[bytes]:
        """The backup, as it is to be written to a file. Raises Conflict, DiskFull, StoreError, all before the first
        part."""
        if self._is_busy:
            raise Conflict("a backup is being made already: wait for that one")
        needed_bytes = self._store.size_bytes() + self._free_min_bytes
        if self._store.free_bytes() < needed_bytes:
            raise DiskFull(
                f"a backup is made beside the database, and the disk of {self._database.parent} has no room for that: "
                f"{needed_bytes >> 20} MiB must be free"
            )
        self._is_busy = True
        begun_s = time.time()
        try:
            made = await self._snapshot()
            with self._target.open("rb") as file:
                _remove(self._target)
                manifest = self._manifest(made, begun_s)
                yield head(manifest, begun_s)
                while chunk := await asyncio.to_thread(file.read, READ_BYTES):
                    yield chunk
                yield tail(manifest)
            log("info", "backup sent", size_bytes=made.bytes, took_s=round(time.time() - begun_s, 3))
        finally:
            _remove(self._target)
            self._is_busy = False

    def _manifest(self, made: Snapshot, begun_s: float) -> Manifest:
        node = self._node
        return Manifest(
            format=FORMAT, made=format_instant(begun_s), version=node.version, cluster=self._cluster,
            node_id=node.node_id, node_name=node.name, store_id=made.store_id, schema=made.schema, bytes=made.bytes,
            sha256=made.sha256,
        )  # fmt: skip

    async def _snapshot(self) -> Snapshot:
        """Have a process make the copy. It ends when we are cancelled."""
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, read_fd)
            try:
                process = subprocess.Popen(  # noqa: ASYNC220  # quicker than by way of uvloop, and reaped here
                    interpreter.command("snapshot", self._database, self._target, os.getpid()),
                    stdin=subprocess.DEVNULL,
                    stdout=write_fd,
                    stderr=write_fd,
                    env=interpreter.environment(os.environ),
                    process_group=0,
                    umask=0o077,
                )
            except OSError as error:
                raise StoreError(f"the process that makes a backup cannot be started: {error}") from error
            finally:
                os.close(write_fd)
            stack.callback(process.wait)
            stack.callback(process.kill)
            await _end_of(process)
            answer = os.read(read_fd, _ANSWER_BYTES_MAX)
        if process.returncode:
            raise StoreError(f"the backup could not be made: {answer.decode(errors='replace').strip()}")
        return msgspec.json.decode(answer, type=Snapshot)


async def _end_of(process: subprocess.Popen[bytes]) -> None:
    """Wait until a process has ended."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    pidfd = os.pidfd_open(process.pid)
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    process.wait()


def _remove(path: Path) -> None:
    for name in (path, path.with_name(path.name + "-journal")):
        name.unlink(missing_ok=True)
