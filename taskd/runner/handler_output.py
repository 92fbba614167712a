"""What handlers print: stdout and stderr of a handler process are two files in memory, and each call has a stretch of
them. So nothing is copied while it is written, what C code and child processes write is there too, and so is what a
process said last before it died.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import sys
from io import TextIOWrapper
from typing import NamedTuple

from taskd.core.task import OUTPUT_TAIL_BYTES

KEPT_BYTES_MAX = 1 << 20  # Of one stream: beyond this, and outside the tail, what was written goes.
STDOUT, STDERR = 1, 2
_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2
_BLOCK_BYTES = 4096

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Written(NamedTuple):
    """What a call wrote: sizes, and the last OUTPUT_TAIL_BYTES of each stream."""

    stdout_bytes: int
    stderr_bytes: int
    stdout_tail: bytes
    stderr_tail: bytes


def make_file(name: str) -> int:
    """The descriptor of a new file in memory that can only be appended to. Raises OSError."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
    return descriptor


def read_written(stdout_fd: int, stderr_fd: int, stdout_from: int, stderr_from: int) -> Written:
    """What was written to these files from these offsets on."""
    stdout_bytes, stdout_tail = _stretch(stdout_fd, stdout_from)
    stderr_bytes, stderr_tail = _stretch(stderr_fd, stderr_from)
    return Written(stdout_bytes, stderr_bytes, stdout_tail, stderr_tail)


class Printed:
    """The streams as their process sees them."""

    def __init__(self) -> None:
        self.stdout_from = self.stderr_from = 0  # Where the output of the next call begins.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                # By lines: so the last words of a process that dies are there.
                stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)

    def take(self) -> Written | None:
        """What was written since the last time; None for nothing."""
        try:
            sys.stdout.flush()
            sys.stderr.flush()
            stdout_to = os.lseek(STDOUT, 0, os.SEEK_END)
            stderr_to = os.lseek(STDERR, 0, os.SEEK_END)
        except Exception:  # A handler has closed or replaced them: its loss.
            return None
        if stdout_to == self.stdout_from and stderr_to == self.stderr_from:
            return None
        written = read_written(STDOUT, STDERR, self.stdout_from, self.stderr_from)
        self.stdout_from, self.stderr_from = _trimmed(STDOUT, stdout_to), _trimmed(STDERR, stderr_to)
        return written

    def bound(self) -> None:
        """Keep a call that prints without end from filling the memory; to be called now and then while one runs."""
        for descriptor, start in ((STDOUT, self.stdout_from), (STDERR, self.stderr_from)):
            with contextlib.suppress(OSError):
                size = os.lseek(descriptor, 0, os.SEEK_END)
                if size - start > KEPT_BYTES_MAX:
                    _punch(descriptor, (size - OUTPUT_TAIL_BYTES) // _BLOCK_BYTES * _BLOCK_BYTES)


def _stretch(descriptor: int, start: int) -> tuple[int, bytes]:
    """How many bytes there are from `start` on, and the last of them."""
    try:
        size = os.lseek(descriptor, 0, os.SEEK_END)
        if size < start:  # Somebody has cut it off.
            start = 0
        tail_from = max(start, size - OUTPUT_TAIL_BYTES)
        return size - start, os.pread(descriptor, size - tail_from, tail_from)
    except OSError:
        return 0, b""


def _trimmed(descriptor: int, size: int) -> int:
    """Empty the file where it has grown, between two calls; where the next call's output begins."""
    if size <= KEPT_BYTES_MAX:
        return size
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        return 0
    return size


def _punch(descriptor: int, stop: int) -> None:
    """Give the memory before `stop` back; offsets stay."""
    _libc.fallocate64(descriptor, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, 0, stop)
