"""What a file of settings may hold. Each row: its content, and what `taskd config check` says of it, on one line for
each thing that is wrong, with an exit code and never with a traceback. Some rows are right, and stay so."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from taskd.cli import main

FINE = "is fine"
TOML = "is not valid TOML"
MEMORY_BYTES_MAX = 1 << 30

ROWS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", FINE),
    "what is right": (b'[node]\nname = "a"\n', FINE),
    # What is no TOML.
    "words": (b"hello there", TOML),
    "binary": (bytes(range(256)), TOML),
    "a NUL": (b'[node]\nname = "a\0b"', TOML),
    "Latin-1": (b'[node]\nname = "\xe4"', TOML),
    "UTF-16": ('[node]\nname = "a"'.encode("utf-16"), TOML),
    "a section twice": (b"[node]\n[node]", TOML),
    "a key twice": (b'[node]\nname = "a"\nname = "b"', TOML),
    "100,000 brackets": (b"[node]\nname = " + b"[" * 100_000, TOML),
    "5,000 tables in each other": (b"[node]\nname = " + b"{a = " * 5000, TOML),
    "a key of 100,000 parts, which would take 40 GB": (b"a." * 100_000 + b"b = 1", "more than 2000 dots"),
    "a number of 5,000 digits": (b"[scheduler]\nqueued_max = " + b"9" * 5000, TOML),
    "30 MB of a comment": (b"#" + b"x" * (30 << 20), "more than 1048576 bytes"),
    # What is not ours.
    "an unknown section": (b'[nodes]\nname = "a"', "[nodes]: there is no such section; did you mean node?"),
    "an unknown key": (b'[node]\nnaem = "a"', "[node] naem: there is no such key; did you mean name?"),
    "a key without its section": (b'name = "a"', "write it below [node]"),
    "a key in another section": (b"[worker]\nheartbeat_s = 1", "it belongs in [network]"),
    "a value for a section": (b"node = 1", "node must be a section"),
    "a section's name that moves the cursor": (b'["\\u001b[2J"]\na = 1', "\\x1b[2J"),
    # Types and bounds.
    "a number for a text": (b"[node]\nname = 1", "[node] name = 1: must be up to 63 letters"),
    "a list for a text": (b'[node]\nname = ["a"]', 'name = ["a"]: must be'),
    "a text for a list": (b'[network]\njoin = "a"', "must be a list"),
    "a truth for a number": (b"[network]\nheartbeat_s = true", "must be a number of seconds"),
    "a date for a number": (b"[network]\nheartbeat_s = 2026-01-01", "must be a number of seconds"),
    "a broken number for a whole one": (b"[scheduler]\nqueued_max = 1.5", "must be a whole number"),
    "less than nothing": (b"[scheduler]\nqueued_max = -1", "must be a whole number from 1"),
    "no number": (b"[network]\nheartbeat_s = nan", "must be a number of seconds"),
    "an endless number": (b"[network]\npeer_timeout_s = inf", "must be a number of seconds"),
    "a size in words": (b'[worker]\nmemory = "lots"', "must be a size"),
    "ten thousand years": (b'[scheduler]\nfinished_age_max = "520000w"', "must be a duration"),
    "a line break in a name": (b'[node]\nname = "a\\nb"', "must be up to 63 letters"),
    "a name that moves the cursor": (b'[node]\nname = "\\u001b[2J"', "must be up to 63 letters"),
    # Paths, addresses, and what gets near a shell.
    "a path from here": (b'[node]\nstate_dir = "../../etc"', "must be an absolute path"),
    "a path with a NUL": (b'[node]\nstate_dir = "/tmp/a\\u0000b"', "must be an absolute path"),
    "a path of 10,000 characters": (b'[node]\nstate_dir = "/' + b"a" * 10_000 + b'"', "must be an absolute path"),
    "a port beyond all": (b'[network]\nlisten = ["127.0.0.1:99999"]', "'127.0.0.1:99999' is wrong"),
    "a URL for an address": (b'[network]\njoin = ["http://a"]', "'http://a' is wrong"),
    "a thousand addresses": (
        b"[network]\njoin = [" + b",".join(b'"a%d"' % number for number in range(1000)) + b"]",
        "at most 256",
    ),
    "a mode that keeps the owner out": (b'[api]\nsocket_mode = "0066"', "must be octal permissions"),
    "a mode as a number": (b"[api]\nsocket_mode = 432", "must be octal permissions"),
    "a user with a command": (b'[worker]\ntask_user = "root; rm -r /"', "must be the name of a user"),
    "a module with a statement": (b'[worker]\nhandlers = ["os; import x"]', "must be a list"),
    "a module that is a path": (b'[worker]\nhandlers = ["../evil"]', "must be a list"),
    "a variable of the loader": (b'[worker]\nenvironment = ["LD_PRELOAD"]', "'LD_PRELOAD' is wrong"),
    "all variables": (b'[worker]\nenvironment = ["*"]', "'*' is wrong"),
    "cpus in another place": (b"[worker.resources]\ncpus = 1", "cpus is a setting of its own"),
    "less than no tape drive": (b"[worker.resources]\ntape = -1", "'tape' is wrong"),
    # What does not go together.
    "a time-out below the heartbeat": (b"[network]\nheartbeat_s = 5\npeer_timeout_s = 1", "at least twice"),
    "a certificate without its key": (b'[api]\ncertificate = "/a"', "name both the certificate and its key"),
    # A key does not belong here, and is not shown.
    "a cluster key": (b'[node]\nid = "taskd-scheduler-key-v1:abcdef"', "id = (a key): must be"),
}

Checked = Callable[[Path], tuple[int, str]]


@pytest.fixture
def checked(capsys: pytest.CaptureFixture[str]) -> Checked:
    """Checks a file in this process: the exit code and all that was printed."""

    def check(path: Path) -> tuple[int, str]:
        code = main.run(["config", "check", str(path)])
        out, err = capsys.readouterr()
        return code, out + err

    return check


@pytest.fixture(autouse=True)
def _bounded() -> object:
    """Memory that runs away ends the test, and not the machine."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (4 * MEMORY_BYTES_MAX, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.mark.parametrize("row", ROWS)
