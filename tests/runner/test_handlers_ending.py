"""Handlers that crash, hang, or are to end: what it costs, and that the pool is whole again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from taskd.core.task import Outcome
from taskd.runner.limits import OomCounter
from tests.runner.handler_stage import HandlerStage, result_of, until_gone
from tests.runner.stage import is_there, new_key, own_children, until

ROOT = Path(__file__).parents[2]
ENDED = (Outcome.SIGNAL, Outcome.EXCEPTION, Outcome.PREEMPTED)  # Broken off, cancelled, or never begun.


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[HandlerStage]:
    async with HandlerStage(tmp_path) as stage:
        yield stage


# -- Deaths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"how": "exit", "status": 3}, (Outcome.EXIT_NONZERO, 3, None)),
        ({"how": "exit", "status": 0}, (Outcome.EXIT_NONZERO, 0, None)),
        ({"how": "kill"}, (Outcome.SIGNAL, None, signal.SIGKILL)),
        ({"how": "crash"}, (Outcome.SIGNAL, None, signal.SIGSEGV)),
    ],
    ids=["os._exit(3)", "os._exit(0)", "SIGKILL", "a crash in C"],
)
async def test_a_death_costs_the_call_and_a_process_takes_its_place(
    stage: HandlerStage, params: dict[str, Any], expected: tuple[Outcome, int | None, int | None]
) -> None:
    (before,) = stage.pids
    end = await stage.run("vanish", **params)
    assert (end.outcome, end.report.exit_code, end.report.signal) == expected
    assert end.error.type == "ProcessEnded"
    assert 0 < end.told.started_s <= end.told.ended_s
    await stage.until_whole()
    assert stage.pids != {before}
    assert await stage.result("add", left=1) == 2
    assert not is_there(before)


async def test_a_crash_says_where(stage: HandlerStage) -> None:
    end = await stage.run("vanish", how="crash")
    assert b"Segmentation fault" in end.report.stderr_tail
    assert b"in vanish" in end.report.stderr_tail


async def test_being_out_of_memory_is_told_from_other_kills(stage: HandlerStage, tmp_path: Path) -> None:
    counter = tmp_path / "vmstat"
    counter.write_text("nr_free_pages 1\noom_kill 3\n")
    stage.pool._oom = OomCounter(str(counter))
    key = stage.start("spin")
    await stage.start_of(key)
    counter.write_text("nr_free_pages 1\noom_kill 4\n")
    os.kill(*stage.pids, signal.SIGKILL)
    assert (await stage.end_of(key)).outcome is Outcome.OOM


async def test_calls_beside_a_death_run_once(stage: HandlerStage, tmp_path: Path) -> None:
    """Those before it keep their results though these were not sent yet, and those behind it begin elsewhere."""
    mark = str(tmp_path / "mark")
    # First many good ones: only calls of a type that is known to be short leave results unsent.
    await stage.end_of(stage.start_all(*(stage.begin("vanish") for _ in range(100)))[-1])
    begins = [stage.begin("vanish", mark=mark) for _ in range(200)]
    begins[100] = stage.begin("vanish", how="kill")
    keys = stage.start_all(*begins)
    outcomes = [(await stage.end_of(key)).outcome for key in keys]
    assert outcomes == [Outcome.OK] * 100 + [Outcome.SIGNAL] + [Outcome.OK] * 99
    assert (tmp_path / "mark").stat().st_size == 199


async def test_a_death_between_calls_costs_nothing(stage: HandlerStage) -> None:
    for _ in range(2):
        os.kill(*stage.pids, signal.SIGKILL)
        assert await stage.result("add", left=1) == 2
        await stage.until_whole()


async def test_processes_that_die_at_their_start_are_started_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskd.runner.handler_fleet.BACKOFF_S_MIN", 0.001)
    async with HandlerStage(tmp_path, modules=("moody",)) as stage:
        bad = stage.place.socket + ".bad"
        os.mkfifo(bad)
        assert (await stage.run("crash")).outcome is Outcome.EXIT_NONZERO
        end = await stage.run("mood")
        assert (end.outcome, end.error.type) == (Outcome.SPAWN_FAILED, "NoHandler")
        assert "it ended with exit code 9" in end.error.message
        os.unlink(bad)
        await stage.until_whole()
        assert await stage.result("mood") == "good"


async def test_a_handler_that_writes_to_our_sockets_costs_one_attempt(stage: HandlerStage) -> None:
    end = await stage.run("scribble")
    assert (end.outcome, end.report.signal) == (Outcome.SIGNAL, signal.SIGKILL)
    assert await stage.result("add", left=1) == 2


@pytest.mark.parametrize("how", ["return", "raise"])
async def test_a_forked_child_does_not_go_on_as_the_process(stage: HandlerStage, how: str) -> None:
    pids = stage.pids
    assert await stage.result("fork", how=how) == 70
    assert await stage.result("add", left=1) == 2
    assert stage.pids == pids


def test_processes_die_with_their_daemon(tmp_path: Path) -> None:
    program = f"""
