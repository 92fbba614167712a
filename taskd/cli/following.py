"""What a task writes, passed on to our own stdout and stderr while it is written."""

from __future__ import annotations

import binascii
import json
import sys
import time
from collections.abc import Callable, Collection
from typing import Any

import click

from taskd.cli import silence
from taskd.cli.session import Session
from taskd.cli.terminal import TerminalFilter
from taskd.client import calls
from taskd.client.call import Patience, error_from, is_worth_repeating
from taskd.client.errors import ApiError, ConnectionLost
from taskd.client.lines import LineSplitter

BOTH = ("stdout", "stderr")

raw_option = click.option(
    "--raw", "is_raw", is_flag=True, help="Let what it writes command the terminal: move the cursor, set its title."
)

Json = dict[str, Any]


class Follower:
    """Passes on what a task writes until it has ended, over all its attempts, or what one `attempt` writes.

    `on_silence` is called whenever nothing came for a second. Where the connection breaks, the output is
    read again, and what was passed on before is left out.
    """

    def __init__(
        self,
        session: Session,
        task_id: str,
        printer: Printer,
        *,
        streams: Collection[str] = BOTH,
        attempt: int | None = None,
        on_silence: Callable[[], None],
    ) -> None:
        self._session = session
        self._call = calls.output(task_id, "both", follow=True, attempt=attempt)
        self._printer = printer
        self._streams = streams
        self._on_silence = on_silence
        self._patience = Patience(session.transport.patience_s)
        self._passed: dict[tuple[int, str], int] = {}  # bytes of each attempt and stream
        self._read: dict[tuple[int, str], int] = {}  # the same, over this connection

    def run(self) -> None:
        """Until the end. Raises ApiError, NoDaemon."""
        while True:
            try:
                self._follow()
                self._printer.end()
                return
            except (ConnectionLost, ApiError) as error:
                delay_s = None
                if is_worth_repeating(error, is_repeatable=True, has_answered=True):
                    delay_s = self._patience.next_delay_s(time.monotonic())
                if delay_s is None:
                    raise
                time.sleep(delay_s)

    def _follow(self) -> None:
        self._read = {}
        lines = LineSplitter()
        with self._session.transport.open(self._call) as stream:
            while True:
                try:
                    data = stream.read(silence.SILENCE_S)
                except TimeoutError:
                    self._on_silence()
                    continue
                if not data:
                    return
                for line in lines.feed(data):
                    self._pass_on(json.loads(line), line)
                self._patience.restore()

    def _pass_on(self, part: Json, line: bytes) -> None:
        if "error" in part:
            raise error_from(503, line)
        data, name = binascii.a2b_base64(part["data"]), part["stream"]
        key = (part.get("attempt", 0), name)
        begin = self._read.get(key, 0)
        self._read[key] = begin + len(data)
        fresh = data[max(0, self._passed.get(key, 0) - begin) :]
        if fresh:
            self._passed[key] = begin + len(data)
            if name in self._streams:
                self._printer.write(name, fresh)


class Printer:
    """Passes the bytes of tasks on to our own stdout and stderr at once: as they are into files and pipes, and where
    `is_raw`; without what could command a terminal where it is one."""

    def __init__(self, *, is_raw: bool = False) -> None:
        self._files = {"stdout": sys.stdout, "stderr": sys.stderr}
        self._filters = {name: TerminalFilter() for name, file in self._files.items() if file.isatty() and not is_raw}

    def write(self, stream: str, data: bytes) -> None:
        """Write bytes to our own stdout or stderr."""
        filter = self._filters.get(stream)
        self._put(stream, data if filter is None else filter.feed(data))

    def end(self) -> None:
        """Write what was held back: the last bytes may be half a character."""
        for stream, filter in self._filters.items():
            self._put(stream, filter.end())

    def _put(self, stream: str, data: bytes) -> None:
        file = self._files[stream]
        file.flush()
        file.buffer.write(data)
        file.buffer.flush()
