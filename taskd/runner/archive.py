"""What ended attempts wrote, kept on the worker for a time and up to a size.

One directory holds what ended in one hour (UTC): long outputs each in a file, short ones in bundles (bundle.py). So
age is swept by whole directories without looking at files. An output is found by trying the hours, newest first: there
is no index of everything that could be wrong.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from msgspec import Struct

from taskd.runner.bundle import BundleWriter, Kept, find_bundled

Stream = Literal["stdout", "stderr"]
STREAMS: tuple[Stream, ...] = ("stdout", "stderr")

_HOUR_S = 3600
_HOUR = re.compile(r"\d{8}T\d\d")
_BUNDLES = "bundles"


class Swept(Struct, frozen=True):
    """What a sweep removed, and how many bytes of disk what stays takes."""

    files: int
    bytes: int
    bytes_kept: int


class Archive:
    """The outputs of ended attempts, in `directory`. Sweeping runs in a thread, everything else on the event loop."""

    def __init__(self, directory: Path) -> None:
        self._directory = str(directory)
        self._hour = -1
        self._hour_name = ""
        self._bundle: BundleWriter | None = None
        self._bundle_is_swept = False
        self._lock = threading.Lock()  # Of the sums.
        self._bytes: dict[str, int] = {}  # By hour; hours of an earlier process are added by the first sweep.

    def open(self) -> None:
        """Make the directory. Raises OSError."""
        os.makedirs(self._directory, 0o700, exist_ok=True)

    def keep_file(self, path: str, task_id: bytes, number: int, stream: Stream) -> None:
        """Move this file in. Raises OSError."""
        hour = self._enter_hour()
        target = f"{self._directory}/{hour}/{_file_name(task_id, number, stream)}"
        os.rename(path, target)
        self._count(hour, _disk_bytes(os.stat(target)))

    def keep_bytes(self, data: bytes, task_id: bytes, number: int, stream: Stream) -> None:
        """Put a short output into a bundle. Raises OSError."""
        hour = self._enter_hour()
        bundle = self._bundle
        if bundle is None or bundle.is_full or self._bundle_is_swept:
            self._close_bundle()
            bundle = self._bundle = BundleWriter(f"{self._directory}/{hour}/{_BUNDLES}")
        try:
            size = bundle.add(data, task_id, number, STREAMS.index(stream))
        except OSError:
            self._close_bundle()
            raise
        self._count(hour, size)

    def find(self, task_id: bytes, number: int, stream: Stream) -> Kept | None:
        """Where an attempt's output is; None where it wrote nothing, or it was swept."""
        name = _file_name(task_id, number, stream)
        for hour in reversed(self._hours()):
            path = f"{self._directory}/{hour}/{name}"
            with contextlib.suppress(FileNotFoundError):
                return Kept(path, 0, os.stat(path).st_size)
            kept = find_bundled(f"{self._directory}/{hour}/{_BUNDLES}", task_id, number, STREAMS.index(stream))
            if kept is not None:
                return kept
        return None

    def sweep(self, now_s: float, age_max_s: float, bytes_max: int) -> Swept:
        """Remove what ended more than `age_max_s` ago (give or take the hour), then the oldest until `bytes_max` of
        disk is not exceeded. For a thread: takes as long as there are files to remove."""
        hours = self._hours()
        for hour in hours:
            self._learn_hour(hour)
        files = freed = 0
        oldest_kept = _hour_of(now_s - age_max_s)
        for hour in hours:
            is_old = hour < oldest_kept
            excess = self._total() - bytes_max
            if excess <= 0 and not is_old:
                break
            removed, removed_bytes = self._shrink(hour, excess, everything=is_old)
            files += removed
            freed += removed_bytes
        return Swept(files, freed, self._total())

    def close(self) -> None:
        """Let go of all files."""
        self._close_bundle()

    def _enter_hour(self) -> str:
        """The directory for what ends now, made where it is missing."""
        now_s = time.time()
        hour = int(now_s // _HOUR_S)
        if hour != self._hour or not os.path.isdir(f"{self._directory}/{self._hour_name}"):
            self._close_bundle()
            name = _hour_of(now_s)
            with self._lock, contextlib.suppress(FileExistsError):
                os.makedirs(f"{self._directory}/{name}", 0o700)
                self._bytes[name] = 0
            self._hour, self._hour_name = hour, name
        return self._hour_name

    def _close_bundle(self) -> None:
        self._bundle_is_swept = False
        if self._bundle is not None:
            self._bundle.close()
            self._bundle = None

    def _hours(self) -> list[str]:
        """Oldest first."""
        try:
            return sorted(name for name in os.listdir(self._directory) if _HOUR.fullmatch(name))
        except FileNotFoundError:  # Removed by hand: made again with the next output.
            return []

    # -- Sums ----------------------------------------------------------------------------------------------------------

    def _count(self, hour: str, size: int) -> None:
        with self._lock:
            if hour in self._bytes:
                self._bytes[hour] += size

    def _total(self) -> int:
        with self._lock:
            return sum(self._bytes.values())

    def _learn_hour(self, hour: str) -> None:
        """What an earlier process kept in it. Outputs that arrive meanwhile may count twice, never not at all."""
        with self._lock:
            if hour in self._bytes:
                return
            self._bytes[hour] = 0
        self._count(hour, sum(_disk_bytes(status) for _, status in self._files(hour)))

    # -- Removal -------------------------------------------------------------------------------------------------------

    def _files(self, hour: str) -> Iterator[tuple[str, os.stat_result]]:
        for directory in (f"{self._directory}/{hour}", f"{self._directory}/{hour}/{_BUNDLES}"):
            with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        if entry.is_file(follow_symlinks=False):
                            yield entry.path, entry.stat(follow_symlinks=False)

    def _shrink(self, hour: str, bytes_wanted: int, everything: bool) -> tuple[int, int]:
        """Remove the oldest files of one hour until so many bytes are free; then the hour itself if it is empty."""
        with self._lock:
            counted = self._bytes.get(hour, 0)
        found = sorted((status.st_mtime, path, _disk_bytes(status)) for path, status in self._files(hour))
        counted_amiss = counted - sum(size for _, _, size in found)  # Bundles are counted by the byte.
        files = freed = 0
        for _, path, size in found:
            if freed >= bytes_wanted and not everything:
                break
            bundle = self._bundle
            if bundle is not None and path.startswith(bundle.path):
                self._bundle_is_swept = True  # The one that is being written, or its index: let another begin.
            with contextlib.suppress(OSError):
                os.unlink(path)
                files += 1
                freed += size
        with self._lock:
            self._bytes[hour] = self._bytes.get(hour, 0) - counted_amiss - freed
            with contextlib.suppress(OSError):  # Not empty.
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(f"{self._directory}/{hour}/{_BUNDLES}")
                os.rmdir(f"{self._directory}/{hour}")
                del self._bytes[hour]
        return files, freed


def _hour_of(time_s: float) -> str:
    return time.strftime("%Y%m%dT%H", time.gmtime(max(0.0, time_s)))


def _file_name(task_id: bytes, number: int, stream: Stream) -> str:
    return f"{task_id.hex()}.{number}.{stream}"


def _disk_bytes(status: os.stat_result) -> int:
    return status.st_blocks * 512
