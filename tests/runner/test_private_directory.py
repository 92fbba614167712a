"""Whether a private directory is as empty as when it was made: nothing that a task does in it is missed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from taskd.runner import private_directory
from taskd.runner.private_directory import PrivateDirectory
from tests.runner.launch_stage import LaunchStage, needs_root, open_directory
from tests.runner.stage import Stage

DIRTY = "pwd; echo bad > planted; touch -d @0 ."


def _plant(path: Path) -> None:
    (path / "planted").write_text("bad")
    os.utime(path, (0, 0))


def _plant_and_hide(path: Path) -> None:
    _plant(path)
    (path / "planted").unlink()
    os.utime(path, (0, 0))


def _open_to_all(path: Path) -> None:
    path.chmod(0o777)


def _replace(path: Path) -> None:
    path.rmdir()
    path.mkdir(0o700)


def _link(path: Path) -> None:
    path.rmdir()
    path.symlink_to("/")


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrivateDirectory:
    """One that has served an attempt, and whose time of change lies back a tick of the clock."""
    made = PrivateDirectory(str(tmp_path / "private"))
    changed_ns = os.lstat(made.path).st_ctime_ns
    while os.lstat(made.path).st_ctime_ns == changed_ns:
        os.utime(made.path)  # Until the file system's clock has moved.
    os.rmdir(made.path)
    monkeypatch.setattr(private_directory, "TICK_NS_MAX", -1)
    made = PrivateDirectory(made.path)
    assert made.is_untouched()
    now_ns = os.lstat(made.path).st_ctime_ns
    other = tmp_path / "clock"
    other.touch()
    while os.lstat(other).st_ctime_ns == now_ns:
        os.utime(other)
    return made


@pytest.mark.parametrize("touch", [_plant, _plant_and_hide, _open_to_all, _replace, _link])
def test_whatever_was_done_in_it_shows(old: PrivateDirectory, touch: Callable[[Path], None]) -> None:
    assert old.is_untouched()
    touch(Path(old.path))
    assert not old.is_untouched()


def test_what_was_left_in_it_in_the_tick_of_its_making_shows(tmp_path: Path) -> None:
    """Its time of change may be the same then."""
    made = PrivateDirectory(str(tmp_path / "private"))
    _plant(tmp_path / "private")
    made._changed_ns = os.lstat(made.path).st_ctime_ns
    assert not made.is_untouched()


def test_one_that_is_gone_is_not_untouched(old: PrivateDirectory) -> None:
    os.rmdir(old.path)
    assert not old.is_untouched()


async def test_the_next_task_finds_nothing_of_the_one_before(stage: Stage) -> None:
    for _ in range(5):
        first = await stage.run(shell=DIRTY)
        assert (await stage.run(shell="ls -A")).stdout == "", first.stdout


@needs_root
async def test_the_next_task_of_a_launcher_finds_nothing_either() -> None:
    with open_directory() as directory:
        async with LaunchStage(directory) as stage:
            for _ in range(5):
                await stage.run(shell=DIRTY)
                assert (await stage.run(shell="ls -A")).stdout == ""


async def test_an_untouched_one_serves_again(stage: Stage) -> None:
    first = await stage.run("pwd")
    inode = os.stat(first.stdout.strip()).st_ino
    for _ in range(3):
        assert (await stage.run("stat", "-c", "%i", ".")).stdout == f"{inode}\n"
