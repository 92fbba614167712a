"""Memory running out, as far as it can be handled without control groups.

Where there is no delegated cgroup v2, the scheduler counts what tasks ask for, and a resource limit holds each process
of a task to the memory that the task may use: RLIMIT_DATA, which counts what is private and writable. RLIMIT_AS would
count address space, which Java, Go, Node and every sanitizer reserve by the terabyte. It holds for each process and not
for the task, and counts the untouched stacks of threads, so it can be switched off. Besides, the kernel is told to take
tasks first when memory runs out, and its doing so is recognised.
"""

from __future__ import annotations

import contextlib
import os

OOM_SCORE = 500  # Of -1000..1000; 500 weighs like half the machine's memory: a task goes before any daemon.
_FAMILY_MAX = 64  # Looked at of one task: it may have been forking as fast as it can.
_READ_S = 1.0  # The least time between two looks at the counter.
_LIMIT = 'ulimit -d "$1" || exit 125; shift; exec "$@"'


def with_memory_limit(argv: list[str], memory_bytes: int) -> list[str]:
    """The command that lowers RLIMIT_DATA and then becomes `argv`."""
    return ["/bin/sh", "-c", _LIMIT, "taskd", str(max(1, memory_bytes >> 10)), *argv]


def oom_score_of_tasks() -> int:
    """OOM_SCORE, or this process's own score where that is greater already."""
    try:
        with open("/proc/self/oom_score_adj", "rb") as file:
            return max(OOM_SCORE, int(file.read()))
    except OSError:
        return OOM_SCORE


def prefer_for_oom(pid: int, score: int) -> None:
    """Have the kernel take this process, and what it will start, before others when memory runs out."""
    with contextlib.suppress(OSError):  # It has ended already.
        fd = os.open(f"/proc/{pid}/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
        try:
            if int(os.read(fd, 16)) < score:  # One that has offered itself more than that stays so.
                os.write(fd, b"%d" % score)
        finally:
            os.close(fd)


def prefer_family_for_oom(pid: int, score: int) -> None:
    """The same, and what it has started so far. Whatever one of them starts meanwhile has its score already."""
    left = [pid]
    for _ in range(_FAMILY_MAX):
        if not left:
            break
        parent = left.pop()
        prefer_for_oom(parent, score)
        left.extend(_children(parent))


def _children(pid: int) -> list[int]:
    """Empty where it has ended, or the kernel does not tell."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found.extend(map(int, file.read().split()))
    return found


class OomCounter:
    """Whether the kernel killed something for want of memory in the last second or two."""

    def __init__(self, path: str = "/proc/vmstat") -> None:
        self._path = path
        self._read_at = 0.0
        self._older = self._newer = 0

    def look(self, now: float) -> None:
        """To be called while tasks run, at monotonic `now`; looks at most once a second."""
        if now - self._read_at < _READ_S:
            return
        count = self._read()
        # After a long time without tasks the older reading says nothing about those that run now.
        self._older = self._newer if now - self._read_at < 3 * _READ_S else count
        self._newer = count
        self._read_at = now

    def has_risen(self) -> bool:
        """Since the look before the last: an attempt is known to have ended a while after the kernel killed it."""
        return self._read() > self._older

    def _read(self) -> int:
        """0 where the kernel does not count."""
        try:
            with open(self._path, "rb") as file:
                _, _, rest = file.read().partition(b"\noom_kill ")
            return int(rest.split(maxsplit=1)[0]) if rest else 0
        except OSError:
            return 0
