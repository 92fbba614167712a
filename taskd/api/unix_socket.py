"""The socket's file: made with the right owner and mode from the first moment, left alone where a daemon answers on it,
replaced where a dead one left it behind, removed at the end if it still is ours.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec import Struct

from taskd.api.peers import group_id
from taskd.errors import AlreadyRunning, ConfigError

PATH_BYTES_MAX = 107  # Of a Unix socket's address, less its closing zero.
BACKLOG = 512
_GROUP_BITS = 0o070


class SocketFile(Struct, frozen=True):
    """A listening socket and the file that leads to it."""

    path: Path
    socket: socket.socket
    device: int
    inode: int
    mode: int  # as it was set

    def remove(self) -> None:
        """Remove the file, unless another socket has taken its place. To be called before the socket is closed: until
        then no other file gets its inode's number."""
        with suppress(OSError):
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == (self.device, self.inode):
                os.unlink(self.path)


class UnixListener:
    """Takes the connections of a socket's file."""

    def __init__(self, file: SocketFile, server: asyncio.AbstractServer) -> None:
        self._file = file
        self._server = server

    @classmethod
    async def open(cls, file: SocketFile, protocol: Callable[[], asyncio.Protocol]) -> UnixListener:
        """Accept connections."""
        # The loop listens once more: with its own backlog of a hundred the kernel would turn a crowd away.
        loop = asyncio.get_running_loop()
        return cls(file, await loop.create_unix_server(protocol, sock=file.socket, backlog=BACKLOG))

    def close(self) -> None:
        """Accept nothing more."""
        self._file.remove()
        self._server.close()

    async def wait_closed(self) -> None:
        """Until that is so."""
        await self._server.wait_closed()


def open_socket(path: Path, mode: int, group: str) -> SocketFile:
    """Listen at `path`, with that mode and group. Where the group does not exist, or may not be given to a file by this
    user, its permissions are left out: no other group gets them. Raises AlreadyRunning, ConfigError."""
    if len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise ConfigError(f"the socket's path is longer than {PATH_BYTES_MAX} bytes: {path}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _directory_lock(path.parent):
            _clear(path)
            # The file takes over the mode that the socket has: there is no moment when others get in.
            os.fchmod(listener.fileno(), 0o600)
            listener.bind(os.fspath(path))
            mode = _set_access(path, mode, group)
            listener.listen(BACKLOG)
            found = os.lstat(path)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen at {path}: {error.strerror or error}") from None
    except BaseException:
        listener.close()
        raise
    return SocketFile(path, listener, found.st_dev, found.st_ino, mode)


def is_answered(path: Path) -> bool:
    """Whether a process listens at a socket's path. Raises OSError where that cannot be told."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        code = probe.connect_ex(os.fspath(path))
    if code in (0, errno.EAGAIN):  # EAGAIN: somebody listens and has his hands full.
        return True
    if code in (errno.ECONNREFUSED, errno.ENOENT):
        return False
    raise OSError(code, os.strerror(code), os.fspath(path))


@contextmanager
def _directory_lock(directory: Path) -> Iterator[None]:
    """Two daemons that start at once look and bind one after the other: or both find a dead socket, and the second
    removes the first one's new one."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _clear(path: Path) -> None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"{path} is in the way: it is not a socket")
    if is_answered(path):
        raise AlreadyRunning(f"another process listens at {path}")
    os.unlink(path)


def _set_access(path: Path, mode: int, group: str) -> int:
    gid = group_id(group)
    try:
        if gid is None:
            raise PermissionError
        if os.lstat(path).st_gid != gid:  # Where it is so already, nobody needs a right to give files away.
            os.chown(path, -1, gid)
    except PermissionError:
        mode &= ~_GROUP_BITS
    os.chmod(path, mode)
    return mode
