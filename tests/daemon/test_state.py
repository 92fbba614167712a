"""The state directory: one daemon a role, the same identity after every restart, and a socket of one's own."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskd import paths
from taskd.config import NodeSettings
from taskd.daemon.state import SocketPlace, StateDirectory, choose_socket, identify
from taskd.errors import AlreadyRunning, ConfigError

NOW_S = 1_767_225_600.0  # 2026-01-01
BOTH = ("scheduler", "worker")


@pytest.fixture
def run_directory(tmp_path: Path, monkeypatch) -> Path:
    """Stands in for /run/taskd."""
    run = tmp_path / "run"
    monkeypatch.setattr(paths, "places", lambda: paths.Places("", str(tmp_path / "usual"), str(run)))
    return run


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as made:
        yield made


def new_identity(path: Path, *roles, wanted_id: int = 0, now_s: float = NOW_S):
    state = StateDirectory(path, roles or ("scheduler",))
    try:
        return identify(state, wanted_id, now_s)
    finally:
        state.close()


# -- One daemon a role -------------------------------------------------------------------------------------------------


def test_each_role_has_a_private_directory(tmp_path):
    state = StateDirectory(tmp_path / "a" / "state", BOTH)
    assert state.main == state.of("scheduler")
    for directory in (state.path, state.of("scheduler"), state.of("worker")):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    state.close()


def test_the_settings_name_the_directory_or_the_usual_one_is_used(tmp_path, run_directory):
    for settings, expected in (
        (NodeSettings(state_dir=str(tmp_path / "mine")), tmp_path / "mine"),
        (NodeSettings(), tmp_path / "usual"),
    ):
        state = StateDirectory.opened(settings, ("worker",))
        assert state.of("worker") == expected / "worker"
        state.close()


def test_a_second_daemon_of_a_role_is_refused_and_told_who_has_it(tmp_path):
    first = StateDirectory(tmp_path, ("worker",))
    with pytest.raises(AlreadyRunning) as caught:
        StateDirectory(tmp_path, BOTH)
    assert f"another daemon (process {os.getpid()}) uses {tmp_path / 'worker'}" in caught.value.message
    assert "--state-dir" in caught.value.message
    # What was taken before the refusal is free again; another role is no obstacle.
    second = StateDirectory(tmp_path, ("scheduler",))
    first.close()
    third = StateDirectory(tmp_path, ("worker",))
    second.close()
    third.close()


def test_the_lock_ends_with_the_process_and_is_not_inherited(tmp_path):
    code = (
        "import subprocess, sys, time; from pathlib import Path; from taskd.daemon.state import StateDirectory\n"
        "state = StateDirectory(Path(sys.argv[1]), ('worker',))\n"
        "task = subprocess.Popen(['sleep', '60'], close_fds=False, stdout=subprocess.DEVNULL)\n"
        "print(task.pid, flush=True); time.sleep(60)"
    )
    daemon = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert daemon.stdout is not None
    task = int(daemon.stdout.readline())
    try:
        with pytest.raises(AlreadyRunning, match=f"process {daemon.pid}"):
            StateDirectory(tmp_path, ("worker",))
        daemon.kill()
        daemon.wait()
        os.kill(task, 0)  # The task outlives it, and holds nothing.
        StateDirectory(tmp_path, ("worker",)).close()
    finally:
        daemon.kill()
        daemon.communicate()
        os.kill(task, 9)


def test_a_directory_that_others_can_write_is_refused(tmp_path):
    (tmp_path / "worker").mkdir()
    (tmp_path / "worker").chmod(0o770)
    with pytest.raises(ConfigError, match=f"chmod 700 {tmp_path / 'worker'}"):
        StateDirectory(tmp_path, ("worker",))


def test_a_path_that_is_no_directory_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"{tmp_path}/file/state.* cannot be used: Not a directory"):
        StateDirectory(tmp_path / "file" / "state", ("worker",))
    (tmp_path / "worker").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="worker cannot be used"):
        StateDirectory(tmp_path, ("worker",))


def test_a_lock_is_not_written_through_a_link(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("stays")
    (tmp_path / "worker").mkdir(0o700)
    (tmp_path / "worker" / "lock").symlink_to(precious)
    with pytest.raises(ConfigError, match="lock cannot be used"):
        StateDirectory(tmp_path, ("worker",))
    assert precious.read_text() == "stays"


# -- Identity ----------------------------------------------------------------------------------------------------------


def test_the_identity_is_not_written_through_a_link(tmp_path):
    """Root restores what is another user's, who may have planted one."""
    other = tmp_path / "other"
    other.write_text("precious")
    (tmp_path / "state" / "scheduler").mkdir(0o700, parents=True)
    (tmp_path / "state" / "scheduler" / "node.json.new").symlink_to(other)
    new_identity(tmp_path / "state")
    assert other.read_text() == "precious"
    assert not (tmp_path / "state/scheduler/node.json").is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's link")
