"""What clients were told, what the stores hold, what really ran: three accounts of the same tasks, compared.

Clients note each submission, and whether and how it was answered. Each task appends a line to a file when it begins, so
that runs are counted where they happen. Afterwards every scheduler's database is read directly, whether or not its
daemon lives.
"""

from __future__ import annotations

import http.client
import itertools
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from taskd.core.task import Outcome, Task, TaskState, decode_report
from taskd.protocol.messages import TaskRow, id_text
from taskd.store.schema import open_reader
from tests.integration.cluster import Daemon, UnixConnection

_COLUMNS = ", ".join(TaskRow.__struct_fields__)


@dataclass
class Submission:
    """One task as its client knows it. Times are of the monotonic clock, in seconds."""

    tag: str  # its name: known even where no id came back
    node: str
    asked: float
    answered: float = 0.0
    id: str = ""
    durability: str = ""
    error: str = ""


class Kept(NamedTuple):
    """One task as a database holds it."""

    id: str
    tag: str
    state: TaskState
    decided: object  # the dot of its decision
    attempts: tuple[tuple[str, Outcome | None, bytes], ...]  # fence, outcome, result

    @property
    def decision(self) -> tuple[object, ...]:
        """What must be the same everywhere."""
        results = [result for _, outcome, result in self.attempts if outcome is Outcome.OK]
        return (self.state, self.decided, tuple(results))


@dataclass
class Report:
    """What came out. Everything but the figures at the end has to be empty."""

    lost: list[str] = field(default_factory=list)  # answered, and in no store
    missing: list[str] = field(default_factory=list)  # in some stores and not in all
    doubled: list[str] = field(default_factory=list)  # one submission, several tasks
    unexpected: list[str] = field(default_factory=list)  # never submitted
    unfinished: list[str] = field(default_factory=list)
    unequal: list[str] = field(default_factory=list)  # decided in one way here, in another there
    wrong: list[str] = field(default_factory=list)  # not succeeded, or with a result that is not of a recorded run
    restarted: list[str] = field(default_factory=list)  # one fencing token, several runs
    unrecorded: list[str] = field(default_factory=list)  # ran, and no store knows the attempt
    answered: int = 0
    replicated: int = 0
    refused: int = 0  # the client got an error, and no task was made
    recovered: int = 0  # the client got no answer, and the task is there and ends all the same
    runs: int = 0
    second_runs: int = 0
    late_results: int = 0  # recorded beside the result that counts

    @property
    def faults(self) -> dict[str, list[str]]:
        """What is not as it has to be, with some examples of each."""
        kinds = (
            "lost", "missing", "doubled", "unexpected", "unfinished", "unequal", "wrong", "restarted", "unrecorded",
        )  # fmt: skip
        return {kind: getattr(self, kind)[:5] for kind in kinds if getattr(self, kind)}

    @property
    def figures(self) -> dict[str, int]:
        """The numbers, for people."""
        kinds = ("answered", "replicated", "refused", "recovered", "runs", "second_runs", "late_results")
        return {kind: getattr(self, kind) for kind in kinds}


