"""What all commands share that talk to a daemon: the option --socket, and JSON there and back."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from math import inf
from typing import Any

import click

from taskd.cli.output import warn
from taskd.client import calls
from taskd.client.call import ENDLESS, Call, Deadline
from taskd.client.transport import Transport
from taskd.errors import TaskdError

PATIENCE_S = 30.0  # Of commands that wait: a scheduler may restart meanwhile. The others say at once what is wrong.

Json = dict[str, Any]


class Session:
    """One daemon, for the time of one command."""

    def __init__(self, socket: str | None, access: str | None = None) -> None:
        if socket and access:
            raise click.UsageError("--socket names a daemon on this machine and --access one on another: give one")
        self._told = socket, access
        self.transport = Transport(socket, access=access, on_trouble=self._on_trouble)
        self._is_troubled = False

    def beside(self) -> Session:
        """Another one with the same daemon, for what is asked while a stream is read."""
        if self.transport.is_remote:
            return Session(*self._told)
        return Session(self.transport.path)  # This very daemon, where several were looked for.

    def be_patient(self, patience_s: float = PATIENCE_S) -> None:
        """Go on when the daemon restarts or the leader changes; `math.inf` for ever."""
        self.transport.patience_s = patience_s

    def ask(self, call: Call, deadline: Deadline = ENDLESS) -> Any:
        """The answer's JSON. Raises ApiError, NoDaemon, TimeoutError."""
        return json.loads(self.transport.request(call, deadline))

    def tasks(self, filters: dict[str, Any], limit: int | None = None, deadline: Deadline = ENDLESS) -> Iterator[Json]:
        """Tasks that fit, newest first, page by page."""
        cursor: str | None = ""
        while cursor is not None and (limit is None or limit > 0):
            page_size = calls.PAGE_TASKS_MAX if limit is None else min(limit, calls.PAGE_TASKS_MAX)
            page = self.ask(calls.tasks(**filters, cursor=cursor, limit=page_size), deadline)
            yield from page["tasks"]
            cursor = page["cursor"]
            if limit is not None:
                limit -= len(page["tasks"])

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.transport.close()

    def _on_trouble(self, error: TaskdError) -> None:
        if not self._is_troubled:
            self._is_troubled = True
            patience_s = self.transport.patience_s
            how_long = "until it works" if patience_s == inf else f"for {patience_s:g} s"
            what = error.message.partition(";")[0].rstrip(".")  # Advice comes behind: we follow it ourselves.
            warn(f"{what}; trying again {how_long}")

    def has_recovered(self) -> None:
        """The daemon answers again: the next trouble is told like the first."""
        self._is_troubled = False


def talks(function: Callable[..., Any]) -> Callable[..., Any]:
    """A command that talks to a daemon: it gets a Session as its first argument, and --socket and --access."""

    @click.option("--socket", metavar="PATH", help="The daemon's socket; else $TASKD_SOCKET, or the one that is found.")
    @click.option("--access", metavar="F", help="A file for a daemon on another machine; else $TASKD_ACCESS.")
    @functools.wraps(function)
    def command(*args: Any, socket: str | None, access: str | None, **options: Any) -> Any:
        with Session(socket, access) as session:
            return function(session, *args, **options)

    return command
