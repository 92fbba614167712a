"""What ended attempts wrote, kept on the worker for a time and up to a size.

One directory holds what ended in one hour (UTC), so that age is swept by whole directories without looking at files.
A file is found by trying the hours, newest first: at most some hundred look-ups, and no index that could be wrong.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from pathlib import Path

from msgspec import Struct

from taskd.runner.capture import Stream

_HOUR_S = 3600
_HOUR = re.compile(r"\d{8}T\d\d")


class Swept(Struct, frozen=True):
    """What a sweep removed, and how many bytes of disk what stays takes."""

    files: int
    bytes: int
    bytes_kept: int


class Archive:
    """The files of ended attempts, in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = str(directory)
        self._hour = -1
        self._hour_name = ""
        self._lock = threading.Lock()  # Sweeping runs in a thread; this guards the sums.
        self._bytes: dict[str, int] = {}  # By hour; hours of an earlier process are added by the first sweep.

    def open(self) -> None:
        """Make the directory. Raises OSError."""
        os.makedirs(self._directory, 0o700, exist_ok=True)

    def keep(self, path: str, task_id: bytes, number: int, stream: Stream) -> None:
        """Move this file in. Raises OSError."""
        hour = self._current_hour()
        target = f"{self._directory}/{hour}/{_file_name(task_id, number, stream)}"
        try:
            os.rename(path, target)
        except FileNotFoundError:
            self._add_hour(hour)
            os.rename(path, target)
        with self._lock:
            if hour in self._bytes:
                self._bytes[hour] += _disk_bytes(os.stat(target))

    def find(self, task_id: bytes, number: int, stream: Stream) -> str | None:
        """The path of what an attempt wrote; None where it wrote nothing, or it was swept."""
        name = _file_name(task_id, number, stream)
        for hour in reversed(self._hours()):
            path = f"{self._directory}/{hour}/{name}"
            if os.path.exists(path):
                return path
        return None

    def sweep(self, now_s: float, age_max_s: float, bytes_max: int) -> Swept:
        """Remove what ended more than `age_max_s` ago (give or take the hour), then the oldest until `bytes_max` of
        disk is not exceeded. For a thread: takes as long as there are files to remove."""
        hours = self._hours()
        for hour in hours:
            self._count_hour(hour)
        files = freed = 0
        oldest_kept = _hour_name(now_s - age_max_s)
        for hour in hours:
            excess = self._total() - bytes_max
            if hour < oldest_kept:
                excess = self._bytes.get(hour, 0)
            elif excess <= 0:
                break
            removed, removed_bytes = self._shrink(hour, excess, everything=hour < oldest_kept)
            files += removed
            freed += removed_bytes
        return Swept(files, freed, self._total())

    def _current_hour(self) -> str:
        now_s = time.time()
        if int(now_s // _HOUR_S) != self._hour:
            self._hour = int(now_s // _HOUR_S)
            self._hour_name = _hour_name(now_s)
        return self._hour_name

    def _add_hour(self, hour: str) -> None:
        with self._lock:
            os.makedirs(f"{self._directory}/{hour}", 0o700)
            self._bytes[hour] = 0

    def _hours(self) -> list[str]:
        """Oldest first."""
        try:
            return sorted(name for name in os.listdir(self._directory) if _HOUR.fullmatch(name))
        except FileNotFoundError:  # Removed by hand: made again with the next output.
            return []

    def _total(self) -> int:
        with self._lock:
            return sum(self._bytes.values())

    def _count_hour(self, hour: str) -> None:
        """Learn what an earlier process kept. Files that arrive meanwhile may count twice, never not at all."""
        with self._lock:
            if hour in self._bytes:
                return
            self._bytes[hour] = 0
        total = 0
        with os.scandir(f"{self._directory}/{hour}") as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    total += _disk_bytes(entry.stat(follow_symlinks=False))
        with self._lock:
            self._bytes[hour] += total

    def _shrink(self, hour: str, bytes_wanted: int, everything: bool) -> tuple[int, int]:
        """Remove the oldest files of one hour until so many bytes are free; then the hour itself if it is empty."""
        directory = f"{self._directory}/{hour}"
        found: list[tuple[float, str, int]] = []
        with os.scandir(directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    found.append((status.st_mtime, entry.path, _disk_bytes(status)))
        found.sort()
        files = freed = 0
        for _, path, size in found:
            if freed >= bytes_wanted and not everything:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
                files += 1
                freed += size
        with self._lock:
            self._bytes[hour] = max(0, self._bytes.get(hour, 0) - freed)
            with contextlib.suppress(OSError):  # Not empty.
                os.rmdir(directory)
                del self._bytes[hour]
        return files, freed


def _hour_name(time_s: float) -> str:
    return time.strftime("%Y%m%dT%H", time.gmtime(max(0.0, time_s)))


def _file_name(task_id: bytes, number: int, stream: Stream) -> str:
    return f"{task_id.hex()}.{number}.{stream}"


def _disk_bytes(status: os.stat_result) -> int:
    return status.st_blocks * 512
