"""Task ids made by the client: UUIDv7 (RFC 9562), so that a submission sent twice makes no second task."""

from __future__ import annotations

import os
import threading
import time

# Below the millisecond an id counts on from a random start, so that those of one submission keep their order, and ends
# in random bits, so that no two processes make the same.
_COUNTER_BITS = 42
_TAIL_BITS = 32

_lock = threading.Lock()
_last_ms = 0
_counter = 0


def new_id() -> str:
    """A fresh id as text, above every id that this process made before."""
    global _last_ms, _counter
    now_ms = time.time_ns() // 1_000_000
    noise = int.from_bytes(os.urandom(9))
    with _lock:
        if now_ms > _last_ms:
            _last_ms = now_ms
            _counter = noise >> _TAIL_BITS & (1 << _COUNTER_BITS - 2) - 1  # The upper bits are left to count into.
        else:
            _counter += 1
        counter, last_ms = _counter, _last_ms
    digits = (
        f"{last_ms:012x}7{counter >> 30:03x}{0b10 << 30 | counter & 0x3FFF_FFFF:08x}{noise & (1 << _TAIL_BITS) - 1:08x}"
    )
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
