"""Starts handler processes: the command, and what it is joined to the daemon by."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from taskd.runner.handler_output import make_file
from taskd.runner.handler_page import Page
from taskd.runner.limits import oom_score_of_tasks, prefer_for_oom

# Not by -m: then processes that `multiprocessing` starts for a handler would load this program once more. And the
# directory goes to the end of the path, where nothing that lies beside the package hides a module of Python's own.
_PROGRAM = (
    "import sys; sys.path.append(sys.argv.pop(1)); from taskd.runner.handler_process import main; main(sys.argv[1:])"
)


def start_command(*arguments: int) -> list[str]:
    """The command that starts a handler process. The only place that knows how."""
    return [sys.executable, "-P", "-c", _PROGRAM, str(Path(__file__).parents[2]), *map(str, arguments)]


class Spawned:
    """A process that was started, in a session of its own, and the daemon's ends of what joins them: the stream and the
    control socket (handler_messages.py), neither blocking, the page (handler_page.py), and the files that it writes its
    stdout and stderr to. Raises OSError."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
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
            descriptors = (their_stream.fileno(), their_control.fileno(), page_fd)
            self._process = subprocess.Popen(
                start_command(*descriptors, os.getpid()),
                stdin=subprocess.DEVNULL,
                stdout=self.stdout_fd,
                stderr=self.stderr_fd,
                pass_fds=descriptors,
                cwd=directory,
                env=environment,
                start_new_session=True,
            )
            self.pid = self._process.pid
            try:
                self.pidfd = os.pidfd_open(self.pid)
            except OSError:  # Out of descriptors.
                self._process.kill()
                self._process.wait()
                raise
            ours.callback(os.close, self.pidfd)
            prefer_for_oom(self.pid, oom_score_of_tasks())
            self._ours = ours.pop_all()

    def reap(self) -> int | None:
        """Its exit code, or minus its signal, when it has ended; None where something else has taken it."""
        try:
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except ChildProcessError:  # Something in the daemon waits for "any child".
            self._process.returncode = 0
            return None
        self._process.returncode = status  # So that Popen does not try.
        return status

    def close(self) -> None:
        """Let go of everything. When it has been reaped."""
        self._ours.close()