def test_a_directory_that_another_user_has_linked_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "state").mkdir()
    link = tmp_path / "state/scheduler"
    link.symlink_to(tmp_path / "elsewhere")
    StateDirectory(tmp_path / "state", ("scheduler",)).close()
    os.chown(link, 65534, 65534, follow_symlinks=False)
    with pytest.raises(ConfigError, match="a link that another user has made"):
        StateDirectory(tmp_path / "state", ("scheduler",))


def test_the_identity_is_made_once_and_kept(tmp_path):
    made = new_identity(tmp_path, "worker")
    assert made.node_id == 365 * 86400 * 1_000_000
    assert made.first_start == "2026-01-01T00:00:00Z"
    assert len(bytes.fromhex(made.store_id)) == 16
    assert new_identity(tmp_path, "worker", now_s=NOW_S + 1000) == made
    assert new_identity(tmp_path, "worker", wanted_id=made.node_id) == made
    assert stat.S_IMODE((tmp_path / "worker" / "node.json").stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path / "worker")) == ["lock", "node.json"]


def test_who_started_first_has_the_lower_id(tmp_path):
    ids = [new_identity(tmp_path / str(number), now_s=NOW_S + number * 1e-5).node_id for number in range(3)]
    assert ids == sorted(set(ids))


def test_a_scheduler_has_its_store_id_in_its_database(tmp_path):
    assert new_identity(tmp_path, *BOTH).store_id == ""
    assert (tmp_path / "scheduler" / "node.json").exists()
    assert not (tmp_path / "worker" / "node.json").exists()


def test_an_id_asked_for_is_taken_once_and_another_refused(tmp_path):
    assert new_identity(tmp_path, wanted_id=5).node_id == 5
    with pytest.raises(ConfigError, match=r"node id 6 is asked for, but .* belongs to node 5") as caught:
        new_identity(tmp_path, wanted_id=6)
    assert caught.value.field == "node.id"
    assert new_identity(tmp_path).node_id == 5


def test_a_clock_that_was_never_set_makes_no_id(tmp_path):
    with pytest.raises(ConfigError, match="the clock says 1970-01-01T00:00:05Z: set it"):
        new_identity(tmp_path, now_s=5.0)
    assert new_identity(tmp_path, now_s=5.0, wanted_id=3).node_id == 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"node_id": 5}',
        b'{"node_id": 0, "first_start": "2026-01-01T00:00:00Z"}',
        b'{"node_id": "5", "first_start": "2026-01-01T00:00:00Z"}',
        b'{"node_id": 5, "first_start": "yesterday-ish"}',
        b'{"node_id": 5, "first_start": "2026-01-01T00:00:00Z", "store_id": "xyz"}',
        b'{"node_id": 5, "first_start": "2026-01-01T00:00:00Z", "role": "king"}',
    ],
)
def test_a_damaged_identity_is_never_replaced(tmp_path, content):
    path = tmp_path / "scheduler" / "node.json"
    path.parent.mkdir(mode=0o700)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"node\.json is damaged \(.*start once with --node-id"):
        new_identity(tmp_path)
    assert path.read_bytes() == content


