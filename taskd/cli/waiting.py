"""Waiting for tasks: with a progress bar where somebody looks on, and an exit code that tells how it went."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import msgspec

from taskd.cli.outcome import TIMED_OUT, exit_code_of, sentence, text_of
from taskd.cli.output import note, plural, print_json, print_lines, warn
from taskd.cli.session import Session
from taskd.client import calls
from taskd.client.call import ENDLESS, Deadline
from taskd.client.results import MapWindow
from taskd.client.streams import ResultFlow
from taskd.client.submission import groups_of

FAILURES_SHOWN_MAX = 10
_WHOLE_ID_CHARS = 36

Json = dict[str, Any]


def whole_ids(session: Session, ids: list[str], deadline: Deadline = ENDLESS) -> list[str]:
    """The ids that people meant by ends of ids and `last`, each once. Raises ApiError, TimeoutError."""
    found = [text if len(text) == _WHOLE_ID_CHARS else session.ask(calls.task(text), deadline)["id"] for text in ids]
    return list(dict.fromkeys(found))


class Waiting:
    """Waits for the end of tasks given by whole ids."""

    def __init__(self, session: Session, ids: list[str], *, is_quiet: bool = False) -> None:
        session.be_patient()
        self._session = session
        self._ids = ids
        self._is_quiet = is_quiet
        self._is_timed_out = False
        self.results: dict[str, Json] = {}

    def run(self, deadline: Deadline = ENDLESS) -> None:
        """Wait until all have ended, or the time is up; then say what did not go well. Raises ApiError, NoDaemon."""
        flow = ResultFlow(self._session.transport, MapWindow(groups_of(self._ids), is_ordered=False), deadline)
        try:
            with closing(flow.results()) as results:
                for result in self._watched(results):
                    self.results[result.id] = msgspec.to_builtins(result)
        except TimeoutError:
            self._is_timed_out = True
        if not self._is_quiet:
            self._summarise()

    @property
    def exit_code(self) -> int:
        """0 if all succeeded; of one task its own, of many 1; 124 where the time was up."""
        if self._is_timed_out:
            return TIMED_OUT
        if len(self._ids) == 1:
            return exit_code_of(self.results[self._ids[0]])
        return 1 if self._failures() else 0

    def print_json(self) -> None:
        """One document for one task, a line each for many."""
        found = [self.results[task_id] for task_id in self._ids if task_id in self.results]
        if len(self._ids) == 1 and found:
            print_json(found[0])
        else:
            print_lines(found)

    def print_result(self) -> None:
        """What the one task returned, as JSON; nothing where it did not succeed."""
        for result in self.results.values():
            if result["state"] == "succeeded":
                print_json(result["result"])

    def _failures(self) -> list[Json]:
        return [result for result in self.results.values() if result["state"] != "succeeded"]

    def _summarise(self) -> None:
        if self._is_timed_out:
            left = len(self._ids) - len(self.results)
            warn(f"{plural(left, 'task')} of {len(self._ids):,} had not ended in time")
        failures = self._failures()
        if len(self._ids) == 1:
            for result in self.results.values():
                (warn if failures else note)(sentence(result) if failures else text_of(result))
            return
        for result in failures[:FAILURES_SHOWN_MAX]:
            warn(sentence(result))
        if len(failures) > FAILURES_SHOWN_MAX:
            warn(f"and {len(failures) - FAILURES_SHOWN_MAX:,} more: taskd list --state failed")
        note(f"{len(self.results) - len(failures):,} of {plural(len(self._ids), 'task')} succeeded")

    def _watched(self, results: Iterator[Any]) -> Iterator[Any]:
        """The results, with a progress bar where there are many and somebody looks on."""
        if len(self._ids) == 1 or self._is_quiet or not sys.stderr.isatty():
            yield from results
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("[red]{task.fields[failed]}"), TimeElapsedColumn())
        failed = 0
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("", total=len(self._ids), failed="")
            for result in results:
                failed += not result.is_success
                progress.update(bar, advance=1, failed=f"{failed:,} failed" if failed else "")
                yield result
