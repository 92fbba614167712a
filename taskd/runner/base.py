"""What every kind of runner has in common: its interface, a task's surroundings, and how progress is told.

A kind (commands, handlers, HTTP calls) gets attempts to run and says when they began and how they ended. It decides
nothing: time limits, retries and what a signal meant are the core's.
"""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

import msgspec
from msgspec import Struct

from taskd.core.effects import Begin
from taskd.core.task import ErrorInfo, Outcome, Report, encode
from taskd.protocol.messages import AttemptEnded, AttemptKey, AttemptStarted

OnProgress = Callable[[list[AttemptStarted], list[AttemptEnded]], None]

STARTED_AFTER_S = 0.01  # An attempt that ends sooner is never told as started; others are within twice this time.
ERROR_TEXT_CHARS_MAX = 16 << 10  # Of an error's message, and of its traceback: a record keeps up to ten of them.
ERROR_FILE = ".taskd-error"  # In the task's directory.
ERROR_FILE_BYTES_MAX = 64 << 10  # Read of it.

# What a task inherits from the daemon's own environment by default. The rest (secrets among it) stays here.
INHERITED = ("PATH", "HOME", "LANG", "LC_*", "TZ", "USER", "LOGNAME", "SHELL")
# What changes which code a program runs, and our own: never inherited, whatever a pattern like "L*" says.
NEVER_INHERITED = (
    "LD_*",
    "PYTHON*",
    "TASKD_*",
    "NOTIFY_SOCKET",
    "LISTEN_*",
    "BASH_ENV",
    "ENV",
    "CREDENTIALS_DIRECTORY",
)
PATH_DEFAULT = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Kind(Protocol):
    """Runs attempts of one kind of task. Used on one event loop, not from threads.

    Made with an `on_progress`, which it calls on the event loop, never from inside `start`, `terminate` or `kill`.
    Each attempt given to `start` is heard of exactly once as ended, whatever happens; nothing here raises for what a
    task, its spec or the machine does.

    A kind that starts a process in a session of its own tells the Reaper (reaper.py) so in the same step, `own(pid)`,
    and `disown(pid)` when it has reaped it: children that nobody owns are strays, and are reaped as such.
    """

    async def open(self) -> None:
        """Get ready to run. Raises OSError where the machine does not permit it."""

    def start(self, begins: list[Begin]) -> None:
        """Start these attempts now: the core has counted the slots, so nothing waits here for room."""

    def terminate(self, key: AttemptKey) -> None:
        """Ask an attempt to end. One that is not running here is passed over."""

    def kill(self, key: AttemptKey) -> None:
        """End an attempt by force, with all that it started. One that is not running here is passed over."""

    async def close(self) -> None:
        """End by force what still runs, tell of its end, and let go of everything."""


class Place(Struct, frozen=True):
    """Where a worker's tasks run: the same for all of them."""

    directory: Path  # <state>/worker
    socket: str  # of this daemon's API
    worker: str  # this worker's store id, 32 hexadecimal digits
    inherited: tuple[str, ...] = INHERITED  # names of variables, or beginnings of names that end in *

    def environment(self, key: AttemptKey, directory: str) -> dict[str, str]:
        """The variables by which an attempt knows itself, and by which its processes are known. `directory` is its
        private one."""
        return {
            "TASKD_TASK_ID": key.task_text,
            "TASKD_ATTEMPT": str(key.number),
            "TASKD_FENCE": key.fence,
            "TASKD_SOCKET": self.socket,
            "TASKD_TASK_DIR": directory,
            "TASKD_ERROR_FILE": f"{directory}/{ERROR_FILE}",
            "TASKD_WORKER": self.worker,
        }


