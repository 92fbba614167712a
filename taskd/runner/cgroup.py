"""Control groups (cgroup v2) for tasks that ask for cpus, memory or a number of processes, where they are delegated.

`memory` becomes memory.max (without swap, the whole task killed together), `pids` pids.max; `cpus` becomes a
cpu.weight, so that a busy machine shares by what was asked for, and unless cpus are shared a cpu.max as well: more is
not to be had then even from idle processors. A task that asks for nothing gets no group: its start would cost twice as
much, and its end is certain without (reaper.py).

The process joins its group before it becomes the task, through a few words of shell: joining from outside would race
with its first children and stall on a kernel-wide lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from msgspec import Struct

CONTROLLERS = ("cpu", "memory", "pids")
JOIN_FAILED = 125  # The exit code of a task that could not join its group.
_CPU_PERIOD_US, _CPU_QUOTA_US_MIN = 100_000, 1000  # The kernel's own period, and the least quota that it takes.
_DAEMON_LEAF = "daemon"
_PREFIX = "attempt-"
_JOIN = 'echo 0 > "$1/cgroup.procs" || exit 125; shift; exec "$@"'


class Limits(Struct, frozen=True):
    """What a task may use; None: no limit."""

    memory_bytes: int | None = None
    cpus: float | None = None
    processes: int | None = None

    @classmethod
    def of(cls, resources: dict[str, int]) -> Limits | None:
        """From a spec's resources, which are in thousandths; None where no limit follows from them."""
        memory, cpus, pids = resources.get("memory"), resources.get("cpus"), resources.get("pids")
        if not (memory or cpus or pids):
            return None
        return cls(
            memory // 1000 if memory else None,
            cpus / 1000 if cpus else None,
            max(1, pids // 1000) if pids else None,
        )


class Group:
    """The group of one attempt."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def join(self) -> None:
        """Move this process into it. Raises OSError."""
        _write(self.path / "cgroup.procs", "0")

    def wrap(self, argv: list[str]) -> list[str]:
        """The command that joins the group and then becomes `argv`."""
        return ["/bin/sh", "-c", _JOIN, "taskd", str(self.path), *argv]

    def kill(self) -> None:
        """Kill every process in it."""
        with contextlib.suppress(OSError):  # Gone, or a kernel before 5.14: then signals have to do.
            _write(self.path / "cgroup.kill", "1")

    def is_empty(self) -> bool:
        """Whether no process is left in it."""
        return _fields(self.path / "cgroup.events").get("populated", 0) == 0

    def was_out_of_memory(self) -> bool:
        """Whether the kernel killed something in it for want of memory."""
        return _fields(self.path / "memory.events").get("oom_kill", 0) > 0

    def memory_peak_bytes(self) -> int:
        """0 where it is not known: a kernel before 5.19, or no memory controller."""
        try:
            return int((self.path / "memory.peak").read_text())
        except (OSError, ValueError):
            return 0

    def cpu_s(self) -> float:
        """Processor time of all its processes, waited for or not."""
        return _fields(self.path / "cpu.stat").get("usage_usec", 0) / 1e6

    def remove(self) -> None:
        """After it is empty."""
        with contextlib.suppress(OSError):  # What cannot be removed now is at the next start.
            os.rmdir(self.path)


class Cgroups:
    """The delegated part of the tree, in which groups for attempts can be made."""

    def __init__(self, path: Path, controllers: frozenset[str], *, cpus_are_shared: bool = False) -> None:
        self.path = path
        self.controllers = controllers
        self._cpus_are_shared = cpus_are_shared

    def make(self, name: str, limits: Limits) -> Group:
        """A group for one attempt, named uniquely. Raises OSError."""
        group = Group(self.path / f"{_PREFIX}{name}")
        os.mkdir(group.path)
        try:
            if limits.memory_bytes is not None and "memory" in self.controllers:
                _write(group.path / "memory.max", str(limits.memory_bytes))
                _write(group.path / "memory.oom.group", "1")
                with contextlib.suppress(FileNotFoundError):  # A kernel without swap.
                    _write(group.path / "memory.swap.max", "0")
            if limits.cpus is not None and "cpu" in self.controllers:
                _write(group.path / "cpu.weight", str(min(10_000, max(1, round(limits.cpus * 100)))))
                if not self._cpus_are_shared:
                    quota_us = max(_CPU_QUOTA_US_MIN, round(limits.cpus * _CPU_PERIOD_US))
                    _write(group.path / "cpu.max", f"{quota_us} {_CPU_PERIOD_US}")
            if limits.processes is not None and "pids" in self.controllers:
                _write(group.path / "pids.max", str(limits.processes))
        except OSError:
            group.remove()
            raise
        return group

    def clear(self) -> None:
        """Kill and remove the groups that an earlier daemon left."""
        for path in self.path.glob(f"{_PREFIX}*"):
            group = Group(path)
            group.kill()
            group.remove()


def delegated(
    root: Path = Path("/sys/fs/cgroup"),
    membership: Path = Path("/proc/self/cgroup"),
    pid: int | None = None,
    *,
    cpus_are_shared: bool = False,
) -> Cgroups | str:
    """The part of the tree that this process may manage, made ready: the process moves to a leaf of its own, so that
    controllers can be enabled beside it. Or, in words, why there is none.

    Ours is a group which is marked as delegated (by systemd, `Delegate=yes`) or the root of a container's own view of
    the tree, which we may write to and in which no other process lives."""
    pid = os.getpid() if pid is None else pid
    try:
        lines = membership.read_text().splitlines()
    except OSError as error:
        return f"no control groups: {error.strerror}"
    own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), None)
    if own is None or not (root / "cgroup.controllers").exists():
        return "no cgroup v2 at " + str(root)
    path = root / own.strip("/")
    if path.name == _DAEMON_LEAF:  # A daemon before this one moved there, and we were started in its place.
        path = path.parent
    if not (path / "cgroup.type").exists():
        return "the root of the machine's control groups is not ours to manage"
    if path != root and not _is_marked_delegated(path):
        return f"the control group {path} is not delegated; set Delegate=yes in the unit"
    try:
        inhabitants = set((path / "cgroup.procs").read_text().split()) - {str(pid)}
        if inhabitants:
            return f"the control group {path} is shared with other processes"
        available = frozenset((path / "cgroup.controllers").read_text().split()).intersection(CONTROLLERS)
        if not available:
            return f"the control group {path} has none of the controllers {', '.join(CONTROLLERS)}"
        leaf = path / _DAEMON_LEAF
        leaf.mkdir(exist_ok=True)
        _write(leaf / "cgroup.procs", str(pid))
        _write(path / "cgroup.subtree_control", " ".join(f"+{name}" for name in sorted(available)))
    except OSError as error:
        return f"the control group {path} cannot be managed: {error.strerror}"
    cgroups = Cgroups(path, available, cpus_are_shared=cpus_are_shared)
    cgroups.clear()
    return cgroups


def _is_marked_delegated(path: Path) -> bool:
    for name in ("user.delegate", "trusted.delegate"):
        try:
            return os.getxattr(path, name) == b"1"
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.ENOTSUP, errno.EPERM):
                return False
    return False


def _write(path: Path, text: str) -> None:
    """Into a file that the kernel has made: never creates one."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _fields(path: Path) -> dict[str, int]:
    """A file of lines `name number`; empty where it cannot be read."""
    try:
        return {name: int(value) for name, value in (line.split() for line in path.read_text().splitlines())}
    except (OSError, ValueError):
        return {}
