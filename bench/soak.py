"""`make soak`: a cluster that works for long while a random daemon is killed every half minute.

Two schedulers and three workers as real processes, one of the workers spared, so that its memory can be followed.
Clients submit batches of mixed tasks through all nodes at about half of what the cluster can do, each under a key of
its own, and ask again elsewhere when a node is gone. In the end every task has to be there once, ended as it must, with
one result, the same in both stores; and memory and descriptors must not have grown.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from contextlib import closing
from pathlib import Path
from random import Random
from typing import NamedTuple

from bench import client, figures
from bench.ceilings import percentile
from bench.depth import rss_bytes
from bench.figures import Figure
from bench.run import HANDLERS, NOOP
from taskd.core.task import Outcome, Task, TaskState
from taskd.protocol.messages import TaskRow
from taskd.store.schema import open_reader
from tests.integration.cluster import Daemon, UnixConnection
from tests.integration.replicas import Replicas, replicas

BATCH = 200
CLIENTS = 8
KILL_EVERY_S = 30.0
DOWN_S = 3.0
SAMPLE_EVERY_S = 2.0
SETTLED_S = 20.0  # A process that is younger still grows.
RETRY_S = 0.1
ASK_S = 30.0
PROBE_TASKS = 10_000
DRAIN_S = 300.0
LOG_LINES = 12  # Shown of a daemon that has ended by itself.
SECONDS_A_MINUTE = 60.0
# What a batch holds of each kind, and how such tasks may end.
KINDS: tuple[tuple[str, int, client.Task, frozenset[str]], ...] = (
    ("no-op", 192, NOOP, frozenset({"succeeded"})),
    ("command", 2, {"argv": ["true"]}, frozenset({"succeeded"})),
    ("failing", 1, {"argv": ["false"], "retries": 1, "backoff": {"initial": 0.2}}, frozenset({"failed"})),
    ("delayed", 3, {**NOOP, "delay": 2}, frozenset({"succeeded"})),
    ("cancelled", 2, {**NOOP, "delay": 5}, frozenset({"cancelled", "succeeded"})),
)


class Sample(NamedTuple):
    """What a process took at a time of the run, in seconds."""

    at: float
    age: float
    name: str
    rss_bytes: int
    descriptors: int


class Account:
    """What the clients know."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.batches = 0
        self.ended = 0
        self.wrong: list[str] = []
        self.submitted_s: list[float] = []
        self.result_s: list[float] = []
        self.asked_again = 0
        self.late_batches = 0  # begun late, for all clients were waiting


