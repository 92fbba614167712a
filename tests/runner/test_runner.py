"""All kinds behind one face, and a worker that starts where another was killed."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from taskd.core.effects import Begin
from taskd.core.task import Outcome, Report, TaskSpec
from taskd.protocol.messages import AttemptKey
from taskd.runner.base import ERROR_TEXT_CHARS_MAX, Place, Progress, ended, error_info
from taskd.runner.command import CommandKind
from taskd.runner.http import HttpKind
from taskd.runner.output import Output
from taskd.runner.reaper import Reaper
from taskd.runner.runner import Runner
from taskd.runner.secrets import Secrets
from tests.runner.stage import Audience, new_key, own_children


class Witness:
    """A kind that writes down what it is asked to do."""

    def __init__(self, name: str, diary: list[str], fails: bool = False) -> None:
        self.name = name
        self.diary = diary
        self.fails = fails

    async def open(self) -> None:
        if self.fails:
            raise OSError("not here")
        self.diary.append(f"{self.name} open")

    def start(self, begins: list[Begin]) -> None:
        self.diary.append(f"{self.name} start {' '.join(begin.spec.type for begin in begins)}")

    def terminate(self, key: AttemptKey) -> None:
        self.diary.append(f"{self.name} terminate")

    def kill(self, key: AttemptKey) -> None:
        self.diary.append(f"{self.name} kill")

    async def close(self) -> None:
        self.diary.append(f"{self.name} close")


def _runner(directory: Path, diary: list[str], fails: str = "") -> Runner:
    kinds = {name: Witness(name, diary, name == fails) for name in ("command", "http", "handlers")}
    secrets = Secrets(directory / "secrets")
    return Runner(Output(directory), Reaper(uuid.uuid4().hex), **kinds, on_progress=lambda *_: None, secrets=secrets)


async def test_each_type_has_its_kind(tmp_path: Path) -> None:
    diary: list[str] = []
    runner = _runner(tmp_path, diary)
    await runner.open()
    begins = [Begin(new_key(), TaskSpec(type)) for type in ("resize", "command", "http", "count", "command")]
    runner.start(begins)
    runner.terminate(begins[0].key)
    runner.kill(begins[0].key)
    await runner.close()
    assert diary == [
        "command open", "http open", "handlers open",
        "handlers start resize count", "command start command command", "http start http",
        "command terminate", "http terminate", "handlers terminate",
        "command kill", "http kill", "handlers kill",
        "handlers close", "http close", "command close",
    ]  # fmt: skip


async def test_open_that_fails_leaves_nothing_open(tmp_path: Path) -> None:
    diary: list[str] = []
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="not here"):
        await _runner(tmp_path, diary, fails="handlers").open()
    assert diary == ["command open", "http open", "http close", "command close"]
    assert set(os.listdir("/proc/self/fd")) == before


async def test_worker_starts_where_another_was_killed(tmp_path: Path) -> None:
    worker, key = uuid.uuid4().hex, new_key()
    arguments = [sys.executable, "-m", "tests.runner.doomed", str(tmp_path), worker, key.task_id.hex()]
    _kill_when_ready(arguments)
    audience = Audience()
    output, reaper = Output(tmp_path), Reaper(worker)
    place = Place(tmp_path, "", worker)
    command = CommandKind(place, audience.on_progress, output, reaper)
    tell = audience.on_progress
    secrets = Secrets(tmp_path / "secrets")
    runner = Runner(output, reaper, command, HttpKind(tell), Witness("handlers", []), on_progress=tell, secrets=secrets)
    leftovers = await runner.open()
    assert (leftovers.killed, leftovers.alive) == (2, ())
    assert sorted(output.read(key.task_id, 1, "stdout", 0, 100)[1].split()) == [b"daemon", b"task"]
    again = new_key()
    runner.start([Begin(again, TaskSpec("command", argv=("echo", "hello")))])
    assert (await audience.end_of(again)).stdout == "hello\n"
    await runner.close()
    assert own_children() == []


def _kill_when_ready(arguments: list[str]) -> None:
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as doomed:
        assert doomed.stdout is not None
        assert doomed.stdout.readline() == b"ready\n"
        doomed.kill()


async def test_progress_tells_ends_of_one_turn_together() -> None:
    told: list[tuple[int, int]] = []
    progress = Progress(lambda started, ended: told.append((len(started), len(ended))))
    keys = [new_key() for _ in range(5)]
    for key in keys:
        progress.began(key, 1.0)
    for key in keys[:3]:
        progress.ended(ended(key, Outcome.OK, Report()))
    assert told == []
    progress.flush()
    assert told == [(0, 3)]
    progress.close()
    assert told == [(0, 3)], "nothing is told as started after close"


def test_errors_are_cut_to_their_bounds() -> None:
    info = error_info("E" * 1000, "m" * 100_000, "old" + "t" * 100_000 + "new")
    assert len(info.type) == 255
    assert len(info.message) == len(info.traceback) == ERROR_TEXT_CHARS_MAX
    assert info.traceback.endswith("new")
