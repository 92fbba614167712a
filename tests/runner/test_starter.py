"""The process that starts tasks of another user quickly: it has no rights, and nothing depends on its life."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from taskd.core.task import Outcome
from taskd.runner.command import CommandKind
from taskd.runner.reaper import STARTER_NAME, Reaper
from taskd.runner.spawn import Spawner, StartUnknown
from taskd.runner.starter import Starter
from tests.runner.launch_stage import LaunchStage, needs_root, open_directory, user
from tests.runner.stage import Stage, is_there, until

pytestmark = needs_root


@pytest.fixture
async def stage() -> AsyncIterator[LaunchStage]:
    with open_directory() as directory:
        async with LaunchStage(directory) as stage:
            yield stage


@pytest.fixture
def null_fd() -> Iterator[int]:
    descriptor = os.open(os.devnull, os.O_RDWR)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def starter(null_fd: int) -> Iterator[Starter]:
    starter = Starter(user(), null_fd, 500)
    yield starter
    starter.end()
    assert not is_there(starter.pid)


def _start(starter: Starter, null_fd: int, script: str) -> int:
    return starter.start(["/bin/sh", "-c", script], "/", {}, (null_fd, null_fd))


def _wait_for_end(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        assert select.select([pidfd], [], [], 20)[0]
    finally:
        os.close(pidfd)


def _starters_of(launcher: int) -> list[int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = []
    for pid in children:
        with suppress(FileNotFoundError, ProcessLookupError):  # It has ended since: an idle starter does so by itself.
            if Path(f"/proc/{pid}/comm").read_text().strip() == STARTER_NAME:
                found.append(int(pid))
    return found


def test_it_is_the_user_for_good_and_nobody_looks_into_it(starter: Starter, null_fd: int) -> None:
    pid = _start(starter, null_fd, f"! cat /proc/{starter.pid}/environ /proc/{starter.pid}/mem 2> /dev/null")
    status = Path(f"/proc/{starter.pid}/status").read_text().splitlines()
    facts = dict(line.split(":\t", 1) for line in status)
    who = user()
    assert facts["Uid"].split() == [str(who.uid)] * 4
    assert facts["Gid"].split() == [str(who.gid)] * 4
    assert {int(group) for group in facts["Groups"].split()} == set(who.groups)
    assert all(int(facts[name], 16) == 0 for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"))
    assert len(os.listdir(f"/proc/{starter.pid}/fd")) == 5, "the standard files, /dev/null, and us"
    (end,) = starter.reap([pid])
    assert end is not None
    assert end.status == 0, "it could not be read"


def test_what_cannot_be_started_is_told_as_ever(starter: Starter, null_fd: int) -> None:
    for argv, directory, expected in (
        (["no-such-program"], "/", FileNotFoundError),
        (["true"], "/no-such-directory", FileNotFoundError),
        (["true"], "/root", PermissionError),
        (["/etc/passwd"], "/", PermissionError),
        (["a\0b"], "/", ValueError),
        (["true", "x" * (4 << 20)], "/", OSError),
    ):
        with pytest.raises(expected) as raised:
            starter.start(argv, directory, {"PATH": "/usr/bin:/bin"}, (null_fd, null_fd))
        if directory != "/":
            assert raised.value.filename == directory  # type: ignore[attr-defined]


def test_ends_are_kept_until_they_are_asked_for(starter: Starter, null_fd: int) -> None:
    pids = []
    for script in ("exit 3", "kill -9 $$"):
        pids.append(_start(starter, null_fd, script))
        _wait_for_end(pids[-1])
    assert [end.status for end in starter.reap(pids) if end is not None] == [3, -signal.SIGKILL]


@pytest.mark.parametrize(
    ("number", "why"), [(signal.SIGSTOP, "it was stopped"), (signal.SIGKILL, "ended|killed|Broken pipe|reset")]
)
def test_one_that_is_stopped_or_killed_is_not_waited_for(
    starter: Starter, null_fd: int, number: signal.Signals, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskd.runner.starter.IDLE_S", 1000.0)
    starter.reap([_start(starter, null_fd, "exit 0")])
    assert not starter.is_due()
    os.kill(starter.pid, number)
    os.waitid(os.P_PID, starter.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
    assert starter.is_due()
    with pytest.raises(StartUnknown, match=why):
        _start(starter, null_fd, "exit 0")


def _touch(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))


async def test_tasks_go_on_when_their_starter_is_killed(stage: LaunchStage) -> None:
    keys = [stage.start(shell=f"echo $$; while ! [ -e go ]; do sleep 0.01; done; exit {code}") for code in (0, 7)]
    followers = [stage.follow(key) for key in keys]
    pids = [int(await follower.line()) for follower in followers]
    for starter in _starters_of(stage.launcher_pid):
        with suppress(ProcessLookupError):
            os.kill(starter, signal.SIGKILL)
    await until(lambda: not _starters_of(stage.launcher_pid))
    assert (await stage.run(shell="exit 5")).report.exit_code == 5
    for pid in pids:
        _touch(f"/proc/{pid}/cwd/go")
    assert [(await stage.end_of(key)).report.exit_code for key in keys] == [0, 7]
    for follower in followers:
        await follower.close()


async def test_none_stays_when_nothing_is_started(stage: LaunchStage) -> None:
    key = stage.start(shell="echo; sleep 1000")
    follower = stage.follow(key)
    await follower.line()
    await until(lambda: not _starters_of(stage.launcher_pid))
    stage.kind.terminate(key)
    assert (await stage.end_of(key)).report.signal == signal.SIGTERM
    await follower.close()


async def test_whose_starter_has_just_died_is_no_stray() -> None:
    reaper = Reaper("0" * 32)
    await reaper.open()
    process = subprocess.Popen(["true"], start_new_session=True)  # noqa: ASYNC220  # only started here
    reaper.own(process.pid, is_child=False)
    _wait_for_end(process.pid)
    assert not reaper.strays()
    assert os.waitpid(process.pid, 0) == (process.pid, 0), "its end is still to be had"  # noqa: ASYNC222  # a zombie
    process.returncode = 0
    reaper.disown(process.pid)
    await reaper.close()


class _Doubtful(Spawner):
    """Is lost each time, when it has started a process and nobody has heard of it."""

    pids: list[int] = []  # noqa: RUF012  # of the one instance

    def spawn(self, *arguments: Any) -> int:
        self.pids.append(super().spawn(*arguments))
        raise StartUnknown("it was killed")


async def test_nothing_is_left_of_a_start_in_doubt(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.kind = CommandKind(stage.place, stage.on_progress, stage.output, stage.reaper, spawner=_Doubtful)
    async with stage:
        end = await stage.run(shell="setsid sleep 1000 & sleep 1000")
        assert (end.outcome, end.error.type) == (Outcome.LOST, "StarterLost")
        assert _Doubtful.pids
        assert not any(map(is_there, _Doubtful.pids))
        assert not stage.reaper.strays()
