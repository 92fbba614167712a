"""What a store and its process say to each other: msgpack, each with its length before it, answered in order."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import msgspec
from msgspec import Struct

from taskd.protocol.messages import TaskRow
from taskd.store.base import Query

LENGTH = struct.Struct(">Q")  # Eight bytes: a commit has no bound of its own.

_encoder = msgspec.msgpack.Encoder()


class _Value(Struct, array_like=True, frozen=True, tag=str.lower):
    """A request or an answer."""


class Write(_Value, frozen=True):
    """Make these rows durable, all or none. Each is an array: of all columns, or of those of `process.UPDATE`."""

    term: bytes | None
    inserted: Sequence[Any]
    updated: Sequence[Any]
    nodes: Sequence[Any]


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


class Written(_Value, frozen=True):
    """The rows are durable."""


class Rows(_Value, frozen=True):
    """A slice of tasks, and `before` of the next slice, empty when there is none."""

    rows: list[TaskRow]
    before: bytes


class Ids(_Value, frozen=True):
    """A slice of ids, and `before` of the next."""

    ids: list[bytes]
    before: bytes


class Counts(_Value, frozen=True):
    """A slice of counts by state and queue, and `before` of the next."""

    counts: list[tuple[int, str, int]]
    before: bytes


class Failed(_Value, frozen=True):
    """It could not be done."""

    reason: str


Read = Scan | ScanIds | Count
Answer = Written | Rows | Ids | Counts | Failed

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