class Clients:
    """Threads that submit batches at an even rate, and wait for each to end."""

    def __init__(self, nodes: list[Daemon], batches_per_s: float, seed: int) -> None:
        self.account = Account()
        self._nodes = nodes
        self._interval_s = 1 / batches_per_s
        self._random = Random(seed)
        self._numbers = itertools.count()
        self._is_over = threading.Event()
        self._begun = time.monotonic()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(CLIENTS)]
        self._waiters: deque[threading.Thread] = deque()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Submit no more, and wait until everything has ended."""
        self._is_over.set()
        for thread in self._threads:
            thread.join(DRAIN_S)
            assert not thread.is_alive(), "a client waits for tasks that do not end"

    def _work(self) -> None:
        waiting: list[threading.Thread] = []
        while not self._is_over.is_set():
            number = next(self._numbers)
            due = self._begun + number * self._interval_s
            late_s = time.monotonic() - due
            if late_s < 0:
                self._is_over.wait(-late_s)
            elif late_s > 1:
                with self.account.lock:
                    self.account.late_batches += 1
            waiter = threading.Thread(target=self._batch, args=(number,), daemon=True)
            waiter.start()
            waiting = [thread for thread in waiting if thread.is_alive()] + [waiter]
            while len(waiting) > 2 * CLIENTS:
                waiting.pop(0).join()
        for thread in waiting:
            thread.join(DRAIN_S)
            assert not thread.is_alive(), "tasks do not end"

    def _batch(self, number: int) -> None:
        tasks = [{**task, "name": f"{name}-{number}"} for name, count, task, _ in KINDS for _ in range(count)]
        begun = time.monotonic()
        answer = json.loads(self._ask("POST", f"/v1/tasks?idempotency_key=batch-{number}", json.dumps(tasks).encode()))
        submitted = time.monotonic()
        ids = answer["ids"]
        # Of what is on one disk nobody knows while that is away.
        may_be_away = answer["durability"] == "local"
        ends = [ways for _, count, _, ways in KINDS for _ in range(count)]
        expected = dict(zip(ids, ends, strict=True))
        cancelled = [task_id for task_id, ways in expected.items() if "cancelled" in ways]
        self._ask("POST", "/v1/tasks/cancel", json.dumps({"ids": cancelled}).encode(), may_be_away=may_be_away)
        results = self._results(ids, may_be_away=may_be_away)
        wrong = [
            f"{task_id}: {results.get(task_id)}"
            for task_id, ways in expected.items()
            if results.get(task_id) not in ways
        ]
        account = self.account
        with account.lock:
            account.batches += 1
            account.ended += len(results)
            account.wrong += wrong
            account.submitted_s.append(submitted - begun)
            account.result_s.append(time.monotonic() - begun)

    def _results(self, ids: list[str], *, may_be_away: bool) -> dict[str, str]:
        """How each task ended; a wait that is cut off is asked again for those that are missing."""
        results: dict[str, str] = {}
        while len(results) < len(ids):
            missing = [task_id for task_id in ids if task_id not in results]
            body = json.dumps({"ids": missing, "timeout": ASK_S, "stream": True}).encode()
            for line in self._ask("POST", "/v1/tasks/wait", body, True, may_be_away).splitlines():
                result = json.loads(line) if line.endswith(b"}") else {}
                if "id" in result:
                    assert result["id"] not in results, f"a second result of {result['id']}"
                    results[result["id"]] = result["state"]
        return results

    def _ask(
        self, method: str, path: str, body: bytes, may_end_early: bool = False, may_be_away: bool = False
    ) -> bytes:
        """The answer of some node, however often it takes. `may_be_away`: that tasks are unknown may pass."""
        end = time.monotonic() + DRAIN_S
        while True:
            node = self._random.choice(self._nodes)
            reason = ""
            try:
                with closing(UnixConnection(node.socket, 2 * ASK_S)) as connection:
                    connection.request(method, path, body)
                    response = connection.getresponse()
                    raw = response.read()
                    if response.status == 200:
                        return raw
                    reason = f"{response.status} {raw[:200]!r}"
                    assert response.status in ((404,) if may_be_away else ()) + (429, 502, 503, 504), reason
            except http.client.IncompleteRead as error:
                if may_end_early:
                    return error.partial.rpartition(b"\n")[0]
                reason = repr(error)
            except (OSError, http.client.HTTPException) as error:
                reason = repr(error)
            with self.account.lock:
                self.account.asked_again += 1
            assert time.monotonic() < end, f"no node answers: {reason}"
            time.sleep(RETRY_S)


class Watch:
    """Looks at what processes take."""

    def __init__(self, daemons: list[Daemon]) -> None:
        self.samples: list[Sample] = []
        self.started: dict[str, float] = {}
        self._daemons = daemons
        self._begun = time.monotonic()

    def look(self) -> None:
        """Once."""
        now = time.monotonic() - self._begun
        for daemon in self._daemons:
            if daemon.process is None:
                continue
            name = daemon.home.name
            try:
                descriptors = len(os.listdir(f"/proc/{daemon.process.pid}/fd"))
                size = rss_bytes(daemon)
            except (OSError, ValueError):
                continue
            self.samples.append(Sample(now, now - self.started.get(name, 0.0), name, size, descriptors))

    def restarted(self, daemon: Daemon) -> None:
        """It is a new process."""
        self.started[daemon.home.name] = time.monotonic() - self._begun


def growth_per_h(samples: list[tuple[float, float]]) -> float:
    """The slope of a straight line through values by seconds, for an hour."""
    count = len(samples)
    if count < 2:
        return 0.0
    mean_at = sum(at for at, _ in samples) / count
    mean = sum(value for _, value in samples) / count
    spread = sum((at - mean_at) ** 2 for at, _ in samples)
    return 3600 * sum((at - mean_at) * (value - mean) for at, value in samples) / spread if spread else 0.0


def check_stores(made: Replicas, batches: int) -> tuple[Counter[str], list[str]]:
    """What both databases hold, read directly: counts, and what is not as it has to be."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    decisions: list[dict[bytes, tuple[object, ...]]] = []
    columns = ", ".join(TaskRow.__struct_fields__)
    for path in made.stores:
        found: dict[bytes, tuple[object, ...]] = {}
        by_batch: Counter[str] = Counter()
        with closing(open_reader(path)) as connection:
            for row in connection.execute(f"SELECT {columns} FROM tasks WHERE name <> ''"):
                task = Task.from_row(TaskRow(*row))
                by_batch[task.spec.name.rpartition("-")[2]] += 1
                good = sum(1 for attempt in task.record.attempts if attempt.outcome is Outcome.OK)
                found[task.id] = (task.state, task.record.decided)
                if not task.state.is_final:
                    wrong.append(f"{path}: {task.id.hex()} is {task.state.word}")
                if (task.state is TaskState.SUCCEEDED) != (good > 0):
                    wrong.append(f"{path}: {task.id.hex()} is {task.state.word} with {good} results")
                counts["late results"] += max(0, good - 1)
                counts["attempts"] += len(task.record.attempts)
        wrong += [f"{path}: batch {name} has {count} tasks" for name, count in by_batch.items() if count != BATCH]
        if len(by_batch) != batches:
            wrong.append(f"{path}: {len(by_batch)} batches of {batches}")
        decisions.append(found)
        counts["tasks"] = len(found)
    first, *others = decisions
    wrong += [f"stores differ in {len(first.items() ^ other.items())} decisions" for other in others if first != other]
    return counts, wrong


