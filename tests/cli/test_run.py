"""taskd run: output, exit codes, Ctrl-C, and a daemon that restarts meanwhile."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable

import pytest

from taskd.cli import silence
from tests.cli.conftest import Taskd
from tests.client.fake_daemon import FakeDaemon

Start = Callable[..., "subprocess.Popen[bytes]"]


def states(daemon: FakeDaemon) -> list[str]:
    return [task["state"] for task in daemon.tasks.values()]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("print", "hi", "oh"), (0, "hi\n", "oh\n")),
        (("exit", "7"), (7, "", "")),
        (("signal", "9"), (137, "", "task ID failed: ended by signal 9 (SIGKILL)\n")),
        (("timeout",), (124, "", "task ID ran longer than its timeout\n")),
        (("expire",), (1, "", "task ID had not begun by its deadline\n")),
    ],
)
def test_run_ends_as_the_command_did(
    taskd: Taskd, daemon: FakeDaemon, words: tuple[str, ...], expected: tuple[int, str, str]
) -> None:
    ran = taskd("run", "--name", "x", "--", *words)
    assert (ran.code, ran.out, re.sub(r"taskd: task \w{8}", "task ID", ran.err)) == expected
    assert daemon.bodies[0]["argv"] == list(words)
    assert daemon.bodies[0]["name"] == "x"


def test_run_of_a_shell_line_and_wrong_calls(taskd: Taskd, daemon: FakeDaemon) -> None:
    assert taskd("run", "--shell", "print hi").out == "hi\n"
    ran = taskd("run")
    assert (ran.code, ran.err.splitlines()[-1]) == (
        2, "Error: say what to run: give a command behind --, or --shell"
    )  # fmt: skip
    assert taskd("run", "--shell", "x", "y").code == 2
    ran = taskd("run", "--constraint", "x", "--memory", "lots", "y")
    assert ran.code == 2


def test_output_comes_while_it_is_written(start: Start, daemon: FakeDaemon) -> None:
    process = start("run", "--", "hold")
    daemon.wait_for(lambda: states(daemon) == ["running"])
    assert process.stdout is not None
    assert process.stderr is not None
    daemon.write("one\n")
    assert process.stdout.readline() == b"one\n"
    daemon.write("two\n", "stderr")
    assert process.stderr.readline() == b"two\n"
    daemon.release()
    assert process.wait(10) == 0


def test_a_task_that_has_to_wait_says_why_once(start: Start, daemon: FakeDaemon) -> None:
    daemon.is_busy = True
    process = start("run", "--", "print", "hi")
    assert process.stderr is not None
    line = process.stderr.readline()
    assert re.fullmatch(rb"taskd: task \w{8} waits: every worker that could run it is busy\n", line)
    daemon.begin()
    assert process.communicate(timeout=10) == (b"hi\n", b"")
    assert process.returncode == 0


def test_who_follows_the_logs_of_a_task_that_has_to_wait_is_told_why(
    start: Start, daemon: FakeDaemon, taskd: Taskd
) -> None:
    daemon.is_busy = True
    taskd("submit", "--", "print", "hi")
    process = start("logs", "-f", "last")
    assert process.stderr is not None
    line = process.stderr.readline()
    assert re.fullmatch(rb"taskd: task \w{8} waits: every worker that could run it is busy\n", line)
    taskd("submit", "--", "print", "another")
    daemon.begin()
    assert process.communicate(timeout=10) == (b"hi\n", b"")


def test_why_it_waits_is_told_again_when_it_changes(
    taskd: Taskd, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(silence, "SILENCE_S", 0.01)
    monkeypatch.setattr(silence, "ASK_AGAIN_S", 0.02)
    daemon.is_busy = True
    reasons = ("all are busy", "all are busy", "all are busy", "it is at arm", "it is about to be handed out")
    words = ("Resources", "Resources", "Resources", "Assigned", "Starting")
    daemon.explanations = [
        {"reason": word, "text": text, "position": 0, "until": None, "nodes": []}
        for word, text in zip(words, reasons, strict=True)
    ]

    def begin() -> None:
        daemon.wait_for(lambda: sum("/explain" in request for request in daemon.requests) > len(words))
        daemon.begin()

    thread = threading.Thread(target=begin)
    thread.start()
    ran = taskd("run", "--", "print", "hi")
    thread.join()
    assert (ran.code, ran.out) == (0, "hi\n")
    assert [line.partition(" waits: ")[2] for line in ran.err.splitlines()] == ["all are busy", "it is at arm"]


def test_ctrl_c_cancels_the_task_and_waits_for_its_end(start: Start, daemon: FakeDaemon) -> None:
    process = start("run", "--", "hold")
    daemon.wait_for(lambda: any("/output" in request for request in daemon.requests))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert states(daemon) == ["cancelled"]
    assert re.fullmatch(rb"taskd: cancelling task \w{8}; once more leaves it to end by itself\n", err)


def test_sigterm_cancels_too(start: Start, daemon: FakeDaemon) -> None:
    process = start("run", "--", "hold")
    daemon.wait_for(lambda: any("/output" in request for request in daemon.requests))
    process.terminate()
    assert process.wait(10) == 143
    assert states(daemon) == ["cancelled"]


def test_a_second_ctrl_c_leaves_a_task_that_does_not_end(start: Start, daemon: FakeDaemon) -> None:
    process = start("run", "--", "stubborn")
    daemon.wait_for(lambda: any("/output" in request for request in daemon.requests))
    process.send_signal(signal.SIGINT)
    daemon.wait_for(lambda: states(daemon) == ["cancelling"])
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert states(daemon) == ["cancelling"]


def test_a_task_that_is_cancelled_elsewhere(start: Start, daemon: FakeDaemon, taskd: Taskd) -> None:
    process = start("run", "--", "hold")
    daemon.wait_for(lambda: any("/output" in request for request in daemon.requests))
    assert taskd("cancel", "last").code == 0
    _, err = process.communicate(timeout=10)
    assert (process.returncode, b"was cancelled" in err) == (143, True)


def test_a_reader_who_has_enough_ends_the_task(start: Start, daemon: FakeDaemon) -> None:
    reading, writing = os.pipe()
    process = start("run", "--", "hold", stdout=writing)
    os.close(writing)
    daemon.wait_for(lambda: states(daemon) == ["running"])
    os.close(reading)
    daemon.write("more\n")
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (141, b"")
    assert states(daemon) == ["cancelled"]


def test_a_restart_of_the_daemon_repeats_no_output(start: Start, daemon: FakeDaemon) -> None:
    process = start("run", "--", "hold")
    daemon.wait_for(lambda: states(daemon) == ["running"])
    assert process.stdout is not None
    daemon.write("one\n")
    assert process.stdout.readline() == b"one\n"
    daemon.stop()
    daemon.start()
    daemon.write("two\n")
    daemon.release()
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, b"two\n")


def test_logs_follow_and_waits_survive_a_restart(start: Start, daemon: FakeDaemon, taskd: Taskd) -> None:
    taskd("submit", "--", "hold")
    logs, wait = start("logs", "-f", "last"), start("wait", "last")
    daemon.wait_for(
        lambda: {request.partition("?")[0].rpartition("/")[2] for request in daemon.requests} >= {"output", "wait"}
    )
    restart = threading.Thread(target=lambda: (daemon.stop(), daemon.start()))
    restart.start()
    restart.join()
    daemon.write("late\n")
    daemon.release()
    assert logs.communicate(timeout=20)[0] == b"late\n"
    assert wait.wait(20) == 0
