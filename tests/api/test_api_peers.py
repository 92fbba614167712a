"""Who may come in, and as whom; and the socket's file."""

from __future__ import annotations

import asyncio
import errno
import os
import pwd
import socket
import stat
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from taskd.api import peers, unix_socket
from taskd.api.app import serve
from taskd.api.peers import Door
from taskd.api.service import Caller
from taskd.api.unix_socket import PATH_BYTES_MAX, is_answered, open_socket
from taskd.errors import AlreadyRunning, ConfigError, Forbidden
from tests.api.fakes import FakeService

STRANGER = 54321  # A user id that nobody has.
MEMBERS, ADMINS = 5000, 5001

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


class FakePeer:
    """The end of a connection, as the kernel describes it."""

    def __init__(self, uid: int, gid: int = STRANGER, groups: tuple[int, ...] | OSError = ()) -> None:
        self.uid = uid
        self.gid = gid
        self.groups = groups

    def getsockopt(self, level: int, option: int, length: int, /) -> bytes:
        if option == socket.SO_PEERCRED:
            return struct.pack("iII", 1, self.uid, self.gid)
        if isinstance(self.groups, OSError):
            raise self.groups
        return struct.pack(f"{len(self.groups)}I", *self.groups)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    found = {"taskd": MEMBERS, "taskd-admin": ADMINS}
    monkeypatch.setattr(peers, "group_id", found.get)
    return found


def door(mode: int = 0o660) -> Door:
    return Door("taskd", "taskd-admin", mode)


# -- Who may come in ---------------------------------------------------------------------------------------------------


def test_root_and_the_daemons_own_user_may_do_everything(groups: dict[str, int]) -> None:
    assert door().admit(FakePeer(0)) == Caller("root", True)
    own = pwd.getpwuid(os.geteuid()).pw_name
    assert door().admit(FakePeer(os.geteuid())) == Caller(own, True)


