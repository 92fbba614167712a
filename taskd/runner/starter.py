"""The starter: a process that is the task user for good, and starts others quickly for the launcher (user_spawner.py).

To become another user takes a fork, which copies a Python process page by page and costs more than all the rest of a
short task. So the launcher forks once, the new process becomes the task user, without capabilities and without a way
back, and then starts task after task by vfork. They are its children until it ends, and then the launcher's, which is
their sub-reaper; the launcher hears of their ends by pidfds, and asks the starter to reap them.

Any task can kill or stop the starter, or slow it down, as it can each other task of its user. It cannot look into it:
the process is not dumpable. So nothing depends on its life but the one start that it is about, it is asked one thing
after the other and watched while it answers, and another one takes its place every few seconds, so that what a task has
done to one does not last.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from taskd.runner.limits import prefer_for_oom
from taskd.runner.reaper import STARTER_NAME
from taskd.runner.spawn import End, StartUnknown, reap
from taskd.runner.task_user import TaskUser

LIFE_S = 5.0
IDLE_S = 0.1  # Nobody is the task user on a machine that runs nothing as that; a new starter takes 3 ms.
STARTS_MAX = 2000
LOOK_S = 0.1  # Between two looks at a starter that does not answer: a stopped one never will.
ANSWER_S_MAX = 10.0  # A program may be on a slow network disk. The launcher does nothing else meanwhile.
_HEAD_BYTES = 4  # Before each message: its length, big-endian.
_READ_BYTES = 64 << 10
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NAME = 1, 4, 15
_FIRST_OWN_FD = 3

_libc = ctypes.CDLL(None, use_errno=True)


class _Message(Struct, array_like=True, frozen=True, tag=str.lower):
    pass


class _Start(_Message, frozen=True):
    """Start this, with the two open files that come beside it as its stdout and stderr."""

    argv: list[str]
    directory: str
    environment: dict[str, str]


class _Reap(_Message, frozen=True):
    """Wait for these, which have ended."""

    pids: list[int]


class _Started(_Message, frozen=True):
    pid: int


class _Failed(_Message, frozen=True):
    """It could not be started: an OSError, or with errno 0 a ValueError."""

    errno: int
    text: str
    filename: str | None


class _Reaped(_Message, frozen=True):
    ends: list[End | None]


_encode = msgspec.msgpack.Encoder().encode
_decode_request = msgspec.msgpack.Decoder(_Start | _Reap).decode
_decode_answer = msgspec.msgpack.Decoder(_Started | _Failed | _Reaped).decode


class Starter:
    """One starter, seen from the launcher: a child of it, which must be root and have one thread."""

    def __init__(self, user: TaskUser, null_fd: int, oom_score: int) -> None:
        """Raises OSError."""
        self.children: set[int] = set()  # not reaped yet
        self._starts_left = STARTS_MAX
        self._ends_at = time.monotonic() + LIFE_S
        self._asked_at = time.monotonic()
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(LOOK_S)
        launcher = os.getpid()
        try:
            self.pid = os.fork()
        except OSError:
            self._socket.close()
            theirs.close()
            raise
        if self.pid == 0:
            _be_starter(theirs, null_fd, user, oom_score, launcher)
        theirs.close()

    def is_due(self) -> bool:
        """Whether it is to end: it has been there for long, or idle for a moment, or it is stopped or dead."""
        now = time.monotonic()
        return self._starts_left <= 0 or now >= min(self._ends_at, self._asked_at + IDLE_S) or self._trouble() != ""

    def start(self, argv: list[str], directory: str, environment: dict[str, str], descriptors: Sequence[int]) -> int:
        """Start a process in a session of its own; its id. Raises OSError and ValueError as `subprocess` does, and
        StartUnknown when the starter is lost."""
        self._starts_left -= 1
        self._asked_at = time.monotonic()
        answer = self._ask(_Start(argv, directory, environment), descriptors)
        if isinstance(answer, _Failed):
            if answer.errno:
                raise OSError(answer.errno, answer.text, answer.filename)
            raise ValueError(answer.text)
        if not isinstance(answer, _Started):
            raise StartUnknown("it says what it must not")
        self.children.add(answer.pid)
        return answer.pid

    def reap(self, pids: list[int]) -> list[End | None]:
        """How these children ended; waits for them. Raises StartUnknown when the starter is lost: then they are the
        launcher's."""
        answer = self._ask(_Reap(pids), ())
        if not isinstance(answer, _Reaped) or len(answer.ends) != len(pids):
            raise StartUnknown("it says what it must not")
        self.children.difference_update(pids)
        return answer.ends

    def end(self) -> None:
        """End it. Its children are this process's own when this returns."""
        self._socket.close()
        os.kill(self.pid, signal.SIGKILL)  # It is about nothing now, and may be stopped.
        os.waitpid(self.pid, 0)

    def _ask(self, request: _Start | _Reap, descriptors: Sequence[int]) -> _Started | _Failed | _Reaped:
        body = _encode(request)
        unsent = memoryview(len(body).to_bytes(_HEAD_BYTES, "big") + body)
        deadline = time.monotonic() + ANSWER_S_MAX
        received = bytearray()
        while True:
            try:
                if unsent:
                    unsent = unsent[socket.send_fds(self._socket, [unsent], descriptors) :]
                    descriptors = ()
                    continue
                part = self._socket.recv(_READ_BYTES)
            except TimeoutError:
                self._require_life(deadline)
                continue
            except OSError as error:
                raise StartUnknown(str(error)) from None
            if not part:
                raise StartUnknown("it has ended")
            received += part
            if len(received) >= _HEAD_BYTES:
                stop = _HEAD_BYTES + int.from_bytes(received[:_HEAD_BYTES], "big")
                if len(received) >= stop:
                    answer: _Started | _Failed | _Reaped = _decode_answer(received[_HEAD_BYTES:stop])
                    return answer

    def _require_life(self, deadline: float) -> None:
        if trouble := self._trouble():
            raise StartUnknown(trouble)
        if time.monotonic() >= deadline:
            raise StartUnknown(f"it has not answered for {ANSWER_S_MAX:g} s")

    def _trouble(self) -> str:
        seen = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
        if seen is None:
            return ""
        return "it was stopped" if seen.si_code == os.CLD_STOPPED else "it was killed"


