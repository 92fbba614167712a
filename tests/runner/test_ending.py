"""How attempts are ended, and that nothing they started outlives them."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from pathlib import Path

import pytest

from taskd.core.effects import Begin
from taskd.core.task import Outcome, TaskSpec
from taskd.runner import reaper
from taskd.runner.limits import OomCounter
from taskd.runner.reaper import Reaper
from tests.runner.stage import Follower, Stage, child, is_there, new_key, own_children, until

# Prints the process ids of a child in its group, of a child in a group of its own, and of a daemon that forked twice
# and made its own session; all ignore TERM. Then it says that it is ready, and goes on as the test adds.
FAMILY = r"""
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleeper = [sys.executable, "-c", "import time; time.sleep(1000)"]
print(subprocess.Popen(sleeper).pid, flush=True)
print(subprocess.Popen(sleeper, process_group=0).pid, flush=True)
middle = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], start_new_session=True).pid, flush=True)"
subprocess.run([sys.executable, "-c", middle, *sleeper])
print("ready", flush=True)
"""


async def _family(follower: Follower) -> list[int]:
    pids = []
    while (line := await follower.line()) != "ready":
        pids.append(int(line))
    assert len(pids) == 3
    assert all(is_there(pid) for pid in pids)
    return pids


async def test_terminate_is_for_the_whole_group(stage: Stage) -> None:
    child = "(trap 'echo child; exit' TERM; echo; sleep 1000 & wait)"
    key = stage.start(shell=f"trap 'echo parent; wait; exit 9' TERM; {child} & echo; wait")
    await stage.start_of(key)
    follower = stage.follow(key)
    assert [await follower.line(), await follower.line()] == ["", ""]
    stage.kind.terminate(key)
    end = await stage.end_of(key)
    assert sorted(end.stdout.split()) == ["child", "parent"]
    assert (end.outcome, end.report.exit_code) == (Outcome.EXIT_NONZERO, 9)
    await follower.close()


async def test_stopped_task_hears_terminate(stage: Stage) -> None:
    key = stage.start(shell="kill -STOP $$; exec sleep 1000")
    await stage.start_of(key)
    pid = own_children()[0]
    await until(lambda: ") T " in Path(f"/proc/{pid}/stat").read_text())
    stage.kind.terminate(key)
    assert (await stage.end_of(key)).report.signal == signal.SIGTERM


async def test_kill_takes_the_whole_family(stage: Stage) -> None:
    key = stage.start(sys.executable, "-c", FAMILY + "time.sleep(1000)")
    await stage.start_of(key)
    follower = stage.follow(key)
    pids = await _family(follower)
    stage.kind.terminate(key)
    stage.kind.kill(key)
    end = await stage.end_of(key)
    assert (end.outcome, end.report.signal) == (Outcome.SIGNAL, signal.SIGKILL)
    assert [pid for pid in pids if is_there(pid)] == []
    assert own_children() == []
    await follower.close()


@pytest.mark.parametrize(("last", "outcome"), [("", Outcome.OK), ("sys.exit(4)", Outcome.EXIT_NONZERO)])
async def test_end_of_the_first_process_is_the_end_of_the_family(stage: Stage, last: str, outcome: Outcome) -> None:
    key = stage.start(sys.executable, "-c", FAMILY + last)
    end = await stage.end_of(key)
    pids = [int(line) for line in end.stdout.split()[:3]]
    assert end.outcome is outcome
    assert end.report.error is None
    assert [pid for pid in pids if is_there(pid)] == []
    assert own_children() == []


async def test_stray_of_another_attempt_is_left_alone(stage: Stage) -> None:
    key = stage.start(sys.executable, "-c", FAMILY + "time.sleep(1000)")
    await stage.start_of(key)
    follower = stage.follow(key)
    pids = await _family(follower)
    for _ in range(3):
        assert (await stage.run("true")).outcome is Outcome.OK
    assert all(is_there(pid) for pid in pids)
    assert stage.reaper.strays()[pids[2]] != ""
    await follower.close()


async def test_stray_that_ends_by_itself_is_reaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reaper, "SWEEP_S", 0.01)
    async with Stage(tmp_path) as stage:
        key = stage.start(shell="(setsid sh -c 'echo $$' &); exec sleep 1000")
        await stage.start_of(key)
        follower = stage.follow(key)
        stray = int(await follower.line())
        await until(lambda: not is_there(stray))
        assert len(own_children()) == 1
        await follower.close()


def test_children_are_found_without_the_kernels_list() -> None:
    with child("read line", own_session=True) as process:
        assert list(reaper._children_searched()) == [process.pid]
        process.kill()


# Ends when a process stands outside of its directory whose environment is empty and whose session is its own.
HIDDEN = """
mkfifo up
( (cd /; exec env -i setsid sh -c 'echo $$ > "$1/up"; exec sleep 1000' sh "$TASKD_TASK_DIR" > /dev/null 2>&1) & )
read pid < up; echo $pid
"""


@pytest.mark.parametrize("place", ["/", "."])
async def test_a_stray_that_hides_ends_with_the_only_attempt_that_can_have_started_it(stage: Stage, place: str) -> None:
    end = await stage.run(shell=HIDDEN.replace("cd /;", f"cd {place};"))
    assert end.outcome is Outcome.OK
    assert not is_there(int(end.stdout)), "before the end was told, and the slot free"
    assert stage.reaper.strays() == {}


async def test_a_stray_that_hides_is_killed_with_its_attempt(stage: Stage) -> None:
    key = stage.start(shell=f"{HIDDEN} sleep 1000")
    follower = stage.follow(key)
    pid = int(await follower.line())
    stage.kind.kill(key)
    assert (await stage.end_of(key)).report.signal == signal.SIGKILL
    assert not is_there(pid)
    await follower.close()


async def test_a_stray_in_its_directory_ends_with_its_attempt_whoever_else_runs(stage: Stage) -> None:
    other = stage.start("sleep", "1000")
    await stage.start_of(other)
    end = await stage.run(shell=HIDDEN.replace("cd /;", "mkdir in; cd in;"))
    assert not is_there(int(end.stdout))
    stage.kind.kill(other)
    await stage.end_of(other)


async def test_a_stray_that_may_be_anothers_lives_as_long_as_that(stage: Stage) -> None:
    """Nobody can tell which of the two has started it; only one that began later cannot have."""
    keys = [stage.start(shell=f"mkfifo go; {HIDDEN} read x < go"), stage.start(shell="mkfifo go; echo; read x < go")]
    followers = [stage.follow(key) for key in keys]
    pid = int(await followers[0].line())
    await followers[1].line()
    assert stage.reaper.strays() == {pid: ""}
    later = stage.start("sleep", "1000")
    await stage.start_of(later)
    assert (await stage.run("true")).outcome is Outcome.OK
    stage.kind.kill(keys[1])
    await stage.end_of(keys[1])
    assert is_there(pid), "its own attempt runs"
    stage.kind.kill(keys[0])
    await stage.end_of(keys[0])
    assert not is_there(pid), "the later one cannot have started it"
    for follower in followers:
        await follower.close()
    stage.kind.kill(later)
    await stage.end_of(later)


async def test_a_stray_with_a_mark_that_nobody_has_is_as_one_without(stage: Stage) -> None:
    end = await stage.run(shell=HIDDEN.replace("env -i", "env -i TASKD_TASK_ID=x TASKD_FENCE=1.2"))
    assert not is_there(int(end.stdout))


async def test_a_stray_that_appears_when_nothing_runs_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reaper, "SWEEP_S", 0.01)
    async with Stage(tmp_path):
        with child("setsid sh -c 'echo $$; exec sleep 1000' & read line", own_session=False) as parent:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
            assert is_there(pid)
            parent.kill()
            parent.wait()
            await until(lambda: not is_there(pid))


async def test_children_of_others_are_not_reaped(stage: Stage) -> None:
    with child("exit 5") as in_our_session, child("exit 6", own_session=True) as owned:
        stage.reaper.own(owned.pid)
        for other in (in_our_session, owned):
            await until(lambda other=other: ") Z " in Path(f"/proc/{other.pid}/stat").read_text())
        assert (await stage.run("true")).outcome is Outcome.OK
        assert stage.reaper.strays() == {}
        assert (in_our_session.poll(), owned.poll()) == (5, 6)
        stage.reaper.disown(owned.pid)


async def test_attempt_ended_before_its_process_began(stage: Stage) -> None:
    keys = [new_key() for _ in range(40)]
    stage.kind.start([Begin(key, TaskSpec("command", argv=("sleep", "1000"))) for key in keys])
    stage.kind.terminate(keys[38])
    stage.kind.kill(keys[39])
    last, killed = await stage.end_of(keys[38]), await stage.end_of(keys[39])
    assert (last.outcome, last.report.signal, last.told.started_s) == (Outcome.SIGNAL, signal.SIGTERM, 0)
    assert (killed.outcome, killed.report.signal, killed.told.started_s) == (Outcome.SIGNAL, signal.SIGKILL, 0)
    await stage.start_of(keys[0])


async def test_close_ends_and_tells_all(tmp_path: Path) -> None:
    async with Stage(tmp_path) as stage:
        keys = [new_key() for _ in range(30)]
        stage.kind.start([Begin(key, TaskSpec("command", argv=("sleep", "1000"))) for key in keys])
        await stage.start_of(keys[0])
        for key in keys[:3]:
            stage.kind.kill(key)
            stage.kind.kill(key)
        stage.kind.terminate(new_key())
        stage.kind.kill(new_key())
    assert {stage.ended[key].report.signal for key in keys} == {signal.SIGKILL}
    assert own_children() == []


async def test_killed_for_want_of_memory_is_told_from_killed(tmp_path: Path) -> None:
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("nr_free_pages 7\noom_kill 4\nswap_ra 0\n")
    async with Stage(tmp_path, oom_counter=OomCounter(str(vmstat))) as stage:
        assert (await stage.run(shell="kill -KILL $$")).outcome is Outcome.SIGNAL
        script = f"sed -i 's/oom_kill 4/oom_kill 5/' {vmstat}; "
        assert (await stage.run(shell=script + "kill -KILL $$")).outcome is Outcome.OOM
        assert (await stage.run(shell="sh -c 'kill -KILL $$'; exit 137")).outcome is Outcome.OOM
        assert (await stage.run(shell="exit 1")).outcome is Outcome.EXIT_NONZERO
        key = stage.start("sleep", "1000")
        await stage.start_of(key)
        stage.kind.kill(key)
        assert (await stage.end_of(key)).outcome is Outcome.SIGNAL, "it was us"


def test_oom_kills_of_long_ago_do_not_count(tmp_path: Path) -> None:
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("a 1\noom_kill 4\n")
    counter = OomCounter(str(vmstat))
    counter.look(100.0)
    assert not counter.has_risen()
    vmstat.write_text("a 1\noom_kill 5\n")
    assert counter.has_risen()
    counter.look(100.5)
    counter.look(101.0)
    assert counter.has_risen(), "a moment ago"
    counter.look(102.0)
    assert not counter.has_risen()
    vmstat.write_text("a 1\noom_kill 6\n")
    counter.look(500.0)
    assert not counter.has_risen(), "while nothing ran"
    assert not OomCounter(str(tmp_path / "none")).has_risen()


_V1 = Path("/sys/fs/cgroup/memory")


@pytest.mark.skipif(
    os.geteuid() != 0 or not os.access(_V1 / "memory.limit_in_bytes", os.R_OK),
    reason="needs root and a memory controller of cgroup v1 to have the kernel kill something",
)
async def test_real_oom_kill_is_recognised(stage: Stage) -> None:
    group = _V1 / f"taskd-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(32 << 20))
        eater = f"{sys.executable} -c 'x = bytearray(512 << 20)'"
        end = await stage.run(shell=f"echo $$ > {group}/tasks && exec {eater}")
        assert (end.outcome, end.report.signal) == (Outcome.OOM, signal.SIGKILL)
    finally:
        group.rmdir()


async def test_leftovers_of_an_earlier_daemon_are_ended() -> None:
    worker, other_worker = uuid.uuid4().hex, uuid.uuid4().hex
    script = "setsid sleep 1000 & sleep 1000 & echo ready; wait"
    own_reaper = Reaper(worker)
    with (
        child(script, own_session=True, environment={"TASKD_WORKER": worker}) as ours,
        child(script, own_session=True, environment={"TASKD_WORKER": other_worker}) as foreign,
    ):
        for left in (ours, foreign):
            own_reaper.own(left.pid)
            assert left.stdout is not None
            assert left.stdout.readline() == b"ready\n"
        try:
            leftovers = await own_reaper.open()
            assert (leftovers.killed, leftovers.alive) == (3, ())
            assert ours.poll() == -signal.SIGKILL
            assert foreign.poll() is None
        finally:
            os.killpg(foreign.pid, signal.SIGKILL)
            for left in (ours, foreign):
                left.wait()
                own_reaper.disown(left.pid)
            await own_reaper.close()
    assert own_children() == []
