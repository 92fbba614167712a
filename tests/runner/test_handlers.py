"""The pool of handler processes: results, failures, crashes, loops that never end, queues behind them, replacement."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import pytest_asyncio

from taskd.core.effects import Begin
from taskd.core.task import OUTPUT_TAIL_BYTES, RESULT_BYTES_MAX, Outcome, TaskSpec
from taskd.protocol.messages import AttemptKey
from taskd.runner.base import ERROR_TEXT_CHARS_MAX, Place
from taskd.runner.handlers import HandlerPool
from taskd.runner.reaper import Reaper
from tests.runner.stage import Audience, End, is_there, new_key, own_children, until

pytestmark = pytest.mark.asyncio(loop_scope="module")
HERE = str(Path(__file__).parent)


class Pool(Audience):
    """A pool on the stage."""

    def __init__(self, directory: Path, **options: Any) -> None:
        super().__init__()
        worker = os.urandom(16).hex()
        self.directory = directory
        self.reaper = Reaper(worker)
        settings: dict[str, Any] = {"processes": 2, "modules": ["pool_handlers"], "path": [HERE], **options}
        self.kind = HandlerPool(Place(directory, "/run/taskd.sock", worker), self.on_progress, self.reaper, **settings)

    def start(self, type: str, **params: Any) -> AttemptKey:
        (key,) = self.start_all([(type, params)])
        return key

    def start_all(self, calls: list[tuple[str, dict[str, Any]]]) -> list[AttemptKey]:
        begins = [Begin(new_key(), TaskSpec(type=type, params=json.dumps(params).encode())) for type, params in calls]
        self.kind.start(begins)
        return [begin.key for begin in begins]

    async def run(self, type: str, **params: Any) -> End:
        return await self.end_of(self.start(type, **params))

    async def value(self, key: AttemptKey) -> Any:
        end = await self.end_of(key)
        assert end.outcome is Outcome.OK, end.report
        return json.loads(end.report.result)

    async def result(self, type: str, **params: Any) -> Any:
        return await self.value(self.start(type, **params))

    async def processes(self) -> set[int]:
        """The processes that make calls: found by calls that only several at once can get through."""
        pids: set[int] = set()
        while len(pids) < 2:
            keys = self.start_all([("process", {})] * 20)
            pids |= {(await self.value(key))[0] for key in keys}
        return pids


@asynccontextmanager
async def opened(directory: Path, **options: Any) -> AsyncIterator[Pool]:
    pool = Pool(directory, **options)
    await pool.kind.open()
    try:
        yield pool
    finally:
        await pool.kind.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pool]:
    """Two processes for the tests of this module: none leaves them less than whole."""
    async with opened(tmp_path_factory.mktemp("pool"), calls_max=1_000_000) as made:
        yield made


@pytest.fixture
def mark(tmp_path: Path) -> str:
    """A file by which a handler shows that it runs."""
    return str(tmp_path / "mark")


def touch(path: str) -> None:
    Path(path).touch()


def exists(path: str) -> bool:
    return os.path.exists(path)


def words(path: str) -> list[str]:
    return Path(path).read_text().split()


def start(script: str) -> Popen[bytes]:
    return Popen([sys.executable, "-c", script])


# -- Results -----------------------------------------------------------------------------------------------------------


async def test_what_there_is_to_run_is_known(pool: Pool) -> None:
    handlers = {handler.type: handler for handler in pool.kind.handlers}
    assert {"add", "add_async", "shout", "boom"} <= set(handlers)
    assert json.loads(handlers["add"].schema)["$defs"]["Params"]["required"] == ["left"]
    assert pool.kind.problems == ()


async def test_functions_coroutines_and_classes_give_results(pool: Pool) -> None:
    assert await pool.result("add", left=2) == 3
    assert await pool.result("add_async", left=2, right=5) == 7
    assert await pool.result("wrapped", number=4) == 4
    assert await pool.result("shout", text="hey") == "HEY"
    assert await pool.result("nothing") is None
    assert await pool.result("anything", value={"a": [1, 2.5, None, "ü"]}) == {"a": [1, 2.5, None, "ü"]}


async def test_times_are_those_of_the_call(pool: Pool) -> None:
    end = await pool.run("nothing")
    assert 1e9 < end.told.started_s <= end.told.ended_s


async def test_a_handler_knows_its_attempt(pool: Pool) -> None:
    key = pool.start("who")
    assert await pool.value(key) == {"task": key.task_text, "attempt": 1, "fence": key.fence}


async def test_many_calls_all_end_and_each_process_makes_them_in_order(pool: Pool) -> None:
    count = 5000
    await pool.processes()
    keys = pool.start_all([("process", {"number": number}) for number in range(count)])
    await pool.until(lambda: all(key in pool.ended for key in keys))
    values = [await pool.value(key) for key in keys]
    assert [number for _, number in values] == list(range(count))
    by_process: dict[int, list[float]] = {}
    for key, (pid, _) in zip(keys, values, strict=True):
        by_process.setdefault(pid, []).append(pool.ended[key].told.started_s)
    assert len(by_process) == 2
    assert all(times == sorted(times) for times in by_process.values())


# -- Failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "complaint"),
    [({}, "left"), ({"left": "two"}, "left"), ({"left": 1, "middle": 2}, "middle"), ({"left": None}, "left")],
)
async def test_wrong_params_are_told_with_their_place(pool: Pool, params: dict[str, Any], complaint: str) -> None:
    end = await pool.run("add", **params)
    assert (end.outcome, end.error.type) == (Outcome.EXCEPTION, "InvalidParams")
    assert complaint in end.error.message


@pytest.mark.parametrize("params", [b"[1]", b"{", b"\xff", b'{"value": ' + b"[" * 100_000])
async def test_params_that_are_no_object_cost_the_call_only(pool: Pool, params: bytes) -> None:
    key = new_key()
    pids = await pool.processes()
    pool.kind.start([Begin(key, TaskSpec(type="anything", params=params))])
    assert (await pool.end_of(key)).outcome is Outcome.EXCEPTION
    assert await pool.processes() == pids


async def test_params_whose_class_raises_anything_cost_the_call_only(pool: Pool) -> None:
    end = await pool.run("choosy", number=1)
    assert (end.outcome, end.error.type) == (Outcome.EXCEPTION, "KeyError")


async def test_an_unknown_type_is_told(pool: Pool) -> None:
    end = await pool.run("no-such-type")
    assert (end.outcome, end.error.type) == (Outcome.EXCEPTION, "NoHandler")
    assert "no-such-type" in end.error.message


@pytest.mark.parametrize(("type", "params"), [("boom", {"message": "no luck"}), ("boom_async", {})])
async def test_an_exception_is_told_with_the_handlers_own_traceback(
    pool: Pool, type: str, params: dict[str, Any]
) -> None:
    error = (await pool.run(type, **params)).error
    assert error.type == "ValueError"
    lines = error.traceback.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "pool_handlers.py" in lines[1]
    assert lines[1].endswith(f"in {type}")
    assert lines[-1] == f"ValueError: {error.message}"
    assert "handler_process" not in error.traceback


async def test_an_exception_that_cannot_be_shown_is_told_all_the_same(pool: Pool) -> None:
    assert (await pool.run("unspeakable")).error.message == "(the error cannot be shown)"


async def test_a_long_message_is_cut(pool: Pool) -> None:
    assert (await pool.run("boom", message="x" * 100_000)).error.message == "x" * (ERROR_TEXT_CHARS_MAX - 1) + "…"


async def test_half_characters_do_not_take_the_process_down(pool: Pool) -> None:
    """Names of files that are no UTF-8 come as such."""
    pids = await pool.processes()
    end = await pool.run("surrogate")
    assert (end.outcome, end.error.message) == (Outcome.EXCEPTION, r"cannot read \udcff")
    assert await pool.processes() == pids


async def test_sys_exit_costs_the_call_only(pool: Pool) -> None:
    pids = await pool.processes()
    end = await pool.run("leave", status=3)
    assert (end.outcome, end.error.type, end.error.message) == (Outcome.EXCEPTION, "SystemExit", "3")
    assert await pool.processes() == pids


async def test_results_that_are_no_json_or_too_large_are_refused(pool: Pool) -> None:
    assert (await pool.run("unserialisable")).error.type == "TypeError"
    assert len(await pool.result("large", size=RESULT_BYTES_MAX - 2)) == RESULT_BYTES_MAX - 2
    end = await pool.run("large", size=RESULT_BYTES_MAX - 1)
    assert (end.outcome, end.error.type) == (Outcome.EXCEPTION, "ResultTooLarge")
    assert str(RESULT_BYTES_MAX + 1) in end.error.message


# -- Printing ----------------------------------------------------------------------------------------------------------


async def test_what_is_printed_belongs_to_the_call(pool: Pool) -> None:
    keys = pool.start_all([("say", {"out": str(number), "err": f"E{number}"}) for number in range(50)])
    for number, key in enumerate(keys):
        report = (await pool.end_of(key)).report
        assert (report.stdout_tail, report.stderr_tail) == (f"{number}\n".encode(), f"E{number}".encode())
    assert (await pool.run("nothing")).report.stdout_bytes == 0


async def test_whoever_writes_it_and_however(pool: Pool) -> None:
    report = (await pool.run("say_below")).report
    assert report.stdout_tail == b"python\ndescriptor\nprogram\n"
    assert report.stderr_tail == b"complaint\n"


async def test_of_much_the_end_is_kept(pool: Pool) -> None:
    report = (await pool.run("say_much", size=1_000_000)).report
    assert report.stdout_bytes == 1_000_003
    assert len(report.stdout_tail) == OUTPUT_TAIL_BYTES
    assert report.stdout_tail.endswith(b"xend")


async def test_programs_of_handlers_inherit_no_channel(pool: Pool) -> None:
    assert set(await pool.result("descriptors")) <= {"0", "1", "2", "3"}


# -- Processes that die ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type", "params", "outcome", "status"),
    [
        ("vanish", {"status": 3}, Outcome.EXIT_NONZERO, 3),
        ("vanish", {"status": 0}, Outcome.EXIT_NONZERO, 0),
        ("segfault", {}, Outcome.SIGNAL, signal.SIGSEGV),
    ],
)
async def test_a_crash_costs_its_call_and_the_pool_is_whole_again(
    pool: Pool, type: str, params: dict[str, Any], outcome: Outcome, status: int
) -> None:
    keys = pool.start_all([("add", {"left": 1}), (type, params), *[("add", {"left": 1})] * 20])
    ends = [await pool.end_of(key) for key in keys]
    assert [end.outcome for end in ends] == [Outcome.OK, outcome, *[Outcome.OK] * 20]
    assert status in (ends[1].report.exit_code, ends[1].report.signal)
    assert ends[1].error.type == "ProcessEnded"
    assert len(await pool.processes()) == 2


async def test_calls_that_ended_just_before_a_crash_keep_their_results(tmp_path: Path) -> None:
    """A crash behind hundreds of short calls: none of these pays, none runs twice, and nor does the crash."""
    async with opened(tmp_path, processes=1) as pool:
        for round_ in range(5):
            path = str(tmp_path / f"lines{round_}")
            calls = [("append", {"path": path, "line": str(number)}) for number in range(100)]
            keys = pool.start_all([*calls, ("append_and_vanish", {"path": path}), *calls])
            ends = [await pool.end_of(key) for key in keys]
            assert [end.outcome for end in ends] == [*[Outcome.OK] * 100, Outcome.EXIT_NONZERO, *[Outcome.OK] * 100]
            numbers = [str(number) for number in range(100)]
            assert words(path) == [*numbers, "vanished", *numbers]


async def test_an_endless_loop_ends_by_force_while_others_go_on(pool: Pool, mark: str) -> None:
    key = pool.start("spin", mark=mark)
    await until(lambda: exists(mark))
    for _ in range(20):
        assert await pool.result("add", left=1) == 2
    await pool.start_of(key)
    pool.kind.terminate(key)
    end = await pool.end_of(key)
    assert (end.outcome, end.report.signal) == (Outcome.SIGNAL, signal.SIGTERM)
    assert end.told.started_s < end.told.ended_s
    assert len(await pool.processes()) == 2


async def test_what_ignores_term_is_killed(pool: Pool, mark: str) -> None:
    key = pool.start("stubborn", mark=mark)
    await until(lambda: exists(mark))
    pool.kind.terminate(key)
    assert await pool.result("add", left=1) == 2
    assert key not in pool.ended
    pool.kind.kill(key)
    assert (await pool.end_of(key)).report.signal == signal.SIGKILL


async def test_a_coroutine_is_cancelled_and_its_process_lives(pool: Pool, mark: str) -> None:
    pids = await pool.processes()
    key = pool.start("hold_async", mark=mark)
    await until(lambda: exists(mark))
    pool.kind.terminate(key)
    end = await pool.end_of(key)
    assert (end.outcome, end.error.type) == (Outcome.EXCEPTION, "CancelledError")
    assert exists(mark + ".cancelled")
    assert await pool.processes() == pids


async def test_a_coroutine_that_is_cancelled_before_it_begins_does_not_go_on(pool: Pool, mark: str) -> None:
    for _ in range(20):
        key = pool.start("hold_async", mark=mark)
        await asyncio.sleep(0)  # The call is on its way, and the wish to end it right behind it, on the other socket.
        pool.kind.terminate(key)
        assert (await pool.end_of(key)).outcome is not Outcome.OK


async def test_what_a_call_has_started_ends_with_it(pool: Pool, mark: str) -> None:
    key = pool.start("child", mark=mark)
    await until(lambda: exists(mark))
    pids = [int(pid) for pid in words(mark)]
    pool.kind.kill(key)
    await pool.end_of(key)
    await until(lambda: not any(_is_alive(pid) for pid in pids))


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


# -- Queues ------------------------------------------------------------------------------------------------------------


async def test_calls_behind_a_slow_one_move_to_another_process(pool: Pool, mark: str) -> None:
    keys = pool.start_all([("hold", {"mark": mark, "until": mark + ".go"}), *[("process", {})] * 40])
    pids = {(await pool.value(key))[0] for key in keys[1:]}  # All of them end while the first one holds its process.
    assert keys[0] not in pool.ended
    touch(mark + ".go")
    assert await pool.value(keys[0]) not in pids or len(pids) == 2


async def test_a_call_that_waits_behind_another_is_ended_without_having_begun(tmp_path: Path, mark: str) -> None:
    async with opened(tmp_path, processes=1) as pool:
        held = pool.start("hold", mark=mark, until=mark + ".go")
        waits = pool.start_all([("append", {"path": mark + ".lines", "line": str(number)}) for number in range(3)])
        await until(lambda: exists(mark))
        pool.kind.terminate(waits[1])
        end = await pool.end_of(waits[1])
        assert (end.outcome, end.told.started_s) == (Outcome.PREEMPTED, 0.0)
        touch(mark + ".go")
        await pool.value(held)
        assert [await pool.value(waits[place]) for place in (0, 2)] == [None, None]
        assert sorted(words(mark + ".lines")) == ["0", "2"]


async def test_ending_what_is_not_there_does_nothing(pool: Pool) -> None:
    key = pool.start("add", left=1)
    await pool.end_of(key)
    pool.kind.terminate(key)
    pool.kind.kill(new_key())
    assert await pool.result("add", left=1) == 2


async def test_ends_of_calls_that_are_just_ending_hit_nobody_else(tmp_path: Path) -> None:
    """Calls are told to end while they end by themselves: whoever comes behind them never pays for that."""
    async with opened(tmp_path, processes=1) as pool:
        for _ in range(30):
            keys = pool.start_all([("process", {})] * 3)
            await pool.end_of(keys[0])
            pool.kind.kill(keys[1])
            outcomes = [(await pool.end_of(key)).outcome for key in keys]
            assert outcomes[0] is Outcome.OK
            assert outcomes[1] in (Outcome.OK, Outcome.SIGNAL, Outcome.PREEMPTED)
            assert outcomes[2] in (Outcome.OK, Outcome.LOST)  # Begun in the moment in which its process was killed.


# -- Life --------------------------------------------------------------------------------------------------------------


async def test_processes_are_replaced_and_nothing_is_lost(tmp_path: Path) -> None:
    async with opened(tmp_path, calls_max=20, start_share_max=1e9) as pool:
        pids: set[int] = set()
        for _ in range(10):
            keys = pool.start_all([("process", {"number": number}) for number in range(50)])
            values = [await pool.value(key) for key in keys]
            assert [number for _, number in values] == list(range(50))
            pids |= {pid for pid, _ in values}
        while len(pids) < 4:
            pids.add((await pool.result("process"))[0])


async def test_a_process_that_grew_is_replaced(tmp_path: Path, mark: str) -> None:
    async with opened(tmp_path, processes=1, memory_max=1) as pool:
        held = pool.start("hold", mark=mark, until=mark + ".go")
        await until(lambda: exists(mark))
        first_pid = None
        while first_pid is None or (await pool.result("process"))[0] == first_pid:  # A successor makes these.
            touch(mark + ".go")
            first_pid = await pool.value(held)


async def test_closing_ends_everything_and_tells_of_it(tmp_path: Path, mark: str) -> None:
    async with opened(tmp_path, processes=1) as pool:
        pid = (await pool.result("process"))[0]
        keys = pool.start_all([("stubborn", {"mark": mark}), ("add", {"left": 1})])
        await until(lambda: exists(mark))
    assert [pool.ended[key].outcome for key in keys] == [Outcome.SIGNAL, Outcome.PREEMPTED]
    assert not is_there(pid)


async def test_no_descriptor_is_left_over(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with opened(tmp_path) as pool:
        for _ in range(5):
            await pool.run("vanish", status=1)
    assert len(os.listdir("/proc/self/fd")) == before


async def test_nothing_to_run_means_no_processes(tmp_path: Path) -> None:
    async with opened(tmp_path, modules=[]) as pool:
        assert pool.kind.handlers == ()
        assert pool.kind.problems == ()


async def test_modules_that_cannot_be_imported_are_told_and_cost_only_their_own(tmp_path: Path) -> None:
    (tmp_path / "wrong_syntax.py").write_text("def f(:\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit('no licence')\n")
    modules = ["no_such_module", "wrong_syntax", "leaves", "pool_handlers"]
    async with opened(tmp_path, modules=modules, path=[str(tmp_path), HERE]) as pool:
        first, second, third = pool.kind.problems
        assert "no_such_module: ModuleNotFoundError" in first
        assert "wrong_syntax: SyntaxError" in second
        assert "leaves: SystemExit: no licence" in third
        assert await pool.result("add", left=1) == 2


async def test_a_module_that_ends_the_process_is_told_and_not_tried_for_ever(tmp_path: Path) -> None:
    (tmp_path / "suicidal.py").write_text("import os\nos._exit(7)\n")
    before = own_children()
    async with opened(tmp_path, modules=["suicidal"], path=[str(tmp_path)]) as pool:
        assert pool.kind.handlers == ()
        assert pool.kind.problems == ("module suicidal has taken its process down: it ended with exit code 7",)
        assert own_children() == before


async def test_processes_die_with_their_worker(tmp_path: Path, mark: str) -> None:
    script = f"""
import asyncio, sys
sys.path.insert(0, {str(Path(HERE).parent.parent)!r})
from pathlib import Path
from tests.runner.test_handlers import opened
async def main():
    async with opened(Path({str(tmp_path)!r})) as pool:
        pool.start("child", mark={mark!r})
        await asyncio.Event().wait()
asyncio.run(main())
"""
    worker = start(script)
    try:
        await until(lambda: exists(mark))
        pid = int(words(mark)[0])
    finally:
        worker.kill()
        worker.wait()
    await until(lambda: not _is_alive(pid))
    os.kill(int(words(mark)[1]), signal.SIGKILL)  # An orphan: sweeping those is the reaper's part.
