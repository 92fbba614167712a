"""What the machine itself can do: the figures that every result of a benchmark is held against, in the same run."""

from __future__ import annotations

import asyncio
import os
import selectors
import statistics
import subprocess
import time
from pathlib import Path

import apsw
import msgspec

from taskd.net import security
from taskd.protocol.messages import NodeInfo


def fdatasync_s(directory: Path, count: int = 300) -> list[float]:
    """Seconds of each append of 4 KB with fdatasync."""
    path = directory / "fdatasync"
    block = os.urandom(4096)
    samples = []
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for _ in range(count):
            begun = time.perf_counter()
            os.write(descriptor, block)
            os.fdatasync(descriptor)
            samples.append(time.perf_counter() - begun)
    finally:
        os.close(descriptor)
        path.unlink()
    return samples


def sqlite_rows_per_s(directory: Path, commits: int = 100, rows: int = 512) -> float:
    """Rows of 300 bytes per second into a plain table, so many in each synced commit (WAL, synchronous=FULL)."""
    path = directory / "rows.db"
    connection = apsw.Connection(str(path))
    connection.pragma("journal_mode", "wal")
    connection.pragma("synchronous", "full")
    connection.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, value BLOB)")
    value = os.urandom(300)
    begun = time.perf_counter()
    for _ in range(commits):
        with connection:
            connection.executemany("INSERT INTO rows (value) VALUES (?)", [(value,)] * rows)
    seconds = time.perf_counter() - begun
    connection.close()
    return commits * rows / seconds


def spawns_per_s(count: int = 2000, at_once: int = 4) -> float:
    """Processes of `true` per second from one process: Popen, a pidfd each, `at_once` at a time, output discarded."""
    selector = selectors.DefaultSelector()
    begun = time.perf_counter()
    started = ended = 0
    while ended < count:
        while started < count and started - ended < at_once:
            process = subprocess.Popen(
                ["/bin/true"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            selector.register(os.pidfd_open(process.pid), selectors.EVENT_READ, process)
            started += 1
        for key, _ in selector.select():
            selector.unregister(key.fd)
            os.close(key.fd)
            key.data.wait()
            ended += 1
    selector.close()
    return count / (time.perf_counter() - begun)


async def tls_echo_s(count: int = 1000) -> list[float]:
    """Seconds of each round trip of one small message over TLS on loopback, one after the other, within one process."""
    node = NodeInfo(1, "bench", ("scheduler",), bytes(16), 1, "bench")
    credentials = security.Credentials(security.SchedulerKey.generate(), node)
    assert credentials.server is not None
    encoder = msgspec.msgpack.Encoder()
    payload = encoder.encode([os.urandom(16), 1, "x" * 100])
    frame = len(payload).to_bytes(4, "big") + payload

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(4), "big")
                body = await reader.readexactly(size)
                writer.write(size.to_bytes(4, "big") + body)
        except asyncio.IncompleteReadError:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=credentials.server)
    port = server.sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=credentials.client)
    samples = []
    for _ in range(count):
        begun = time.perf_counter()
        writer.write(frame)
        await reader.readexactly(len(frame))
        samples.append(time.perf_counter() - begun)
    writer.close()
    server.close()
    return samples


def percentile(samples: list[float], percent: float) -> float:
    """The value that `percent` of the samples do not exceed."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def median(samples: list[float]) -> float:
    return statistics.median(samples)
