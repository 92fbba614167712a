"""What a task wrote, out of the lines in which a daemon sends both of its streams. Pure."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from taskd.client.call import error_from
from taskd.client.lines import LineSplitter


class Written(Struct, frozen=True):
    """Bytes that an attempt of a task wrote to `stream`, "stdout" or "stderr"."""

    stream: str = ""
    data: bytes = b""  # base64 in JSON
    attempt: int = 0


_decode = msgspec.json.Decoder(Written).decode


class OutputReader:
    """Reads such lines, in whatever pieces they come."""

    def __init__(self) -> None:
        self._lines = LineSplitter()

    def feed(self, data: bytes) -> list[Written]:
        """What these bytes complete. Raises ApiError where the daemon gives up in between."""
        found = []
        for line in self._lines.feed(data):
            written = _decode(line)
            if written.stream:
                found.append(written)
            elif "error" in msgspec.json.decode(line):
                raise error_from(503, line)
        return found