def test_a_crash_while_writing_leaves_no_half_identity(tmp_path, monkeypatch):
    def fail(file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        with pytest.raises(ConfigError, match=r"node\.json cannot be used: No space left on device"):
            new_identity(tmp_path)
    assert not (tmp_path / "scheduler" / "node.json").exists()
    assert new_identity(tmp_path, wanted_id=4).node_id == 4


# -- The socket --------------------------------------------------------------------------------------------------------


def test_the_first_daemon_takes_the_usual_socket_and_the_next_that_of_its_role(run_directory, caplog):
    caplog.set_level("INFO", "taskd")
    first = choose_socket(NodeSettings(), ("scheduler",))
    assert first.path == f"{run_directory}/taskd.sock"
    assert not caplog.records
    second = choose_socket(NodeSettings(), ("worker",))
    assert second.path == f"{run_directory}/taskd-worker.sock"
    assert caplog.records[0].fields == {"usual": first.path, "socket": second.path}
    with pytest.raises(AlreadyRunning, match=r"taskd\.sock and .*taskd-worker\.sock: stop it first"):
        choose_socket(NodeSettings(), ("worker",))
    third = choose_socket(NodeSettings(), BOTH)
    assert third.path == f"{run_directory}/taskd-scheduler.sock"
    for place in (first, second, third):
        place.close()
    again = choose_socket(NodeSettings(), ("worker",))
    assert again.path == first.path
    again.close()


def test_a_state_directory_that_is_set_holds_the_socket(tmp_path, run_directory):
    place = choose_socket(NodeSettings(state_dir=str(tmp_path / "mine")), ("worker",))
    assert place.path == f"{tmp_path}/mine/taskd.sock"
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o700
    place.close()


def test_what_a_dead_daemon_left_is_removed(tmp_path, listener):
    path = tmp_path / "taskd.sock"
    listener.bind(str(path))  # Never listened on, as if its process were gone.
    place = choose_socket(NodeSettings(socket=str(path)), ("worker",))
    assert place.path == str(path)
    assert not path.exists()
    place.close()


def test_a_daemon_that_does_not_listen_yet_keeps_its_place(run_directory, listener):
    first = choose_socket(NodeSettings(), ("scheduler",))
    listener.bind(first.path)
    second = choose_socket(NodeSettings(), ("worker",))
    assert second.path != first.path
    assert Path(first.path).exists()
    second.close()
    first.close()
    assert not Path(first.path).exists()


def test_somebody_elses_listener_keeps_its_place(tmp_path, listener):
    path = tmp_path / "taskd.sock"
    listener.bind(str(path))
    listener.listen()
    with pytest.raises(AlreadyRunning, match="another daemon answers on"):
        choose_socket(NodeSettings(socket=str(path)), ("worker",))
    assert path.exists()


def test_a_file_in_the_way_is_not_removed(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("important")
    with pytest.raises(ConfigError, match="in the way of the socket"):
        choose_socket(NodeSettings(socket=str(path)), ("worker",))
    assert path.read_text() == "important"


def test_a_place_that_cannot_be_is_refused_in_words(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path}/none/a.sock.lock cannot be used: No such file"):
        choose_socket(NodeSettings(socket=f"{tmp_path}/none/a.sock"), ("worker",))
    with pytest.raises(ConfigError, match="at most 107"):
        choose_socket(NodeSettings(socket="/" + "x" * 107), ("worker",))


def test_what_a_killed_daemon_left_at_the_socket_of_its_role_is_removed_by_the_next(run_directory, listener):
    other = choose_socket(NodeSettings(), ("worker",))
    left, kept = f"{run_directory}/taskd-scheduler.sock", run_directory / "taskd-worker.sock"
    listener.bind(left)  # As if its process were gone.
    other.close()
    kept.write_text("no socket")
    place = choose_socket(NodeSettings(), ("scheduler",))
    assert place.path == f"{run_directory}/taskd.sock"
    assert not os.path.lexists(left)
    place.close()
    choose_socket(NodeSettings(), ("worker",)).close()
    assert kept.read_text() == "no socket"


def test_closing_a_place_without_a_socket_is_no_error(tmp_path):
    place = choose_socket(NodeSettings(socket=str(tmp_path / "a.sock")), ("worker",))
    assert isinstance(place, SocketPlace)
    place.close()
