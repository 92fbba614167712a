"""HTTP/1.1 as a client speaks it to its daemon: requests to bytes, bytes to responses. Pure; both clients drive it.

Written out because the standard library's http.client brings ssl and the mail parser with it, which costs the command
line a third of its start, and because one reader serves the blocking and the asyncio client alike.
"""

from __future__ import annotations

from taskd.client.errors import ConnectionLost, ProtocolError
from taskd.version import VERSION

HEAD_BYTES_MAX = 64 << 10
LINE_BYTES_MAX = 4 << 10  # Of a chunk's size line, and of a trailer.
READ_BYTES = 256 << 10  # What drivers ask the socket for at a time.

_BODILESS = frozenset({204, 304})
_HEXADECIMAL = b"0123456789abcdefABCDEF"
_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


def encode_request(method: str, target: str, body: bytes = b"", header: str = "") -> bytes:
    """A request as bytes. `target` is a path with its query, already quoted; a body is JSON; `header` is one more
    line."""
    head = f"{method} {target} HTTP/1.1\r\nHost: taskd\r\nUser-Agent: taskd/{VERSION}\r\n{header}"
    if body or method != "GET":
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode("ascii") + b"\r\n" + body


def quote(text: str) -> str:
    """Text as it may stand in one part of a path, or in a query."""
    return "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in text.encode("utf-8", "surrogateescape"))


def query(**fields: str | int | float | None) -> str:
    """A query with its question mark, or nothing. None and empty text are left out."""
    parts = [f"{name}={quote(str(value))}" for name, value in fields.items() if value is not None and value != ""]
    return "?" + "&".join(parts) if parts else ""


class ResponseReader:
    """Reads one response: bytes go in, the parts of its body come out.

    `status` is 0 until the head is complete. Raises ProtocolError for what is not HTTP, ConnectionLost where it breaks
    off.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}  # by name in lower case
        self.is_complete = False
        self.is_reusable = False  # once complete: whether the connection may carry the next request
        self._buffer = bytearray()
        self._left = 0  # bytes of the current chunk, or of the body, that are still to come
        self._read = self._read_head

    def feed(self, data: bytes) -> list[bytes]:
        """The parts of the body that these bytes complete. No bytes means that the connection has ended."""
        if not data:
            return self._end()
        self._buffer += data
        parts: list[bytes] = []
        while self._buffer and not self.is_complete and self._read(parts):
            pass
        if self.is_complete and self._buffer:
            raise ProtocolError("the daemon sent more than its answer")
        return parts

    def _end(self) -> list[bytes]:
        if self.is_complete:
            return []
        if self._read == self._read_until_end:
            self.is_complete = True
            return []
        raise ConnectionLost()

    # Each of these takes what it can from the buffer, and returns whether there may be more to take.

    def _read_head(self, parts: list[bytes]) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 or end > HEAD_BYTES_MAX:
            if len(self._buffer) > HEAD_BYTES_MAX:
                raise ProtocolError("the head of the answer is too long")
            return False
        status_line, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        version, _, rest = status_line.partition(" ")
        code = rest[:3]
        if not version.startswith("HTTP/1.") or not (code.isascii() and code.isdigit()):
            raise ProtocolError(f"what listens there does not speak HTTP: it began with {status_line[:80]!r}")
        if code.startswith("1"):
            return True  # An interim answer: the real one follows.
        self.status = int(code)
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        self._choose_body(version)
        return True

    def _choose_body(self, version: str) -> None:
        connection = self.headers.get("connection", "").lower()
        self.is_reusable = version == "HTTP/1.1" and connection != "close"
        length = self.headers.get("content-length")
        if self.status in _BODILESS:
            self.is_complete = True
        elif self.headers.get("transfer-encoding", "").lower() == "chunked":
            self._read = self._read_size
        elif length is not None:
            if not (length.isascii() and length.isdigit()):
                raise ProtocolError(f"the length of the answer is no number: {length[:80]!r}")
            self._left = int(length)
            self._read = self._read_body
            self.is_complete = self._left == 0
        else:
            self.is_reusable = False
            self._read = self._read_until_end

    def _read_body(self, parts: list[bytes]) -> bool:
        self._take(parts)
        self.is_complete = self._left == 0
        return False

    def _read_until_end(self, parts: list[bytes]) -> bool:
        self._left = len(self._buffer)
        self._take(parts)
        return False

    def _read_size(self, parts: list[bytes]) -> bool:
        line = self._line()
        if line is None:
            return False
        digits = line.partition(b";")[0].strip()
        if not digits or digits.strip(_HEXADECIMAL):
            raise ProtocolError(f"not the size of a chunk: {bytes(digits[:80])!r}")
        self._left = int(digits, 16)
        self._read = self._read_chunk if self._left else self._read_trailer
        return True

    def _read_chunk(self, parts: list[bytes]) -> bool:
        if self._left:
            self._take(parts)
        if self._left or len(self._buffer) < 2:
            return False
        if self._buffer[:2] != b"\r\n":
            raise ProtocolError("a chunk of the answer does not end where it should")
        del self._buffer[:2]
        self._read = self._read_size
        return True

    def _read_trailer(self, parts: list[bytes]) -> bool:
        line = self._line()
        if line is None:
            return False
        self.is_complete = not line
        return True

    def _line(self) -> bytearray | None:
        end = self._buffer.find(b"\r\n")
        if end < 0 or end > LINE_BYTES_MAX:
            if len(self._buffer) > LINE_BYTES_MAX:
                raise ProtocolError("a line of the answer is too long")
            return None
        line = self._buffer[:end]
        del self._buffer[: end + 2]
        return line

    def _take(self, parts: list[bytes]) -> None:
        part = bytes(self._buffer[: self._left])
        del self._buffer[: len(part)]
        self._left -= len(part)
        if part:
            parts.append(part)
