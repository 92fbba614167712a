"""Handlers in real processes: what a call is given, and how its end is told."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from taskd.core.effects import Begin
from taskd.core.task import OUTPUT_TAIL_BYTES, RESULT_BYTES_MAX, Outcome, TaskSpec
from taskd.runner.base import ERROR_TEXT_CHARS_MAX
from tests.runner.handler_stage import HandlerStage, result_of
from tests.runner.stage import new_key, own_children


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[HandlerStage]:
    async with HandlerStage(tmp_path) as stage:
        yield stage


async def test_functions_and_classes_sync_and_async(stage: HandlerStage) -> None:
    assert await stage.result("noop") is None
    assert await stage.result("add", left=2) == 3
    assert await stage.result("add_async", left=2, right=5) == 7
    assert await stage.result("others", first=1, second=2) == {"first": 1, "second": 2}
    assert await stage.result("keyword_only", items=[1, 2.5]) == [2.0, 5.0]
    assert await stage.result("wrapped", number=4) == 8
    assert await stage.result("even", number={"number": 4}) == 4
    assert await stage.result("shout_async", any=[1]) == {"any": [1]}


async def test_a_class_has_one_instance_in_its_process(stage: HandlerStage) -> None:
    assert [await stage.result("shout", text="hey") for _ in range(3)] == [["HEY", 1], ["HEY", 2], ["HEY", 3]]


async def test_a_task_without_params_has_none(stage: HandlerStage) -> None:
    key = new_key()
    stage.pool.start([Begin(key, TaskSpec(type="noop"))])
    assert result_of(await stage.end_of(key)) is None


async def test_times_are_told(stage: HandlerStage) -> None:
    told = (await stage.run("noop")).told
    assert 0 < told.started_s <= told.ended_s


@pytest.mark.parametrize(
    ("type", "params", "message"),
    [
        ("add", {"left": "two"}, "params.left: expected `int`, got `str`"),
        ("add", {}, "params.left: is missing"),
        ("add", {"left": 1, "rigth": 2}, "params.rigth: unknown parameter; this task takes: left, right"),
        ("noop", {"left": 1}, "params.left: unknown parameter; this task takes none"),
        ("even", {"number": {"number": 3}}, "params.number: it is odd"),
        ("shout", {"text": 1}, "params.text: expected `str`, got `int`"),
    ],
)
async def test_params_are_checked(stage: HandlerStage, type: str, params: dict[str, Any], message: str) -> None:
    end = await stage.run(type, **params)
    assert (end.outcome, end.error.type, end.error.message) == (Outcome.EXCEPTION, "InvalidParams", message)


@pytest.mark.parametrize("params", [b"[1]", b"{", b"\xff", b'{"text": "\xff"}', b'{"text": ' + b"[" * 100_000])
async def test_params_that_are_no_object_cost_an_attempt(stage: HandlerStage, params: bytes) -> None:
    pids = stage.pids
    for type in ("add", "others", "shout", "shout_async"):
        key = new_key()
        stage.pool.start([Begin(key, TaskSpec(type=type, params=params))])
        if (type, params) != ("shout_async", b"[1]"):
            assert (await stage.end_of(key)).outcome is Outcome.EXCEPTION
    assert stage.pids == pids


async def test_params_whose_class_raises_anything_cost_an_attempt(stage: HandlerStage) -> None:
    end = await stage.run("choosy", choice={"number": 1})
    assert (end.outcome, end.error.type) == (Outcome.EXCEPTION, "KeyError")


async def test_an_unknown_type_is_not_started(stage: HandlerStage) -> None:
    end = await stage.run("no_such_handler")
    assert (end.outcome, end.error.type) == (Outcome.EXCEPTION, "NoHandler")


@pytest.mark.parametrize(
    ("kind", "result"),
    [
        ("dataclass", b'{"number":2}'),
        ("datetime", b'"2026-01-02T00:00:00Z"'),
        ("decimal", b'"1.5"'),
        ("set", b"[1]"),
        ("bytes", b'"YWI="'),
        ("large", b'"' + b"x" * 1_000_000 + b'"'),
    ],
)
async def test_results_are_json(stage: HandlerStage, kind: str, result: bytes) -> None:
    end = await stage.run("values", kind=kind)
    assert (end.outcome, end.report.result) == (Outcome.OK, result)


@pytest.mark.parametrize(
    ("kind", "type", "message"),
    [
        ("object", "TypeError", "the handler returned object, which cannot be said in JSON"),
        ("generator", "TypeError", "the handler returned generator"),
        ("circle", "RecursionError", "the handler returned list"),
        ("huge", "ResultTooLarge", "2097154 bytes of JSON; 1048576 are allowed"),
    ],
)
async def test_other_results_cost_an_attempt(stage: HandlerStage, kind: str, type: str, message: str) -> None:
    pids = stage.pids
    end = await stage.run("values", kind=kind)
    assert (end.outcome, end.error.type) == (Outcome.EXCEPTION, type)
    assert message in end.error.message
    assert await stage.result("add", left=1) == 2
    assert stage.pids == pids


async def test_a_result_may_just_reach_the_limit(stage: HandlerStage) -> None:
    assert len(await stage.result("large", size=RESULT_BYTES_MAX - 2)) == RESULT_BYTES_MAX - 2
    assert (await stage.run("large", size=RESULT_BYTES_MAX - 1)).error.type == "ResultTooLarge"


async def test_an_exception_is_told_with_the_handlers_own_frames(stage: HandlerStage) -> None:
    end = await stage.run("boom", message="no luck")
    assert (end.outcome, end.error.type, end.error.message) == (Outcome.EXCEPTION, "ValueError", "no luck")
    frames = [line for line in end.error.traceback.splitlines() if line.startswith("  File ")]
    assert len(frames) == 3, end.error.traceback
    assert all("staged.py" in frame for frame in frames)
    assert "During handling of the above exception" in end.error.traceback
    assert end.error.traceback.endswith("ValueError: no luck\n")


@pytest.mark.parametrize("type", ["leave", "leave_async"])
@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("system_exit", "SystemExit"),
        ("keyboard_interrupt", "KeyboardInterrupt"),
        ("unspeakable", "Unspeakable"),
        ("recursion", "RecursionError"),
        ("long", "ValueError"),
        ("half_a_character", "OSError"),
    ],
)
async def test_whatever_is_raised_costs_one_attempt(stage: HandlerStage, type: str, how: str, name: str) -> None:
    pids = stage.pids
    end = await stage.run(type, how=how)
    assert (end.outcome, end.error.type) == (Outcome.EXCEPTION, name)
    assert len(end.error.message) <= ERROR_TEXT_CHARS_MAX
    assert len(end.error.traceback) <= ERROR_TEXT_CHARS_MAX
    assert "taskd/runner" not in end.error.traceback
    assert await stage.result("add_async", left=1, right=1) == 2
    assert stage.pids == pids


# -- Surroundings ------------------------------------------------------------------------------------------------------


async def test_a_process_is_alone_and_holds_nothing_of_the_daemons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD", "secret")
    of_the_daemon = os.memfd_create("of_the_daemon", 0)  # inheritable
    try:
        async with HandlerStage(tmp_path) as stage:
            (child,) = stage.children
            found = await stage.result("process")
    finally:
        os.close(of_the_daemon)
    assert found["pid"] == found["group"] == found["session"] == child.pid
    assert found["main_thread"]
    assert found["stdin"] == ""
    assert found["cwd"] == str(tmp_path / "handlers")
    assert "DATABASE_PASSWORD" not in found["env"]
    assert found["env"]["TASKD_SOCKET"] == stage.place.socket
    assert found["env"]["TASKD_WORKER"] == stage.place.worker
    assert not [name for name in found["open"].values() if "of_the_daemon" in name]
    assert found["inheritable"] == [0, 1, 2]


@pytest.mark.parametrize("type", ["who", "who_async"])
async def test_a_call_knows_its_attempt(stage: HandlerStage, type: str) -> None:
    keys = stage.start_all(*(stage.begin(type) for _ in range(3)))
    for key in keys:
        assert result_of(await stage.end_of(key)) == [key.task_text, 1, key.fence]


async def test_a_call_has_its_own_variables_and_directory(stage: HandlerStage, tmp_path: Path) -> None:
    key, other = new_key(), new_key()
    spec = TaskSpec(type="process", env={"COLOUR": "red", "HOME": "/tmp"}, cwd="/usr")
    stage.pool.start([Begin(key, spec), Begin(other, TaskSpec(type="process"))])
    found, after = result_of(await stage.end_of(key)), result_of(await stage.end_of(other))
    assert (found["cwd"], found["env"]["COLOUR"], found["env"]["HOME"]) == ("/usr", "red", "/tmp")
    assert after["cwd"] == str(tmp_path / "handlers")
    assert "COLOUR" not in after["env"]
    assert after["env"].get("HOME") == os.environ.get("HOME")


async def test_a_directory_that_is_not_there_is_told(stage: HandlerStage) -> None:
    key = new_key()
    stage.pool.start([Begin(key, TaskSpec(type="noop", cwd="/no/such/directory"))])
    end = await stage.end_of(key)
    assert (end.outcome, end.error.type) == (Outcome.SPAWN_FAILED, "FileNotFoundError")
    assert "/no/such/directory" in end.error.message
    assert await stage.result("add", left=1) == 2


# -- Output ------------------------------------------------------------------------------------------------------------


async def test_each_call_has_what_it_printed(stage: HandlerStage) -> None:
    begins = [
        stage.begin("say", out="one\n", err="bad\n"),
        stage.begin("noop"),
        stage.begin("say", out="half a line", raw="|raw"),
        stage.begin("say", child="from a child"),
    ]
    ends = [await stage.end_of(key) for key in stage.start_all(*begins)]
    reports = [end.report for end in ends]
    assert [(report.stdout_tail, report.stderr_tail) for report in reports] == [
        (b"one\n", b"bad\n"),
        (b"", b""),
        (b"|rawhalf a line", b""),  # Python writes whole lines; the rest at the end.
        (b"from a child\n", b""),
    ]
    assert [(report.stdout_bytes, report.stderr_bytes) for report in reports] == [(4, 4), (0, 0), (15, 0), (13, 0)]


async def test_of_much_output_the_end_is_kept(stage: HandlerStage) -> None:
    text = "".join(f"{number}\n" for number in range(300_000))
    for _ in range(2):  # The second time in a file that has grown.
        end = await stage.run("say", out=text)
        assert end.report.stdout_bytes == len(text)
        assert end.report.stdout_tail == text[-OUTPUT_TAIL_BYTES:].encode()
    assert (await stage.run("say", out="short")).report.stdout_tail == b"short"


async def test_a_failed_call_has_its_output_too(stage: HandlerStage) -> None:
    end = await stage.run("vanish", how="exit", status=4)
    assert (end.outcome, end.report.exit_code, end.report.stdout_tail) == (Outcome.EXIT_NONZERO, 4, b"last words\n")


# -- Modules -----------------------------------------------------------------------------------------------------------


async def test_what_is_offered(stage: HandlerStage) -> None:
    offered = {handler.type: handler for handler in stage.pool.handlers}
    assert offered.keys() >= {"noop", "add", "shout", "add_async"}
    assert offered["shout"].summary == "Say it louder."
    assert b'"required":["left"]' in offered["add"].schema
    assert stage.pool.problems == ()


@pytest.mark.parametrize(
    ("module", "problem"),
    [
        ("failing", "module failing: ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("no.such.module", "module no.such.module: ModuleNotFoundError: No module named 'no'"),
        ("exiting", "module exiting: SystemExit: this is no module"),
        ("leaving", "module leaving has taken its process down: it ended with exit code 5: this is the end"),
    ],
)
async def test_a_module_that_cannot_be_loaded_is_left_out(tmp_path: Path, module: str, problem: str) -> None:
    async with HandlerStage(tmp_path, modules=(module, "staged")) as stage:
        (told,) = stage.pool.problems
        assert problem in told
        assert "half" not in {handler.type for handler in stage.pool.handlers}
        assert await stage.result("add", left=1) == 2


async def test_a_module_that_never_ends_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskd.runner.handler_fleet.LOAD_S_MAX", 2.0)
    async with HandlerStage(tmp_path, modules=("endless", "moody")) as stage:
        assert stage.pool.problems == ("module endless took more than 2 s",)
        assert await stage.result("mood") == "good"


async def test_without_handlers_there_are_no_processes(tmp_path: Path) -> None:
    before = own_children()
    async with HandlerStage(tmp_path, modules=()) as stage:
        assert stage.pool.handlers == ()
        assert own_children() == before
        end = await stage.run("add", left=1)
        assert (end.outcome, end.error.message) == (Outcome.SPAWN_FAILED, "this worker has no handlers")


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_both_loops(run: Callable[[Awaitable[None]], None], tmp_path: Path) -> None:
    async def story() -> None:
        async with HandlerStage(tmp_path, processes=2) as stage:
            keys = stage.start_all(*(stage.begin("add", left=number) for number in range(500)))
            assert [result_of(await stage.end_of(key)) for key in keys] == list(range(1, 501))
            key = stage.start("spin")
            await stage.start_of(key)
            stage.pool.terminate(key)
            assert (await stage.end_of(key)).report.signal == signal.SIGTERM
            await stage.until_whole()

    run(story())
