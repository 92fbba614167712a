"""What forms of the table of tasks, and indexes on it, cost: for docs/decisions/0001-writing-to-sqlite.md.

    python -m bench.store_schema [--tasks 60000] [--rounds 3] [--directory DIR]

Each task is inserted, then changed twice some commits later, 512 tasks in a commit (64 where rows are large), WAL,
synchronous=FULL. Printed: microseconds of processor time for a task's whole life, tasks per second, bytes of the file
for a task, and milliseconds to fetch 1,000 of them by id; of several rounds the best.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import apsw

from taskd.store.changes import INSERT, UPDATE

SCHEMA = Path(__file__).parents[1] / "taskd" / "store" / "sql" / "0001.sql"
UNFINISHED = "CREATE INDEX tasks_unfinished ON tasks (id) WHERE state < 20"
LAG = 3  # Commits between two changes of one task.

FORMS: dict[str, tuple[str, ...]] = {
    "row ids, no further index": (),
    "row ids, unfinished (id)": (UNFINISHED,),
    "row ids, unfinished (priority, id)": (UNFINISHED.replace("(id)", "(priority DESC, id)"),),
    "  and (state, queue)": (UNFINISHED, "CREATE INDEX extra ON tasks (state, queue)"),
    "  and (owner, id)": (UNFINISHED, "CREATE INDEX extra ON tasks (owner, id)"),
    "  and (epoch, node_id, lsn)": (UNFINISHED, "CREATE INDEX extra ON tasks (epoch, node_id, lsn)"),
    "  and the last 4 bytes of id": (UNFINISHED, "CREATE INDEX extra ON tasks (substr(id, -4))"),
    "WITHOUT ROWID, unfinished (id)": (UNFINISHED,),
    "specs in a table of their own, unfinished (id)": (UNFINISHED,),
}


def make(path: str, form: str, page_bytes: int) -> apsw.Connection:
    """A database whose table of tasks has this form."""
    connection = apsw.Connection(path)
    connection.pragma("page_size", page_bytes)
    connection.pragma("journal_mode", "wal")
    connection.pragma("synchronous", "full")
    table = SCHEMA.read_text().partition("CREATE TABLE tasks")[2].partition(") STRICT;")[0]
    if "own" in form:
        table = table.replace("spec        BLOB NOT NULL,", "")
        connection.execute("CREATE TABLE specs (number INTEGER PRIMARY KEY, spec BLOB NOT NULL) STRICT")
    connection.execute(f"CREATE TABLE tasks {table}) STRICT{', WITHOUT ROWID' if 'WITHOUT' in form else ''}")
    for statement in FORMS[form]:
        connection.execute(statement)
    return connection


def ids(tasks: int) -> Iterator[bytes]:
    """Time-ordered ids, 50 of them in a millisecond."""
    chance = random.Random(1)
    for number in range(tasks):
        time_ms = 1_790_000_000_000 + number // 50
        yield time_ms.to_bytes(6) + (0x7000 | number & 0xFFF).to_bytes(2) + chance.randbytes(8)


def live(connection: apsw.Connection, form: str, chosen: list[bytes], spec: bytes, record: bytes) -> None:
    """Take all tasks through their lives."""
    batch = 512 if len(spec) + len(record) < 10_000 else 64
    batches = [chosen[start : start + batch] for start in range(0, len(chosen), batch)]
    first, second = record[:30], record[:90]
    number = 0
    for lsn in range(len(batches) + 2 * LAG):
        with connection:
            if lsn < len(batches):
                new = batches[lsn]
                head = [(id, 3, 0, "default", "noop", "", "ann", 1.7e9, 1.7e9, 0.0, 1, 5, 7, lsn) for id in new]
                if "own" in form:
                    connection.executemany(INSERT.replace("?, ", "", 1), [(*values, first) for values in head])
                    connection.executemany(
                        "INSERT INTO specs VALUES (?, ?)", [(number + n, spec) for n in range(len(new))]
                    )
                    number += len(new)
                else:
                    connection.executemany(INSERT, [(*values, spec, first) for values in head])
            for state, at, data in ((5, lsn - LAG, second), (20, lsn - 2 * LAG, record)):
                if 0 <= at < len(batches):
                    changed = [(id, state, 1.8e9, 0.5, 1, 5, 7, lsn, data) for id in batches[at]]
                    connection.executemany(UPDATE, changed)


class Figures(NamedTuple):
    """Of one round."""

    cpu_us: float  # processor time for a task's whole life
    wall_s: float  # for all tasks
    task_bytes: float
    fetch_s: float  # for 1,000 tasks


def measure(form: str, tasks: int, sizes: tuple[int, int], page_bytes: int, directory: str) -> Figures:
    """One round. `sizes`: bytes of the spec and of the final record."""
    chance = random.Random(2)
    spec, record = map(chance.randbytes, sizes)
    chosen = list(ids(tasks))
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        path = f"{folder}/bench.db"
        connection = make(path, form, page_bytes)
        wall, cpu = time.perf_counter(), time.process_time()
        live(connection, form, chosen, spec, record)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        begun = time.perf_counter()
        wanted = apsw.carray(tuple(chance.sample(chosen, min(1000, tasks))))
        connection.execute("SELECT * FROM carray(?) CROSS JOIN tasks ON id = value", (wanted,)).fetchall()
        fetch = time.perf_counter() - begun
        connection.close()
        return Figures(cpu / tasks * 1e6, wall, Path(path).stat().st_size / tasks, fetch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=60_000, help="with small rows; a twentieth of it with large ones")
    parser.add_argument("--rounds", type=int, default=3, help="of which the best is shown")
    parser.add_argument("--directory", default=".", help="where the databases are made")
    options = parser.parse_args()
    header = ["table", "page", "spec", "record", "µs/task", "tasks/s", "bytes/task", "1,000 by id, ms"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    cases = [(form, options.tasks, (150, 200), page) for page in (4096, 8192) for form in FORMS]
    for page in (4096, 8192):
        for form in FORMS:
            if form.endswith("unfinished (id)"):
                cases += [(form, options.tasks // 20, sizes, page) for sizes in ((150, 65_536), (65_536, 200))]
    for form, tasks, sizes, page in cases:
        rounds = [measure(form, tasks, sizes, page, options.directory) for _ in range(options.rounds)]
        cpu_us, wall_s, task_bytes, fetch_s = (min(values) for values in zip(*rounds, strict=True))
        cells = [
            form, f"{page}", f"{sizes[0]}", f"{sizes[1]}", f"{cpu_us:.1f}", f"{tasks / wall_s:,.0f}",
            f"{task_bytes:.0f}", f"{fetch_s * 1e3:.1f}",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
