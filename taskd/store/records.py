"""Records in an append-only file: each has a header of its length, the checksum of its body, and one of the header.

With a checksum of its own the header tells a record cut short by a crash (it promises more than there is) from damage.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from enum import Enum
from typing import BinaryIO

MAGIC = b"TASKDJ1\n"  # How a file begins; the digit is the version of the format.

_HEADER = struct.Struct(">III")  # bytes of the body, its CRC-32, CRC-32 of these eight bytes
_LENGTH_AND_SUM = struct.Struct(">II")
_CHUNK_BYTES = 1 << 20


class Ending(Enum):
    """What follows the last good record."""

    CLEAN = "nothing"
    TORN = "the beginning of a record: the process or the machine died while it was written"
    DAMAGED = "something that was never written so"


def pack(body: bytes) -> bytes:
    """The record of a body, at most 4 GiB."""
    start = _LENGTH_AND_SUM.pack(len(body), zlib.crc32(body))
    return b"".join((start, zlib.crc32(start).to_bytes(4), body))


class Records:
    """Reads the records of a file from its start on. `good_bytes` is where the last good one ends, `ending` what
    follows; both are final when the iteration has ended."""

    def __init__(self, file: BinaryIO) -> None:
        self.good_bytes = 0
        self.ending = Ending.CLEAN
        self._file = file

    def __iter__(self) -> Iterator[bytes]:
        """The bodies. Raises OSError."""
        magic = self._file.read(len(MAGIC))
        if magic != MAGIC:
            if magic:
                self._ends(is_torn=MAGIC.startswith(magic))
            return
        self.good_bytes = len(MAGIC)
        while header := self._file.read(_HEADER.size):
            if len(header) < _HEADER.size:
                return self._ends(is_torn=True)
            length, body_sum, header_sum = _HEADER.unpack(header)
            if zlib.crc32(header[: _LENGTH_AND_SUM.size]) != header_sum:
                return self._ends(is_torn=False)
            body = self._file.read(length)
            if len(body) < length:
                return self._ends(is_torn=True)
            if zlib.crc32(body) != body_sum:
                return self._ends(is_torn=False)
            yield body
            self.good_bytes += len(header) + length

    def reject(self) -> None:
        """The record just given makes no sense: it counts as damaged, and the iteration has to be left."""
        self.ending = Ending.DAMAGED

    def _ends(self, *, is_torn: bool) -> None:
        # When a machine dies, a file can have grown by bytes that never came: zeros to its end.
        self.ending = Ending.TORN if is_torn or self._is_zero_from(self.good_bytes) else Ending.DAMAGED

    def _is_zero_from(self, offset: int) -> bool:
        self._file.seek(offset)
        while chunk := self._file.read(_CHUNK_BYTES):
            if chunk.count(0) < len(chunk):
                return False
        return True
