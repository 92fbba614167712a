"""taskd run: a command on the cluster as if it ran here: its output, its exit code, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

import click

from taskd.cli.following import Follower, Printer, raw_option
from taskd.cli.outcome import exit_code_of, text_of
from taskd.cli.output import short, warn
from taskd.cli.session import Session, talks
from taskd.cli.silence import Silence
from taskd.cli.submission import encode, refusal, task_options
from taskd.cli.submit import what_to_do
from taskd.client import calls
from taskd.client.errors import ApiError
from taskd.client.ids import new_id

RESULT_WAIT_S = 30.0

Json = dict[str, Any]


@click.command(
    "run",
    context_settings={"allow_interspersed_args": False},
    epilog="""\b
Examples:
  taskd run -- uname -a
  taskd run --cpus 4 --timeout 1h -- make -j4 world
  taskd run --constraint os=debian --shell 'apt list --upgradable | wc -l'

The exit code is that of the command, 128 + N for signal N, 124 where it ran longer than --timeout. Ctrl-C cancels the
task and waits for its end; once more leaves at once. The input is empty, and nothing of this directory goes along.""",
)
@click.argument("command", nargs=-1, metavar="[--] [CMD]...")
@click.option("--shell", metavar="LINE", help="A line for the shell instead of a command.")
@raw_option
@task_options
@talks
def run(session: Session, *, command: tuple[str, ...], shell: str | None, is_raw: bool, options: Json) -> int:
    """Run a command on whichever worker has room; print what it writes, and end with its exit code."""
    task = {**what_to_do(command, shell=shell, ways="--shell"), **options, "id": new_id()}
    session.be_patient()
    return Run(session, task, Printer(is_raw=is_raw)).run()


class Run:
    """One task, from its submission to its end."""

    def __init__(self, session: Session, task: Json, printer: Printer) -> None:
        self._session = session
        self._printer = printer
        self._task = task
        self._id: str = task["id"]
        self._is_submitted = False
        self._signal = 0  # that asked us to end
        self._silence = Silence(session, self._id)

    def run(self) -> int:
        """Submit the task and see it through; returns the exit code. Raises ApiError, NoDaemon."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self._run()
        except BrokenPipeError:
            self._cancel()  # Nobody reads what it writes any more.
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        try:
            self._session.ask(calls.submit(encode(self._task)))
        except ApiError as error:
            raise refusal(error) from None
        self._is_submitted = True
        if self._signal:
            self._cancel()
        Follower(self._session, self._id, self._printer, on_silence=self._on_silence).run()
        result = self._result()
        sys.stdout.flush()
        if self._signal:
            return 128 + self._signal
        if result["state"] != "succeeded" and not result["exit_code"]:
            warn(f"task {short(self._id)} {_verb(result)}{text_of(result)}")
        return exit_code_of(result)

    def _result(self) -> Json:
        while True:
            result: Json = self._session.ask(calls.result(self._id, RESULT_WAIT_S))
            if result["state"] in ("succeeded", "failed", "cancelled", "timed_out", "expired"):
                return result

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first time: cancel the task, and wait for its end. The second time: leave."""
        if self._signal:
            raise KeyboardInterrupt
        self._signal = number
        if self._is_submitted:
            # Past Python's own stderr, which this may have interrupted in the middle of a line.
            os.write(2, f"taskd: cancelling task {short(self._id)}; once more leaves it to end by itself\n".encode())
            self._cancel()

    def _cancel(self) -> None:
        self._session.ask(calls.cancel({"ids": [self._id]}))

    def _on_silence(self) -> None:
        if not self._signal:
            self._silence.tell()


def _verb(result: Json) -> str:
    return "" if result["state"] in ("cancelled", "timed_out", "expired") else "failed: "
