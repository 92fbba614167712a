"""Runs `command` tasks: programs in any language, each in a session of its own.

What a task can count on: its argv, or its shell line by /bin/sh; a small environment (base.py) with its own variables
and TASKD_*; as working directory `cwd`, or else TASKD_TASK_DIR, a private, empty directory that is removed at its end
and takes its temporary files (a relative `cwd` is relative to it; nothing runs in somebody's home by accident); no
input; output into files. A failing task may say why in TASKD_ERROR_FILE.

An attempt has ended when its first process has ended and nothing that it started is left: members of its process group
are killed then, and so are strays, which made sessions of their own. Until all are dead the slot is not free.

Processes are started by `subprocess` (a vfork, which is quick and tells what went wrong) and waited for by pidfds in an
epoll of our own, which the event loop watches: one wake-up for all that ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from taskd.core.effects import Begin
from taskd.core.task import ErrorInfo, Outcome, Report, TaskSpec
from taskd.protocol.messages import AttemptEnded, AttemptKey, AttemptStarted
from taskd.runner.base import (
    OnProgress,
    Place,
    Progress,
    base_environment,
    ended,
    error_info,
    not_started,
    read_error_file,
)
from taskd.runner.capture import Captured
from taskd.runner.cgroup import Cgroups, Group, Limits
from taskd.runner.limits import OomCounter, oom_score_of_tasks, prefer_family_for_oom
from taskd.runner.reaper import Reaper
from taskd.runner.spawn import Spawner, StartUnknown, spawn_error, working_directory

SPAWNS_PER_TURN = 8  # Each stops the event loop for some 0.4 ms; between two lots it can do other things.
WATCH_S = 0.25  # Between two looks at how much running tasks have written.
LINGER_POLL_S = 0.005  # Between two looks at whether the last processes of an attempt are dead.
LINGER_S_MAX = 10.0  # Killed processes that the kernel holds for longer are left to it, and told of.
CLOSE_S_MAX = 15.0
SHELL_SAYS_KILLED = 128 + signal.SIGKILL  # With this code a shell ends when what it ran was killed.


class Lender(Protocol):
    """Lends what an attempt needs while it runs: Output (output.py), or what stands for it in the launcher."""

    stream_bytes_max: int

    def begin(self, key: AttemptKey) -> Any:
        """Files and a directory (spawn.Surroundings) for an attempt that is about to begin. Raises OSError."""

    def end(self, capture: Any) -> Captured:
        """The attempt has ended, and nothing of it is left."""

    def bound(self) -> list[tuple[AttemptKey, str]]:
        """Keep what attempts write within its limits; those where that cannot be, and why."""


class _Attempt:
    """One running attempt."""

    __slots__ = (
        "capture", "cpu_s", "ended_s", "error", "give_up_at", "group", "key", "mark", "memory_peak_bytes", "pid",
        "started_s", "status", "was_killed",
    )  # fmt: skip

    def __init__(self, key: AttemptKey, capture: Any, group: Group | None, pid: int, started_s: float) -> None:
        self.key = key
        self.mark = key.fence
        self.capture = capture
        self.group = group
        self.pid = pid  # also of its process group and session
        self.started_s = started_s
        self.ended_s = 0.0  # set when the first process has ended
        self.status = 0  # its exit code, or minus its signal
        self.cpu_s = 0.0
        self.memory_peak_bytes = 0
        self.was_killed = False  # by us
        self.error: ErrorInfo | None = None  # why we ended it
        self.give_up_at = 0.0  # monotonic; set while others of its processes live on


class CommandKind:
    """Runs commands; see `Kind` in base.py. `output` and `reaper` are opened before it and closed after it."""

    def __init__(
        self,
        place: Place,
        on_progress: OnProgress,
        output: Lender,
        reaper: Reaper,
        *,
        cgroups: Cgroups | None = None,
        oom_counter: OomCounter | None = None,
        environment: Mapping[str, str] | None = None,
        spawner: Callable[[int], Spawner] = Spawner,
        owner_uid: int | None = None,
    ) -> None:
        """`environment` is what every process gets, by default what is inherited; `spawner` makes their starter from a
        descriptor of /dev/null; `owner_uid` is whose files in private directories are believed, None for anybody's."""
        self._place = place
        self._progress = Progress(self._tell)
        self._on_progress = on_progress
        self._output = output
        self._reaper = reaper
        self._cgroups = cgroups
        self._environment = base_environment(place.inherited) if environment is None else environment
        self._spawner_of = spawner
        self._owner_uid = owner_uid
        self._oom = oom_counter or OomCounter()
        self._oom_score = oom_score_of_tasks()
        self._waiting: dict[AttemptKey, TaskSpec] = {}  # to be spawned in this turn and the next ones
        self._running: dict[AttemptKey, _Attempt] = {}
        self._by_pidfd: dict[int, _Attempt] = {}
        self._lingering: list[_Attempt] = []
        self._spawner: asyncio.Handle | None = None
        self._watcher: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.Handle | None = None
        self._idle: asyncio.Future[None] | None = None  # awaited by close

    async def open(self) -> None:
        """Get ready to run. Raises OSError."""
        self._loop = asyncio.get_running_loop()
        self._null_fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._processes = self._spawner_of(self._null_fd)
        self._epoll = select.epoll()
        self._loop.add_reader(self._epoll.fileno(), self._on_exits)

    def start(self, begins: list[Begin]) -> None:
        """Start these attempts: the first few at once, the others in the next turns of the loop."""
        for begin in begins:
            self._waiting[begin.key] = begin.spec
        if self._spawner is None:
            self._spawn_some()

    def terminate(self, key: AttemptKey) -> None:
        """TERM to the attempt's process group."""
        attempt = self._running.get(key)
        if attempt is None:
            self._forget_waiting(key, signal.SIGTERM)
        elif not attempt.ended_s:
            _signal_group(attempt.pid, signal.SIGTERM)
            _signal_group(attempt.pid, signal.SIGCONT)  # A stopped process would not hear it.

    def kill(self, key: AttemptKey) -> None:
        """KILL to all that the attempt started."""
        attempt = self._running.get(key)
        if attempt is None:
            self._forget_waiting(key, signal.SIGKILL)
        elif not attempt.ended_s:
            attempt.was_killed = True
            self._kill_all(attempt)

    async def close(self) -> None:
        """Kill what still runs, wait for its end and tell of it."""
        for key in (*self._waiting, *self._running):
            self.kill(key)
        if self._running:
            self._idle = self._loop.create_future()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_S_MAX):
                    await self._idle
        for attempt in list(self._running.values()):
            attempt.ended_s = attempt.ended_s or time.time()
            attempt.status = attempt.status or -signal.SIGKILL
            self._finish(attempt, error_info("Unkillable", f"process {attempt.pid} was killed and does not end"))
        for handle in (self._spawner, self._watcher, self._linger_timer):
            if handle is not None:
                handle.cancel()
        self._progress.close()
        self._processes.close()
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        for pidfd in self._by_pidfd:
            os.close(pidfd)
        os.close(self._null_fd)

    # -- Beginning -----------------------------------------------------------------------------------------------------

    def _spawn_some(self) -> None:
        self._spawner = None
        for _ in range(min(SPAWNS_PER_TURN, len(self._waiting))):
            key = next(iter(self._waiting))
            self._begin(key, self._waiting.pop(key))
        if self._waiting:
            self._spawner = self._loop.call_soon(self._spawn_some)

    def _begin(self, key: AttemptKey, spec: TaskSpec) -> None:
        try:
            capture = self._output.begin(key)
        except OSError as error:
            problem = error_info(type(error).__name__, f"no files for its output: {error}")
            return self._progress.ended(not_started(key, problem))
        directory = capture.directory
        environment = {
            **self._environment, "TMPDIR": directory, **spec.env, **spec.secrets,
            **self._place.environment(key, directory),
        }  # fmt: skip
        group: Group | None = None
        started_s = time.time()
        try:
            try:
                limits = Limits.of(spec.resources) if spec.resources else None
                if limits is not None and self._cgroups is not None:
                    group = self._cgroups.make(f"{key.task_id.hex()}-{key.number}", limits)
                pid = self._processes.spawn(spec, environment, capture, group, limits)
            finally:
                capture.close_descriptors()
            attempt = _Attempt(key, capture, group, pid, started_s)
            self._watch(attempt)
        except StartUnknown as error:
            if group is not None:
                group.kill()
            self._reaper.end(key.fence)
            if group is not None:
                group.remove()
            self._output.end(capture)
            problem = error_info("StarterLost", f"whether it began, nobody knows: who was to start it is gone, {error}")
            return self._progress.ended(ended(key, Outcome.LOST, Report(error=problem), started_s))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            if group is not None:
                group.remove()
            self._output.end(capture)
            problem = spawn_error(error, spec, environment, working_directory(spec, capture))
            return self._progress.ended(not_started(key, problem))
        self._running[key] = attempt
        self._progress.began(key, started_s)
        if self._watcher is None:
            self._watch_running()
        return None

    def _watch(self, attempt: _Attempt) -> None:
        """Hear of its end. Where that cannot be, it is ended at once, and OSError raised."""
        try:
            pidfd = os.pidfd_open(attempt.pid)
        except OSError:  # Out of descriptors.
            _signal_group(attempt.pid, signal.SIGKILL)
            self._processes.reap([attempt.pid])
            raise
        self._reaper.own(attempt.pid, mark=attempt.mark, is_child=self._processes.is_child(attempt.pid))
        self._by_pidfd[pidfd] = attempt
        # Once: a process that is being started holds a copy of it until it becomes its program. So closing it may not
        # take it out of the epoll at once, and it would be told of again, by a number that another one has got by then.
        self._epoll.register(pidfd, select.EPOLLIN | select.EPOLLONESHOT)

    def _forget_waiting(self, key: AttemptKey, number: signal.Signals) -> None:
        """To be ended before it began: as if the signal had met it at its first instant."""
        if self._waiting.pop(key, None) is not None:
            self._progress.ended(ended(key, Outcome.SIGNAL, Report(signal=int(number))))

    # -- Running -------------------------------------------------------------------------------------------------------

    def _tell(self, started: list[AttemptStarted], ended: list[AttemptEnded]) -> None:
        # Not when they begin: what ends within milliseconds has not taken much memory, and a twentieth of all that a
        # short command costs went into opening its score in /proc.
        for begun in started:
            attempt = self._running.get(begun.key)
            if attempt is not None and not attempt.ended_s:
                prefer_family_for_oom(attempt.pid, self._oom_score)
        self._on_progress(started, ended)

    def _watch_running(self) -> None:
        """While anything runs: keep the output within its bounds, and remember the count of OOM kills."""
        self._oom.look(time.monotonic())
        for key, why in self._output.bound():
            attempt = self._running.get(key)
            if attempt is not None and attempt.error is None:
                limit = self._output.stream_bytes_max
                attempt.error = error_info("OutputTooLarge", f"it wrote more than {limit} bytes to one stream: {why}")
                self.kill(key)
        self._watcher = self._loop.call_later(WATCH_S, self._watch_running) if self._running else None

    def _kill_all(self, attempt: _Attempt) -> None:
        if attempt.group is not None:
            attempt.group.kill()
        _signal_group(attempt.pid, signal.SIGKILL)
        self._reaper.kill(attempt.mark, attempt.capture.directory)

    # -- Ending --------------------------------------------------------------------------------------------------------

    def _on_exits(self) -> None:
        """First processes have ended."""
        exited = []
        now_s = time.time()
        for pidfd, _ in self._epoll.poll(0):
            attempt = self._by_pidfd.pop(pidfd)
            os.close(pidfd)
            attempt.ended_s = now_s
            exited.append(attempt)
        self._reap(exited)
        strays = self._reaper.strays()
        for attempt in exited:
            if self._is_gone(attempt, strays):
                self._finish(attempt)
            else:
                attempt.give_up_at = time.monotonic() + LINGER_S_MAX
                self._lingering.append(attempt)
                if self._linger_timer is None:
                    self._linger_timer = self._loop.call_soon(self._check_lingering)

    def _reap(self, attempts: list[_Attempt]) -> None:
        ends = self._processes.reap([attempt.pid for attempt in attempts])
        for attempt, end in zip(attempts, ends, strict=True):
            if end is None:  # A bug, but not the task's.
                attempt.error = error_info("ExitStatusLost", "another part of the daemon took its exit status")
                attempt.status = -signal.SIGKILL
            else:
                attempt.status = end.status
                attempt.cpu_s = end.cpu_s
                attempt.memory_peak_bytes = end.memory_peak_bytes
            self._reaper.disown(attempt.pid)

    def _is_gone(self, attempt: _Attempt, strays: dict[int, str]) -> bool:
        """Whether nothing that it started is left."""
        if strays and self._reaper.left_by(attempt.mark, attempt.capture.directory):
            return False
        if attempt.group is not None and not attempt.group.is_empty():
            return False
        return not _signal_group(attempt.pid, 0)

    def _check_lingering(self) -> None:
        """Kill what is left of attempts that have ended, until nothing is."""
        self._linger_timer = None
        remaining = []
        for attempt in self._lingering:
            self._kill_all(attempt)
        strays = self._reaper.strays()
        for attempt in self._lingering:
            if self._is_gone(attempt, strays):
                self._finish(attempt)
            elif time.monotonic() > attempt.give_up_at:
                self._finish(attempt, error_info("Unkillable", "it left processes that were killed and do not end"))
            else:
                remaining.append(attempt)
        self._lingering = remaining
        if remaining:
            self._linger_timer = self._loop.call_later(LINGER_POLL_S, self._check_lingering)

    def _finish(self, attempt: _Attempt, problem: ErrorInfo | None = None) -> None:
        """Tell of its end."""
        outcome = self._outcome(attempt)
        error = attempt.error or problem
        if outcome is not Outcome.OK and error is None:
            error = read_error_file(attempt.capture.directory, self._owner_uid)
        captured = self._output.end(attempt.capture)
        cpu_s, memory_peak_bytes = attempt.cpu_s, attempt.memory_peak_bytes
        if attempt.group is not None:
            cpu_s = attempt.group.cpu_s() or cpu_s
            memory_peak_bytes = attempt.group.memory_peak_bytes() or memory_peak_bytes
            attempt.group.remove()
        report = Report(
            exit_code=attempt.status if attempt.status >= 0 else None,
            signal=-attempt.status if attempt.status < 0 else None,
            error=error,
            stdout_tail=captured.stdout_tail,
            stderr_tail=captured.stderr_tail,
            stdout_bytes=captured.stdout_bytes,
            stderr_bytes=captured.stderr_bytes,
            memory_peak_bytes=memory_peak_bytes,
            cpu_s=cpu_s,
        )
        del self._running[attempt.key]
        self._progress.ended(ended(attempt.key, outcome, report, attempt.started_s, attempt.ended_s))
        if self._idle is not None and not self._running and not self._idle.done():
            self._idle.set_result(None)

    def _outcome(self, attempt: _Attempt) -> Outcome:
        status = attempt.status
        if status == 0:
            return Outcome.OK
        if attempt.group is not None and attempt.group.was_out_of_memory():
            return Outcome.OOM
        looks_killed = status in (-signal.SIGKILL, SHELL_SAYS_KILLED) and not attempt.was_killed
        if looks_killed and attempt.error is None and self._oom.has_risen():
            return Outcome.OOM
        return Outcome.SIGNAL if status < 0 else Outcome.EXIT_NONZERO


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to every process of a group; whether there is one. 0 only asks."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # All of them run as another user, by setuid.
        return True
    return True
