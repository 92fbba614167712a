"""Who has changed what, or has had a backup: a line of JSON for each request that was to, whatever came of it.

It goes to a file of its own, which is only ever added to; all but plain submissions, of which there may be thousands a
second, go to the log too. No params, commands, environments or other bodies are in it: who, what, which tasks, when.
The kernel has the line when the answer leaves; it is not synced for each of them, so that the last second or so may
be missing after a crash of the machine.
"""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from msgspec import Struct

from taskd.api.service import ApiRequest, ApiResponse
from taskd.daemon.logs import log

TEXT_CHARS_MAX = 1000  # Of a path, or of the query.
_COMPLAIN_S = 60.0
_SUBMISSION = "/v1/tasks"

_encode = msgspec.json.Encoder().encode


class Entry(Struct, frozen=True, omit_defaults=True):
    """One line. `source`: the process that asked at this node's socket, or the node that relayed it."""

    at: str
    user: str
    is_admin: bool
    source: str
    method: str
    path: str
    status: int
    query: dict[str, str] = {}
    did: str = ""


class AuditLog:
    """The file `path`; where it has grown to `bytes_max` it becomes `path`.1, in the place of an older one. 0: none."""

    def __init__(self, path: Path, bytes_max: int) -> None:
        """Raises OSError."""
        self._path = path
        self._bytes_max = bytes_max
        self._fd = -1
        self._size_bytes = 0
        self._complain_at = 0.0
        if bytes_max:
            self._open()

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self._path, flags, 0o640)
        self._size_bytes = os.fstat(self._fd).st_size

    def record(self, request: ApiRequest, response: ApiResponse, now_s: float) -> None:
        """A request was answered, at UTC `now_s`. Never raises: that the file cannot be written is logged."""
        at = datetime.fromtimestamp(now_s, UTC).isoformat(timespec="milliseconds")
        query = {name: text[:TEXT_CHARS_MAX] for name, text in request.query.items()}
        caller = request.caller
        entry = Entry(
            at, caller.user, caller.is_admin, request.source, request.method, request.path[:TEXT_CHARS_MAX],
            response.status, query, response.did,
        )  # fmt: skip
        if request.path != _SUBMISSION:
            done, refused = ("changed", "change refused") if request.method == "POST" else ("given", "refused")
            log(
                "info", done if response.status < 400 else refused, user=entry.user, source=entry.source,
                path=entry.path, status=entry.status, did=entry.did,
            )  # fmt: skip
        if self._bytes_max:
            self._write(_encode(entry) + b"\n")

    def _write(self, line: bytes) -> None:
        try:
            if self._fd < 0:
                self._open()
            if self._size_bytes + len(line) > self._bytes_max and self._size_bytes:
                os.replace(self._path, f"{self._path}.1")
                self.close()
                self._open()
            self._size_bytes += os.write(self._fd, line)
        except OSError as error:
            now = time.monotonic()
            if now >= self._complain_at:
                self._complain_at = now + _COMPLAIN_S
                log("error", "the audit file cannot be written", path=self._path, reason=error.strerror)

    def reopen(self) -> None:
        """Go on in the file of that name, which may be another one now."""
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
