"""What may be tried by the arguments of `taskd`, and by what others have put into the tasks that it shows. Each row:
the arguments, the exit code, and what the answer has to say; never a traceback, never a control character."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cluster import LOOPBACK, Daemon
from tests.runner.launch_stage import open_directory

WELL, FAILED, WRONG, NO_DAEMON = 0, 1, 2, 3
ESCAPE = "\x1b]0;owned\x07\x1b[2J"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

ROWS: dict[str, tuple[list[str], int, str]] = {
    "no command": (["submit"], WRONG, ""),
    "an empty program": (["submit", "--", ""], WRONG, "empty"),
    "command and shell": (["submit", "--shell", "true", "--", "true"], WRONG, ""),
    "an option that there is not": (["submit", "--owner", "root", "--", "true"], WRONG, "No such option"),
    "an option of another command": (["list", "--shell", "true"], WRONG, "No such option"),
    "a command that there is not": (["rm", "-rf", "/"], WRONG, "there is no command"),
    "a control character in a name": (["submit", "--name", f"a{ESCAPE}", "--", "true"], WRONG, "printable"),
    "a line break in a queue": (["submit", "--queue", "a\nb", "--", "true"], WRONG, "printable"),
    "a priority that is a word": (["submit", "--priority", "high", "--", "true"], WRONG, "high"),
    "a priority beyond all": (["submit", "--priority", "9" * 40, "--", "true"], WRONG, ""),
    "retries below nothing": (["submit", "--retries", "-1", "--", "true"], WRONG, "-1"),
    "a time-out of parsecs": (["submit", "--timeout", "7 parsecs", "--", "true"], WRONG, "parsecs"),
    "a time-out without an end": (["submit", "--timeout", "inf", "--", "true"], WRONG, "inf"),
    "memory below nothing": (["submit", "--memory", "-1GiB", "--", "true"], WRONG, ""),
    "memory beyond all": (["submit", "--memory", "9" * 30, "--", "true"], WRONG, ""),
    "cpus that are no number": (["submit", "--cpus", "nan", "--", "true"], WRONG, ""),
    "a constraint that is code": (["submit", "--constraint", "__import__('os')", "--", "true"], WRONG, "constraint"),
    "a variable without a name": (["submit", "-e", "=x", "--", "true"], WRONG, ""),
    "a label without a name": (["submit", "-l", "=x", "--", "true"], WRONG, ""),
    "a directory that is relative, which is taken from here": (["submit", "--cwd", "../..", "--", "true"], WELL, ""),
    "params that are no JSON": (["submit", "--type", "x", "--params", "{"], WRONG, ""),
    "params of a file that is a directory": (["submit", "--type", "x", "--params", "@/"], WRONG, ""),
    "params of a file that there is not": (["submit", "--type", "x", "--params", "@/nowhere"], WRONG, "nowhere"),
    "a url that is a file": (["submit", "--http", "file:///etc/shadow"], WRONG, ""),
    "a header with a line break": (["submit", "--http", "http://x/", "--http-header", "a=b\r\nc: d"], WRONG, ""),
    "a list of tasks that is a device": (["submit", "--from-json", "/dev/null"], WRONG, ""),
    "a backup instead of a list": (["submit", "--from-json", sys.executable], WRONG, "not UTF-8"),
    "an id that is a path": (["show", "../../etc/passwd"], WRONG, "names no task"),
    "an id that is a wildcard": (["cancel", "*"], WRONG, "names no task"),
    "an id that is an option": (["show", "--", "--help"], WRONG, "names no task"),
    "an id of 10,000 characters": (["logs", "a" * 10_000], WRONG, ""),
    "a node that there is not": (["node", "drain", "nowhere"], FAILED, "nowhere"),
    "a state that there is not": (["list", "--state", "sleeping"], WRONG, "sleeping"),
    "a socket that is a file": (["list", "--socket", "/etc/passwd"], NO_DAEMON, ""),
    "a socket that is a directory": (["list", "--socket", "/"], NO_DAEMON, ""),
    "a socket of 1,000 characters": (["list", "--socket", "/" + "a" * 1000], FAILED, "at most 107"),
    "a configuration that is a device": (["config", "check", "/dev/zero"], FAILED, ""),
    "a role that there is not": (["start", "--role", "king"], WRONG, "king"),
    "a key that is none": (["key", "import", "/etc/hostname"], WRONG, ""),
}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with open_directory() as directory:
        daemon = Daemon(directory / "node", directory / "key", "scheduler,worker", env=LOOPBACK)
        daemon.start()
        try:
            yield daemon
            log = daemon.log.read_text()
            assert "request failed" not in log
            assert daemon.is_ready()
        finally:
            daemon.stop()


def taskd(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "TASKD_SOCKET": str(daemon.socket), "COLUMNS": "200", "HOME": str(daemon.home)}
    environment["XDG_CONFIG_HOME"] = str(daemon.home / "config")
    return subprocess.run(
        [sys.executable, "-m", "taskd", *arguments], env=environment, stdin=subprocess.DEVNULL, capture_output=True,
        timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_arguments(row: str, daemon: Daemon) -> None:
    arguments, code, said = ROWS[row]
    result = taskd(daemon, *arguments)
    answer = (result.stdout + result.stderr).decode()
    assert "Traceback" not in answer, answer
    assert not CONTROL.search(answer), repr(answer)
    assert (result.returncode, said in answer) == (code, True), answer


def test_what_tasks_hold_does_no_harm_to_the_terminal(daemon: Daemon) -> None:
    """Commands and outputs may hold anything; only what was asked for raw comes raw."""
    task = {"argv": ["printf", f"{ESCAPE}printed"], "labels": {"note": "x"}, "env": {"A": ESCAPE}}
    (task_id,) = daemon.submit(task)
    daemon.wait([task_id])
    failing = {"argv": [f"/no{ESCAPE}where"]}
    (failed_id,) = daemon.submit(failing)
    daemon.wait([failed_id])
    for arguments in (["list"], ["show", task_id], ["show", failed_id], ["explain", failed_id], ["list", "--json"]):
        result = taskd(daemon, *arguments)
        assert result.returncode == 0, result
        assert not CONTROL.search(result.stdout.decode()), (arguments, result.stdout)
    (line, *_) = taskd(daemon, "list", "--json").stdout.splitlines()
    assert json.loads(line), "programs get all of it, as JSON writes it"


def test_the_key_is_nobody_elses(daemon: Daemon, tmp_path: Path) -> None:
    """A key file that others can read is named, and no key is printed by what only looks."""
    key = (daemon.home.parent / "key").read_text().strip()
    for arguments in (["doctor"], ["cluster", "status"], ["node", "list"], ["config", "check"]):
        result = taskd(daemon, *arguments)
        assert key.encode() not in result.stdout + result.stderr
        assert b"Traceback" not in result.stderr
