"""Starts handler processes: the command, and what it is joined to the daemon by."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from taskd import interpreter
from taskd.core.task import ErrorInfo, Outcome, TaskSpec, decode_report
from taskd.protocol.messages import AttemptEnded, AttemptKey, AttemptStarted
from taskd.runner.capture import Trash
from taskd.runner.handler_output import make_file
from taskd.runner.handler_page import Page
from taskd.runner.launched import Launches
from taskd.runner.limits import oom_score_of_tasks, prefer_for_oom
from taskd.runner.reaper import HANDLER_VARIABLE, Reaper, handler_mark


def start_command() -> list[str]:
    """The command that starts a handler process, to be followed by the numbers of its descriptors and the id of its
    parent."""
    return interpreter.command("handlers")


class Joint(Protocol):
    """A handler process, and the daemon's ends of what joins them: the stream and the control socket
    (handler_messages.py), neither blocking, the page (handler_page.py), and the files that it writes its stdout and
    stderr to."""

    pid: int
    page: Page
    stream: socket.socket
    control: socket.socket
    stdout_fd: int
    stderr_fd: int

    def when_ended(self, on_ended: Callable[[], None]) -> None:
        """Have this called when the process has ended."""

    def kill(self) -> None:
        """End it and its group by force."""

    def reap(self) -> int:
        """Its exit code, or minus its signal, when it has ended. Its group is killed."""

    def has_left_something(self) -> bool:
        """Whether processes that it started are still there. They are killed."""

    def close(self) -> None:
        """Let go of everything. When it has been reaped."""


class Ends:
    """The daemon's ends, and until `start` those of the process. Raises OSError."""

    def __init__(self) -> None:
        with ExitStack() as ours, ExitStack() as theirs:
            page_fd = Page.make()
            theirs.callback(os.close, page_fd)
            self.page = Page(page_fd)
            ours.callback(self.page.close)
            self.stdout_fd = make_file("taskd-handler-stdout")
            ours.callback(os.close, self.stdout_fd)
            self.stderr_fd = make_file("taskd-handler-stderr")
            ours.callback(os.close, self.stderr_fd)
            self.stream, their_stream = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            ours.enter_context(self.stream)
            theirs.enter_context(their_stream)
            self.control, their_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.enter_context(self.control)
            theirs.enter_context(their_control)
            self.stream.setblocking(False)
            self.control.setblocking(False)
            self.theirs = (their_stream.fileno(), their_control.fileno(), page_fd)
            self._ours, self._theirs = ours.pop_all(), theirs.pop_all()

    def close_theirs(self) -> None:
        """The process has them now (or never will)."""
        self._theirs.close()

    def close(self) -> None:
        """Let go of all."""
        self._theirs.close()
        self._ours.close()


class Spawned(Ends):
    """A process that this daemon has started itself, in a session of its own, with a temporary directory of its own.
    Raises OSError."""

    def __init__(
        self, directory: Path, environment: Mapping[str, str], mark: str, reaper: Reaper, trash: Trash
    ) -> None:
        super().__init__()
        self._mark = handler_mark(mark)
        self._reaper = reaper
        self._trash = trash
        self._loop = asyncio.get_running_loop()
        self._temporary = f"{directory}/{mark}"
        try:
            os.mkdir(self._temporary, 0o700)
            self._process = subprocess.Popen(
                [*start_command(), *map(str, self.theirs), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=self.stdout_fd,
                stderr=self.stderr_fd,
                pass_fds=self.theirs,
                cwd=directory,
                env=interpreter.environment({**environment, "TMPDIR": self._temporary, HANDLER_VARIABLE: mark}),
                start_new_session=True,
            )
            self.pid = self._process.pid
            try:
                self._pidfd = os.pidfd_open(self.pid)
            except OSError:  # Out of descriptors.
                self._process.kill()
                self._process.wait()
                raise
        except OSError:
            self.close()
            raise
        self.close_theirs()
        prefer_for_oom(self.pid, oom_score_of_tasks())
        reaper.own(self.pid, mark=self._mark)

    def when_ended(self, on_ended: Callable[[], None]) -> None:
        """See Joint."""
        self._loop.add_reader(self._pidfd, on_ended)

    def kill(self) -> None:
        """See Joint."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def reap(self) -> int:
        """See Joint."""
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.kill()  # Before: as long as it is a zombie nobody else can have the number of its group.
        try:
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except ChildProcessError:  # Something in the daemon waits for "any child".
            status = -signal.SIGKILL
        self._process.returncode = status  # So that Popen does not try.
        self._reaper.disown(self.pid)
        return status

    def has_left_something(self) -> bool:
        """See Joint."""
        found = False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
            found = True
        if self._reaper.strays() and self._reaper.left_by(self._mark, self._temporary):
            found = True
            self._reaper.kill(self._mark, self._temporary)
        return found

    def close(self) -> None:
        """See Joint."""
        super().close()
        with contextlib.suppress(OSError):
            self._trash.add(self._temporary)


class Launched(Ends):
    """A process that a launcher has started as another user, and looks after. `key` names it there. Raises OSError."""

    def __init__(self, launches: Launches, environment: Mapping[str, str], mark: str, key: AttemptKey) -> None:
        super().__init__()
        self.pid = 0  # It is the launcher's affair.
        self._launches = launches
        self._key = key
        self._status: int | None = None
        self._on_ended: Callable[[], None] | None = None
        try:
            # Given away: those of ours that it writes to stay here as well.
            given = [os.dup(fd) for fd in (self.stdout_fd, self.stderr_fd, *self.theirs)]
        except OSError:
            self.close()
            raise
        self.close_theirs()
        spec = TaskSpec(type="handlers", argv=tuple(start_command()), env={**environment, HANDLER_VARIABLE: mark})
        launches.launch(key, spec, given, self, is_handler=True)

    def when_ended(self, on_ended: Callable[[], None]) -> None:
        """See Joint."""
        self._on_ended = on_ended

    def kill(self) -> None:
        """See Joint."""
        self._launches.signal(self._key, is_kill=True)

    def reap(self) -> int:
        """See Joint."""
        return -signal.SIGKILL if self._status is None else self._status

    def has_left_something(self) -> bool:
        """See Joint: the launcher has seen to that."""
        return False

    # -- What the launcher says ----------------------------------------------------------------------------------------

    def on_started(self, started: AttemptStarted) -> None:
        """It began a moment ago."""

    def on_ended(self, ended: AttemptEnded) -> None:
        """It has ended, with all that it had started."""
        report = decode_report(ended.report)
        if report.error is not None and ended.outcome == Outcome.SPAWN_FAILED:
            with contextlib.suppress(OSError):
                os.write(self.stderr_fd, report.error.message.encode())
        status = report.exit_code if report.exit_code is not None else -(report.signal or signal.SIGKILL)
        self._end(status)

    def on_lost(self, key: AttemptKey, error: ErrorInfo) -> None:
        """The launcher is gone, and the process with it."""
        self._end(-signal.SIGKILL)

    def _end(self, status: int) -> None:
        self._status = status
        if self._on_ended is not None:
            self._on_ended()
