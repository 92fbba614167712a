"""Limits in a real cgroup v2, as root of a machine of our own: memory, processes, cpus, and the end of whole trees; for
tasks that the worker starts itself, and for those of the launcher."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from taskd.core.task import Outcome
from taskd.runner.cgroup import Cgroups, delegated
from tests.runner.launch_stage import LaunchStage, open_directory, user
from tests.runner.stage import Stage, is_there, until

ROOT = Path("/sys/fs/cgroup")
OURS = ROOT / "taskd.service"
MIB = 1 << 20
GROW = "x = bytearray({bytes}); print(len(x), flush=True)"
FORK = """
import os, time
count = 0
try:
    while count < 100:
        if os.fork() == 0:
            time.sleep(1000)
        count += 1
except BlockingIOError:
    print(count, flush=True)
"""


def enter(name: str) -> None:
    """Have this process in a group of this name that is delegated to us, as a service manager does it."""
    (ROOT / "cgroup.subtree_control").write_text("+cpu +memory +pids")
    group = ROOT / name
    group.mkdir(exist_ok=True)
    os.setxattr(group, "trusted.delegate", b"1")
    (group / "cgroup.procs").write_text(str(os.getpid()))


@pytest.fixture(scope="module")
def cgroups() -> Cgroups:
    found = delegated()
    assert isinstance(found, Cgroups), found
    assert found.controllers == {"cpu", "memory", "pids"}
    return found


@pytest.fixture(params=["direct", "launcher"])
async def stage(request: pytest.FixtureRequest, cgroups: Cgroups) -> AsyncIterator[Stage]:
    with open_directory() as directory:
        if request.param == "direct":
            async with Stage(directory, cgroups=cgroups) as stage:
                yield stage
        else:
            async with LaunchStage(directory) as stage:
                yield stage
        assert not list(ROOT.glob("*/attempt-*")), "groups go with their attempts"  # noqa: ASYNC240  # a look


async def test_memory_beyond_the_limit_ends_the_task_as_out_of_memory(stage: Stage) -> None:
    limit = 64 * MIB
    ended = await stage.run(
        "/bin/sh", "-c", f'sleep 1000 & {sys.executable} -c "{GROW.format(bytes=4 * limit)}"; echo survived',
        resources={"memory": limit * 1000},
    )  # fmt: skip
    assert ended.outcome is Outcome.OOM, ended.report
    assert "survived" not in ended.stdout, "all of the task is ended, the shell too"
    assert limit * 0.8 < ended.report.memory_peak_bytes <= limit
    within = await stage.run(sys.executable, "-c", GROW.format(bytes=limit // 4), resources={"memory": limit * 1000})
    assert (within.outcome, within.stdout) == (Outcome.OK, f"{limit // 4}\n"), within.report
    assert within.report.memory_peak_bytes > limit // 4


async def test_another_end_is_not_taken_for_want_of_memory(stage: Stage) -> None:
    killed = await stage.run("/bin/sh", "-c", "kill -9 $$", resources={"memory": 64 * MIB * 1000})
    assert (killed.outcome, killed.report.signal) == (Outcome.SIGNAL, signal.SIGKILL)
    failed = await stage.run("/bin/sh", "-c", "exit 3", resources={"memory": 64 * MIB * 1000})
    assert failed.outcome is Outcome.EXIT_NONZERO


async def test_a_limit_of_processes_holds_a_bomb(stage: Stage) -> None:
    ended = await stage.run(sys.executable, "-c", FORK, resources={"pids": 8_000})
    assert (ended.outcome, ended.stdout) == (Outcome.OK, "7\n"), ended.report
    assert (await stage.run("/bin/true", resources={"pids": 8_000})).outcome is Outcome.OK


async def test_a_quota_of_cpus_holds_a_loop(stage: Stage) -> None:
    # By the processor's time: half of one and two loops; what they have used says how long they were held back.
    script = "import time\nend = time.monotonic() + 3\nwhile time.monotonic() < end: pass"
    began = time.monotonic()
    ended = await stage.run(
        "/bin/sh", "-c", f"{sys.executable} -c '{script}' & {sys.executable} -c '{script}'; wait",
        resources={"cpus": 500},
    )  # fmt: skip
    took_s = time.monotonic() - began
    assert ended.outcome is Outcome.OK, ended.report
    assert 0 < ended.report.cpu_s < 0.75 * took_s


async def test_nothing_of_a_tree_gets_away(stage: Stage) -> None:
    # No mark in the environment, a session of its own, and deaf to everything that can be heard.
    stray = "env -i /bin/setsid /bin/sh -c \"trap '' TERM HUP INT; echo $$ > pid; while :; do sleep 1000; done\""
    key = stage.start("/bin/sh", "-c", f"{stray} & while [ ! -s pid ]; do sleep 0.01; done; cat pid; sleep 1000",
                      resources={"cpus": 1000})  # fmt: skip
    follower = stage.follow(key)
    pid = int(await follower.line())
    assert is_there(pid)
    stage.kind.kill(key)
    assert (await stage.end_of(key)).outcome is Outcome.SIGNAL
    await until(lambda: not is_there(pid))
    await follower.close()


async def test_a_limited_task_of_the_launcher_is_the_user_in_its_group(stage: Stage) -> None:
    script = "id -u; cat /proc/self/cgroup; grep CapEff /proc/self/status"
    ended = await stage.run("/bin/sh", "-c", script, resources={"memory": 64 * MIB * 1000})
    uid, group, capabilities = ended.stdout.splitlines()
    assert "/attempt-" in group
    if isinstance(stage, LaunchStage):
        assert uid == str(user().uid)
        assert int(capabilities.split()[1], 16) == 0


def main() -> None:
    """Run the tests in a delegated group; ends the process with pytest's exit code."""
    enter(OURS.name)
    arguments = ["-q", "-c", "/dev/null", "--rootdir", "/taskd", "-o", "asyncio_mode=auto", "-p", "no:cacheprovider"]
    arguments += ["--tb=short", "--durations=5"]
    sys.exit(pytest.main([*arguments, "--import-mode=importlib", "-W", "ignore", __file__]))