def test_what_is_said_of_it(row: str, tmp_path: Path, checked: Checked) -> None:
    content, says = ROWS[row]
    path = tmp_path / "taskd.toml"
    path.write_bytes(content)
    code, text = checked(path)
    assert says in text
    assert code == (0 if says == FINE else 1)
    assert "a bug" not in text
    assert "\x1b" not in text
    assert len(text) < 1000
    assert says == FINE or str(path) in text


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "there is no such file"),
        (lambda path: path.mkdir(), "cannot be read: Is a directory"),
        (lambda path: path.symlink_to(path), "cannot be read: Too many levels"),
        (lambda path: path.symlink_to("/dev/zero"), "more than 1048576 bytes"),
        (lambda path: path.symlink_to("/dev/null"), FINE),
        (lambda path: path.symlink_to("nowhere"), "there is no such file"),
    ],
    ids=["none", "a directory", "a link to itself", "endless zeros", "nothing", "a link to nowhere"],
)
def test_what_is_no_file(make: Callable[[Path], object], says: str, tmp_path: Path, checked: Checked) -> None:
    path = tmp_path / "taskd.toml"
    make(path)
    code, text = checked(path)
    if code == 2:  # The command line looked before.
        assert "directory" in text
        return
    assert says in text
    assert code == (0 if says == FINE else 1)


def test_a_daemon_does_not_begin_with_it(tmp_path: Path) -> None:
    path = tmp_path / "taskd.toml"
    path.write_bytes(ROWS["a key of 100,000 parts, which would take 40 GB"][0] + b"\n[node]\nnaem = 1")
    started = subprocess.run(
        [sys.executable, "-m", "taskd", "start", "--role", "worker", "--config", str(path)],
        env={**os.environ, "TASKD_NODE_STATE_DIR": str(tmp_path / "state")}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert started.returncode == 2  # Which a service manager is told not to try again.
    assert started.stderr.startswith(f"taskd: {path}: is no configuration")
    assert not (tmp_path / "state").exists()


def test_the_table_is_long_enough() -> None:
    assert len(ROWS) >= 25
