"""Removes what tasks left, for a launcher (launcher.py): in a process that is the task user and nothing more, as a tree
that a task has made may hold links to anywhere, and be changed while it is removed.

Any task can kill or stop that process, as it can each other one of its user. So nobody waits for it without a bound:
where it was stopped it is killed, which ends a stopped process too, and what it was to remove stays until the next one,
at the latest until the next session's beginning.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import time
from collections.abc import Callable

from taskd.runner.capture import remove_contents, remove_tree
from taskd.runner.reaper import Reaper
from taskd.runner.task_user import TaskUser

LOOK_S = 0.1  # Between two looks at whether it was stopped, while its end is waited for.
WAIT_S_MAX = 20.0  # A launcher does nothing else meanwhile; a million files take less.
DEATH_S_MAX = 2.0  # One that was killed and is held by the kernel for longer is left to it.
WATCH_S = 1.0  # Between two looks while nobody waits.

_logger = logging.getLogger("taskd")


class Remover:
    """Removes trees, and all that is put into `trash`, a directory of the task user's."""

    def __init__(self, trash: str, user: TaskUser, reaper: Reaper) -> None:
        self._trash = trash
        self._user = user
        self._reaper = reaper
        self._running: tuple[int, int] | None = None  # who empties the trash: process id and pidfd
        self._is_wanted = False  # There is more in it than when that began.
        self._timer: asyncio.TimerHandle | None = None

    def remove(self, path: str) -> None:
        """Remove a tree now, as far as that can be within WAIT_S_MAX."""
        if (begun := self._begin(lambda: remove_tree(path))) is not None:
            self._see_off(*begun)

    def empty_trash(self) -> None:
        """Begin to remove what is in the trash, while other things are done."""
        if self._running is not None:
            self._is_wanted = True
            return
        self._is_wanted = False
        self._running = self._begin(lambda: remove_contents(self._trash))
        if self._running is not None:
            loop = asyncio.get_running_loop()
            loop.add_reader(self._running[1], self._on_end)
            self._timer = loop.call_later(WATCH_S, self._watch)

    def close(self) -> None:
        """Remove the trash, as far as that can be within WAIT_S_MAX. After all processes have ended."""
        if self._running is not None:
            self._see_off(*self._let_go())
        self.remove(self._trash)

    def _begin(self, work: Callable[[], None]) -> tuple[int, int] | None:
        pid = os.fork()
        if pid == 0:
            try:
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, signal.SIG_DFL)
                os.setsid()  # So that, should it outlive this session, the next one takes it for a stray.
                self._user.become()
                work()
            finally:
                os._exit(0)
        self._reaper.own(pid)
        try:
            return pid, os.pidfd_open(pid)
        except OSError:  # Out of descriptors: nobody could look after it.
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._reaper.disown(pid)
            return None

    def _watch(self) -> None:
        assert self._running is not None
        pid, _ = self._running
        if _is_stopped(pid):
            _kill(pid, "it was stopped")
        self._timer = asyncio.get_running_loop().call_later(WATCH_S, self._watch)

    def _on_end(self) -> None:
        self._see_off(*self._let_go())
        if self._is_wanted:
            self.empty_trash()

    def _let_go(self) -> tuple[int, int]:
        assert self._running is not None
        assert self._timer is not None
        self._timer.cancel()
        begun, self._running = self._running, None
        asyncio.get_running_loop().remove_reader(begun[1])
        return begun

    def _see_off(self, pid: int, pidfd: int) -> None:
        """Wait for its end; kill it where that cannot come, or takes too long."""
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        deadline = time.monotonic() + WAIT_S_MAX
        while not (has_ended := bool(poll.poll(LOOK_S * 1000))):
            if trouble := "it was stopped" if _is_stopped(pid) else "it takes too long" * (time.monotonic() > deadline):
                _kill(pid, trouble)
                has_ended = bool(poll.poll(DEATH_S_MAX * 1000))
                break
        os.close(pidfd)
        if has_ended:
            os.waitpid(pid, 0)
        self._reaper.disown(pid)


def _is_stopped(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None


def _kill(pid: int, why: str) -> None:
    _logger.warning("what tasks left is not all removed yet", extra={"fields": {"reason": f"its remover: {why}"}})
    os.kill(pid, signal.SIGKILL)
