"""Clients for benchmarks, as lean as can be, so that the daemons are what is measured."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.integration.cluster import Daemon, UnixConnection

BATCH = 1000  # Tasks of one request.
CONNECTIONS = 3  # Of one client: while the answer to a request is on its way, the next one comes.
Task = dict[str, Any]


class Client:
    """One kept connection to a daemon's socket."""

    def __init__(self, path: Path) -> None:
        self._connection: http.client.HTTPConnection = UnixConnection(path, 600)

    def post(self, path: str, body: bytes) -> bytes:
        """The answer's body."""
        self._connection.request("POST", path, body)
        response = self._connection.getresponse()
        raw = response.read()
        assert response.status == 200, raw
        return raw

    def lines(self, path: str, body: bytes) -> int:
        """The number of lines of a streamed answer, read to its end."""
        self._connection.request("POST", path, body)
        response = self._connection.getresponse()
        assert response.status == 200, response.read()
        count = 0
        while chunk := response.read1(1 << 20):
            count += chunk.count(b"\n")
        return count

    def close(self) -> None:
        self._connection.close()


def batch_of(task: Task, count: int) -> bytes:
    """A request's body."""
    return json.dumps([task] * count).encode()


def throughput(head: Daemon, task: Task, count: int) -> float:
    """Tasks per second, from the first submission until every result is known to the client: each of its connections
    submits a batch and reads the results as they come."""
    batch = min(BATCH, count)
    body = batch_of(task, batch)
    left = count // batch
    known: list[int] = []
    lock = threading.Lock()

    def work() -> None:
        nonlocal left
        client = Client(head.socket)
        while True:
            with lock:
                if not left:
                    break
                left -= 1
            known.append(client.lines("/v1/tasks?stream=1", body) - 1)  # The first line says what was accepted.
        client.close()

    threads = [threading.Thread(target=work) for _ in range(CONNECTIONS)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begun
    assert sum(known) == count // batch * batch, (sum(known), count)
    return sum(known) / seconds


def submissions(head: Daemon, count: int) -> float:
    """Durable submissions per second in bulk, of tasks that no worker runs yet; they are cancelled afterwards."""
    body = batch_of({"type": "noop", "params": {}, "delay": 3600, "queue": "later"}, BATCH)
    rounds = count // BATCH // CONNECTIONS

    def work() -> None:
        client = Client(head.socket)
        for _ in range(rounds):
            client.post("/v1/tasks", body)
        client.close()

    threads = [threading.Thread(target=work) for _ in range(CONNECTIONS)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begun
    client = Client(head.socket)
    client.post("/v1/tasks/cancel", json.dumps({"queues": ["later"]}).encode())
    client.close()
    return rounds * CONNECTIONS * BATCH / seconds


def latencies_s(head: Daemon, task: Task, count: int) -> list[float]:
    """Seconds from submission to result of single tasks, one after the other, on one connection."""
    client = Client(head.socket)
    body = json.dumps(task).encode()
    samples = []
    for _ in range(count):
        begun = time.perf_counter()
        answer = client.post("/v1/tasks?wait=30", body)
        samples.append(time.perf_counter() - begun)
        assert b'"succeeded"' in answer, answer
    client.close()
    return samples


# -- Many requests at a time, each of one task -------------------------------------------------------------------------


class _Pipe:
    """One connection for one request after the other, on an event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> None:
        self._reader, self._writer = reader, writer
        head = f"POST /v1/tasks?wait=30 HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        self._request = head.encode() + body

    async def ask(self) -> None:
        """Submit the task and have its result."""
        self._writer.write(self._request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in head, head
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
        answer = await self._reader.readexactly(int(fields[b"content-length"]))
        assert b'"succeeded"' in answer, answer

    def close(self) -> None:
        self._writer.close()


async def _with_pipes(head: Daemon, task: Task, count: int, do: Callable[[list[_Pipe]], Awaitable[Any]]) -> Any:
    body = json.dumps(task).encode()
    pipes = [_Pipe(*await asyncio.open_unix_connection(str(head.socket)), body) for _ in range(count)]
    try:
        return await do(pipes)
    finally:
        for pipe in pipes:
            pipe.close()


async def closed_loop_per_s(head: Daemon, task: Task, connections: int, seconds: float) -> float:
    """Single tasks per second, when each connection submits the next one as soon as it has a result."""

    async def do(pipes: list[_Pipe]) -> float:
        end = time.perf_counter() + seconds
        done = 0

        async def work(pipe: _Pipe) -> None:
            nonlocal done
            while time.perf_counter() < end:
                await pipe.ask()
                done += 1

        await asyncio.gather(*map(work, pipes))
        return done / seconds

    return float(await _with_pipes(head, task, connections, do))


async def open_loop_s(head: Daemon, task: Task, per_s: float, connections: int, count: int) -> list[float]:
    """Seconds of each request from when it was due, at an even rate, whether or not earlier ones were answered: a
    stall counts for everybody who came while it lasted."""

    async def do(pipes: list[_Pipe]) -> list[float]:
        free: asyncio.LifoQueue[_Pipe] = asyncio.LifoQueue()
        for pipe in pipes:
            free.put_nowait(pipe)
        samples: list[float] = []

        async def one(due: float) -> None:
            pipe = await free.get()
            await pipe.ask()
            samples.append(time.perf_counter() - due)
            free.put_nowait(pipe)

        begun = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                due = begun + number / per_s
                wait_s = due - time.perf_counter()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                group.create_task(one(due))
        return samples

    return list(await _with_pipes(head, task, connections, do))
