"""Results on their way from a handler process: sent in batches, and kept until then in memory that outlives it.

A call that takes its process down must cost itself one attempt and nothing else. So the result of a call is in shared
memory before the next one begins; when the process has died, the worker finds there what was not sent any more, and
knows by that which call was being made. A batch a millisecond costs half of what a message a result would.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable

import msgspec

from taskd.core.task import encode
from taskd.runner.handler_messages import HEAD_BYTES, CallEnded, Ended

MEMORY_BYTES = 256 << 10
FLUSH_S = 0.001  # Results are sent together that ended within this time of each other.
HELD_S = 0.003  # And none waits longer than this behind a call that goes on.

_decoder: msgspec.msgpack.Decoder[CallEnded] = msgspec.msgpack.Decoder(CallEnded)


def shared_memory() -> int:
    """A descriptor of memory for one process's results. Raises OSError."""
    descriptor = os.memfd_create("results", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, MEMORY_BYTES)
    return descriptor


def unsent(descriptor: int) -> list[CallEnded]:
    """The results that a process left in its memory when it died. Some of them may have been sent all the same."""
    memory = os.pread(descriptor, MEMORY_BYTES, 0)
    end = HEAD_BYTES + int.from_bytes(memory[:HEAD_BYTES], "big")
    found: list[CallEnded] = []
    start = HEAD_BYTES
    while start + HEAD_BYTES <= min(end, len(memory)):
        stop = start + HEAD_BYTES + int.from_bytes(memory[start : start + HEAD_BYTES], "big")
        try:
            found.append(_decoder.decode(memory[start + HEAD_BYTES : stop]))
        except msgspec.DecodeError:  # Handlers share that memory, and may have written over it.
            break
        start = stop
    return found


class Results:
    """The process's end: takes results from one thread, and sends them from that or another."""

    def __init__(self, descriptor: int, send: Callable[[Ended], None]) -> None:
        self._memory = mmap.mmap(descriptor, MEMORY_BYTES)  # It duplicates the descriptor for itself.
        os.close(descriptor)
        self._send = send
        self._lock = threading.Lock()
        self._ended: list[CallEnded] = []
        self._used = 0
        self._flushed_at = 0.0

    def add(self, ended: CallEnded) -> None:
        """Keep a result, and send what has gathered where it is time."""
        body = encode(ended)
        size = HEAD_BYTES + len(body)
        with self._lock:
            if HEAD_BYTES + self._used + size > MEMORY_BYTES:
                self._flush()
            self._ended.append(ended)
            start = HEAD_BYTES + self._used
            if start + size > MEMORY_BYTES:  # Larger than the memory: on its way before the next call begins.
                self._flush()
                return
            self._memory[start : start + size] = len(body).to_bytes(HEAD_BYTES, "big") + body
            self._set_used(self._used + size)
            if time.monotonic() - self._flushed_at > FLUSH_S:
                self._flush()

    def flush(self) -> None:
        """Send what is there."""
        with self._lock:
            self._flush()

    def flush_held(self) -> None:
        """Send what is there, where it has waited for long enough."""
        if self._ended and time.monotonic() - self._flushed_at > HELD_S:
            self.flush()

    def _flush(self) -> None:
        self._flushed_at = time.monotonic()
        if self._ended:
            ended, self._ended = self._ended, []
            self._send(Ended(ended))
            self._set_used(0)

    def _set_used(self, used: int) -> None:
        self._used = used
        self._memory[:HEAD_BYTES] = used.to_bytes(HEAD_BYTES, "big")
