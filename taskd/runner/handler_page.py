"""Memory that the pool shares with one handler process: what the process does, and what it has done and not yet said.

A process collects results and sends them together. If it died with results in hand, calls that had ended would be run
again, and nobody could tell which call took it down. So it keeps them here, where they outlive it: the pool then knows
every result, and the one call that was running, exactly. It costs a call a copy and a few stores.

The process alone writes. The pool reads all of it after the process has died, and only `begun` while it lives.
"""

from __future__ import annotations

import fcntl
import mmap
import os

import msgspec

from taskd.runner.handler_messages import HEAD_BYTES, Done, decode_done

PAGE_BYTES = 4 << 20  # Of address space; memory only where it was written.
# Offsets of eight-byte words.
_BEGUN, _STARTED, _RESULTS, _STEP, _STDOUT, _STDERR = range(6)
_WORDS = 8
_ARRAY_HEAD = 5  # msgpack: 0xdd and a count of four bytes.
_ITEMS = _WORDS * 8 + HEAD_BYTES + _ARRAY_HEAD  # Results begin here, after room for the head of their frame.
RESULTS_BYTES_MAX = PAGE_BYTES - _ITEMS
_LENGTH_BITS = 32  # Count and length of the results stand in one word, so that they change together.
_LENGTH_MASK = (1 << _LENGTH_BITS) - 1


class Page:
    """One page. `descriptor` is of its memfd, and is not needed any more afterwards."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, PAGE_BYTES)
        self._view = memoryview(self._memory)
        self._words = self._view[: _WORDS * 8].cast("Q")
        self._times = self._view[: _WORDS * 8].cast("d")

    @staticmethod
    def make() -> int:
        """The descriptor of a new, empty page. Raises OSError."""
        descriptor = os.memfd_create("taskd-handler-page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, PAGE_BYTES)
            # A handler has this descriptor: were the file cut off, reading it here would end the daemon (SIGBUS).
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def close(self) -> None:
        """Let go of the memory."""
        self._words.release()
        self._times.release()
        self._view.release()
        self._memory.close()

    # -- Written by the process ----------------------------------------------------------------------------------------

    def enter(self, step: str) -> None:
        """About to take a step of loading; empty: loading is over."""
        text = step.encode(errors="replace")[:1024]
        self._memory[_ITEMS : _ITEMS + len(text)] = text
        self._words[_STEP] = len(text)

    def begin(self, number: int, started_s: float, stdout_from: int, stderr_from: int) -> None:
        """About to make a call, whose output begins at these offsets."""
        words = self._words
        self._times[_STARTED] = started_s
        words[_STDOUT] = stdout_from
        words[_STDERR] = stderr_from
        words[_BEGUN] = number

    def add(self, item: bytes) -> bool:
        """Keep one more result (the msgpack of a Done); False where there is no room until they are sent."""
        results = self._words[_RESULTS]
        start = _ITEMS + (results & _LENGTH_MASK)
        stop = start + len(item)
        if stop > PAGE_BYTES:
            return False
        self._memory[start:stop] = item
        self._words[_RESULTS] = results + (1 << _LENGTH_BITS) + len(item)
        return True

    @property
    def has_results(self) -> bool:
        """Whether results are kept that were not sent."""
        return self._words[_RESULTS] != 0

    def frame(self) -> memoryview:
        """All results as one frame."""
        count, length = divmod(self._words[_RESULTS], 1 << _LENGTH_BITS)
        head = (length + _ARRAY_HEAD).to_bytes(HEAD_BYTES, "big") + b"\xdd" + count.to_bytes(4, "big")
        start = _ITEMS - len(head)
        self._memory[start:_ITEMS] = head
        return self._view[start : _ITEMS + length]

    def forget(self) -> None:
        """All results were sent."""
        self._words[_RESULTS] = 0

    # -- Read by the pool ----------------------------------------------------------------------------------------------

    @property
    def step(self) -> str:
        """The step of loading that the process was taking, if any."""
        return self._memory[_ITEMS : _ITEMS + min(self._words[_STEP], 1024)].decode(errors="replace")

    @property
    def begun(self) -> int:
        """The number of the call that was begun last."""
        return self._words[_BEGUN]

    @property
    def started_s(self) -> float:
        """When that was."""
        return self._times[_STARTED]

    @property
    def output_from(self) -> tuple[int, int]:
        """Where its output begins in stdout and stderr."""
        return self._words[_STDOUT], self._words[_STDERR]

    def results(self) -> list[Done]:
        """What the process had not sent; nothing where it wrote over its own memory."""
        try:
            return decode_done(self.frame()[HEAD_BYTES:]) if self.has_results else []
        except (msgspec.DecodeError, OverflowError, ValueError):
            return []