def base_environment(inherited: Sequence[str] = INHERITED) -> dict[str, str]:
    """The part of the daemon's environment that tasks inherit: what these patterns name, with a PATH in any case."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if any(fnmatchcase(name, pattern) for pattern in inherited)
        and not any(fnmatchcase(name, pattern) for pattern in NEVER_INHERITED)
    }
    kept.setdefault("PATH", PATH_DEFAULT)
    return kept


def ended(
    key: AttemptKey, outcome: Outcome, report: Report, started_s: float = 0.0, ended_s: float | None = None
) -> AttemptEnded:
    """How an attempt ended. Times are UTC: `started_s` is 0 where it never began, `ended_s` is by default now."""
    return AttemptEnded(key, int(outcome), started_s, time.time() if ended_s is None else ended_s, encode(report))


def not_started(key: AttemptKey, error: ErrorInfo) -> AttemptEnded:
    """The end of an attempt that could not be started."""
    return ended(key, Outcome.SPAWN_FAILED, Report(error=error))


def error_info(type: str, message: str, traceback: str = "") -> ErrorInfo:
    """An error for the record, cut to its bounds: a message keeps its beginning, a traceback its end."""
    if len(message) > ERROR_TEXT_CHARS_MAX:
        message = message[: ERROR_TEXT_CHARS_MAX - 1] + "…"
    if len(traceback) > ERROR_TEXT_CHARS_MAX:
        traceback = "…" + traceback[-(ERROR_TEXT_CHARS_MAX - 1) :]
    return ErrorInfo(type[:255], message, traceback)


def read_error_file(directory: str, owner_uid: int | None = None) -> ErrorInfo | None:
    """What a failing task wrote into TASKD_ERROR_FILE: a JSON object {"type", "message", "traceback"}, each a text and
    none of them needed, or else plain text, which is the message. None where it wrote nothing. With `owner_uid` only a
    file of this owner counts: one that the task could not read itself may be linked there."""
    try:
        # Whatever stands there was made by the task: no pipe must be waited for, no link followed.
        fd = os.open(f"{directory}/{ERROR_FILE}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or owner_uid not in (None, status.st_uid):
            return None
        text = os.read(fd, ERROR_FILE_BYTES_MAX)
    except OSError:
        return None
    finally:
        os.close(fd)
    if not text.strip():
        return None
    try:
        given = msgspec.json.decode(text, type=_ErrorFile)
    except (msgspec.DecodeError, RecursionError):
        return error_info("TaskError", text.decode(errors="replace").strip())
    return error_info(given.type or "TaskError", given.message, given.traceback)


class _ErrorFile(Struct):
    type: str = ""
    message: str = ""
    traceback: str = ""


class Progress:
    """Gathers what a kind has to tell: ends once per turn of the loop, beginnings a moment later if still true."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: list[AttemptEnded] = []
        # Beginnings not told yet, by age: a timer tells of `_older` and makes `_younger` the older ones.
        self._younger: dict[AttemptKey, float] = {}
        self._older: dict[AttemptKey, float] = {}
        self._flush_handle: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None

    def began(self, key: AttemptKey, started_s: float) -> None:
        """An attempt began at UTC `started_s`."""
        self._younger[key] = started_s
        if self._timer is None:
            self._timer = self._running_loop().call_later(STARTED_AFTER_S, self._tell_started)

    def tell_started(self, started: list[AttemptStarted]) -> None:
        """Attempts of which another process has found that they began and go on."""
        self._on_progress(started, [])

    def ended(self, attempt: AttemptEnded) -> None:
        """An attempt ended; told with all others of this turn."""
        if self._younger.pop(attempt.key, None) is None:
            self._older.pop(attempt.key, None)
        self._ended.append(attempt)
        if self._flush_handle is None:
            self._flush_handle = self._running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Tell of all ends now."""
        if self._flush_handle is not None:
            self._flush_handle.cancel()
            self._flush_handle = None
        if self._ended:
            told, self._ended = self._ended, []
            self._on_progress([], told)

    def close(self) -> None:
        """Tell of all ends, and of nothing more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._younger.clear()
        self._older.clear()
        self.flush()

    def _tell_started(self) -> None:
        told = [AttemptStarted(key, started_s) for key, started_s in self._older.items()]
        self._older, self._younger = self._younger, {}
        if self._older:
            self._timer = self._running_loop().call_later(STARTED_AFTER_S, self._tell_started)
        else:
            self._timer = None
        if told:
            self._on_progress(told, [])

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop
