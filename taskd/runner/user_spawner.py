"""Starts processes as the task user: most of them through a starter (starter.py), the others by a fork for each.

A fork it takes where the new process has something to do as root, which is to join a control group, and for handlers,
which must be the launcher's own children. It is also what is left for a while when a starter was lost.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import time
from typing import Any

from taskd.core.task import TaskSpec
from taskd.protocol.messages import AttemptKey
from taskd.runner.cgroup import Group, Limits
from taskd.runner.limits import oom_score_of_tasks
from taskd.runner.private_directory import PrivateDirectory
from taskd.runner.reaper import Reaper
from taskd.runner.spawn import End, Spawner, StartUnknown, Surroundings, reap, working_directory
from taskd.runner.starter import ANSWER_S_MAX, IDLE_S, LOOK_S, Starter
from taskd.runner.task_user import TaskUser

STANDARD_DESCRIPTORS = 2  # stdout and stderr
REST_S = 60.0  # Without a starter after one was lost: who stops or kills it can delay others once a minute.

_logger = logging.getLogger("taskd")


class Lent:
    """What one process was lent: open files of the worker's, and a private directory of the launcher's."""

    __slots__ = ("descriptors", "directory", "is_handler", "key", "private", "stderr_fd", "stdout_fd")

    def __init__(self, key: AttemptKey, descriptors: list[int], private: PrivateDirectory, is_handler: bool) -> None:
        self.key = key
        self.descriptors = descriptors
        self.stdout_fd, self.stderr_fd = descriptors[:STANDARD_DESCRIPTORS]
        self.private = private
        self.directory = private.path
        self.is_handler = is_handler

    def close_descriptors(self) -> None:
        """The process has them now (or never will)."""
        for descriptor in self.descriptors:
            os.close(descriptor)


class WatchedStart(subprocess.Popen[bytes]):
    """A start by fork, which never waits without a bound: the new process is the task user before it becomes its
    program, and whoever stops it then would stop the launcher, which waits to hear how that went. By a timer's signal,
    as a thread may not be where a process changes what user it sees as."""

    pid: int | None  # type: ignore[assignment]  # None until it is there
    trouble = ""  # why it was killed before it was its program

    def __init__(self, argv: list[str], **options: Any) -> None:
        """See Popen. In the main thread."""
        self._deadline = time.monotonic() + ANSWER_S_MAX
        before = signal.signal(signal.SIGALRM, self._look)
        signal.setitimer(signal.ITIMER_REAL, LOOK_S, LOOK_S)
        try:
            super().__init__(argv, **options)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _look(self, *_: object) -> None:
        if self.pid is None or self.trouble:
            return
        try:
            is_stopped = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # It failed, and was reaped a moment ago.
            return
        if is_stopped:
            self.trouble = "it was stopped before it was its program"
        elif time.monotonic() >= self._deadline:
            self.trouble = f"it was not its program after {ANSWER_S_MAX:g} s"
        else:
            return
        os.kill(self.pid, signal.SIGKILL)  # By which the wait for it ends, too.


class UserSpawner(Spawner):
    """Starts processes as the task user. A group is joined by the new process itself, while it still may."""

    def __init__(self, null_fd: int, user: TaskUser, reaper: Reaper, has_memory_rlimit: bool) -> None:
        super().__init__(null_fd, has_memory_rlimit=has_memory_rlimit)
        self._user = user
        self._reaper = reaper
        self._oom_score = oom_score_of_tasks()
        self._group: Group | None = None  # of the process that is being started
        self._starter: Starter | None = None
        self._timer: asyncio.TimerHandle | None = None  # to look whether the starter is to end
        self._rests_until = 0.0  # monotonic

    def spawn(
        self,
        spec: TaskSpec,
        environment: dict[str, str],
        capture: Surroundings,
        group: Group | None,
        limits: Limits | None,
    ) -> int:
        """See Spawner."""
        assert isinstance(capture, Lent)
        self._group = group
        self._prepare_starter(is_wanted=group is None and not capture.is_handler)
        if self._starter is None or group is not None or capture.is_handler:
            with self._user.seeing():
                self._check_directory(working_directory(spec, capture))
        return super().spawn(spec, environment, capture, group, limits)

    def is_child(self, pid: int) -> bool:
        """See Spawner."""
        return self._starter is None or pid not in self._starter.children

    def reap(self, pids: list[int]) -> list[End | None]:
        """See Spawner."""
        self._end_starter_when_due()
        ends: dict[int, End | None] = {}
        if self._starter is not None and (fostered := [pid for pid in pids if pid in self._starter.children]):
            try:
                ends = dict(zip(fostered, self._starter.reap(fostered), strict=True))
            except StartUnknown as error:
                self._lose_starter(error)
        return [ends[pid] if pid in ends else reap(pid) for pid in pids]

    def close(self) -> None:
        """See Spawner."""
        if self._starter is not None:
            self._end_starter(self._starter)

    def _prepare_starter(self, *, is_wanted: bool) -> None:
        self._end_starter_when_due()
        if self._starter is None and is_wanted and time.monotonic() >= self._rests_until:
            self._starter = Starter(self._user, self._null_fd, self._oom_score)
            self._reaper.own(self._starter.pid)
            self._look_later()

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(IDLE_S, self._look)

    def _look(self) -> None:
        self._end_starter_when_due()
        if self._starter is not None:
            self._look_later()

    def _end_starter_when_due(self) -> None:
        if self._starter is not None and self._starter.is_due():
            self._end_starter(self._starter)

    def _end_starter(self, starter: Starter) -> None:
        self._starter = None
        if self._timer is not None:
            self._timer.cancel()
        starter.end()
        self._reaper.disown(starter.pid)
        for pid in starter.children:
            self._reaper.own(pid)

    def _lose_starter(self, error: StartUnknown) -> None:
        assert self._starter is not None
        self._end_starter(self._starter)
        self._rests_until = time.monotonic() + REST_S
        fields = {"reason": str(error), "seconds": REST_S}
        _logger.warning("tasks start slowly for a while: their starter is lost", extra={"fields": fields})

    def _limited(self, argv: list[str], group: Group | None, limits: Limits) -> list[str]:
        return argv if group is not None else super()._limited(argv, group, limits)

    def _find(self, program: str, path: str) -> str | None:
        return None  # What root finds need not be what the task user may run: the new process searches itself.

    def _popen(
        self,
        argv: list[str],
        executable: str | None,
        directory: str,
        environment: dict[str, str],
        capture: Surroundings,
    ) -> int:
        assert isinstance(capture, Lent)
        if self._starter is not None and self._group is None and not capture.is_handler:
            try:
                return self._starter.start(argv, directory, environment, capture.descriptors)
            except StartUnknown as error:
                self._lose_starter(error)
                raise
        more = capture.descriptors[STANDARD_DESCRIPTORS:]
        if capture.is_handler:
            argv = [*argv, *map(str, more), str(os.getpid())]
        user = self._user
        # Without a group all is done by the interpreter's own C code, which is quicker than a function of ours.
        identity: dict[str, Any] = (
            {"user": user.uid, "group": user.gid, "extra_groups": user.groups}
            if self._group is None
            else {"preexec_fn": self._join}
        )
        process = WatchedStart(
            argv,
            stdin=self._null_fd,
            stdout=capture.stdout_fd,
            stderr=capture.stderr_fd,
            pass_fds=more,
            cwd=directory,
            env=environment,
            start_new_session=True,
            **identity,
        )
        if process.trouble:
            os.waitpid(self._let_go(process), 0)
            raise StartUnknown(process.trouble)
        return self._let_go(process)

    def _join(self) -> None:
        """In the new process, while it still may."""
        assert self._group is not None
        self._group.join()
        self._user.become()

    @staticmethod
    def _check_directory(directory: str) -> None:
        """The new process enters it while it is root still."""
        try:
            os.stat(f"{directory}/.")
        except OSError as error:
            error.filename = directory
            raise
