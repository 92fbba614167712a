"""Task ids as people write them, and the ids of submissions that may be sent twice.

An id is a UUIDv7 (RFC 9562): its first 48 bits are the millisecond of its making, so that ids sort by age.
"""

from __future__ import annotations

from hashlib import sha256

from taskd.errors import InvalidRequest

FUTURE_S_MAX = 3600.0  # How far ahead of the leader's clock a client's own id may be.

# A key is remembered for a day: the ids made from it carry the quarter of an hour in which it was first used.
KEY_WINDOW_MS = 15 * 60 * 1000
KEY_WINDOWS = 97

_HYPHENS = (8, 13, 18, 23)
_VERSION_7, _VARIANT = 0x70, 0x80
_LOW_BITS = (1 << 62) - 1  # Of the second half of an id, below the variant.
_INDEX_BITS = 17  # Of a place in a submission; the 57 bits of the key's digest above it keep keys apart.


def parse_id(text: str) -> bytes | None:
    """The 16 bytes of a UUID, with its hyphens or without; None where the text is none."""
    if len(text) == 36 and all(text[place] == "-" for place in _HYPHENS):
        text = text.replace("-", "")
    if len(text) != 32:
        return None
    try:
        task_id = bytes.fromhex(text)
    except ValueError:
        return None
    return task_id if len(task_id) == 16 else None  # fromhex passes over blanks


def parse_own_id(text: str, now_s: float, field: str) -> bytes:
    """An id that a client chose. Raises InvalidRequest where it is no UUIDv7 of about now: lists, pages and the
    database rely on the order of ids."""
    task_id = parse_id(text)
    if task_id is None or not _is_version_7(task_id):
        raise InvalidRequest(
            f"{text!r} is not a UUID of version 7; leave `id` out, or send an Idempotency-Key instead", field=field
        )
    if _is_of_the_future(task_id, now_s):
        raise InvalidRequest(f"the time in {text!r} lies more than an hour ahead", field=field)
    return task_id


def _is_version_7(task_id: bytes) -> bool:
    return task_id[6] & 0xF0 == _VERSION_7 and task_id[8] & 0xC0 == _VARIANT


def _is_of_the_future(task_id: bytes, now_s: float) -> bool:
    return int.from_bytes(task_id[:6]) > (now_s + FUTURE_S_MAX) * 1000


class RequestIds:
    """The ids of the tasks that one request makes. They follow from `first_id`, made for it by the node where it came
    in: answered again, by the next leader say, it makes the same tasks and no second ones."""

    def __init__(self, first_id: bytes, now_s: float) -> None:
        """Raises InvalidRequest where the id is none, or of a clock that is far ahead of `now_s`."""
        if len(first_id) != 16 or not _is_version_7(first_id):
            raise InvalidRequest("another node relayed this request with an id that is none")
        if _is_of_the_future(first_id, now_s):
            raise InvalidRequest("the clock of the node that was asked is more than an hour ahead of the leader's")
        self._high = first_id[:8]
        self._low = int.from_bytes(first_id[8:]) & _LOW_BITS

    def id(self, index: int) -> bytes:
        """The id of the new task at this place of the request."""
        return self._high + (_VARIANT << 56 | self._low + index & _LOW_BITS).to_bytes(8)

    def has_made(self, task_id: bytes, count: int) -> bool:
        """Whether it is the id of one of the first `count` new tasks."""
        low = int.from_bytes(task_id[8:]) & _LOW_BITS
        return task_id.startswith(self._high) and (low - self._low) & _LOW_BITS < count


class KeyedIds:
    """The ids that a user's Idempotency-Key stands for: used again within a day, a key gives the same ids.

    Two copies of one first request that are both on their way while a window ends can slip through as two.
    """

    def __init__(self, owner: str, key: str, now_s: float) -> None:
        digest = int.from_bytes(sha256(f"{owner}\0{key}".encode()).digest()[:8])
        self._high = _VERSION_7 << 8 | digest & 0xFFF
        self._low = _VARIANT << 56 | (digest >> 12 & (1 << (62 - _INDEX_BITS)) - 1) << _INDEX_BITS
        self._window = int(now_s * 1000) // KEY_WINDOW_MS

    def candidates(self) -> list[bytes]:
        """The id of the first task, had the key first been used in each of the windows that are remembered."""
        return [self._id(self._window - age, 0) for age in range(min(KEY_WINDOWS, self._window + 1))]

    def adopt(self, known: bytes) -> None:
        """Go on with the ids of a candidate that exists."""
        self._window = int.from_bytes(known[:6]) // KEY_WINDOW_MS

    def id(self, index: int) -> bytes:
        """The id of the task at this place of the submission."""
        return self._id(self._window, index)

    def _id(self, window: int, index: int) -> bytes:
        assert index < 1 << _INDEX_BITS
        return (window * KEY_WINDOW_MS << 16 | self._high).to_bytes(8) + (self._low | index).to_bytes(8)
