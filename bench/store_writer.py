"""Which way to write to SQLite? Measures the candidates of docs/decisions/0001-writing-to-sqlite.md.

    python -m bench.store_writer [--seconds 0.5] [--rounds 5] [--rows 1,64,512] [--directory DIR] [--only WORD]

Every way commits the same rows into the same schema (WAL, synchronous=FULL), one commit at a time, beside an event loop
that is idle or busy; a third of the rows are new tasks, two thirds change earlier ones, as in a task's life.
Printed for each way:

    rows/s        rows made durable in a second
    p50, p99      milliseconds from asking for a commit to hearing that it is durable
    blocked       milliseconds between two turns of the loop, beyond its own work; 99 of 100 are shorter
    loop µs/row   processor time of the loop's own thread for each row
    work left     busy loop only: how much of its other work the loop still got done
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import queue
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from operator import attrgetter
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple, Protocol

import apsw
import msgspec
import uvloop

from taskd.core.effects import Commit
from taskd.protocol.messages import TaskRow
from taskd.store.changes import CHANGING, INSERT, UPDATE
from taskd.store.process import CHECKPOINT_PAGES
from taskd.store.schema import open_writer, prepare
from taskd.store.sqlite import SQLiteStore

SPEC = random.Random(1).randbytes(150)
RECORDS = [random.Random(size).randbytes(size) for size in (30, 90, 200)]

COLUMNS = TaskRow.__struct_fields__
UPSERT_TAIL = "ON CONFLICT (id) DO UPDATE SET " + ", ".join(f"{name} = excluded.{name}" for name in CHANGING[1:])
UPSERT_JSON = f"""
    INSERT INTO tasks SELECT unhex(value ->> 0), {", ".join(f"value ->> {index}" for index in range(1, 14))},
    unhex(value ->> 14), unhex(value ->> 15) FROM json_each(?) WHERE true {UPSERT_TAIL}"""
UPSERT_ROWS_MAX = 512


def upsert(rows: int) -> str:
    """One statement for many rows."""
    values = f"({', '.join('?' * len(COLUMNS))})"
    return f"INSERT INTO tasks VALUES {', '.join([values] * rows)} {UPSERT_TAIL}"


def connect(path: str) -> apsw.Connection:
    """As the store's own process does, but for the checkpoints, which come with the commits here."""
    prepare(Path(path))
    connection = open_writer(Path(path))
    connection.wal_autocheckpoint(CHECKPOINT_PAGES)
    return connection


def write_rows(connection: apsw.Connection, commit: Commit) -> None:
    """Row by row."""
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany(INSERT, map(msgspec.structs.astuple, commit.inserted))
    connection.executemany(UPDATE, map(attrgetter(*CHANGING), commit.updated))


def write_many(connection: apsw.Connection, commit: Commit) -> None:
    """Up to UPSERT_ROWS_MAX rows by one statement."""
    connection.execute("BEGIN IMMEDIATE")
    rows = commit.inserted + commit.updated
    for start in range(0, len(rows), UPSERT_ROWS_MAX):
        part = rows[start : start + UPSERT_ROWS_MAX]
        connection.execute(upsert(len(part)), tuple(chain.from_iterable(map(msgspec.structs.astuple, part))))


def write_json(connection: apsw.Connection, commit: Commit) -> None:
    """The whole batch as one parameter."""
    connection.execute("BEGIN IMMEDIATE")
    text = json.dumps(
        [
            [row.id.hex(), *msgspec.structs.astuple(row)[1:14], row.spec.hex(), row.record.hex()]
            for row in commit.inserted + commit.updated
        ]
    )
    connection.execute(UPSERT_JSON, (text,))


Write = Callable[[apsw.Connection, Commit], None]


class OnLoop:
    """Everything on the loop, the fsync too: what must not be done, for comparison."""

    def __init__(self, path: str) -> None:
        self.connection = connect(path)

    async def commit(self, commit: Commit) -> None:
        write_rows(self.connection, commit)
        self.connection.execute("COMMIT")

    def close(self) -> None:
        self.connection.close()


