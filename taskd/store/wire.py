"""What a store and its process say to each other: msgpack, each with its length before it, answered in order."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, BinaryIO

import msgspec
from msgspec import Struct

from taskd.core.backlog import Backlog
from taskd.core.effects import Purge
from taskd.protocol.messages import Dot, TaskRow
from taskd.store.base import Query

LENGTH = struct.Struct(">Q")  # Eight bytes: a commit has no bound of its own.

_encoder = msgspec.msgpack.Encoder()


class _Value(Struct, array_like=True, frozen=True, tag=str.lower):
    """A request or an answer."""


class Write(_Value, frozen=True):
    """Make all of this durable, or none: see core.effects.Commit. Rows are arrays: of all columns, or, where they are
    `updated`, of those of changes.CHANGING. Terms and dots of `meta` come as JSON."""

    term: bytes | None
    inserted: list[Any]
    updated: list[Any]
    nodes: list[Any]
    taken: list[Any] = []
    purged: list[bytes] = []
    purges: list[Purge] = []
    seen: list[tuple[int, int, int, int]] = []  # epoch, node_id, boot, lsn
    last_purge: bytes | None = None
    has_strays: bool | None = None


class Scan(_Value, frozen=True):
    """Read one slice of the tasks that match: at most `limit`, whatever the query says."""

    query: Query
    limit: int


class ScanIds(_Value, frozen=True):
    """Read one slice of the ids that end so."""

    suffix: str
    before: bytes
    limit: int


class Count(_Value, frozen=True):
    """Count one slice of the tasks."""

    before: bytes


class Unfinished(_Value, frozen=True):
    """Read one slice of the unfinished tasks, by id, as a Backlog."""

    after: bytes


class Lacking(_Value, frozen=True):
    """Read one slice of the tasks that `seen` does not cover, by id."""

    seen: list[Dot]
    after: bytes


class Fetch(_Value, frozen=True):
    """Read the rows of these ids, which are in ascending order: so many as an answer holds."""

    ids: list[bytes]


class AllIds(_Value, frozen=True):
    """Read one slice of all ids, ascending."""

    after: bytes


class Ended(_Value, frozen=True):
    """Read one slice of the ids of tasks that had ended before, ascending, at most `limit`."""

    before_s: float
    after: bytes
    limit: int


class Written(_Value, frozen=True):
    """All of it is durable."""


class Rows(_Value, frozen=True):
    """A slice of tasks, and where the next slice begins: `before` or `after` it, empty when there is none."""

    rows: list[TaskRow]
    next: bytes


class Waiting(_Value, frozen=True):
    """A slice of the unfinished tasks, and where the next begins."""

    backlog: Backlog
    next: bytes


class Ids(_Value, frozen=True):
    """A slice of ids, and where the next begins."""

    ids: list[bytes]
    next: bytes


class Counts(_Value, frozen=True):
    """A slice of counts by state and queue, and where the next begins."""

    counts: list[tuple[int, str, int]]
    next: bytes


class Failed(_Value, frozen=True):
    """It could not be done."""

    reason: str


Read = Scan | ScanIds | Count | Unfinished | Lacking | Fetch | AllIds | Ended
Answer = Written | Rows | Waiting | Ids | Counts | Failed

decode_write = msgspec.msgpack.Decoder(Write).decode
decode_read: Callable[[bytes], Read] = msgspec.msgpack.Decoder(Read).decode
decode_answer: Callable[[memoryview], Answer] = msgspec.msgpack.Decoder(Answer).decode


def frame(value: Struct) -> bytearray:
    """The bytes to send."""
    buffer = bytearray(LENGTH.size)
    _encoder.encode_into(value, buffer, LENGTH.size)
    LENGTH.pack_into(buffer, 0, len(buffer) - LENGTH.size)
    return buffer


def receive(stream: BinaryIO) -> bytes | None:
    """The next request from a blocking stream; None at its end, even in the middle of a request."""
    header = stream.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(header)
    body = stream.read(length)
    return body if len(body) == length else None
