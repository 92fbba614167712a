"""Commands as real processes: what a task is given, and how its end is told."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from taskd.core.effects import Begin
from taskd.core.task import OUTPUT_TAIL_BYTES, Outcome, TaskSpec
from taskd.runner import spawn
from taskd.runner.base import PATH_DEFAULT, base_environment
from tests.runner.stage import Stage, new_key, own_children


async def test_success_is_told_with_times_sizes_and_tails(stage: Stage) -> None:
    end = await stage.run("sh", "-c", "echo out; echo error >&2")
    assert end.outcome is Outcome.OK
    assert end.report.exit_code == 0
    assert end.report.signal is None
    assert (end.report.stdout_tail, end.report.stdout_bytes) == (b"out\n", 4)
    assert (end.report.stderr_tail, end.report.stderr_bytes) == (b"error\n", 6)
    assert 0 < end.told.started_s <= end.told.ended_s


async def test_exit_code_is_told(stage: Stage) -> None:
    end = await stage.run("sh", "-c", "exit 7")
    assert (end.outcome, end.report.exit_code, end.report.error) == (Outcome.EXIT_NONZERO, 7, None)


async def test_signal_is_told(stage: Stage) -> None:
    end = await stage.run("sh", "-c", "kill -SEGV $$")
    assert (end.outcome, end.report.exit_code, end.report.signal) == (Outcome.SIGNAL, None, signal.SIGSEGV)


async def test_shell_line_runs_in_a_shell(stage: Stage) -> None:
    end = await stage.run(shell="printf 'b\\na\\n' | sort; exit 3")
    assert (end.outcome, end.report.exit_code, end.stdout) == (Outcome.EXIT_NONZERO, 3, "a\nb\n")


async def test_input_is_empty(stage: Stage) -> None:
    end = await stage.run("cat")
    assert (end.outcome, end.report.stdout_bytes) == (Outcome.OK, 0)


async def test_environment_is_small_and_names_the_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD", "secret")
    monkeypatch.setenv("LC_TIME", "C")
    monkeypatch.setenv("TASKD_STATE_DIR", "/somewhere")
    async with Stage(tmp_path) as stage:
        key = stage.start("env", "-0", env={"COLOR": "blue", "TASKD_ATTEMPT": "forged"})
        end = await stage.end_of(key)
    found = dict(line.split("=", 1) for line in end.stdout.split("\0") if line)
    directory = found["TASKD_TASK_DIR"]
    taskd = {name: value for name, value in found.items() if name.startswith("TASKD_")}
    assert taskd == {
        "TASKD_TASK_ID": key.task_text,
        "TASKD_ATTEMPT": "1",
        "TASKD_FENCE": key.fence,
        "TASKD_SOCKET": "/run/taskd/taskd.sock",
        "TASKD_TASK_DIR": directory,
        "TASKD_ERROR_FILE": f"{directory}/.taskd-error",
        "TASKD_WORKER": stage.place.worker,
    }
    assert found["COLOR"] == "blue"
    assert found["PATH"] == os.environ["PATH"]
    assert found["LC_TIME"] == "C"
    assert "DATABASE_PASSWORD" not in found


async def test_only_listed_variables_are_inherited_and_none_that_change_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SITE_PROXY", "SITE_CA", "OTHER", "LD_PRELOAD", "PYTHONPATH", "TASKD_X", "BASH_ENV", "NOTIFY_SOCKET"):
        monkeypatch.setenv(name, "" if name == "LD_PRELOAD" else "inherited")
    monkeypatch.delenv("PATH")
    environment = base_environment(("SITE_*", "LD_*", "PYTHON*", "TASKD_*", "BASH_ENV", "NOT*"))
    assert environment == {"SITE_PROXY": "inherited", "SITE_CA": "inherited", "PATH": PATH_DEFAULT}
    async with Stage(tmp_path) as stage:
        end = await stage.run(shell='echo "$PYTHONPATH $OTHER"', env={"PYTHONPATH": "its own"})
    assert end.stdout == "its own \n"


async def test_temporary_files_are_private_and_go_with_the_attempt(stage: Stage) -> None:
    end = await stage.run(shell='mktemp; test "$TMPDIR" = "$TASKD_TASK_DIR" && stat -c "%a %u" "$TMPDIR"')
    made, mode, owner = end.stdout.split()
    assert (mode, owner) == ("700", str(os.geteuid()))
    assert made.startswith(str(stage.place.directory))
    assert not os.path.exists(made)  # noqa: ASYNC240  # a look
    assert (await stage.run(shell="echo $TMPDIR", env={"TMPDIR": "/elsewhere"})).stdout == "/elsewhere\n"


async def test_memory_is_bounded_without_control_groups(tmp_path: Path) -> None:
    grow = f"x = bytearray({256 << 20}); print(len(x))"
    async with Stage(tmp_path) as stage:
        bounded = await stage.run(sys.executable, "-c", grow, resources={"memory": (64 << 20) * 1000})
        enough = await stage.run(sys.executable, "-c", grow, resources={"memory": (1 << 30) * 1000})
        missing = await stage.run("no-such-program", resources={"memory": (64 << 20) * 1000})
    assert bounded.outcome is Outcome.EXIT_NONZERO
    assert b"MemoryError" in bounded.report.stderr_tail
    assert enough.outcome is Outcome.OK
    assert "no program 'no-such-program'" in missing.error.message
    async with Stage(tmp_path, has_memory_rlimit=False) as stage:
        assert (await stage.run(sys.executable, "-c", grow, resources={"memory": 1000})).outcome is Outcome.OK


async def test_default_directory_is_private_empty_and_cleared(stage: Stage) -> None:
    first = await stage.run(shell="pwd; stat -c %a .; ls -A; mkdir -p a/b; touch a/b/c; chmod 0 a")
    directory, mode = first.stdout.split()
    assert mode == "700"
    assert directory.startswith(str(stage.place.directory))
    second = await stage.run(shell="ls -A; pwd; test $PWD = $TASKD_TASK_DIR")
    assert second.stdout.split() == [directory]
    assert second.outcome is Outcome.OK


async def test_directory_that_a_task_removed_is_there_for_the_next(stage: Stage) -> None:
    assert (await stage.run(shell="rmdir $TASKD_TASK_DIR")).outcome is Outcome.OK
    assert (await stage.run(shell="cd $TASKD_TASK_DIR")).outcome is Outcome.OK


async def test_working_directory_is_as_asked(stage: Stage, tmp_path: Path) -> None:
    assert (await stage.run("pwd", cwd=str(tmp_path))).stdout == f"{tmp_path}\n"


async def test_programs_are_found_by_the_tasks_own_path_and_directory(stage: Stage, tmp_path: Path) -> None:
    program = tmp_path / "here" / "greet"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho hello\n")
    program.chmod(0o755)
    assert (await stage.run("greet", env={"PATH": str(program.parent)})).stdout == "hello\n"
    assert (await stage.run("./greet", cwd=str(program.parent))).stdout == "hello\n"


def _install(directory: Path, name: str, words: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\necho {words}\n")
    (directory / name).chmod(0o755)


async def test_program_that_moves_is_found_again(stage: Stage, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    _install(second, "greet", "from second")
    _install(first, "greet", "from first")
    path = {"PATH": f"{first}:{second}"}
    assert (await stage.run("greet", env=path)).stdout == "from first\n"
    (first / "greet").unlink()
    assert (await stage.run("greet", env=path)).stdout == "from second\n"


async def test_program_installed_ahead_is_found_soon(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spawn, "REMEMBERED_S", 0.0)
    first, second = tmp_path / "first", tmp_path / "second"
    _install(second, "greet", "from second")
    path = {"PATH": f"{first}:{second}"}
    assert (await stage.run("greet", env=path)).stdout == "from second\n"
    _install(first, "greet", "from first")
    assert (await stage.run("greet", env=path)).stdout == "from first\n"


async def test_relative_path_is_relative_to_the_working_directory(stage: Stage, tmp_path: Path) -> None:
    _install(tmp_path / "bin", "greet", "hello")
    _install(tmp_path / "other", "greet", "wrong")
    path = {"PATH": f"bin:{tmp_path}/other"}
    assert (await stage.run("greet", env=path, cwd=str(tmp_path))).stdout == "hello\n"


async def test_what_cannot_be_started_says_why(stage: Stage, tmp_path: Path) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("no program\n")
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    plain_path = {"PATH": "/usr/bin:/bin"}  # One with a directory that may not be searched says so instead.
    cases: list[tuple[TaskSpec, str, str]] = [
        (
            TaskSpec("command", argv=("no-such-program",), env=plain_path),
            "FileNotFoundError",
            "'no-such-program' on this worker (PATH",
        ),
        (TaskSpec("command", argv=("/no/such/program",)), "FileNotFoundError", "no program '/no/such/program'"),
        (TaskSpec("command", argv=(str(plain),)), "PermissionError", "Permission denied"),
        (TaskSpec("command", argv=("/",)), "PermissionError", "Permission denied"),
        (TaskSpec("command", argv=(str(script),)), "FileNotFoundError", "the interpreter that its first line names"),
        (TaskSpec("command", argv=("true",), cwd="/no/such/dir"), "FileNotFoundError", "directory '/no/such/dir'"),
        (TaskSpec("command", argv=("true",), cwd=str(plain)), "NotADirectoryError", "cannot enter the working"),
        (TaskSpec("command", argv=("echo", "a\0b")), "ValueError", "null byte"),
        (TaskSpec("command", argv=("true",), env={"A=B": "c"}), "ValueError", "illegal environment variable name"),
        (TaskSpec("command", argv=("true",), env={"A": "\ud800"}), "UnicodeEncodeError", "surrogates not allowed"),
        (TaskSpec("command", argv=("echo", "x" * (4 << 20))), "OSError", "are too long"),
        (TaskSpec("command"), "ValueError", "nothing to run"),
        (TaskSpec("command", argv=("",)), "ValueError", "nothing to run"),
    ]
    for spec, error_type, words in cases:
        key = new_key()
        stage.kind.start([Begin(key, spec)])
        end = await stage.end_of(key)
        assert end.outcome is Outcome.SPAWN_FAILED
        assert end.told.started_s == 0
        assert end.error.type == error_type, end.error
        assert words in end.error.message
    assert own_children() == []


async def test_without_descriptors_nothing_is_left_running(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pidfd_open", no_more)
        end = await stage.run("sleep", "1000")
    assert end.outcome is Outcome.SPAWN_FAILED
    assert "Too many open files" in end.error.message
    assert own_children() == []
    assert (await stage.run("true")).outcome is Outcome.OK


async def test_tail_is_the_end_of_a_long_output(stage: Stage) -> None:
    program = "import sys; sys.stdout.write(''.join(f'{n:07}\\n' for n in range(20_000)))"
    end = await stage.run(sys.executable, "-c", program)
    assert end.report.stdout_bytes == 160_000
    assert len(end.report.stdout_tail) == OUTPUT_TAIL_BYTES
    assert end.stdout.endswith("0019998\n0019999\n")


@pytest.mark.parametrize(
    ("script", "error_type", "message"),
    [
        ('echo \'{"type": "BadInput", "message": "no such image"}\' > $TASKD_ERROR_FILE', "BadInput", "no such image"),
        ("echo it broke > $TASKD_ERROR_FILE", "TaskError", "it broke"),
        ("echo '[1, 2]' > $TASKD_ERROR_FILE", "TaskError", "[1, 2]"),
    ],
)
async def test_failing_task_may_say_why(stage: Stage, script: str, error_type: str, message: str) -> None:
    end = await stage.run(shell=f"{script}; exit 1")
    assert (end.error.type, end.error.message) == (error_type, message)


@pytest.mark.parametrize(
    "script", ["mkfifo $TASKD_ERROR_FILE", "ln -s /etc/passwd $TASKD_ERROR_FILE", ": > $TASKD_ERROR_FILE", "true"]
)
async def test_error_file_that_is_none_is_passed_over(stage: Stage, script: str) -> None:
    end = await stage.run(shell=f"{script}; exit 1")
    assert (end.outcome, end.report.error) == (Outcome.EXIT_NONZERO, None)


async def test_error_file_of_a_success_says_nothing(stage: Stage) -> None:
    end = await stage.run(shell="echo almost > $TASKD_ERROR_FILE")
    assert (end.outcome, end.report.error) == (Outcome.OK, None)
    assert (await stage.run(shell="exit 1")).report.error is None


async def test_usage_is_the_tasks_own(stage: Stage) -> None:
    # More than whatever ran before in this process has made of its own peak, below which a task's is not known.
    wanted_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) + (64 << 20)
    big = await stage.run(sys.executable, "-c", f"x = b'x' * {wanted_bytes}")
    assert big.report.memory_peak_bytes > wanted_bytes
    assert big.report.cpu_s > 0
    # A process starts with the peak of the one that started it, which would be told of every small one.
    assert (await stage.run("true")).report.memory_peak_bytes == 0


async def test_only_what_lasts_is_told_as_started(stage: Stage) -> None:
    key = stage.start("sleep", "1000")
    started = await stage.start_of(key)
    assert key not in stage.ended
    stage.kind.terminate(key)
    assert (await stage.end_of(key)).told.started_s == started.started_s


async def test_two_hundred_at_once(stage: Stage) -> None:
    keys = [new_key() for _ in range(200)]
    stage.kind.start([Begin(key, TaskSpec("command", argv=("true",))) for key in keys])
    assert stage.ended == {}, "nothing is told from inside start"
    await stage.until(lambda: len(stage.ended) == 200)
    assert {stage.ended[key].outcome for key in keys} == {Outcome.OK}
    assert own_children() == []


async def test_descriptors_and_slots_are_given_back(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    async with Stage(tmp_path) as stage:
        for _ in range(3):
            await asyncio.gather(*(stage.run("sh", "-c", "echo x; echo y >&2") for _ in range(10)))
        assert len([name for name in os.listdir(tmp_path / "slots") if name.isdigit()]) == 10
    assert set(os.listdir("/proc/self/fd")) == before


async def test_tasks_are_the_first_to_go_when_memory_runs_out(stage: Stage) -> None:
    # The score is set soon after the start: a task that asks at once may be too early.
    end = await stage.run(shell="until grep -qx 500 /proc/self/oom_score_adj; do :; done")
    assert end.outcome is Outcome.OK


async def test_so_is_what_they_started_before_that(stage: Stage) -> None:
    key = stage.start(shell="sleep 1000 & (sleep 1000 & wait) & sleep 1000")
    await stage.start_of(key)

    scores = [_oom_score(pid) for pid in _descendants(os.getpid())]
    assert len(scores) >= 4
    assert set(scores) == {500}
    stage.kind.kill(key)
    await stage.end_of(key)


async def test_a_task_may_offer_itself_before_all_others(stage: Stage) -> None:
    key = stage.start(shell="echo 900 > /proc/self/oom_score_adj; exec sleep 1000")
    await stage.start_of(key)
    (pid,) = own_children()
    assert _oom_score(pid) == 900
    stage.kind.kill(key)
    await stage.end_of(key)


def _oom_score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def _descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [other for child in children for other in _descendants(child)]


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_both_loops(run: Callable[[Awaitable[None]], None], tmp_path: Path) -> None:
    async def story() -> None:
        async with Stage(tmp_path) as stage:
            ends = await asyncio.gather(*(stage.run("sh", "-c", f"echo {n}; exit {n}") for n in range(20)))
            assert [end.report.exit_code for end in ends] == list(range(20))
            key = stage.start("sleep", "1000")
            await stage.start_of(key)
            stage.kind.terminate(key)
            assert (await stage.end_of(key)).report.signal == signal.SIGTERM

    run(story())
