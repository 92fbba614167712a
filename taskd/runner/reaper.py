"""Keeps the machine clean of what tasks leave behind: orphans, zombies, and processes of an earlier daemon.

The daemon makes itself the sub-reaper of its descendants: a process whose parent dies becomes the daemon's child,
even after a double fork and a session of its own. Such a *stray* is told from the children that the daemon started
itself by the list of those (`own`), and traced to its attempt by TASKD_FENCE in its environment. No stray shares the
daemon's own session: every task begins a new one, and nobody can join a session later.

One that has emptied its environment goes with the attempt in whose private directory it stands, and where it has left
that too, with the last one to end of those that ran when it was first seen: one of them has started it, and none of
another's processes may be killed.

Never waits for "any child": each owner reaps its own processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator

from msgspec import Struct

PR_SET_CHILD_SUBREAPER = 36
PR_GET_CHILD_SUBREAPER = 37
HANDLER_VARIABLE = "TASKD_HANDLER_PROCESS"  # By which processes that handlers started are known.
LEFTOVERS_S_MAX = 5.0  # How long a start waits for killed leftovers to vanish; those stuck in the kernel may never.
LEFTOVERS_POLL_S = 0.01
CHILDREN_BYTES = 1 << 16
STARTER_NAME = "taskd-starter"  # Of the process that starts others (starter.py). At most 15 bytes.
DOUBT_LOOKS = 2  # One may come while a process becomes a program, and has neither name nor mark.
DOUBT_POLL_S, DOUBT_S_MAX = 0.002, 1.0
SWEEP_S = 1.0  # How long a stray that ended by itself may stay a zombie.

_libc = ctypes.CDLL(None, use_errno=True)


class Leftovers(Struct, frozen=True):
    """Processes of an earlier daemon's tasks: how many were killed, and the ids of those that would not die."""

    killed: int
    alive: tuple[int, ...]