class Thread:
    """A thread with a queue: it runs what it is given, and wakes the loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.jobs: queue.SimpleQueue[tuple[Callable[[], object], asyncio.Future[None]] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._main)
        self.thread.start()

    def _main(self) -> None:
        while (job := self.jobs.get()) is not None:
            job[0]()
            self.loop.call_soon_threadsafe(job[1].set_result, None)

    def call(self, job: Callable[[], object]) -> asyncio.Future[None]:
        future = self.loop.create_future()
        self.jobs.put((job, future))
        return future

    def close(self) -> None:
        self.jobs.put(None)
        self.thread.join()


class CommitInThread:
    """The statements on the loop, only COMMIT in a thread."""

    def __init__(self, path: str, write: Write) -> None:
        self.connection, self.write, self.thread = connect(path), write, Thread()

    async def commit(self, commit: Commit) -> None:
        self.write(self.connection, commit)
        await self.thread.call(lambda: self.connection.execute("COMMIT"))

    def close(self) -> None:
        self.thread.close()
        self.connection.close()


class CommitInExecutor(OnLoop):
    """The same by loop.run_in_executor."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.executor = ThreadPoolExecutor(1)

    async def commit(self, commit: Commit) -> None:
        write_rows(self.connection, commit)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self.executor, self.connection.execute, "COMMIT")

    def close(self) -> None:
        self.executor.shutdown()
        super().close()


class AllInThread(CommitInThread):
    """Statements and COMMIT in the thread."""

    async def commit(self, commit: Commit) -> None:
        def job() -> None:
            self.write(self.connection, commit)
            self.connection.execute("COMMIT")

        await self.thread.call(job)


class Way(Protocol):
    """What is measured."""

    async def commit(self, commit: Commit) -> None: ...
    def close(self) -> None: ...


WAYS: dict[str, Callable[[str], Way]] = {
    "all on the loop, fsync too": OnLoop,
    "statements on the loop, COMMIT in a thread": lambda path: CommitInThread(path, write_rows),
    "the same, COMMIT by run_in_executor": CommitInExecutor,
    "the same, 512 rows a statement": lambda path: CommitInThread(path, write_many),
    "thread, row by row": lambda path: AllInThread(path, write_rows),
    "thread, 512 rows a statement": lambda path: AllInThread(path, write_many),
    "thread, one json_each statement": lambda path: AllInThread(path, write_json),
    "a process of its own (taskd.store.sqlite)": SQLiteStore.open,
}


def batches(rows: int) -> Iterator[Commit]:
    """Commits of so many rows, for ever: each task is inserted, then changed twice, some commits later."""
    chance = random.Random(2)
    boot = chance.getrandbits(63)
    stages: list[list[bytes]] = [[], [], []]  # ids to insert, to change once, to change again
    lives = [(3, 0.0), (5, 0.0), (20, 1.7e9)]
    lsn = number = 0
    while True:
        lsn += 1
        chosen: list[TaskRow] = []
        fresh: list[TaskRow] = []
        for offset in range(rows):
            stage = (lsn * rows + offset) % 3
            if stage and len(stages[stage]) < rows:
                stage = 0
            if stage == 0:
                number += 1
                time_ms = 1_790_000_000_000 + number // 50
                id = time_ms.to_bytes(6) + (0x7000 | number & 0xFFF).to_bytes(2) + chance.randbytes(8)
            else:
                id = stages[stage].pop(0)
            if stage < 2:
                stages[stage + 1].append(id)
            state, finished_s = lives[stage]
            row = TaskRow(
                id, state, 0, "default", "noop", "", "root", 1.7e9, 1.7e9 + lsn, finished_s, 1, 5, boot, lsn, SPEC,
                RECORDS[stage],
            )  # fmt: skip
            (fresh if stage == 0 else chosen).append(row)
        yield Commit(lsn, None, fresh, chosen, [])


class Busy:
    """A loop with other work: callbacks of pure Python, one after another, and what comes between them."""

    def __init__(self, callback_s: float) -> None:
        """`callback_s`: how long one callback works; 0 for an idle loop."""
        self.loop = asyncio.get_running_loop()
        self.callback_s = callback_s
        self.worked = 0
        self.gaps: list[float] = []
        self.last = time.perf_counter()
        self.handle = self.loop.call_soon(self._turn)

    def _turn(self) -> None:
        now = time.perf_counter()
        self.gaps.append(now - self.last)
        if self.callback_s:
            until = now + self.callback_s
            while time.perf_counter() < until:
                self.worked += sum(range(20)) > 0
            self.handle = self.loop.call_soon(self._turn)
        else:
            self.handle = self.loop.call_later(0.001, self._turn)
        self.last = time.perf_counter()

    def stop(self) -> None:
        self.handle.cancel()


