"""Handlers that the tests of the pool have its processes run."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import datetime
import decimal
import functools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, TypedDict

from taskd import TaskHandler, current, task

print("printed while the module was loaded")


@task
def noop() -> None:
    return None


@task
def add(left: int, right: int = 1) -> int:
    return left + right


@task
async def add_async(left: int, right: int) -> int:
    await asyncio.sleep(0)
    return left + right


@task
def others(first: int, **more: int) -> dict[str, int]:
    return {"first": first, **more}


@task
def keyword_only(*, factor: float = 2.0, items: list[float] = []) -> list[float]:  # noqa: B006  # as users write it
    return [factor * item for item in items]


def _doubled(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return 2 * function(*args, **kwargs)

    return wrapper


@task
@_doubled
def wrapped(number: int) -> int:
    return number


class Text(TypedDict):
    text: str


class Shout(TaskHandler):
    """Say it louder."""

    type = "shout"

    def __init__(self) -> None:
        self.calls = 0

    def execute(self, params: Text) -> list[Any]:
        self.calls += 1
        return [params["text"].upper(), self.calls]


class ShoutAsync(TaskHandler):
    type = "shout_async"

    async def execute(self, params: Any) -> Any:
        await asyncio.sleep(0)
        return params


@dataclasses.dataclass
class Even:
    number: int

    def __post_init__(self) -> None:
        if self.number % 2:
            raise ValueError("it is odd")


@task
def values(kind: str) -> Any:
    return {
        "dataclass": Even(2),
        "datetime": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        "decimal": decimal.Decimal("1.5"),
        "set": {1},
        "bytes": b"ab",
        "object": object(),
        "circle": _circle(),
        "huge": "x" * (2 << 20),
        "large": "x" * 1_000_000,
        "generator": (number for number in range(3)),
    }[kind]


def _circle() -> list[Any]:
    circle: list[Any] = []
    circle.append(circle)
    return circle


@task
def even(number: Even) -> int:
    return number.number


@dataclasses.dataclass
class Choosy:
    number: int

    def __post_init__(self) -> None:
        raise KeyError("choosy")


@task
def choosy(choice: Choosy) -> None: ...


@task
def large(size: int) -> str:
    return "x" * size


@task
def boom(message: str) -> None:
    try:
        raise KeyError("first")
    except KeyError:
        _raise(message)


def _raise(message: str) -> None:
    raise ValueError(message)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


@task
def leave(how: str) -> None:
    match how:
        case "system_exit":
            raise SystemExit(3)
        case "keyboard_interrupt":
            raise KeyboardInterrupt
        case "unspeakable":
            raise Unspeakable
        case "recursion":
            leave(how)
        case "long":
            raise ValueError("x" * 100_000)
        case "half_a_character":
            raise OSError("cannot read " + os.fsdecode(b"\xff"))


@task
async def leave_async(how: str) -> None:
    await asyncio.sleep(0)
    leave(how)


@task
def vanish(how: str = "", status: int = 0, mark: str = "") -> None:
    if mark:
        append(mark)
    match how:
        case "exit":
            print("last words")
            os._exit(status)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "crash":
            ctypes.string_at(0)


def append(mark: str) -> None:
    """One byte for each call, by whichever process."""
    descriptor = os.open(mark, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, b"x")
    os.close(descriptor)


@task
def spin(mark: str = "", begun: str = "") -> None:
    try:
        if begun:
            append(begun)
        while True:
            pass
    finally:
        if mark:
            append(mark)


@task
def stubborn(mark: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    append(mark)
    while True:
        pass


@task
def wait_for(path: str = "") -> str:
    """Returns when somebody writes to a pipe."""
    if path:
        with open(path) as pipe:
            return pipe.read()
    return ""


@task
async def sleep_async(mark: str, begun: str = "", stubborn: bool = False) -> str:
    try:
        if begun:
            append(begun)
        await asyncio.sleep(1000)
    except asyncio.CancelledError:
        append(mark)
        if not stubborn:
            raise
    return "woken"


@task
def process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "group": os.getpgrp(),
        "session": os.getsid(0),
        "cwd": os.getcwd(),
        "stdin": os.read(0, 1).decode(),
        "main_thread": threading.current_thread() is threading.main_thread(),
        "env": dict(os.environ),
        "open": {int(name): os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
                 if os.path.lexists(f"/proc/self/fd/{name}")},
        "inheritable": [int(name) for name in os.listdir("/proc/self/fd") if _is_inheritable(int(name))],
    }  # fmt: skip


def _is_inheritable(descriptor: int) -> bool:
    with contextlib.suppress(OSError):
        return os.get_inheritable(descriptor)
    return False


@task
def who() -> list[Any]:
    return [current().task_id, current().attempt, current().fence]


@task
async def who_async() -> list[Any]:
    await asyncio.sleep(0)
    return who()


@task
def say(out: str = "", err: str = "", raw: str = "", child: str = "") -> None:
    print(out, end="")
    print(err, end="", file=sys.stderr)
    os.write(1, raw.encode())
    if child:
        subprocess.run(["echo", child], check=True)


@task
def chatter() -> None:
    line = "x" * 65536
    while True:
        print(line)


@task
def grow(size: int) -> int:
    global _held
    _held = b"x" * size
    return os.getpid()


_held = b""


@task
def fork(how: str) -> int:
    """What the child does must not be taken for what this process does."""
    child = os.fork()
    if child == 0:
        if how == "raise":
            raise ValueError("in the child")
        return 1
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@task
def start_others(path: str) -> None:
    """Leaves a process in the group and one in a session of its own, and does not end."""
    inside = subprocess.Popen(["sleep", "1000"])
    outside = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    Path(path).write_text(f"{inside.pid} {outside.pid}")
    time.sleep(1000)


@task
def scribble() -> None:
    """Writes to sockets that are not its own."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                os.write(int(name), b"\xff" * 8)
    time.sleep(1000)


@task
def tell_secret(name: str) -> list[Any]:
    value = current().secret(name)
    return [value, value in os.environ.values(), value in repr(current())]


@task
def cut_off_page() -> str:
    """Try to make the memory that is shared with the daemon smaller, which would end the daemon when it reads it."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            if "taskd-handler-page" in os.readlink(f"/proc/self/fd/{name}"):
                try:
                    os.ftruncate(int(name), 0)
                except PermissionError:
                    return "denied"
                return "cut off"
    return "not found"


@task
def make_temporary_file() -> tuple[str, int]:
    descriptor, path = tempfile.mkstemp()
    os.close(descriptor)
    return path, os.stat(os.path.dirname(path)).st_mode & 0o777


@task
def identity() -> dict[str, Any]:
    """Who a call is, and where."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    return {
        "pid": os.getpid(), "uid": os.getuid(), "gid": os.getgid(), "capabilities": int(status["CapEff"], 16),
        "directory": os.getcwd(), "temporary": tempfile.gettempdir(), "mode": os.stat(".").st_mode & 0o777,
    }  # fmt: skip