import asyncio, pathlib
from tests.runner.handler_stage import HandlerStage
async def main():
    async with HandlerStage(pathlib.Path({str(tmp_path)!r}), processes=2) as stage:
        stage.start("spin")
        print(*stage.pids, flush=True)
        await asyncio.sleep(1000)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        pids = [int(pid) for pid in daemon.stdout.readline().split()]
        daemon.kill()
    assert len(pids) == 2
    for pid in pids:
        # Orphans are reaped by whoever takes them in; what counts is that they do not live.
        while is_there(pid) and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]:
            pass


# -- To be ended -------------------------------------------------------------------------------------------------------


async def test_term_breaks_a_call_off_where_it_is(stage: HandlerStage, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (before,) = stage.pids
    begun = tmp_path / "begun"
    key = stage.start("spin", mark=str(mark), begun=str(begun))
    await until(begun.exists)
    stage.pool.terminate(key)
    end = await stage.end_of(key)
    assert not is_there(before), "the call is over when its process is gone"
    assert (end.outcome, end.report.signal, end.error.type) == (Outcome.SIGNAL, signal.SIGTERM, "Terminated")
    assert "in spin" in end.error.traceback
    assert mark.exists(), "it was let out through its finally"
    assert await stage.result("add", left=1) == 2


async def test_what_ignores_term_is_killed(stage: HandlerStage, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    key = stage.start("stubborn", mark=str(mark))
    await until(mark.exists)
    stage.pool.terminate(key)
    stage.pool.terminate(key)
    stage.pool.kill(key)
    assert (await stage.end_of(key)).report.signal == signal.SIGKILL
    assert await stage.result("add", left=1) == 2


async def test_an_async_call_is_cancelled_and_its_process_stays(stage: HandlerStage, tmp_path: Path) -> None:
    pids = stage.pids
    key = stage.start("sleep_async", mark=str(tmp_path / "mark"), begun=str(tmp_path / "begun"))
    await until((tmp_path / "begun").exists)
    stage.pool.terminate(key)
    end = await stage.end_of(key)
    assert (end.outcome, end.error.type) == (Outcome.EXCEPTION, "CancelledError")
    assert (tmp_path / "mark").exists()
    assert await stage.result("add_async", left=1, right=2) == 3
    assert stage.pids == pids


async def test_a_success_that_came_first_is_one(stage: HandlerStage, tmp_path: Path) -> None:
    key = stage.start("sleep_async", mark=str(tmp_path / "mark"), begun=str(tmp_path / "begun"), stubborn=True)
    await until((tmp_path / "begun").exists)
    stage.pool.terminate(key)
    assert result_of(await stage.end_of(key)) == "woken"


async def test_kill_ends_a_call_and_others_go_on(tmp_path: Path) -> None:
    async with HandlerStage(tmp_path, processes=2) as stage:
        key = stage.start("spin")
        await stage.start_of(key)
        others = stage.start_all(*(stage.begin("add", left=number) for number in range(200)))
        assert [result_of(await stage.end_of(other)) for other in others] == list(range(1, 201))
        assert key not in stage.ended
        stage.pool.kill(key)
        end = await stage.end_of(key)
        assert (end.outcome, end.report.signal) == (Outcome.SIGNAL, signal.SIGKILL)
        await stage.until_whole()


@pytest.mark.parametrize("end", ["terminate", "kill"])
async def test_a_call_that_waits_behind_another_never_begins(stage: HandlerStage, tmp_path: Path, end: str) -> None:
    mark = tmp_path / "mark"
    first, second, third = stage.start_all(
        stage.begin("spin"), stage.begin("vanish", mark=str(mark)), stage.begin("add", left=1)
    )
    getattr(stage.pool, end)(second)
    told = await stage.end_of(second)
    assert (told.outcome, told.told.started_s) == (Outcome.PREEMPTED, 0.0)
    assert first not in stage.ended
    stage.pool.kill(first)
    assert result_of(await stage.end_of(third)) == 2
    assert not mark.exists()


async def test_a_call_that_waits_for_a_process_never_begins(stage: HandlerStage) -> None:
    os.kill(*stage.pids, signal.SIGKILL)
    await until(lambda: not stage.children)
    key = stage.start("spin")
    stage.pool.terminate(key)
    assert (await stage.end_of(key)).outcome is Outcome.PREEMPTED
    assert await stage.result("add", left=1) == 2


async def test_a_call_that_is_to_end_does_not_begin_elsewhere(stage: HandlerStage, tmp_path: Path) -> None:
    """Its process dies before it can answer."""
    mark = tmp_path / "mark"
    first, second, third = stage.start_all(
        stage.begin("spin"), stage.begin("vanish", mark=str(mark)), stage.begin("add", left=1)
    )
    await stage.start_of(first)
    (child,) = stage.children
    os.kill(child.pid, signal.SIGSTOP)
    stage.pool.terminate(second)
    os.kill(child.pid, signal.SIGKILL)
    assert (await stage.end_of(second)).outcome is Outcome.PREEMPTED
    assert result_of(await stage.end_of(third)) == 2
    assert not mark.exists()


@pytest.mark.parametrize("end", ["terminate", "kill"])
async def test_ends_of_calls_that_just_end_cost_nobody_else(stage: HandlerStage, end: str) -> None:
    for _ in range(20):
        first, second, third = stage.start_all(*(stage.begin("noop") for _ in range(3)))
        await stage.end_of(first)
        getattr(stage.pool, end)(second)
        assert (await stage.end_of(second)).outcome in (Outcome.OK, Outcome.SIGNAL, Outcome.PREEMPTED)
        # Begun in the very moment in which its process was killed: lost, which counts against no retry.
        assert (await stage.end_of(third)).outcome in (Outcome.OK, Outcome.LOST)


@pytest.mark.parametrize("type", ["sleep_async", "spin"])
async def test_a_call_may_be_ended_while_it_begins(stage: HandlerStage, type: str) -> None:
    for _ in range(10):
        key = stage.start(type, mark="/dev/null")
        await asyncio.sleep(0)  # It is on its way, and the wish to end it right behind.
        stage.pool.terminate(key)
        assert (await stage.end_of(key)).outcome in ENDED


async def test_calls_are_ended_whenever_that_is_asked(stage: HandlerStage) -> None:
    """Before, while and after it begins, and all of them at once: each is told once, and the pool is whole."""
    begins = [stage.begin("spin") for _ in range(5)] + [stage.begin("sleep_async", mark="/dev/null") for _ in range(5)]
    keys = stage.start_all(*begins)
    for key in keys:
        stage.pool.terminate(key)
    for key in keys:
        assert (await stage.end_of(key)).outcome in ENDED
    stage.pool.terminate(keys[0])
    stage.pool.kill(keys[0])
    stage.pool.kill(new_key())
    assert await stage.result("add", left=1) == 2
    await stage.until_whole()


async def test_all_that_a_call_has_started_ends_with_it(stage: HandlerStage, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    key = stage.start("start_others", path=str(path))
    await until(lambda: path.exists() and path.read_text().count(" "))
    pids = [int(pid) for pid in path.read_text().split()]
    stage.pool.kill(key)
    await stage.end_of(key)
    assert not any(map(is_there, pids))


async def test_closing_ends_everything_and_tells_of_it(tmp_path: Path) -> None:
    before = own_children()
    async with HandlerStage(tmp_path, processes=2) as stage:
        keys = stage.start_all(*(stage.begin("spin") for _ in range(6)))
        await stage.until(lambda: len(stage.started) == 2)
        pids = stage.pids
    assert [stage.ended[key].outcome for key in keys].count(Outcome.SIGNAL) == 2
    assert [stage.ended[key].outcome for key in keys].count(Outcome.PREEMPTED) == 4
    await until_gone(*pids)
    assert own_children() == before


async def test_no_descriptor_is_left_over(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with HandlerStage(tmp_path) as stage:
        for _ in range(5):
            await stage.run("vanish", how="exit", status=1)
    assert len(os.listdir("/proc/self/fd")) == before
