"""The user that tasks run as, and how a launcher (launcher.py), which is root, becomes or asks for it.

A process that is the task user, be it for a moment, can be killed by any task. So the launcher never is: its real and
its saved user are always root, and only what it may see of the file system is changed now and then. A new process
becomes the task user between fork and exec; it loses its capabilities by that, and can never get one again:
`no_new_privs` is set for good.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import Struct

from taskd.errors import ConfigError

UMASK = 0o022
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_CAPABILITY_VERSION_3 = 0x20080522
_NO_LOGIN = ("nologin", "false")

_libc = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    """Half of the three sets: capabilities 0 to 31, or those above."""

    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


class TaskUser(Struct, frozen=True):
    """The user that tasks run as, and its groups."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str
    shell: str

    @classmethod
    def named(cls, name: str) -> TaskUser:
        """From the machine's user database. Raises ConfigError: no such user, or root."""
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            raise ConfigError(
                f"there is no user {name!r} that tasks could run as: make it, or change task_user"
            ) from None
        if entry.pw_uid == 0:
            raise ConfigError(
                f"tasks cannot run as {name!r}: it is root; leave task_user empty to run them as taskd does"
            )
        groups = tuple(os.getgrouplist(name, entry.pw_gid))
        if 0 in groups:
            raise ConfigError(f"tasks cannot run as {name!r}: it is in the group of root")
        shell = entry.pw_shell or "/bin/sh"
        shell = "/bin/sh" if os.path.basename(shell) in _NO_LOGIN else shell
        return cls(name, entry.pw_uid, entry.pw_gid, groups, entry.pw_dir or "/", shell)

    def environment(self) -> dict[str, str]:
        """The variables that say who it is."""
        return {"HOME": self.home, "USER": self.name, "LOGNAME": self.name, "SHELL": self.shell}

    def become(self) -> None:
        """Be this user for good, without capabilities. Raises OSError."""
        os.setgroups(self.groups)
        os.setresgid(self.gid, self.gid, self.gid)
        os.setresuid(self.uid, self.uid, self.uid)

    @contextmanager
    def seeing(self) -> Iterator[None]:
        """See files as this user does, in a process of one thread. Raises OSError."""
        os.setgroups(self.groups)
        try:
            _see_as(self.uid, self.gid)
            yield
        finally:
            _see_as_root_again()


def prepare(processes_max: int) -> None:
    """Make this process, which must be root, one that starts tasks: what they are to inherit is set once. At most
    `processes_max` processes of the task user can be started. Raises OSError, ValueError."""
    for number in signal.valid_signals():
        if signal.getsignal(number) is signal.SIG_IGN and number != signal.SIGPIPE:  # Popen gives tasks that one back.
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(UMASK)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _inherit_no_capabilities()
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    most = processes_max if hard == resource.RLIM_INFINITY else min(processes_max, hard)
    resource.setrlimit(resource.RLIMIT_NPROC, (most, most))


def _see_as(uid: int, gid: int) -> None:
    """By the ids for files alone: by the others it is decided who may send signals, or slow the process down."""
    _libc.setfsgid(gid)
    _libc.setfsuid(uid)
    if _libc.setfsgid(-1) != gid or _libc.setfsuid(-1) != uid:  # They tell of no error, only what it was before.
        raise PermissionError("the user for files cannot be changed")


def _see_as_root_again() -> None:
    # Whatever fails here, the process would go on half changed: better none.
    try:
        _see_as(0, 0)
        os.setgroups(())
    except OSError:
        os._exit(70)


def _inherit_no_capabilities() -> None:
    header = _Header(_CAPABILITY_VERSION_3, 0)
    sets = (_Sets * 2)()
    if _libc.capget(ctypes.byref(header), sets) != 0:
        raise OSError(ctypes.get_errno(), "capget failed")
    for half in sets:
        half.inheritable = 0
    if _libc.capset(ctypes.byref(header), sets) != 0:
        raise OSError(ctypes.get_errno(), "capset failed")


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
