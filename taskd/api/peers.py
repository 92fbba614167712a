"""Who is at the other end of the socket, and whether they may come in: the kernel's word, not the client's.

- Everything: root, the daemon's own user, members of the admin group.
- Submit, read, and cancel or retry what is their own: members of the socket's group; and whoever the socket's file
  mode lets in as one of the "others", for an operator who set that wants everybody.
- Nobody else. Before any of this the kernel itself asks the file mode: a member of the admin group needs the socket's
  group too.

Groups are those that the connecting process has, as for any file; where the kernel cannot say, those of its user.
"""

from __future__ import annotations

import grp
import os
import pwd
import socket
import struct
import time
from asyncio import BaseTransport
from typing import NoReturn, Protocol

from taskd.api.service import Caller
from taskd.errors import Forbidden

KNOWN_FOR_S = 10.0  # Names and ids of users and groups may come over the network: not asked for at each connection.
USERS_KEPT = 1024

_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid
_SO_PEERGROUPS = 59  # Linux 4.13; Python has no name for it.
_GROUPS_BYTES_MAX = 1024  # What Python's getsockopt takes: 256 groups.


class PeerSocket(Protocol):
    """The part of a socket that is needed: event loops lend no more."""

    def getsockopt(self, level: int, option: int, length: int, /) -> bytes: ...


class Door:
    """Lets connections in, each as the user that it is."""

    def __init__(self, group: str, admin_group: str, mode: int) -> None:
        self._group = group
        self._admin_group = admin_group
        self._is_open_to_others = bool(mode & 0o002)
        self._own_uid = os.geteuid()
        self._group_ids: tuple[int | None, int | None] = (None, None)
        self._group_ids_until = 0.0
        self._users: dict[int, tuple[str, float]] = {}

    def greet(self, transport: BaseTransport) -> tuple[Caller, str]:
        """Who the peer is, and its process. Raises Forbidden, OSError."""
        peer = transport.get_extra_info("socket")
        return self.admit(peer), source_of(peer)

    def authenticate(self, authorization: str | None, source: str) -> NoReturn:
        """Never asked: whoever has come in is known."""
        raise AssertionError("the kernel has said who it is")

    def is_accepted(self, authorization: str | None) -> bool:
        """Always: the kernel has said who it is."""
        return True

    def admit(self, peer: PeerSocket) -> Caller:
        """Who the peer is. Raises Forbidden."""
        _, uid, gid = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        user = self._user(uid)
        if uid in (0, self._own_uid):
            return Caller(user, True)
        members, admins = self._find_group_ids()
        groups = _groups(peer, user, gid)
        if admins in groups:
            return Caller(user, True)
        if members in groups or self._is_open_to_others:
            return Caller(user, False)
        remedy = f"; an administrator can add them to the group {self._group}" if self._group else ""
        raise Forbidden(f"the user {user} may not use this socket{remedy}")

    def _user(self, uid: int) -> str:
        now = time.monotonic()
        known = self._users.get(uid)
        if known is not None and known[1] > now:
            return known[0]
        try:
            name = pwd.getpwuid(uid).pw_name
        except KeyError:
            name = str(uid)
        if len(self._users) >= USERS_KEPT:
            self._users.clear()
        self._users[uid] = (name, now + KNOWN_FOR_S)
        return name

    def _find_group_ids(self) -> tuple[int | None, int | None]:
        now = time.monotonic()
        if now >= self._group_ids_until:
            self._group_ids = (group_id(self._group), group_id(self._admin_group))
            self._group_ids_until = now + KNOWN_FOR_S
        return self._group_ids


def source_of(peer: PeerSocket) -> str:
    """The process at the other end, for the audit."""
    pid, uid, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return f"pid {pid} uid {uid}"


def group_id(name: str) -> int | None:
    """The id of a group, None where there is no such group."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def _groups(peer: PeerSocket, user: str, gid: int) -> set[int | None]:
    try:
        packed = peer.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES_MAX)
    except OSError:  # An older kernel, another numbering, or more groups than fit.
        return {gid, *os.getgrouplist(user, gid)}
    return {gid, *struct.unpack(f"{len(packed) // 4}I", packed)}
