"""What the daemon says: one line for an event, with the fields that explain it; text for people or JSON for programs.

Nothing from outside can forge a line: whatever is not printable is escaped, and a traceback is indented. A cluster key
that came into a field by mistake is blotted out. Lines go straight to stderr, so that the last one before a crash is
there.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import IO, Any

VALUE_CHARS_MAX = 2000  # Of one field: a peer's reason, an error's text.

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
# syslog's numbers, which journald reads from the start of a line.
_SYSLOG = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
_KEY = re.compile(r"(taskd-(?:scheduler|worker)-key-v1:)[\w=-]+")
_BARE = re.compile(r"[^\s\"'=\\]+")
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", '"': '\\"', "\\": "\\\\"}

_logger = logging.getLogger("taskd")


def log(level: str, event: str, /, **fields: object) -> None:
    """Say that something happened: `level` is debug, info, warning or error."""
    number = _LEVELS[level]
    if _logger.isEnabledFor(number):
        _logger.log(number, event, extra={"fields": fields})


def log_bug(event: str, error: BaseException, /) -> None:
    """Say that something went wrong that nobody expected, with its traceback."""
    _logger.error(event, exc_info=error)


def set_up(level: str, format: str, environ: Mapping[str, str], stream: IO[str] | None = None) -> None:
    """Send all logs of the process to stderr (or `stream`), in `format`: auto, text or json. Again: anew."""
    stream = stream if stream is not None else sys.stderr
    is_journal = _is_journal(stream, environ)
    formatter: logging.Formatter = _JsonLines() if format == "json" else _TextLines(format != "auto" or not is_journal)
    handler = _Handler(stream)
    handler.setFormatter(_Prefixed(formatter) if is_journal else formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)  # Libraries: only what is wrong.
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    # It warns of every interface that comes and goes; discovery says itself what matters of that.
    logging.getLogger("zeroconf").setLevel(logging.ERROR)
    set_level(level)


def set_level(level: str) -> None:
    """The least level that is logged from now on."""
    _logger.setLevel(_LEVELS[level])


class _Handler(logging.StreamHandler[IO[str]]):
    """Writes lines. A log that cannot be written stops nothing: there is nowhere left to say so."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's own name
        pass


class _TextLines(logging.Formatter):
    """`2026-03-01T09:00:00.123+01:00 warning worker lost worker=a open=3`, the time in the machine's zone."""

    def __init__(self, shows_time: bool) -> None:
        super().__init__()
        self._shows_time = shows_time

    def format(self, record: logging.LogRecord) -> str:
        parts = [record.levelname.lower(), escape(_event(record))]
        if self._shows_time:
            moment = datetime.fromtimestamp(record.created).astimezone()
            parts.insert(0, moment.isoformat(timespec="milliseconds"))
        parts += [f"{name}={_quoted(_text(value))}" for name, value in _fields(record).items()]
        line = " ".join(parts)
        traceback = _traceback(record)
        return "\n".join([line, *("    " + escape(part) for part in traceback.splitlines())])


class _JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, event, and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, object] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": _cut(_event(record)),
        }
        for name, value in _fields(record).items():
            line.setdefault(name, value if _is_json(value) else _text(value))
        traceback = _traceback(record)
        if traceback:
            line["traceback"] = traceback
        return json.dumps(line)


class _Prefixed(logging.Formatter):
    """Marks each line with its level for journald."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_SYSLOG.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in self._inner.format(record).split("\n"))


def _is_json(value: object) -> bool:
    return value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def escape(text: str) -> str:
    """The text on one line: what is not printable is written as an escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _ESCAPES.get(char) or _code(char) for char in text)


def _quoted(text: str) -> str:
    """Bare where that cannot be misread, else in quotes."""
    if text.isprintable() and _BARE.fullmatch(text):
        return text
    return '"' + "".join(_ESCAPES.get(char) or (char if char.isprintable() else _code(char)) for char in text) + '"'


def _code(char: str) -> str:
    number = ord(char)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _event(record: logging.LogRecord) -> str:
    """What happened; of a library's record the name of the library too."""
    message = _without_keys(record.getMessage())
    return message if record.name == _logger.name else f"{record.name}: {message}"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


def _text(value: object) -> str:
    """A field's value as text. Short bytes are ids; longer ones are somebody's data, of which only the size is said."""
    if isinstance(value, bytes):
        return value.hex() if len(value) <= 16 else f"({len(value)} bytes)"
    if isinstance(value, float):
        return f"{value:.6g}"
    return _cut(_without_keys(str(value)))


def _traceback(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[0] is None:
        return ""
    return _without_keys(logging.Formatter().formatException(record.exc_info))


def _without_keys(text: str) -> str:
    return _KEY.sub(r"\1…", text)


def _cut(text: str) -> str:
    return text if len(text) <= VALUE_CHARS_MAX else text[: VALUE_CHARS_MAX - 1] + "…"


def _is_journal(stream: IO[str], environ: Mapping[str, str]) -> bool:
    """Whether the stream goes to journald, which says so by device and inode: the variable alone is inherited by
    processes whose stderr goes elsewhere."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
