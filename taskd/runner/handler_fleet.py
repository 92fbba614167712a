"""Keeps the right number of handler processes: starts them, replaces those that are worn out, and waits between starts
that fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable
from functools import partial

import msgspec

from taskd.protocol.messages import HandlerInfo
from taskd.runner.handler_child import Child
from taskd.runner.handler_messages import Ready, Setup

LOAD_S_MAX = 60.0  # For the modules of a process; then the one that takes so long is left out.
SKIPPED_MAX = 100  # Steps of loading that take processes down: beyond this there is nothing to be saved.
BACKOFF_S_MIN, BACKOFF_S_MAX = 0.1, 30.0  # Between starts that fail.
FAILURES_MAX = 3  # Failed starts in a row from which on nothing is expected of the next one.
PROVED_S = 10.0  # A process that lived for so long, or ended a call, was started well.
LEAVE_S_MAX = 2.0  # When all is closed: for what idle processes do at exit.
CLOSE_S_MAX = 15.0


class Fleet:
    """The processes of a pool. `start_child` starts one, and may raise OSError."""

    def __init__(self, start_child: Callable[[Setup], Child], setup: Setup, count: int) -> None:
        self.children: list[Child] = []
        self.handlers: tuple[HandlerInfo, ...] = ()
        self.problems: list[str] = []  # what could not be loaded, and why
        self.last_failure = ""  # of a start, in words
        self._start_child = start_child
        self._setup = setup
        self._count = count
        self._failures = 0  # of starts, in a row
        self._is_filling = False  # Not while it opens, and not when it closes.
        self._filler: asyncio.Handle | None = None
        self._changed = asyncio.Event()

    @property
    def is_hopeless(self) -> bool:
        """Whether no process takes calls, and starting one has failed again and again."""
        return self._failures >= FAILURES_MAX and not any(child.is_ready for child in self.children)

    # -- Opening and closing -------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Start a process and learn from it what there is to run; then the others, if there is anything. Modules that
        cannot be loaded, not even by a process of their own, are left out. Raises OSError."""
        self._loop = asyncio.get_running_loop()
        if not await self._load() or not self.handlers:
            await self.close()  # Nothing to run, so nothing that takes memory.
            return
        self._is_filling = True
        self._fill()

    async def close(self) -> None:
        """Let idle processes end by themselves, the others by force. Returns when all are gone."""
        self._is_filling = False
        if self._filler is not None:
            self._filler.cancel()
        for child in self.children:
            if child.outstanding or not child.is_ready:
                child.kill()
            else:
                child.leave()
        if not await self._all_end(LEAVE_S_MAX):
            for child in self.children:
                child.kill()
            await self._all_end(CLOSE_S_MAX)

    async def _load(self) -> bool:
        """Have a first process load everything; where that takes it down, again, without what did."""
        while True:
            child = self._start_child(self._setup)
            self.children.append(child)
            is_in_time = await self._in_time(LOAD_S_MAX, partial(self._is_settled, child))
            if child.is_ready and child in self.children:
                return True
            child.kill()
            await self._all_end(CLOSE_S_MAX)
            step = child.step
            how = f"has taken its process down: {end_of(child)}" if is_in_time else f"took more than {LOAD_S_MAX:g} s"
            self.problems.append(f"{step or 'the start of handler processes'} {how}")
            if not step or step in self._setup.skipped or len(self._setup.skipped) >= SKIPPED_MAX:
                return False
            self._setup = msgspec.structs.replace(self._setup, skipped=(*self._setup.skipped, step))

    def _is_settled(self, child: Child) -> bool:
        return child.is_ready or child not in self.children

    async def _all_end(self, timeout_s: float) -> bool:
        return await self._in_time(timeout_s, lambda: not self.children)

    async def _in_time(self, timeout_s: float, is_so: Callable[[], bool]) -> bool:
        """Wait until what processes do makes it so; whether it is."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not is_so():
                    self._changed.clear()
                    await self._changed.wait()
        return is_so()

    # -- What becomes of processes -------------------------------------------------------------------------------------

    def on_ready(self, child: Child, ready: Ready) -> None:
        """It can be given calls."""
        self._changed.set()
        if not self._is_filling:
            self.handlers = ready.handlers
            self.problems.extend(ready.problems)
            return
        able = [other for other in self.children if other.takes_calls]
        tired = next((other for other in able if other.is_tired), None)
        if tired is not None and len(able) > self._count:
            tired.leave()

    def on_tired(self, child: Child, is_urgent: bool) -> None:
        """It wants to be replaced: by one that is ready, or, where it takes too much memory, at once."""
        if is_urgent:
            child.leave()
            child.take_back()
        self._fill()

    def on_exit(self, child: Child) -> None:
        """It is gone."""
        self.children.remove(child)
        self._changed.set()
        if not self._is_filling:
            return
        if child.is_proved or time.monotonic() - child.started_at > PROVED_S:
            self._failures = 0
            self._fill()
        else:
            self._fail(f"handler processes end before they can be used: {end_of(child)}")

    def _fill(self) -> None:
        """Start what is missing, one in a turn of the loop: each stops it for a millisecond."""
        if not self._is_filling or self._filler is not None:
            return
        staying = [child for child in self.children if not child.is_leaving]
        # A tired one works on until its successor is ready.
        if len(staying) >= self._count + any(child.is_tired for child in staying):
            return
        try:
            self.children.append(self._start_child(self._setup))
        except OSError as error:
            self._fail(f"handler processes cannot be started: {error}")
        else:
            self._filler = self._loop.call_soon(self._fill_again)

    def _fail(self, why: str) -> None:
        self._failures += 1
        self.last_failure = why
        if self._filler is not None:
            self._filler.cancel()
        delay_s = min(BACKOFF_S_MIN * 2 ** min(self._failures, 16), BACKOFF_S_MAX)
        self._filler = self._loop.call_later(delay_s, self._fill_again)

    def _fill_again(self) -> None:
        self._filler = None
        self._fill()


def end_of(child: Child) -> str:
    """How a process ended, and its last words."""
    words = child.last_words
    return f"{status_words(child.status)}{': ' if words else ''}{words}"


def status_words(status: int) -> str:
    """How a process ended: its exit code, or minus its signal, in words."""
    if status >= 0:
        return f"it ended with exit code {status}"
    try:
        return f"it was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"it was ended by signal {-status}"