def test_of_a_daemon_without_privileges_root_still_is_an_admin(
    groups: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    entrance = door()
    assert entrance.admit(FakePeer(0)) == Caller("root", True)
    assert entrance.admit(FakePeer(STRANGER)) == Caller(str(STRANGER), True)
    with pytest.raises(Forbidden):
        entrance.admit(FakePeer(STRANGER + 1))


@pytest.mark.parametrize(
    ("peer", "is_admin"),
    [
        (FakePeer(STRANGER, groups=(1, MEMBERS)), False),
        (FakePeer(STRANGER, gid=MEMBERS), False),
        (FakePeer(STRANGER, groups=(ADMINS,)), True),
        (FakePeer(STRANGER, gid=MEMBERS, groups=(ADMINS, 1)), True),
    ],
)
def test_members_of_the_groups(groups: dict[str, int], peer: FakePeer, is_admin: bool) -> None:
    assert door().admit(peer) == Caller(str(STRANGER), is_admin)


def test_nobody_else(groups: dict[str, int]) -> None:
    with pytest.raises(Forbidden, match=r"the user 54321 may not use this socket; .* to the group taskd"):
        door().admit(FakePeer(STRANGER, groups=(1, 2)))


def test_everybody_where_the_mode_says_so(groups: dict[str, int]) -> None:
    assert door(0o666).admit(FakePeer(STRANGER)) == Caller(str(STRANGER), False)
    assert door(0o666).admit(FakePeer(STRANGER, groups=(ADMINS,))) == Caller(str(STRANGER), True)


def test_groups_that_do_not_exist_let_nobody_in(groups: dict[str, int]) -> None:
    groups.clear()
    with pytest.raises(Forbidden):
        door().admit(FakePeer(STRANGER, groups=(MEMBERS, ADMINS)))


def test_groups_that_are_made_later_count_soon(groups: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    groups.clear()
    entrance, peer = door(), FakePeer(STRANGER, groups=(MEMBERS,))
    now = 1000.0
    monkeypatch.setattr(peers.time, "monotonic", lambda: now)
    with pytest.raises(Forbidden):
        entrance.admit(peer)
    groups["taskd"] = MEMBERS
    now += peers.KNOWN_FOR_S
    assert entrance.admit(peer) == Caller(str(STRANGER), False)


def test_without_the_kernels_word_on_groups_those_of_the_user_count(
    groups: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def getgrouplist(user: str, gid: int) -> list[int]:
        asked.append((user, gid))
        return [gid, MEMBERS]

    monkeypatch.setattr(os, "getgrouplist", getgrouplist)
    peer = FakePeer(STRANGER, groups=OSError(errno.ENOPROTOOPT, "no such option"))
    assert door().admit(peer) == Caller(str(STRANGER), False)
    assert asked == [(str(STRANGER), STRANGER)]


def test_a_real_socket() -> None:
    one, other = socket.socketpair()
    with one, other:
        caller = door().admit(one)
    assert caller == Caller(pwd.getpwuid(os.geteuid()).pw_name, True)


# -- Somebody else, for real -------------------------------------------------------------------------------------------


def ask_as(uid: int, gid: int, path: Path, go: int, answer: int) -> None:
    """In a child process: become that user, wait for the word, ask, pass on what comes."""
    try:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        os.read(go, 1)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(os.fspath(path))
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: taskd\r\nConnection: close\r\n\r\n")
            text = connection.recv(4096)
    except OSError as error:
        text = errno.errorcode[error.errno or 0].encode()
    os.write(answer, text)
    os._exit(0)


@needs_root
@pytest.mark.parametrize(
    ("access", "gid", "words"),
    [
        ((0o666, "taskd"), STRANGER, b"HTTP/1.1 200 OK"),
        ((0o660, "daemon"), STRANGER, b"EACCES"),
        ((0o660, "no-such-group"), 0, b"EACCES"),  # Not even for the group that the file would have otherwise.
        ((0o660, "daemon"), 1, b"HTTP/1.1 200 OK"),
    ],
)
def test_the_kernel_and_the_door_agree(
    service: FakeService, path: Path, access: tuple[int, str], gid: int, words: bytes
) -> None:
    path.parent.chmod(0o755)
    go_read, go_write = os.pipe()
    answer_read, answer_write = os.pipe()
    child = os.fork()
    if child == 0:
        ask_as(STRANGER, gid, path, go_read, answer_write)

    async def story() -> bytes:
        server = await serve(service, path, *access)
        try:
            os.write(go_write, b"!")
            return await asyncio.to_thread(os.read, answer_read, 4096)
        finally:
            await server.close(0.0)

    try:
        assert asyncio.run(story()).startswith(words)
    finally:
        os.waitpid(child, 0)
        for descriptor in (go_read, go_write, answer_read, answer_write):
            os.close(descriptor)


# -- The file ----------------------------------------------------------------------------------------------------------


def test_the_files_mode_and_directory(path: Path) -> None:
    deep = path.parent / "run" / "taskd.sock"
    file = open_socket(deep, 0o600, "no-such-group")
    assert stat.S_IMODE(deep.stat().st_mode) == 0o600
    file.socket.close()
    file.remove()
    assert not deep.exists()


def test_without_its_group_a_socket_has_no_group_permissions(path: Path) -> None:
    file = open_socket(path, 0o666, "no-such-group")
    assert stat.S_IMODE(path.stat().st_mode) == file.mode == 0o606
    file.socket.close()


@needs_root
def test_the_files_group(path: Path) -> None:
    file = open_socket(path, 0o660, "daemon")
    assert (path.stat().st_gid, stat.S_IMODE(path.stat().st_mode)) == (1, 0o660)
    file.socket.close()


def test_a_dead_socket_is_replaced(path: Path) -> None:
    open_socket(path, 0o600, "taskd").socket.close()
    assert path.exists()
    assert not is_answered(path)
    file = open_socket(path, 0o600, "taskd")
    assert is_answered(path)
    file.socket.close()


def test_a_live_one_is_not(path: Path) -> None:
    file = open_socket(path, 0o600, "taskd")
    with pytest.raises(AlreadyRunning):
        open_socket(path, 0o600, "taskd")
    assert is_answered(path)
    file.socket.close()


def test_a_busy_one_is_alive(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unix_socket, "BACKLOG", 0)
    file = open_socket(path, 0o600, "taskd")
    waiting = []
    code = 0
    while code == 0:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        waiting.append(client)
        code = client.connect_ex(os.fspath(path))
    assert code == errno.EAGAIN
    assert is_answered(path)
    for client in (*waiting, file.socket):
        client.close()


def test_only_ones_own_file_is_removed(path: Path) -> None:
    first = open_socket(path, 0o600, "taskd")
    path.unlink()
    second = open_socket(path, 0o600, "taskd")
    first.remove()
    assert is_answered(path)
    second.remove()
    assert not path.exists()
    second.remove()
    first.socket.close()
    second.socket.close()


def make_file(path: Path) -> Path:
    path.write_text("precious")
    return path


def make_long(path: Path) -> Path:
    return path.parent / ("x" * (PATH_BYTES_MAX + 1))


def make_below_file(path: Path) -> Path:
    return make_file(path) / "taskd.sock"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_file, "it is not a socket"),
        (make_long, "longer than 107 bytes"),
        (make_below_file, "cannot listen at"),
    ],
)
def test_paths_that_cannot_be_used(path: Path, make: Callable[[Path], Path], words: str) -> None:
    wanted = make(path)
    with pytest.raises(ConfigError, match=words):
        open_socket(wanted, 0o600, "taskd")
    assert not path.exists() or path.read_text() == "precious"


def test_of_two_that_start_at_once_one_listens(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a lock both would find a dead socket, and the second would remove the first one's new one."""
    open_socket(path, 0o600, "taskd").socket.close()
    both_look = threading.Barrier(2)
    look = unix_socket.is_answered

    def look_together(where: Path) -> bool:
        with suppress(threading.BrokenBarrierError):
            both_look.wait(0.1)
        return look(where)

    monkeypatch.setattr(unix_socket, "is_answered", look_together)

    def start(_: int) -> unix_socket.SocketFile | None:
        try:
            return open_socket(path, 0o600, "taskd")
        except AlreadyRunning:
            return None

    with ThreadPoolExecutor(2) as pool:
        (file,) = [file for file in pool.map(start, range(2)) if file is not None]
    assert look(path)
    file.socket.close()
