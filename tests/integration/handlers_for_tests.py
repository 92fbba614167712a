"""Handlers that the integration tests have the workers run."""

from __future__ import annotations

import asyncio
import os
import time

from taskd import TaskHandler, current, task


@task("noop")
def noop() -> None:
    return None


@task("add")
def add(left: int, right: int = 1) -> int:
    return left + right


@task("add_async")
async def add_async(left: int, right: int) -> int:
    await asyncio.sleep(0)
    return left + right


@task("boom")
def boom(message: str) -> None:
    raise ValueError(message)


@task("vanish")
def vanish(status: int) -> None:
    os._exit(status)


@task("spin")
def spin() -> None:
    while True:
        pass


@task("unserialisable")
def unserialisable() -> object:
    return object()


@task("patient", retries=2, timeout="1h")
def patient(mark: str) -> int:
    """Works at the third attempt."""
    with open(mark, "a") as file:
        file.write("x")
    if os.path.getsize(mark) < 3:
        raise ValueError("not yet")
    return os.path.getsize(mark)


@task("hasty", timeout=0.2)
def hasty() -> None:
    time.sleep(1000)


@task("note")
def note(runs: str, seconds: float = 0) -> str:
    """Note that it runs, in one line of a file that all runs share."""
    attempt = current()
    line = f"{attempt.task_id} {attempt.attempt} {attempt.fence} {os.getpid()}\n"
    with open(runs, "ab", buffering=0) as file:
        file.write(line.encode())
    time.sleep(seconds)
    return attempt.fence


class Shout(TaskHandler):
    """The task interface as a class."""

    type = "shout"

    def execute(self, params: dict[str, str]) -> str:
        return params["text"].upper()
