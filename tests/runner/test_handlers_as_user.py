"""Handlers as another user: their processes are the launcher's, and their calls go on as ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import AsyncIterator, Iterator

import pytest

from taskd.core.task import Outcome
from tests.runner.handler_stage import MODULES, HandlerStage
from tests.runner.launch_stage import USER, LaunchStage, needs_root, open_directory, user
from tests.runner.stage import until

pytestmark = needs_root
SYSTEM_PYTHON = "/usr/bin/python3"


def _can_run(python: str) -> bool:
    """Whether the task user can run this Python, with taskd."""
    code = f"import sys; sys.path.append({str(MODULES.parents[2])!r}); import taskd.runner.reaper"
    who = user()
    try:
        done = subprocess.run(
            [python, "-P", "-c", code], user=who.uid, group=who.gid, extra_groups=[], capture_output=True, cwd="/",
            check=False,
        )  # fmt: skip
    except PermissionError:
        return False
    return done.returncode == 0


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One that every user may run: often the one of a checkout is somebody's own."""
    if _can_run(sys.executable):
        yield
        return
    with open_directory() as directory:
        made = subprocess.run(
            [SYSTEM_PYTHON, "-m", "venv", "--without-pip", directory / "venv"], capture_output=True, check=False
        )
        wanted = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = directory / "venv" / "lib" / wanted / "site-packages"
        if made.returncode != 0 or not packages.is_dir():
            pytest.skip(f"user {USER} can run neither {sys.executable} nor another {wanted}")
        (packages / "ours.pth").write_text(f"{sysconfig.get_path('purelib')}\n{MODULES.parents[2]}\n")
        directory.chmod(0o755)
        if not _can_run(str(directory / "venv/bin/python")):
            pytest.skip(f"user {USER} cannot read taskd's own files")
        monkeypatch.setattr(sys, "executable", str(directory / "venv/bin/python"))
        yield


@pytest.fixture
async def stage(python: None) -> AsyncIterator[HandlerStage]:
    with open_directory() as directory:
        async with LaunchStage(directory) as launch:
            # Its reaper is not opened: there is one in a process, and the launcher is that one's.
            stage = HandlerStage(directory, launches=launch.launches)
            await stage.pool.open()
            await stage.until_whole()
            yield stage
            await stage.pool.close()


async def test_calls_run_as_the_user_in_a_directory_of_its_own(stage: HandlerStage) -> None:
    assert await stage.result("add", left=2, right=3) == 5
    facts = await stage.result("identity")
    assert (facts["uid"], facts["gid"]) == (user().uid, user().gid)
    assert facts["capabilities"] == 0
    assert facts["directory"] == facts["temporary"]
    assert facts["mode"] == 0o700


async def test_a_process_that_ends_costs_one_call_and_is_replaced(stage: HandlerStage) -> None:
    facts = await stage.result("identity")
    end = await stage.run("vanish", how="kill")
    assert (end.outcome, end.report.signal) == (Outcome.SIGNAL, signal.SIGKILL)
    await stage.until_whole()
    assert (await stage.result("identity"))["pid"] != facts["pid"]
    await until(lambda: not os.path.exists(facts["directory"]))


async def test_a_call_is_killed_with_all_that_it_started(stage: HandlerStage) -> None:
    key = stage.start("spin")
    await stage.start_of(key)
    stage.pool.kill(key)
    assert (await stage.end_of(key)).outcome is Outcome.SIGNAL
    await stage.until_whole()
    assert await stage.result("add", left=1) == 2
