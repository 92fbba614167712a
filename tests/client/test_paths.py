"""Where things are, and which daemon a client talks to."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from taskd import paths
from taskd.errors import ConfigError, NoDaemon


@contextmanager
def listening(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        yield


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's run directory, and a system's whose daemon is not there."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(paths, "SYSTEM", paths.Places("/etc/taskd", "/var/lib/taskd", str(tmp_path / "system")))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("TASKD_SOCKET", raising=False)
    return tmp_path / "run" / "taskd"


def test_root_has_the_system_places() -> None:
    assert paths.places({"HOME": "/root", "XDG_CONFIG_HOME": "/x"}, is_root=True) == paths.SYSTEM
    assert paths.SYSTEM == ("/etc/taskd", "/var/lib/taskd", "/run/taskd")


def test_a_user_has_the_xdg_places() -> None:
    environ = {"XDG_CONFIG_HOME": "/c", "XDG_STATE_HOME": "/s", "XDG_RUNTIME_DIR": "/r", "HOME": "/h"}
    assert paths.places(environ, is_root=False) == ("/c/taskd", "/s/taskd", "/r/taskd")


def test_a_user_without_xdg_folders_has_those_below_home() -> None:
    # Relative folders are invalid and are passed over.
    places = paths.places({"HOME": "/h/", "XDG_STATE_HOME": "state"}, is_root=False)
    assert places == ("/h/.config/taskd", "/h/.local/state/taskd", "/h/.local/state/taskd/run")


def test_a_service_has_the_directories_of_its_unit() -> None:
    environ = {
        "HOME": "/h", "XDG_RUNTIME_DIR": "/r", "STATE_DIRECTORY": "/var/lib/taskd:/var/lib/more",
        "RUNTIME_DIRECTORY": "/run/taskd", "CONFIGURATION_DIRECTORY": "/etc/taskd",
    }  # fmt: skip
    assert paths.places(environ, is_root=False) == paths.SYSTEM
    del environ["RUNTIME_DIRECTORY"], environ["CONFIGURATION_DIRECTORY"]
    assert paths.places(environ, is_root=False) == ("/h/.config/taskd", "/var/lib/taskd", "/r/taskd")


def test_the_users_daemon_comes_before_the_systems(user: Path, tmp_path: Path) -> None:
    with listening(tmp_path / "system" / "taskd-worker.sock"):
        assert paths.find_socket() == str(tmp_path / "system" / "taskd-worker.sock")
        with listening(user / "taskd-scheduler.sock"):
            assert paths.find_socket() == str(user / "taskd-scheduler.sock")
            with listening(user / "taskd.sock"):
                assert paths.find_socket() == str(user / "taskd.sock")


def test_a_socket_that_is_told_is_the_only_one(user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(user / "taskd.sock"), listening(tmp_path / "a"), listening(tmp_path / "b"):
        monkeypatch.setenv("TASKD_SOCKET", str(tmp_path / "a"))
        assert paths.find_socket() == str(tmp_path / "a")
        assert paths.find_socket(str(tmp_path / "b")) == str(tmp_path / "b")
        with pytest.raises(NoDaemon, match="there is no such file"):
            paths.find_socket(str(tmp_path / "none"))


def test_a_file_left_by_a_dead_daemon_is_no_daemon(user: Path) -> None:
    with listening(user / "taskd.sock"):
        pass
    assert (user / "taskd.sock").exists()
    with pytest.raises(NoDaemon, match="taskd start --role") as caught:
        paths.find_socket()
    assert str(user) in caught.value.message
    assert "with --socket or TASKD_SOCKET: one with a --state-dir" in caught.value.message
    with pytest.raises(NoDaemon, match=r"nothing listens on it.*with --socket or TASKD_SOCKET"):
        paths.find_socket(str(user / "taskd.sock"))


def test_a_daemon_too_busy_to_accept_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "CONNECT_TIMEOUT_S", 0.01)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen(0)
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.connect(str(tmp_path / "s"))
            assert paths.answers(str(tmp_path / "s"))


def test_a_forbidden_socket_says_whom_to_ask(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> bool:
        raise PermissionError(path)

    monkeypatch.setattr(paths, "answers", refuse)
    with pytest.raises(NoDaemon, match="group taskd"):
        paths.find_socket()


def test_a_path_too_long_for_a_socket_is_a_clear_error() -> None:
    longest = "/" + "x" * (paths.SOCKET_PATH_BYTES_MAX - 1)
    assert paths.checked_socket_path(longest) == longest
    with pytest.raises(ConfigError, match="at most 107"):
        paths.checked_socket_path(longest + "x")
    with pytest.raises(ConfigError, match="108 bytes"):
        paths.find_socket("/" + "é" * 53 + "x")
