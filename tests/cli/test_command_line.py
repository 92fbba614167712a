"""The command line as a whole: help, errors, exit codes, terminals, and how little it loads."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from taskd.cli import main, start
from tests.cli.conftest import ROOT, Taskd
from tests.client.fake_daemon import FakeDaemon

Start = Callable[..., "subprocess.Popen[bytes]"]


def all_commands() -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name in main.COMMANDS:
        command = main.cli.get_command(click.Context(main.cli), name)
        found.append((name,))
        if isinstance(command, click.Group):
            found += [(name, sub) for sub in command.commands]
    return found


def test_alone_it_lists_the_commands_by_group(taskd: Taskd) -> None:
    ran = taskd()
    assert ran.code == 0
    for text in ("Run work:", "Look:", "The cluster:", "submit ", "completion "):
        assert text in ran.out
    assert taskd("--help").out == ran.out


@pytest.mark.parametrize("command", all_commands())
def test_every_command_helps(taskd: Taskd, command: tuple[str, ...]) -> None:
    ran = taskd(*command, "-h")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("Usage: taskd " + " ".join(command))
    assert "  -h, --help" in ran.out


def test_the_version(taskd: Taskd) -> None:
    assert taskd("--version").out == f"taskd {main.VERSION}\n"


def test_a_slip_of_the_pen_is_understood(taskd: Taskd) -> None:
    ran = taskd("sumbit", "--", "true")
    assert ran.code == 2
    assert "did you mean `taskd submit`?" in ran.err
    assert taskd("xyzzy").code == 2


@pytest.mark.parametrize("command", [("submit", "x"), ("run", "x"), ("list",), ("node", "list"), ("wait", "x")])
def test_without_a_daemon_it_says_how_to_start_one(
    start: Start, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASKD_SOCKET", "/nowhere/taskd.sock")
    process = start(*command)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 3
    assert b"taskd start --role" in err
    assert b"Traceback" not in err


def test_a_socket_can_be_named(taskd: Taskd, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKD_SOCKET", "/nowhere/taskd.sock")
    assert taskd("list", "--socket", str(daemon.path)).code == 0
    ran = taskd("list", "--socket", "/" + "x" * 200)
    assert (ran.code, "at most 107" in ran.err) == (1, True)


def test_what_listens_there_may_not_be_a_daemon(taskd: Taskd, tmp_path: Path) -> None:
    import socket
    import threading

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "other"))
        server.listen()

        def answer() -> None:
            for _ in range(2):  # One asks whether anybody is there.
                with server.accept()[0] as connection:
                    if connection.recv(65536):
                        connection.sendall(b"220 mail ready\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        ran = taskd("list", "--socket", str(tmp_path / "other"))
        thread.join()
    assert ran.code == 1
    assert ran.err == "taskd: what listens there does not speak HTTP: it began with '220 mail ready'\n"


def test_errors_of_the_daemon_have_one_form(taskd: Taskd, daemon: FakeDaemon) -> None:
    for status, code in ((400, 2), (403, 1), (404, 1), (429, 1), (500, 1), (503, 1)):
        daemon.refuse("/v1/tasks", status, "x", "it says why")
        assert taskd("list") == (code, "", "taskd: it says why\n")


def test_our_own_bug_is_told_without_a_traceback(taskd: Taskd, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("oh")

    monkeypatch.setattr(main.cli, "main", broken)
    ran = taskd("list")
    assert ran.code == 1
    assert "this is a bug in taskd: RuntimeError: oh" in ran.err
    assert "TASKD_DEBUG=1" in ran.err
    monkeypatch.setenv("TASKD_DEBUG", "1")
    with pytest.raises(RuntimeError):
        main.run(["list"])


def test_a_broken_pipe_is_silent(start: Start, daemon: FakeDaemon, taskd: Taskd) -> None:
    file = daemon.path.with_name("tasks.json")
    file.write_text("[" + ",".join(['{"argv": ["true"]}'] * 2000) + "]")
    taskd("submit", "--from-json", str(file), "-q")
    process = start("list", "--all", "--json")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(20) == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""


def test_a_full_disk_is_told(start: Start, daemon: FakeDaemon) -> None:
    with open("/dev/full", "wb") as full:
        process = start("submit", "--", "true", stdout=full)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert b"No space left on device" in err


# -- Starting a daemon -------------------------------------------------------------------------------------------------


def test_start_hands_roles_and_settings_on(taskd: Taskd, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def run(*args: object) -> int:
        calls.append(args)
        return 5

    from taskd.daemon import main as daemon_main

    monkeypatch.setattr(daemon_main, "run", run)
    ran = taskd(
        "start", "--role", "worker,scheduler", "--node-id", "3", "--name", "n", "--cluster", "c", "--config", "f.toml",
        "--state-dir", "/s", "--socket", "/x.sock", "--listen", "0.0.0.0:1", "--join", "a:1", "--join", "b",
        "--key-file", "k", "--log-level", "debug",
    )  # fmt: skip
    assert ran.code == 5
    assert taskd("start", "--role", "worker").code == 5
    assert calls == [
        (("scheduler", "worker"), Path("f.toml"), {
            "node.id": 3, "node.name": "n", "node.cluster": "c", "node.state_dir": "/s", "node.socket": "/x.sock",
            "network.listen": ("0.0.0.0:1",), "network.join": ("a:1", "b"), "node.key_file": "k",
            "node.log_level": "debug",
        }),
        (("worker",), None, {}),
    ]  # fmt: skip


@pytest.mark.parametrize("role", ["", "boss", "worker,boss", "worker;scheduler"])
def test_start_knows_its_roles(taskd: Taskd, role: str) -> None:
    ran = taskd("start", "--role", role)
    assert ran.code == 2
    assert "is not scheduler, worker, or scheduler,worker" in ran.err
    assert start.ROLES == ("scheduler", "worker")


# -- Terminals ---------------------------------------------------------------------------------------------------------


def at_terminal(*args: str, **env: str) -> str:
    """What a command shows at a terminal of 80 columns."""
    leader, follower = pty.openpty()
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80", **env}
    process = subprocess.Popen(
        [sys.executable, "-m", "taskd", *args], stdin=follower, stdout=follower, stderr=follower, env=settings
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            data = os.read(leader, 65536)
        except OSError:  # EIO: the other side is closed.
            break
        if not data:
            break
        shown += data
    os.close(leader)
    process.wait()
    return shown.decode()


def test_a_terminal_gets_colours_and_a_table_that_fits(daemon: FakeDaemon, taskd: Taskd) -> None:
    taskd("submit", "--name", "long " * 30, "--", "exit", "7")
    shown = at_terminal("list")
    assert "\x1b[31mfailed" in shown
    assert "…" in shown
    assert all(len(click.unstyle(line)) <= 80 for line in shown.splitlines())
    assert "exit 7" in shown
    plain = at_terminal("list", NO_COLOR="1")
    assert "\x1b[3" not in plain
    assert "\x1b" not in at_terminal("show", "last", NO_COLOR="1")
    assert "\x1b[31m" in at_terminal("show", "last")


def test_a_terminal_gets_hints(daemon: FakeDaemon) -> None:
    assert "follow it: taskd logs -f" in at_terminal("submit", "--", "true")
    assert "follow it" not in at_terminal("submit", "-q", "--", "true")
    assert "these are the newest" not in at_terminal("list")


def test_a_wait_for_many_shows_its_progress(daemon: FakeDaemon, taskd: Taskd) -> None:
    for word in ("true", "true", "true"):
        taskd("submit", "--", word)
    shown = at_terminal("wait", "--state", "finished")
    assert "3/3" in shown
    assert "3 of 3 tasks succeeded" in shown


# -- Completion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shell", "mark"), [("bash", "complete -o nosort"), ("zsh", "#compdef taskd"), ("fish", "complete --no-files")]
)
def test_completion_scripts(taskd: Taskd, shell: str, mark: str) -> None:
    ran = taskd("completion", shell)
    assert ran.code == 0
    assert mark in ran.out
    assert "_TASKD_COMPLETE" in ran.out


def completed(start: Start, monkeypatch: pytest.MonkeyPatch, words: str) -> list[str]:
    monkeypatch.setenv("_TASKD_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    out, _ = start().communicate(timeout=20)
    return [line.partition(",")[2] for line in out.decode().split()]


def test_completion_knows_commands_tasks_nodes_and_states(
    start: Start, daemon: FakeDaemon, taskd: Taskd, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = taskd("submit", "--", "true").out.strip()
    assert completed(start, monkeypatch, "taskd su") == ["submit"]
    assert completed(start, monkeypatch, "taskd show ") == ["last", task_id[-8:]]
    assert completed(start, monkeypatch, "taskd node drain a") == ["arm"]
    assert completed(start, monkeypatch, "taskd list --state fa") == ["failed"]
    monkeypatch.setenv("TASKD_SOCKET", "/nowhere")
    assert completed(start, monkeypatch, "taskd show ") == []


# -- Speed -------------------------------------------------------------------------------------------------------------


def test_submit_loads_little(daemon: FakeDaemon) -> None:
    code = (
        # What an editable installation loads at the interpreter's start is not ours.
        "import sys; before = set(sys.modules)\n"
        "from taskd.cli.main import run; assert run(['submit', '--', 'true']) == 0\n"
        "heavy = {'asyncio', 'aiohttp', 'http.client', 'ssl', 'msgspec', 'rich', 'pathlib', 'subprocess',\n"
        "         'urllib.parse', 'tempfile', 'logging', 'taskd.values', 'taskd.config', 'taskd.core', 'taskd.api'}\n"
        "sys.exit(', '.join(sorted(heavy & (set(sys.modules) - before))) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
