"""Lines out of a stream: a daemon tells results and output as a JSON document a line. Pure."""

from __future__ import annotations

from taskd.client.errors import ProtocolError

LINE_BYTES_MAX = 64 << 20  # A result and its error are a few MiB, even with every character escaped.


class LineSplitter:
    """Whole lines out of bytes that come in any pieces."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that these bytes complete, without empty ones."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LINE_BYTES_MAX:
            raise ProtocolError("a line of the answer is too long")
        return [line for line in lines if line]