class History:
    """What the clients of one test asked for, and were told. Usable from several threads."""

    def __init__(self, directory: Path) -> None:
        self.submissions: list[Submission] = []
        self.runs_file = directory / "runs"
        self._tags = itertools.count(1)

    # -- What clients do -----------------------------------------------------------------------------------------------

    def handler(self, seconds: float = 0.0) -> dict[str, Any]:
        """A call of a Python handler that notes its run and takes some time."""
        return {"type": "note", "params": {"runs": str(self.runs_file), "seconds": seconds}, "on_lost": "retry"}

    def command(self, shell: str = "true") -> dict[str, Any]:
        """The same as a command."""
        line = "$TASKD_TASK_ID $TASKD_ATTEMPT $TASKD_FENCE $$"
        return {"shell": f'echo "{line}" >> {self.runs_file}; {shell}', "on_lost": "retry"}

    def submit(self, node: Daemon, *tasks: dict[str, Any], timeout_s: float = 60) -> list[str]:
        """Submit tasks through a node; whatever is answered is noted. Returns their ids, [] for an error."""
        with closing(UnixConnection(node.socket, timeout_s)) as connection:
            noted = self.submit_on(connection, node.home.name, tasks)
        return [one.id for one in noted if one.id]

    def submit_on(
        self, connection: http.client.HTTPConnection, node: str, tasks: Sequence[dict[str, Any]]
    ) -> list[Submission]:
        """The same on an open connection, which is closed after an error of its own."""
        asked = time.monotonic()
        noted = [Submission(f"tag-{next(self._tags)}", node, asked) for _ in tasks]
        self.submissions += noted
        named = [{**task, "name": one.tag} for task, one in zip(tasks, noted, strict=True)]
        try:
            connection.request("POST", "/v1/tasks", json.dumps(named))
            response = connection.getresponse()
            status, raw = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            status, raw = 0, repr(error).encode()
        answered = time.monotonic()
        if status != 200:
            for one in noted:
                one.error = f"{status}: {raw.decode(errors='replace')[:300]}"
                one.answered = answered
            return noted
        answer = json.loads(raw)
        for one, task_id in zip(noted, answer["ids"], strict=True):
            one.id, one.durability, one.answered = task_id, answer["durability"], answered
        return noted

    @property
    def ids(self) -> list[str]:
        """Of all tasks whose submission was answered."""
        return [one.id for one in self.submissions if one.id]

    def errors(self, *nodes: str) -> list[str]:
        """What clients of these nodes were told instead of an answer; of all, where none is named."""
        return [
            f"{one.node}: {one.error}" for one in self.submissions if one.error and (not nodes or one.node in nodes)
        ]

    def errors_since(self, begin: int) -> list[str]:
        """What clients were told instead of an answer, after so many submissions."""
        return [f"{one.node}: {one.error}" for one in self.submissions[begin:] if one.error]

    # -- What came of it -----------------------------------------------------------------------------------------------

    def check(self, stores: Iterable[Path]) -> Report:
        """Compare what clients know with what these databases hold and what ran."""
        kept = [read_store(path) for path in stores]
        report = Report()
        by_tag: dict[str, set[str]] = defaultdict(set)
        known = {task_id for store in kept for task_id in store}
        for store in kept:
            for task in store.values():
                by_tag[task.tag].add(task.id)
        for one in self.submissions:
            ids = by_tag.pop(one.tag, set())
            if len(ids) > 1:
                report.doubled.append(f"{one.tag}: {sorted(ids)}")
            if not one.id:
                report.recovered += bool(ids)
                report.refused += bool(one.error) and not ids
                continue
            report.answered += 1
            report.replicated += one.durability == "replicated"
            if one.id not in known:
                report.lost.append(f"{one.id} ({one.tag}, {one.durability}, by {one.node})")
        report.unexpected += [f"{tag}: {sorted(ids)}" for tag, ids in by_tag.items()]
        runs = self._runs()
        for task_id in sorted(known):
            self._check_task(report, task_id, [store.get(task_id) for store in kept], runs.pop(task_id, []))
        report.unrecorded += [f"{task_id}: of no known task" for task_id in runs]
        return report

    def _runs(self) -> dict[str, list[str]]:
        """The fences of all runs, by task."""
        runs: dict[str, list[str]] = defaultdict(list)
        if self.runs_file.exists():
            for line in self.runs_file.read_text().splitlines():
                task_id, _, token, _ = line.split()
                runs[task_id].append(token)
        return runs

    @staticmethod
    def _check_task(report: Report, task_id: str, copies: list[Kept | None], runs: list[str]) -> None:
        there = [copy for copy in copies if copy is not None]
        if len(there) < len(copies):
            report.missing.append(f"{task_id}: in {len(there)} of {len(copies)} stores")
        unfinished = [copy for copy in there if not copy.state.is_final]
        if unfinished:
            report.unfinished.append(f"{task_id}: {[copy.state.word for copy in there]} {unfinished[0].attempts}")
        elif len({copy.decision for copy in there}) > 1:
            report.unequal.append(f"{task_id}: {[copy.decision for copy in there]}")
        elif there[0].state is not TaskState.SUCCEEDED:
            report.wrong.append(f"{task_id}: {there[0].state.word} {there[0].attempts}")
        else:
            good = [
                token
                for token, outcome, result in there[0].attempts
                if outcome is Outcome.OK and token in runs and result in (b"", json.dumps(token).encode())
            ]
            if not good:
                report.wrong.append(f"{task_id}: runs {runs}, attempts {there[0].attempts}")
            report.late_results += sum(outcome is Outcome.OK for _, outcome, _ in there[0].attempts) - 1
        attempts = {token for copy in there for token, _, _ in copy.attempts}
        count = Counter(runs)
        report.runs += len(runs)
        report.second_runs += max(0, len(count) - 1)
        report.restarted += [f"{task_id}: {token} {times} times" for token, times in count.items() if times > 1]
        report.unrecorded += [f"{task_id}: {token}" for token in count.keys() - attempts]

    def settle(self, stores: Sequence[Path], timeout_s: float = 60) -> Report:
        """Wait until every task has ended in every store, the same way; what is still not so then is in the report."""
        end = time.monotonic() + timeout_s
        while True:
            report = self.check(stores)
            if not report.faults or time.monotonic() > end:
                return report
            time.sleep(0.2)


def read_store(path: Path) -> dict[str, Kept]:
    """All tasks of a scheduler's database, by id. It may be in use."""
    with closing(open_reader(path)) as connection:
        rows = connection.execute(f"SELECT {_COLUMNS} FROM tasks").fetchall()
    kept = {}
    for row in rows:
        task = Task.from_row(TaskRow(*row))
        attempts = []
        for attempt in task.record.attempts:
            result = decode_report(attempt.report).result if attempt.report else b""
            attempts.append((attempt.key(task.id).fence, attempt.outcome, result))
        task_id = id_text(task.id)
        kept[task_id] = Kept(task_id, task.spec.name, task.state, task.record.decided, tuple(attempts))
    return kept
