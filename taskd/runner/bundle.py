"""Small outputs, many to a file: a file of its own for each would cost more than the task that wrote it.

A bundle is two files, the outputs one after the other, and an index of records of one size. Both only grow. What a
crash of the machine left half written is passed over: a record counts only where its bytes are there.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
from collections.abc import Iterator

from msgspec import Struct

BUNDLE_BYTES_MAX = 8 << 20  # A bundle is removed as one: this is how exactly a limit on the sum can be kept.
INDEX_SUFFIX = ".index"

_NAME = struct.Struct(">16sQB")  # task id, number of the attempt, stream
_PLACE = struct.Struct(">QI")  # offset, length
_RECORD_BYTES = _NAME.size + _PLACE.size


class Kept(Struct, frozen=True):
    """Where a kept output is: `size` bytes of a file from `start` on."""

    path: str
    start: int
    size: int


class BundleWriter:
    """Appends to a new bundle in `directory`, which is made where it is missing. Raises OSError."""

    def __init__(self, directory: str) -> None:
        os.makedirs(directory, 0o700, exist_ok=True)
        names = (name.removesuffix(INDEX_SUFFIX) for name in os.listdir(directory))
        number = max((int(name) for name in names if name.isdigit()), default=0) + 1
        self.path = f"{directory}/{number}"
        self.size = 0
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd = os.open(self.path, flags, 0o600)
        try:
            self._index_fd = os.open(self.path + INDEX_SUFFIX, flags, 0o600)
        except OSError:
            os.close(self._fd)
            raise

    @property
    def is_full(self) -> bool:
        return self.size >= BUNDLE_BYTES_MAX

    def add(self, data: bytes, task_id: bytes, number: int, stream: int) -> int:
        """Keep one output; returns the bytes this took. After an error the bundle is not to be written any more."""
        record = _NAME.pack(task_id, number, stream) + _PLACE.pack(self.size, len(data))
        for fd, part in ((self._fd, data), (self._index_fd, record)):
            if os.write(fd, part) != len(part):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)
        self.size += len(data)
        return len(data) + len(record)

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._index_fd)


def find_bundled(directory: str, task_id: bytes, number: int, stream: int) -> Kept | None:
    """Looks for an output in all bundles of a directory, the newest first."""
    name = _NAME.pack(task_id, number, stream)
    for bundle in _bundles(directory):
        with contextlib.suppress(FileNotFoundError):  # It is being removed.
            place = _look_up(bundle + INDEX_SUFFIX, name)
            if place is not None and sum(place) <= os.stat(bundle).st_size:
                return Kept(bundle, *place)
    return None


def _bundles(directory: str) -> Iterator[str]:
    try:
        numbers = sorted((int(name) for name in os.listdir(directory) if name.isdigit()), reverse=True)
    except FileNotFoundError:
        return
    for number in numbers:
        yield f"{directory}/{number}"


def _look_up(index_path: str, name: bytes) -> tuple[int, int] | None:
    with open(index_path, "rb") as file:
        size = os.fstat(file.fileno()).st_size // _RECORD_BYTES * _RECORD_BYTES
        if not size:
            return None
        with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as index:
            at = index.rfind(name)
            while at % _RECORD_BYTES and at >= 0:  # These bytes by chance, across two records.
                at = index.rfind(name, 0, at + len(name) - 1)
            if at < 0:
                return None
            offset, length = _PLACE.unpack_from(index, at + _NAME.size)
            return offset, length