class Figures(NamedTuple):
    """Of one round."""

    rows_per_s: float
    p50_s: float
    p99_s: float
    blocked_s: float
    loop_cpu_s: float  # of the loop's thread, for a row
    work_rate: float  # units of other work in a second


async def measure(way: str, rows: int, callback_s: float, options: argparse.Namespace) -> Figures:
    """One round of one way."""
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        writer = WAYS[way](f"{folder}/bench.db")
        source = batches(rows)
        # Made before the clock starts: making rows is not what is measured.
        commits = [next(source) for _ in range(max(20, min(int(options.seconds * 8000), 60_000 // rows)))]
        for commit in commits[:10]:
            await writer.commit(commit)
        busy = Busy(callback_s)
        times = []
        cpu, start = time.thread_time(), time.perf_counter()
        for commit in commits[10:]:
            begun = time.perf_counter()
            await writer.commit(commit)
            times.append(time.perf_counter() - begun)
            if begun - start > options.seconds:
                break
            await asyncio.sleep(0)  # A way that never waits still has to let the loop turn.
        elapsed, cpu = time.perf_counter() - start, time.thread_time() - cpu
        busy.stop()
        writer.close()
    done = len(times) * rows
    cuts = quantiles(times, n=100)
    blocked_s = quantiles(busy.gaps, n=100)[98] - (0 if callback_s else 0.001)
    return Figures(done / elapsed, cuts[49], cuts[98], blocked_s, cpu / done, busy.worked / elapsed)


async def work_alone(callback_s: float, seconds: float) -> float:
    """Units of other work in a second on a loop without a writer."""
    busy = Busy(callback_s)
    await asyncio.sleep(seconds)
    busy.stop()
    return busy.worked / seconds


def fdatasync_ceiling(directory: str) -> str:
    """The disk alone: 4 KiB appended, then fdatasync."""
    times = []
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        for _ in range(500):
            file.write(bytes(4096))
            begun = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - begun)
    cuts = quantiles(times, n=100)
    return f"fdatasync of 4 KiB: p50 {cuts[49] * 1e3:.2f} ms, p99 {cuts[98] * 1e3:.2f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="of a round")
    parser.add_argument("--rounds", type=int, default=5, help="of each way; the medians are shown")
    parser.add_argument("--rows", default="1,64,512", help="rows in a commit")
    parser.add_argument("--directory", default=".", help="where the databases are made")
    parser.add_argument("--callback-ms", type=float, default=1.0, help="of the busy loop: how long each callback works")
    parser.add_argument("--switch-ms", type=float, default=5.0, help="sys.setswitchinterval, milliseconds")
    parser.add_argument("--only", default="", help="only ways whose name has this in it")
    options = parser.parse_args()
    sys.setswitchinterval(options.switch_ms / 1e3)

    print(
        f"Python {sys.version.split()[0]}, SQLite {apsw.sqlite_lib_version()}, {os.cpu_count()} cores, "
        f"switch interval {options.switch_ms:g} ms, busy loop of {options.callback_ms:g} ms callbacks, "
        f"{options.rounds} rounds of {options.seconds:g} s, load average {os.getloadavg()[0]:.1f} at the start"
    )
    print(fdatasync_ceiling(options.directory))
    callback_s = options.callback_ms / 1e3
    header = ["way", "loop", "rows", "rows/s", "p50 ms", "p99 ms", "blocked ms", "loop µs/row", "work left"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    ways = [way for way in WAYS if options.only in way]
    for busy_s in (0.0, callback_s):
        for rows in map(int, options.rows.split(",")):
            # Round about, so that what else goes on in the machine meets all of them alike.
            rounds, alone = [], []
            for _ in range(options.rounds):
                alone.append(uvloop.run(work_alone(callback_s, options.seconds)))
                rounds.append([uvloop.run(measure(way, rows, busy_s, options)) for way in ways])
            for way, figures in zip(ways, zip(*rounds, strict=True), strict=True):
                middle = Figures(*(median(values) for values in zip(*figures, strict=True)))
                cells = [
                    way, "busy" if busy_s else "idle", f"{rows}", f"{middle.rows_per_s:,.0f}",
                    f"{middle.p50_s * 1e3:.2f}", f"{middle.p99_s * 1e3:.2f}", f"{middle.blocked_s * 1e3:.2f}",
                    "" if busy_s else f"{middle.loop_cpu_s * 1e6:.1f}",
                    f"{middle.work_rate / median(alone):.0%}" if busy_s else "",
                ]  # fmt: skip
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