# -- In the starter ----------------------------------------------------------------------------------------------------


def _be_starter(connection: socket.socket, null_fd: int, user: TaskUser, oom_score: int, launcher: int) -> None:
    """In the new process. Never returns: what stands above it on the stack is the launcher's."""
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        _keep_only(connection.fileno(), null_fd)
        prefer_for_oom(os.getpid(), oom_score)  # While it may. What it starts inherits it.
        user.become()
        _prctl(_PR_SET_DUMPABLE, 0)
        _prctl(_PR_SET_NAME, ctypes.cast(ctypes.c_char_p(STARTER_NAME.encode()), ctypes.c_void_p).value or 0)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # After the change of user, which clears it.
        if os.getppid() == launcher:
            connection.settimeout(None)
            _serve(connection, null_fd)
    finally:
        os._exit(0)


def _keep_only(*descriptors: int) -> None:
    """Close all files but these and the standard ones: the worker's stream and other tasks' files are nothing to it."""
    first = _FIRST_OWN_FD
    for descriptor in sorted(descriptors):
        os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, 1 << 30)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def _serve(connection: socket.socket, null_fd: int) -> None:
    """Do what the launcher asks for, until it closes the connection."""
    while True:
        received, descriptors, _, _ = socket.recv_fds(connection, _READ_BYTES, 2)
        while len(received) < _HEAD_BYTES or len(received) < _HEAD_BYTES + int.from_bytes(received[:4], "big"):
            part = connection.recv(_READ_BYTES)
            if not part:
                return
            received += part
        request = _decode_request(received[_HEAD_BYTES:])
        answer: _Started | _Failed | _Reaped
        if isinstance(request, _Start):
            answer = _start(request, null_fd, descriptors)
        else:
            answer = _Reaped([reap(pid) for pid in request.pids])
        body = _encode(answer)
        connection.sendall(len(body).to_bytes(_HEAD_BYTES, "big") + body)


def _start(request: _Start, null_fd: int, descriptors: Sequence[int]) -> _Started | _Failed:
    try:
        stdout_fd, stderr_fd = descriptors
        process = subprocess.Popen(
            request.argv,
            stdin=null_fd,
            stdout=stdout_fd,
            stderr=stderr_fd,
            cwd=request.directory,
            env=request.environment,
            start_new_session=True,
        )
    except OSError as error:
        filename = None if error.filename is None else os.fsdecode(error.filename)
        return _Failed(error.errno or 0, error.strerror or str(error), filename)
    except (ValueError, subprocess.SubprocessError) as error:
        return _Failed(0, str(error), None)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    process.returncode = 0  # Reaped when the launcher says so; Popen must not try.
    return _Started(process.pid)
