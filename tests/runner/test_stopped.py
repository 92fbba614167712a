"""Tasks stop, or end, whatever the launcher has of their user: it never waits for that without a bound, and goes on."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from taskd.core.task import Outcome
from taskd.daemon.launcher import end_on_signals
from taskd.runner import remover
from taskd.runner.reaper import Reaper
from taskd.runner.remover import Remover
from taskd.runner.user_spawner import WatchedStart
from tests.runner.launch_stage import LaunchStage, needs_root, open_directory, user
from tests.runner.stage import is_there, until

pytestmark = needs_root
PYTHON = "/usr/bin/python3"
# Signals to each child of the launcher that it may send them to, again and again; not to others of this user.
ATTACK = """
import os, sys
launcher, number = map(int, sys.argv[1:])
print("begun", flush=True)
while True:
    with open(f"/proc/{launcher}/task/{launcher}/children") as file:
        for pid in map(int, file.read().split()):
            if pid not in (os.getpid(), os.getppid()):
                try:
                    os.kill(pid, number)
                except OSError:
                    pass
"""


def _stop_here() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_start_that_is_stopped_before_its_program_is_killed() -> None:
    process = WatchedStart(["/bin/true"], preexec_fn=_stop_here)
    assert process.trouble == "it was stopped before it was its program"
    assert process.wait() == -signal.SIGKILL
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_start_that_takes_for_ever_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskd.runner.user_spawner.ANSWER_S_MAX", 0.0)
    process = WatchedStart(["/bin/true"], preexec_fn=signal.pause)
    assert process.trouble == "it was not its program after 0 s"
    assert process.wait() == -signal.SIGKILL


def test_a_start_that_goes_well_or_fails_is_as_ever() -> None:
    process = WatchedStart(["/bin/sh", "-c", "exit 3"])
    assert (process.trouble, process.wait()) == ("", 3)
    with pytest.raises(FileNotFoundError):
        WatchedStart(["/no/such/program"])


async def test_a_signal_to_a_new_process_is_not_taken_for_one_to_the_launcher() -> None:
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    ended = asyncio.Event()
    try:
        end_on_signals(ended.set)
        WatchedStart(["/bin/true"], preexec_fn=lambda: os.kill(os.getpid(), signal.SIGTERM)).wait()
        for _ in range(3):  # Turns of the loop, in which it would hear.
            await asyncio.sleep(0)
        assert not ended.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        await ended.wait()
    finally:
        for number, handler in before:
            signal.signal(number, handler)


# -- Who removes what tasks left ---------------------------------------------------------------------------------------


class Trash:
    """A directory of the task user's, and who removes what is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(mode=0o700)
        os.chown(path, user().uid, user().gid)
        self.reaper = Reaper("0" * 32, uid=user().uid)
        self.remover = Remover(str(path), user(), self.reaper)

    def put(self, name: str) -> None:
        (self.path / name).mkdir()
        os.chown(self.path / name, user().uid, user().gid)

    def is_empty(self) -> bool:
        return not any(self.path.iterdir())

    @property
    def pid(self) -> int:
        assert self.remover._running is not None
        return self.remover._running[0]


@pytest.fixture
def trash() -> Iterator[Trash]:
    with open_directory() as directory:
        yield Trash(directory / "trash")


def _stopped(_: str) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


async def test_what_was_put_there_while_it_is_emptied_is_removed_too(trash: Trash) -> None:
    trash.put("1")
    trash.remover.empty_trash()
    os.kill(trash.pid, signal.SIGSTOP)
    trash.put("2")
    trash.remover.empty_trash()
    os.kill(trash.pid, signal.SIGCONT)
    await until(trash.is_empty)
    trash.remover.close()
    assert trash.is_empty()


async def test_a_stopped_remover_is_killed_while_nobody_waits(trash: Trash, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remover, "WATCH_S", 0.01)
    monkeypatch.setattr(remover, "remove_contents", _stopped)
    trash.put("1")
    trash.remover.empty_trash()
    pid = trash.pid
    await until(lambda: not is_there(pid))
    monkeypatch.undo()
    trash.remover.empty_trash()
    await until(trash.is_empty)
    trash.remover.close()


async def test_a_stopped_remover_is_not_waited_for_at_the_end(trash: Trash, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remover, "remove_contents", _stopped)
    trash.put("1")
    trash.remover.empty_trash()
    pid = trash.pid
    trash.remover.close()
    assert not is_there(pid)
    assert trash.is_empty(), "another one has removed it"


def test_one_that_takes_for_ever_is_not_waited_for(trash: Trash, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remover, "WAIT_S_MAX", 0.0)
    monkeypatch.setattr(remover, "remove_tree", lambda _: signal.pause())
    trash.put("1")
    trash.remover.close()
    assert not trash.is_empty()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


# -- All of it ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL])
async def test_whoever_signals_all_of_its_user_does_not_hold_up_the_launcher(number: signal.Signals) -> None:
    with open_directory() as directory:
        async with LaunchStage(directory) as stage:
            launcher = stage.launcher_pid
            attack = stage.start(PYTHON, "-c", ATTACK, str(launcher), str(int(number)))
            follower = stage.follow(attack)
            assert await follower.line() == "begun"
            for _ in range(20):
                key = stage.start(shell="mkdir left; exec sleep 1000")
                stage.kind.kill(key)
                told: Any = await stage.end_of(key)
                assert told.outcome in (Outcome.SIGNAL, Outcome.LOST, Outcome.OK)
            stage.kind.kill(attack)
            assert (await stage.end_of(attack)).outcome is Outcome.SIGNAL
            await follower.close()
            assert (await stage.run("true")).outcome is Outcome.OK
            assert stage.launcher_pid == launcher, "it is the same"
        await until(lambda: not list((directory / "tasks").rglob("*")))
