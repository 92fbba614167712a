"""Runs `command` tasks through a launcher: what a task can count on, and what its end means, is as in command.py. Here
is what stays with the worker: the output."""

from __future__ import annotations

import asyncio

from msgspec import structs

from taskd.core.effects import Begin
from taskd.core.task import ErrorInfo, Outcome, Report, TaskSpec, decode_report
from taskd.protocol.messages import AttemptEnded, AttemptKey, AttemptStarted
from taskd.runner.base import OnProgress, Progress, ended, error_info, not_started
from taskd.runner.capture import Capture
from taskd.runner.command import CLOSE_S_MAX, WATCH_S
from taskd.runner.launched import Launches
from taskd.runner.output import Output


class LaunchedCommandKind:
    """Runs commands; see `Kind` in base.py. `output` and `launches` are opened before it and closed after it."""

    def __init__(self, on_progress: OnProgress, output: Output, launches: Launches) -> None:
        self._progress = Progress(on_progress)
        self._output = output
        self._launches = launches
        self._running: dict[AttemptKey, Capture] = {}
        self._errors: dict[AttemptKey, ErrorInfo] = {}  # why we ended them
        self._watcher: asyncio.TimerHandle | None = None
        self._idle: asyncio.Future[None] | None = None  # awaited by close

    async def open(self) -> None:
        """Get ready to run."""
        self._loop = asyncio.get_running_loop()

    def start(self, begins: list[Begin]) -> None:
        """Start these attempts."""
        for begin in begins:
            self._begin(begin.key, begin.spec)
        if self._watcher is None and self._running:
            self._watcher = self._loop.call_later(WATCH_S, self._watch)

    def terminate(self, key: AttemptKey) -> None:
        """TERM to the attempt's process group."""
        if key in self._running:
            self._launches.signal(key, is_kill=False)

    def kill(self, key: AttemptKey) -> None:
        """KILL to all that the attempt started."""
        if key in self._running:
            self._launches.signal(key, is_kill=True)

    async def close(self) -> None:
        """Kill what still runs, wait for its end and tell of it."""
        for key in tuple(self._running):
            self.kill(key)
        if self._running:
            self._idle = self._loop.create_future()
            await asyncio.wait([self._idle], timeout=CLOSE_S_MAX)
        for key in tuple(self._running):
            self.on_lost(key, error_info("Unkillable", "it was killed and does not end"))
        if self._watcher is not None:
            self._watcher.cancel()
        self._progress.close()

    def _begin(self, key: AttemptKey, spec: TaskSpec) -> None:
        try:
            capture = self._output.begin(key)
        except OSError as error:
            problem = error_info(type(error).__name__, f"no files for its output: {error}")
            return self._progress.ended(not_started(key, problem))
        self._running[key] = capture
        what = TaskSpec(
            type=spec.type,
            argv=spec.argv,
            shell=spec.shell,
            env=spec.env,
            secrets=spec.secrets,  # By themselves: what the launcher says of a failed start must not name one.
            cwd=spec.cwd,
            resources=spec.resources,
        )
        self._launches.launch(key, what, (capture.stdout_fd, capture.stderr_fd), self)
        return None

    # -- What the launcher says ----------------------------------------------------------------------------------------

    def on_started(self, started: AttemptStarted) -> None:
        """It began a moment ago."""
        self._progress.tell_started([started])

    def on_ended(self, told: AttemptEnded) -> None:
        """It has ended; what it wrote is here."""
        self._finish(told.key, Outcome(told.outcome), decode_report(told.report), told.started_s, told.ended_s)

    def on_lost(self, key: AttemptKey, error: ErrorInfo) -> None:
        """Nobody knows how it ended."""
        if key in self._running:
            self._finish(key, Outcome.LOST, Report(error=error), 0.0, None)

    def _finish(
        self, key: AttemptKey, outcome: Outcome, report: Report, started_s: float, ended_s: float | None
    ) -> None:
        captured = self._output.end(self._running.pop(key))
        report = structs.replace(
            report,
            error=self._errors.pop(key, None) or report.error,
            stdout_tail=captured.stdout_tail,
            stderr_tail=captured.stderr_tail,
            stdout_bytes=captured.stdout_bytes,
            stderr_bytes=captured.stderr_bytes,
        )
        self._progress.ended(ended(key, outcome, report, started_s, ended_s))
        if self._idle is not None and not self._running and not self._idle.done():
            self._idle.set_result(None)

    def _watch(self) -> None:
        """While anything runs: keep the output within its bounds."""
        for key, why in self._output.bound():
            if key in self._running and key not in self._errors:
                limit = self._output.stream_bytes_max
                self._errors[key] = error_info(
                    "OutputTooLarge", f"it wrote more than {limit} bytes to one stream: {why}"
                )
                self.kill(key)
        self._watcher = self._loop.call_later(WATCH_S, self._watch) if self._running else None
