"""Handlers that the tests of the pool have its processes run."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from taskd import TaskHandler, task
from taskd.handler import current


def touch(path: str) -> None:
    Path(path).touch()


@task("add")
def add(left: int, right: int = 1) -> int:
    return left + right


@task("process")
def process(number: int = 0) -> list[int]:
    return [os.getpid(), number]


@task("who")
def who() -> dict[str, Any]:
    it = current()
    return {"task": it.task_id, "attempt": it.attempt, "fence": it.fence}


@task("nothing")
def nothing() -> None: ...


@task("add_async")
async def add_async(left: int, right: int) -> int:
    await asyncio.sleep(0)
    return left + right


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        return function(*arguments, **keywords)

    return wrapper


@task("wrapped")
@logged
async def wrapped(number: int) -> int:
    await asyncio.sleep(0)
    return number


class Shout(TaskHandler):
    type = "shout"

    def execute(self, params: dict[str, str]) -> str:
        return params["text"].upper()


@dataclasses.dataclass
class Choosy:
    number: int

    def __post_init__(self) -> None:
        raise KeyError("never satisfied")


class TakesChoosy(TaskHandler):
    type = "choosy"

    def execute(self, params: Choosy) -> int:
        return params.number


@task("anything")
def anything(value: Any = None) -> Any:
    return value


@task("boom")
def boom(message: str) -> None:
    raise ValueError(message)


@task("boom_async")
async def boom_async() -> None:
    await asyncio.sleep(0)
    raise ValueError("from a coroutine")


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even that")


@task("unspeakable")
def unspeakable() -> None:
    raise Unspeakable


@task("leave")
def leave(status: int) -> None:
    sys.exit(status)


@task("vanish")
def vanish(status: int) -> None:
    os._exit(status)


@task("segfault")
def segfault() -> None:
    ctypes.string_at(0)


@task("unserialisable")
def unserialisable() -> object:
    return object()


@task("large")
def large(size: int) -> str:
    return "x" * size


@task("say")
def say(out: str, err: str = "") -> None:
    print(out)
    sys.stderr.write(err)


@task("say_below")
def say_below() -> None:
    print("python", flush=True)
    os.write(1, b"descriptor\n")
    subprocess.run(["sh", "-c", "echo program; echo complaint >&2"], check=True)


@task("say_much")
def say_much(size: int) -> None:
    sys.stdout.write("x" * size + "end")


@task("spin")
def spin(mark: str) -> None:
    touch(mark)
    while True:
        pass


@task("hold")
def hold(mark: str, until: str) -> int:
    """Runs until a file is there."""
    touch(mark)
    while not os.path.exists(until):
        time.sleep(0.001)
    return os.getpid()


@task("hold_async")
async def hold_async(mark: str) -> None:
    touch(mark)
    try:
        await asyncio.sleep(1000)
    finally:
        touch(mark + ".cancelled")


@task("stubborn")
def stubborn(mark: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    touch(mark)
    while True:
        time.sleep(1)


@task("child")
def child(mark: str) -> None:
    """Starts a program, and both run for ever."""
    program = subprocess.Popen(["sleep", "1000"])
    Path(mark + ".part").write_text(f"{os.getpid()} {program.pid}")
    os.rename(mark + ".part", mark)
    program.wait()


@task("append")
def append(path: str, line: str) -> None:
    with contextlib.closing(os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "w")) as file:
        file.write(line + "\n")


@task("append_and_vanish")
def append_and_vanish(path: str) -> None:
    append(path, "vanished")
    os._exit(9)


@task("descriptors")
def descriptors() -> list[str]:
    """What a program started by a handler without any care inherits."""
    return subprocess.run(
        ["ls", "/proc/self/fd"], close_fds=False, capture_output=True, text=True, check=True
    ).stdout.split()


@task("surrogate")
def surrogate() -> None:
    raise OSError("cannot read " + os.fsdecode(b"\xff"))