def soak(directory: Path, minutes: float, share: float, seed: int) -> tuple[list[Figure], list[str]]:
    """Figures, and what went wrong."""
    random = Random(seed)
    with replicas(directory, 2, 3, env={**HANDLERS, "TASKD_WORKER_SLOTS": "2"}) as made:
        client.throughput(made.schedulers[0], NOOP, PROBE_TASKS)
        most = client.throughput(made.schedulers[0], NOOP, PROBE_TASKS)
        rate = most * share
        say(f"{most:,.0f} no-op tasks/s at most; from now on {rate:,.0f} mixed tasks/s for {minutes:g} minutes")
        watch = Watch(made.daemons)
        clients = Clients(made.daemons, rate / BATCH, seed)
        victims = [*made.schedulers, *made.workers[:-1]]
        kills: Counter[str] = Counter()
        ended_by_themselves: list[str] = []
        begun = time.monotonic()
        kill_at = begun + KILL_EVERY_S
        while (now := time.monotonic()) < begun + minutes * SECONDS_A_MINUTE:
            watch.look()
            if now >= kill_at:
                kill_at += KILL_EVERY_S
                victim = random.choice(victims)
                kills[victim.home.name] += 1
                victim.kill()
                time.sleep(DOWN_S)
                watch.restarted(victim)
                victim.start(wait=False)
                say(f"{(now - begun) / 60:5.1f} min: {victim.home.name} killed; {clients.account.ended:,} tasks ended")
            time.sleep(SAMPLE_EVERY_S)
            ended_by_themselves += revive(made.daemons, watch)
        clients.stop()
        seconds = time.monotonic() - begun
        for number in (1, 2):
            made.schedulers[number - 1].wait_ready()
        made.wait_until_whole()
        watch.look()
        account = clients.account
        counts, wrong = check_stores(made, account.batches)
    expected = account.batches * BATCH
    lost = expected - counts["tasks"]
    made_figures = [
        Figure("tasks submitted and ended", expected, ""),
        Figure("  a second", expected / seconds, "/s", most, "no-op tasks at most"),
        Figure("kills", sum(kills.values()), ""),
        Figure("lost", lost, ""),
        Figure("ended otherwise than they must", len(account.wrong), ""),
        Figure("late results of second runs", counts["late results"], ""),
        Figure("attempts", counts["attempts"] / 2, ""),
        Figure("requests asked again", account.asked_again, ""),
        Figure("batches begun late", account.late_batches, ""),
        Figure("submission, p50", percentile(account.submitted_s, 50) * 1e3, "ms"),
        Figure("submission, p99", percentile(account.submitted_s, 99) * 1e3, "ms"),
        Figure("batch ended (the delayed after 2 s), p99", percentile(account.result_s, 99), "s"),
        *trends(watch.samples, made.workers[-1].home.name),
    ]
    return made_figures, [*ended_by_themselves, *account.wrong[:20], *wrong[:20]]


def revive(daemons: list[Daemon], watch: Watch) -> list[str]:
    """Start again what has ended without having been killed, as a service manager would, and say what it said."""
    found = []
    for daemon in daemons:
        if daemon.process is not None and (code := daemon.process.poll()) is not None:
            said = "".join(daemon.log.read_text().splitlines(keepends=True)[-LOG_LINES:])
            found.append(f"{daemon.home.name} ended by itself with code {code}:\n{said}")
            say(found[-1])
            daemon.process = None
            watch.restarted(daemon)
            daemon.start(wait=False)
    return found


def trends(samples: list[Sample], spared: str) -> list[Figure]:
    """How memory and descriptors went, of processes that are not quite young."""
    found: list[Figure] = []
    for name, select in (("schedulers", "scheduler"), ("workers", "worker"), ("the spared worker", spared)):
        ours = [it for it in samples if it.name.startswith(select) and it.age > SETTLED_S]
        if not ours:
            continue
        middle = len(ours) // 2
        sizes = [(it.at, it.rss_bytes / 2**20) for it in ours]
        found += [
            Figure(f"memory of {name}, p50 of the last half", percentile([it for _, it in sizes[middle:]], 50), "MiB"),
            Figure("  growth", growth_per_h(sizes[len(sizes) // 6 :]), "MiB/h"),
            Figure(f"descriptors of {name}, most", max(it.descriptors for it in ours), ""),
            Figure("  growth", growth_per_h([(it.at, it.descriptors) for it in ours][len(ours) // 6 :]), "/h"),
        ]
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="for how long (default 30)")
    parser.add_argument("--share", type=float, default=0.5, help="of the most that it can do (default 0.5)")
    parser.add_argument("--seed", type=int, default=1, help="which daemons are killed")
    parser.add_argument("--json", type=Path, default=figures.RESULTS / "soak.json", help="the file for the figures")
    parser.add_argument("--directory", type=Path, help="where the daemons keep their state (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="taskd-soak-", dir=options.directory) as directory:
        found, wrong = soak(Path(directory), options.minutes, options.share, options.seed)
    figures.show("A cluster whose daemons are killed", found)
    figures.keep(found, options.json)
    for text in wrong:
        print(f"WRONG: {text}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
