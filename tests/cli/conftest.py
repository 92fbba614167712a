"""A daemon, and the command line to talk to it: in this process, and as a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from taskd.cli import main
from tests.client.fake_daemon import FakeDaemon

ROOT = Path(__file__).parents[2]


class Ran(NamedTuple):
    """What a command line left behind."""

    code: int
    out: str
    err: str


Taskd = Callable[..., Ran]


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    monkeypatch.setenv("TASKD_SOCKET", str(tmp_path / "taskd.sock"))
    with FakeDaemon(tmp_path / "taskd.sock") as daemon:
        yield daemon


@pytest.fixture
def taskd(capsys: pytest.CaptureFixture[str]) -> Taskd:
    """Runs a command line in this process."""

    def run(*args: str) -> Ran:
        capsys.readouterr()
        code = main.run(list(args))
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a command line as a process; ends it with the test."""
    started = []
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    # A test run in the background ignores Ctrl-C; its children must not inherit that.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(*args: str, **options: object) -> subprocess.Popen[bytes]:
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
        process = subprocess.Popen([sys.executable, "-m", "taskd", *args], **settings)  # type: ignore[call-overload]
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()
    signal.signal(signal.SIGINT, ignored)


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TASKD_DEBUG", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
