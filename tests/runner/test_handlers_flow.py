"""Many calls: in order, complete, none held up by another, and processes replaced when they are worn out."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from taskd.core.effects import Begin
from taskd.core.task import Outcome, TaskSpec
from taskd.runner.handler_output import KEPT_BYTES_MAX
from tests.runner.handler_stage import HandlerStage, result_of
from tests.runner.stage import new_key, until


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[HandlerStage]:
    async with HandlerStage(tmp_path) as stage:
        yield stage


async def test_thousands_of_calls_end_in_order_and_complete(stage: HandlerStage) -> None:
    keys = stage.start_all(*(stage.begin("add", left=number) for number in range(5000)))
    await stage.until(lambda: len(stage.ended) == 5000)
    assert list(stage.ended) == keys
    assert [result_of(stage.ended[key]) for key in keys] == list(range(1, 5001))
    assert stage.calls < 2500, "results are told many at a time"


async def test_each_process_makes_its_calls_in_order(tmp_path: Path) -> None:
    async with HandlerStage(tmp_path, processes=2) as stage:
        begins = [stage.begin("process") for _ in range(200)]
        by_process: dict[int, list[float]] = {}
        for key in stage.start_all(*begins):
            end = await stage.end_of(key)
            by_process.setdefault(result_of(end)["pid"], []).append(end.told.started_s)
    assert len(by_process) == 2
    assert all(times == sorted(times) for times in by_process.values())


async def test_calls_spread_over_all_processes(tmp_path: Path) -> None:
    async with HandlerStage(tmp_path, processes=3) as stage:
        keys = stage.start_all(*(stage.begin("process") for _ in range(9)))
        pids = [result_of(await stage.end_of(key))["pid"] for key in keys]
        assert sorted(pids) == sorted(3 * list(stage.pids))


async def test_more_than_the_sockets_hold(stage: HandlerStage) -> None:
    text = "x" * 500_000
    keys = stage.start_all(*(stage.begin("shout_async", text=text) for _ in range(20)))
    for key in keys:
        assert result_of(await stage.end_of(key)) == {"text": text}


async def test_only_calls_that_run_for_a_while_are_told_as_started(stage: HandlerStage) -> None:
    quick, slow, waiting = stage.start_all(stage.begin("noop"), stage.begin("spin"), stage.begin("noop"))
    started = await stage.start_of(slow)
    assert started.started_s > 0
    assert quick in stage.ended
    assert set(stage.started) == {slow}
    stage.pool.kill(slow)
    await stage.end_of(waiting)


@pytest.mark.parametrize("calls_before", [0, 100], ids=["of an unknown type", "of a short type"])
async def test_results_do_not_wait_behind_a_slow_call(stage: HandlerStage, tmp_path: Path, calls_before: int) -> None:
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    if calls_before:
        await stage.end_of(stage.start_all(*(stage.begin("wait_for") for _ in range(calls_before)))[-1])
    *quick, slow = stage.start_all(*(stage.begin("wait_for") for _ in range(20)), stage.begin("wait_for", path=pipe))
    for key in quick:
        assert result_of(await stage.end_of(key)) == ""
    assert slow not in stage.ended
    await until(lambda: _say(pipe, "now"))
    assert result_of(await stage.end_of(slow)) == "now"


def _say(pipe: str, text: str) -> bool:
    try:
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # Nobody reads yet.
        return False
    os.write(descriptor, text.encode())
    os.close(descriptor)
    return True


async def test_what_waits_behind_a_long_call_is_taken_back(tmp_path: Path) -> None:
    async with HandlerStage(tmp_path, processes=2) as stage:
        long = stage.begin("spin")
        keys = stage.start_all(long, *(stage.begin("add", left=number) for number in range(300)))
        assert [result_of(await stage.end_of(key)) for key in keys[1:]] == list(range(1, 301))
        assert long.key not in stage.ended
        stage.pool.kill(long.key)


async def test_what_was_taken_back_is_not_made_twice(tmp_path: Path) -> None:
    """Not even what a process had not read yet, when it was asked for it."""
    pipes = [str(tmp_path / "first"), str(tmp_path / "second")]
    mark = tmp_path / "mark"
    for pipe in pipes:
        os.mkfifo(pipe)
    async with HandlerStage(tmp_path, processes=2) as stage:
        held = [stage.start("wait_for", path=pipe) for pipe in pipes]
        await stage.until(lambda: len(stage.started) == 2)
        keys = stage.start_all(*(stage.begin("vanish", mark=str(mark)) for _ in range(40)))
        await until(lambda: _say(pipes[0], "go"))
        for key in keys:
            assert (await stage.end_of(key)).outcome is Outcome.OK
        assert held[1] not in stage.ended
        await until(lambda: _say(pipes[1], "go"))
        await stage.end_of(held[1])
        assert await stage.result("add", left=1) == 2
        assert await stage.result("add", left=1) == 2
    assert mark.stat().st_size == 40


async def test_what_waits_behind_long_calls_goes_to_whoever_is_free_first(tmp_path: Path) -> None:
    async with HandlerStage(tmp_path, processes=2) as stage:
        first, second = stage.start("spin"), stage.start("spin")
        keys = stage.start_all(*(stage.begin("add", left=number) for number in range(100)))
        await stage.until(lambda: len(stage.started) == 2)
        stage.pool.terminate(first)
        for key in keys:
            await stage.end_of(key)
        assert second not in stage.ended
        stage.pool.kill(second)


async def test_a_call_that_prints_for_ever_does_not_fill_the_memory(stage: HandlerStage) -> None:
    key = stage.start("chatter")
    (child,) = stage.children
    file = child._process.stdout_fd
    await until(lambda: os.fstat(file).st_size > 64 * KEPT_BYTES_MAX)
    await until(lambda: os.fstat(file).st_blocks * 512 < os.fstat(file).st_size // 4)
    stage.pool.kill(key)
    assert (await stage.end_of(key)).report.stdout_bytes > 64 * KEPT_BYTES_MAX


# -- Wear --------------------------------------------------------------------------------------------------------------


async def test_a_process_is_replaced_after_its_calls(tmp_path: Path) -> None:
    async with HandlerStage(tmp_path, calls_max=10, start_share_max=1e9) as stage:
        (first,) = stage.pids
        for _ in range(3):
            keys = stage.start_all(*(stage.begin("add", left=number) for number in range(25)))
            assert [result_of(await stage.end_of(key)) for key in keys] == list(range(1, 26))
        await until(lambda: first not in stage.pids)
        await stage.until_whole()


async def test_replacing_is_not_worth_more_than_its_share(tmp_path: Path) -> None:
    async with HandlerStage(tmp_path, calls_max=1, start_share_max=1e-9) as stage:
        pids = stage.pids
        for number in range(50):
            assert await stage.result("add", left=number) == number + 1
        assert stage.pids == pids
        assert stage.pool._children_started == 1


async def test_a_process_that_takes_too_much_memory_is_replaced(tmp_path: Path) -> None:
    async with HandlerStage(tmp_path, memory_max=200 << 20) as stage:
        (first,) = stage.pids
        keys = stage.start_all(stage.begin("grow", size=300 << 20), *(stage.begin("process") for _ in range(3)))
        assert result_of(await stage.end_of(keys[0])) == first
        for key in keys[1:]:
            assert (await stage.end_of(key)).outcome is Outcome.OK
        await until(lambda: first not in stage.pids)
        await stage.until_whole()


async def test_a_limit_that_no_process_can_keep_is_told_and_raised(tmp_path: Path) -> None:
    async with HandlerStage(tmp_path, memory_max=1 << 20) as stage:
        (problem,) = stage.pool.problems
        assert "handler processes take" in problem
        pids = stage.pids
        for _ in range(5):
            assert await stage.result("noop") is None
        assert stage.pids == pids


async def test_attempts_of_one_task_are_not_mixed_up(stage: HandlerStage) -> None:
    first = new_key()
    second = type(first)(first.task_id, 2, first.term, first.lsn)
    stage.pool.start([Begin(first, TaskSpec(type="spin")), Begin(second, TaskSpec(type="noop"))])
    await stage.start_of(first)
    stage.pool.kill(first)
    assert (await stage.end_of(first)).outcome is Outcome.SIGNAL
    assert (await stage.end_of(second)).outcome is Outcome.OK


async def test_memory_that_is_shared_with_the_daemon_cannot_be_cut_off(stage: HandlerStage) -> None:
    assert await stage.result("cut_off_page") == "denied"


async def test_each_process_has_temporary_files_of_its_own(stage: HandlerStage) -> None:
    made, mode = await stage.result("make_temporary_file")
    assert mode == 0o700
    assert os.path.exists(made)  # noqa: ASYNC240  # a look
    (child,) = stage.children
    child.kill()
    await until(lambda: not os.path.exists(made))