class Reaper:
    """The strays of one worker, whose store id `worker` marks the environment of all its tasks."""

    def __init__(self, worker: str, *, uid: int | None = None) -> None:
        """`uid` is the user that tasks run as; None: this process's own."""
        self._uid = os.geteuid() if uid is None else uid
        self._worker_mark = f"\0TASKD_WORKER={worker}\0".encode()
        self._owned: set[int] = set()  # children, all of them
        self._fostered: set[int] = set()  # children of a child of ours, which are ours when that one ends
        self._running: dict[int, str] = {}  # Of those with an owner, those that run tasks: their marks.
        self._strays: dict[int, str] = {}
        self._suspects: dict[int, frozenset[str]] = {}  # by stray: whose it may be, the marks that ran at first sight
        self._children_fd = -1
        self._lists_all = False
        self._was_subreaper = False
        self._sweeper: asyncio.TimerHandle | None = None

    async def open(self) -> Leftovers:
        """Become the sub-reaper, and end what an earlier daemon left running. Before any task is started."""
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # Inherited; it would throw away every exit status.
        self._was_subreaper = _set_subreaper(True)
        with contextlib.suppress(FileNotFoundError):  # A kernel without it: /proc is searched instead.
            self._children_fd = os.open(f"/proc/self/task/{os.getpid()}/children", os.O_RDONLY | os.O_CLOEXEC)
        # Strays fall to the main thread; children belong to the thread that started them.
        self._lists_all = threading.get_native_id() == os.getpid()
        leftovers = await self._end_leftovers()
        self._sweep()
        return leftovers

    def own(self, pid: int, *, mark: str = "", is_child: bool = True) -> None:
        """This process has an owner, who will see that it is reaped. To be told in the step that starts it, with the
        mark of what it runs where that can leave strays. It is a child, or becomes one when another child ends: then it
        is to be told of again."""
        mark = mark or self._running.get(pid, "")
        self.disown(pid)
        (self._owned if is_child else self._fostered).add(pid)
        if mark:
            self._running[pid] = mark

    def disown(self, pid: int) -> None:
        """It was reaped."""
        self._running.pop(pid, None)
        self._owned.discard(pid)
        self._fostered.discard(pid)

    def strays(self) -> dict[int, str]:
        """The living strays: process id to the mark of its attempt, which is its fence; "" where it has none. Reaps
        dead ones.

        Costs a microsecond while there are none."""
        raw = self._read_children()
        if self._lists_all and not self._strays and raw.count(b" ") == len(self._owned):
            return self._strays
        own_session = os.getsid(0)
        found: dict[int, str] = {}
        for pid in map(int, raw.split()):
            if pid in self._owned or pid in self._fostered or _session(pid) in (own_session, -1) or _reap(pid):
                continue
            found[pid] = self._strays.get(pid) or _mark(pid)
        running = frozenset(self._running.values()) if found else frozenset()
        self._suspects = {pid: self._suspects.get(pid, running) for pid in found}
        self._strays = found
        return found

    def left_by(self, mark: str, directory: str) -> list[int]:
        """Of the strays last asked for, those that go with an attempt that ends, whose private directory this is."""
        for pid, of in self._strays.items():
            if of not in self._running.values() and _is_in(pid, directory):
                self._strays[pid] = mark  # For good: one that is dying stands nowhere.
        return [pid for pid, of in self._strays.items() if of == mark or self._is_nobodys(pid)]

    def _is_nobodys(self, pid: int) -> bool:
        """Whether no attempt still runs that can have started this stray, or whose mark it has. One with the name of
        another worker, of which this process may have several, is left to that."""
        running = self._running.values()
        if self._strays[pid] in running or not self._suspects[pid].isdisjoint(running):
            return False
        environment = _environment(pid)
        return self._worker_mark in environment or b"\0TASKD_WORKER=" not in environment

    def kill(self, mark: str, directory: str) -> None:
        """Kill the strays of one attempt. Their own children become strays then: ask `strays` until none is left."""
        if self.strays():
            for pid in self.left_by(mark, directory):
                _kill(pid)

    def end(self, mark: str) -> None:
        """Kill all of one attempt whose start went wrong in the middle, and wait for that: what has its mark, and what
        has not become a program yet and still is called as its starter."""
        deadline = time.monotonic() + DOUBT_S_MAX
        quiet = 0
        while quiet < DOUBT_LOOKS and time.monotonic() < deadline:
            found = [pid for pid, of in self.strays().items() if of == mark or _name(pid) == STARTER_NAME]
            for pid in found:
                _kill(pid)
            quiet = 0 if found else quiet + 1
            time.sleep(DOUBT_POLL_S)

    async def end_all(self) -> None:
        """Kill every stray, traced or not, until none is left."""
        for _ in range(round(LEFTOVERS_S_MAX / LEFTOVERS_POLL_S)):
            strays = self.strays()
            if not strays:
                break
            for pid in strays:
                _kill(pid)
            await asyncio.sleep(LEFTOVERS_POLL_S)

    async def close(self) -> None:
        """Kill every stray, traced or not, and be no sub-reaper any more."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        await self.end_all()
        if not self._was_subreaper:
            _set_subreaper(False)
        if self._children_fd >= 0:
            os.close(self._children_fd)
            self._children_fd = -1

    def _sweep(self) -> None:
        for pid in self.strays():
            if self._is_nobodys(pid):
                _kill(pid)
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)

    def _read_children(self) -> bytes:
        if self._children_fd < 0:
            return b"".join(b"%d " % pid for pid in _children_searched())
        raw = b""
        while part := os.pread(self._children_fd, CHILDREN_BYTES, len(raw)):  # A page or so at a time.
            raw += part
        return raw

    async def _end_leftovers(self) -> Leftovers:
        killed: set[int] = set()
        spared = set(_ancestry())
        alive: tuple[int, ...] = ()
        for _ in range(round(LEFTOVERS_S_MAX / LEFTOVERS_POLL_S)):
            alive = tuple(pid for pid in _process_ids() if pid not in spared and self._kill_leftover(pid))
            if not alive:
                break
            killed.update(alive)
            await asyncio.sleep(LEFTOVERS_POLL_S)
        return Leftovers(len(killed.difference(alive)), alive)

    def _kill_leftover(self, pid: int) -> bool:
        """Whether it was one and, when last seen, alive."""
        try:
            # First: should it end now, a signal by this handle cannot hit the process that gets its number.
            handle = os.pidfd_open(pid)
        except OSError:
            return False
        try:
            if os.stat(f"/proc/{pid}").st_uid != self._uid or self._worker_mark not in _environment(pid):
                return False
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        except OSError:
            return False
        finally:
            os.close(handle)
        return True


def handler_mark(process: str) -> str:
    """The mark of what a handler process, named so in its environment, has started."""
    return f"handlers {process}"


def _set_subreaper(wanted: bool) -> bool:
    """What it was before. Raises OSError."""
    before = ctypes.c_int()
    if _libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_GET_CHILD_SUBREAPER) failed")
    if _libc.prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(wanted), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")
    return bool(before.value)


def _reap(pid: int) -> bool:
    """Whether this child is gone: reaped just now, or before."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is not None
    except ChildProcessError:
        return True


def _kill(pid: int) -> None:
    # A child that nobody has reaped keeps its number: this cannot hit another process.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def _name(pid: int) -> str:
    """Empty where it has ended."""
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().rstrip("\n")
    except OSError:
        return ""


def _environment(pid: int) -> bytes:
    """With a NUL before and after each `NAME=value`; empty where it may not be read or the process has ended."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return b"\0" + file.read()
    except OSError:
        return b""


def _mark(pid: int) -> str:
    variables = dict(line.split(b"=", 1) for line in _environment(pid).split(b"\0") if b"=" in line)
    process = variables.get(HANDLER_VARIABLE.encode())
    if process:
        return handler_mark(process.decode(errors="replace"))
    return variables.get(b"TASKD_FENCE", b"").decode(errors="replace")


def _is_in(pid: int, directory: str) -> bool:
    """Whether its working directory is this one, or below it."""
    try:
        return f"{os.readlink(f'/proc/{pid}/cwd')}/".startswith(f"{os.path.realpath(directory)}/")
    except OSError:  # It has ended, or may not be looked at.
        return False


def _process_ids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _ancestry() -> Iterator[int]:
    """This process, its parent, and so on up."""
    pid = os.getpid()
    while pid > 0:
        yield pid
        pid = _parent(pid)


def _parent(pid: int) -> int:
    """0 where it has none or is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def _children_searched() -> Iterator[int]:
    own = os.getpid()
    return (pid for pid in _process_ids() if _parent(pid) == own)
