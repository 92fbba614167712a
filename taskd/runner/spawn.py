"""Turns a `command` spec into a process, or into words that say why there is none."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import time
from typing import Protocol

from msgspec import Struct

from taskd.core.task import ErrorInfo, TaskSpec
from taskd.runner.base import error_info
from taskd.runner.cgroup import Group, Limits
from taskd.runner.limits import with_memory_limit

SHELL = "/bin/sh"
REMEMBERED_S = 1.0  # A program newly installed in a directory further ahead in PATH is found after this time.
REMEMBERED_MAX = 1000


class StartUnknown(Exception):
    """Who was to start a process is gone; whether it began, nobody knows."""


class End(Struct, array_like=True, frozen=True):
    """How a process ended."""

    status: int  # its exit code, or minus its signal
    cpu_s: float
    memory_peak_bytes: int  # 0 where it is not known


def reap(pid: int) -> End | None:
    """Wait for a child; None where its end is lost: something in this process waits for "any child"."""
    try:
        _, status, usage = os.wait4(pid, 0)
    except ChildProcessError:
        return None
    # A process begins with the peak of the one that started it: what does not exceed ours is not its own.
    is_its_own = usage.ru_maxrss > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu_s = usage.ru_utime + usage.ru_stime
    return End(os.waitstatus_to_exitcode(status), cpu_s, usage.ru_maxrss * 1024 if is_its_own else 0)


class Surroundings(Protocol):
    """What a process is lent (capture.py, launcher.py)."""

    stdout_fd: int
    stderr_fd: int

    @property
    def directory(self) -> str:
        """The attempt's private directory."""


class Spawner:
    """Starts processes, and remembers for a moment where programs are, as shells do for longer: searching PATH takes a
    tenth of the whole start."""

    def __init__(self, null_fd: int, *, has_memory_rlimit: bool = True) -> None:
        self._null_fd = null_fd
        self._has_memory_rlimit = has_memory_rlimit
        self._found: dict[tuple[str, str], str | None] = {}
        self._forget_at = 0.0

    def spawn(
        self,
        spec: TaskSpec,
        environment: dict[str, str],
        capture: Surroundings,
        group: Group | None,
        limits: Limits | None,
    ) -> int:
        """Start a task's process in a session of its own, in its group or else with its limits; its id. Raises
        OSError, ValueError, SubprocessError: see `spawn_error`; and StartUnknown."""
        argv = [SHELL, "-c", spec.shell] if spec.shell else list(spec.argv)
        if not argv or not argv[0]:
            raise ValueError("there is nothing to run: the task has neither argv nor shell")
        directory = working_directory(spec, capture)
        if limits is not None:
            wrapped = self._limited(argv, group, limits)
            if wrapped is not argv:
                _require_program(argv[0], directory, environment)  # The shell that sets the limits could only say 127.
                argv = wrapped
        executable = self._find(argv[0], environment.get("PATH", os.defpath))
        try:
            return self._popen(argv, executable, directory, environment, capture)
        except OSError:
            if executable is None or os.access(executable, os.X_OK):
                raise
        # It was moved a moment ago: this time by a search of its own.
        return self._popen(argv, None, directory, environment, capture)

    def is_child(self, pid: int) -> bool:
        """Whether a process that was started here is a child of this one."""
        return True

    def reap(self, pids: list[int]) -> list[End | None]:
        """How these processes ended; waits for those that have not. See `reap`."""
        return [reap(pid) for pid in pids]

    def close(self) -> None:
        """No more is started."""

    def _limited(self, argv: list[str], group: Group | None, limits: Limits) -> list[str]:
        """The command that sets the limits before it becomes the task."""
        if group is not None:
            return group.wrap(argv)
        if limits.memory_bytes is None or not self._has_memory_rlimit:
            return argv
        return with_memory_limit(argv, limits.memory_bytes)

    def _popen(
        self,
        argv: list[str],
        executable: str | None,
        directory: str,
        environment: dict[str, str],
        capture: Surroundings,
    ) -> int:
        process = subprocess.Popen(
            argv,
            executable=executable,
            stdin=self._null_fd,
            stdout=capture.stdout_fd,
            stderr=capture.stderr_fd,
            cwd=directory,
            env=environment,
            start_new_session=True,
        )
        return self._let_go(process)

    @staticmethod
    def _let_go(process: subprocess.Popen[bytes]) -> int:
        process.returncode = 0  # It is reaped by `reap`; Popen must not try.
        return process.pid

    def _find(self, program: str, path: str) -> str | None:
        """Where a program is that is named without a directory; None where it has to be searched for."""
        now = time.monotonic()
        if now >= self._forget_at or len(self._found) >= REMEMBERED_MAX:
            self._found.clear()
            self._forget_at = now + REMEMBERED_S
        try:
            return self._found[program, path]
        except KeyError:
            found = self._found[program, path] = _search(program, path)
            return found


def _search(program: str, path: str) -> str | None:
    directories = path.split(os.pathsep)
    if "/" in program or "\0" in program + path or not all(map(os.path.isabs, directories)):
        return None  # It depends on the working directory, or is an error that spawning tells of.
    for directory in directories:
        candidate = os.path.join(directory, program)
        if os.path.isfile(candidate) and os.access(candidate, os.X_OK):
            return candidate
    return None


def working_directory(spec: TaskSpec, capture: Surroundings) -> str:
    """The spec's `cwd`, taken relative to the attempt's private directory, which is also the default."""
    return os.path.join(capture.directory, spec.cwd)


def spawn_error(error: Exception, spec: TaskSpec, environment: dict[str, str], directory: str) -> ErrorInfo:
    """What kept a task from starting: the kind of error, and what is wrong with what, on this worker."""
    program = SHELL if spec.shell else next(iter(spec.argv), "")
    # What is said here is kept with the task and shown to whoever reads it.
    path = environment.get("PATH", "") if "PATH" not in spec.secrets else "a secret"
    return error_info(type(error).__name__, _explain(error, program, path, directory))


def _explain(error: Exception, program: str, path: str, directory: str) -> str:
    if not isinstance(error, OSError):  # A NUL byte, text that is no UTF-8, "=" in the name of a variable.
        return f"cannot run {program!r}: {error}"
    if error.errno == errno.E2BIG:
        return f"cannot run {program!r}: its arguments and environment are too long for this system"
    if error.filename is not None and os.fspath(error.filename) == directory:
        return f"cannot enter the working directory {directory!r}: {error.strerror}"
    if error.errno == errno.ENOENT:
        if "/" not in program:
            return f"there is no program {program!r} on this worker (PATH is {path})"
        if os.path.exists(os.path.join(directory, program)):
            return f"cannot run {program!r}: the interpreter that its first line names does not exist on this worker"
        return f"there is no program {program!r} on this worker"
    if error.errno == errno.ENOEXEC:
        return f"cannot run {program!r}: it is no program of this system, and names no interpreter in its first line"
    return f"cannot run {program!r}: {error.strerror or error}"


def _require_program(program: str, directory: str, environment: dict[str, str]) -> None:
    """Raises OSError where exec would."""
    if not os.path.isdir(directory):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), directory)
    path = os.path.join(directory, program) if "/" in program else program
    if shutil.which(path, path=environment.get("PATH", os.defpath)) is None:
        code = errno.EACCES if "/" in program and os.path.exists(path) else errno.ENOENT
        raise OSError(code, os.strerror(code), program)
