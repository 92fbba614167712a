"""A sorted set of byte strings of one width, in little more memory than they have bytes.

For what is known of millions of tasks that are on the disk alone: a dict of ids takes ten times as much.
"""

from __future__ import annotations

from bisect import bisect_right
from heapq import heapify, heappop, heapreplace
from itertools import islice
from operator import lt

CHUNK_ENTRIES = 1024  # Inserting in the middle moves at most twice as many.


class PackedSet:
    """Entries of `width` bytes each, in the order of their bytes. Adding at the end is cheapest."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._chunk_bytes = CHUNK_ENTRIES * width
        self._chunks: list[bytearray] = []  # none is empty
        self._firsts: list[bytes] = []  # the first entry of each
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, entry: bytes) -> bool:
        if not self._chunks:
            return False
        chunk = self._chunks[self._chunk_of(entry)]
        at = self._place(chunk, entry)
        return chunk[at : at + self._width] == entry

    def add(self, entry: bytes) -> None:
        """Put an entry in, if it is not there."""
        width, chunks = self._width, self._chunks
        if not chunks or entry > chunks[-1][-width:]:
            if not chunks or len(chunks[-1]) >= self._chunk_bytes:
                chunks.append(bytearray())
                self._firsts.append(entry)
            chunks[-1] += entry
            self._count += 1
            return
        index = self._chunk_of(entry)
        chunk = chunks[index]
        at = self._place(chunk, entry)
        if chunk[at : at + width] == entry:
            return
        chunk[at:at] = entry
        self._count += 1
        if at == 0:
            self._firsts[index] = entry
        if len(chunk) > 2 * self._chunk_bytes:
            rest = chunk[self._chunk_bytes :]
            del chunk[self._chunk_bytes :]
            chunks.insert(index + 1, rest)
            self._firsts.insert(index + 1, bytes(rest[:width]))

    def extend(self, entries: bytes) -> None:
        """Put many in, one after the other; quick where they ascend and come after all that are there."""
        width, chunks = self._width, self._chunks
        each = [entries[start : start + width] for start in range(0, len(entries), width)]
        if not all(map(lt, each, islice(each, 1, None))) or (each and chunks and each[0] <= chunks[-1][-width:]):
            for entry in each:
                self.add(entry)
            return
        start = 0
        while start < len(entries):
            if not chunks or len(chunks[-1]) >= self._chunk_bytes:
                chunks.append(bytearray())
                self._firsts.append(entries[start : start + width])
            end = start + self._chunk_bytes - len(chunks[-1])
            chunks[-1] += entries[start:end]
            start = end
        self._count += len(each)

    def discard(self, entry: bytes) -> bool:
        """Take an entry out; whether it was there."""
        if not self._chunks:
            return False
        index = self._chunk_of(entry)
        chunk = self._chunks[index]
        at = self._place(chunk, entry)
        if chunk[at : at + self._width] != entry:
            return False
        del chunk[at : at + self._width]
        self._count -= 1
        self._trim(index)
        return True

    def first(self) -> bytes | None:
        """The least entry."""
        return self._firsts[0] if self._firsts else None

    def peek(self, count: int) -> list[bytes]:
        """The least entries, at most so many."""
        width = self._width
        found: list[bytes] = []
        for chunk in self._chunks:
            wanted = min(len(chunk), (count - len(found)) * width)
            found += (bytes(chunk[start : start + width]) for start in range(0, wanted, width))
            if len(found) >= count:
                break
        return found

    def take(self, count: int) -> list[bytes]:
        """Take the least entries out, at most so many."""
        found = self.peek(count)
        left = len(found) * self._width
        self._count -= len(found)
        while left:
            chunk = self._chunks[0]
            here = min(left, len(chunk))
            left -= here
            del chunk[:here]
            self._trim(0)
        return found

    def count_below(self, entry: bytes) -> int:
        """How many entries are less than this one."""
        if not self._chunks:
            return 0
        index = self._chunk_of(entry)
        before = sum(map(len, self._chunks[:index]))
        return (before + self._place(self._chunks[index], entry)) // self._width

    def _trim(self, index: int) -> None:
        """The begin of a chunk may have changed."""
        chunk = self._chunks[index]
        if chunk:
            self._firsts[index] = bytes(chunk[: self._width])
        else:
            del self._chunks[index], self._firsts[index]

    def _chunk_of(self, entry: bytes) -> int:
        """Which chunk an entry is in, or would be put into."""
        return max(0, bisect_right(self._firsts, entry) - 1)

    def _place(self, chunk: bytearray, entry: bytes) -> int:
        """Where in a chunk an entry begins, or would."""
        width = self._width
        low, high = 0, len(chunk) // width
        while low < high:
            middle = (low + high) // 2
            if chunk[middle * width : (middle + 1) * width] < entry:
                low = middle + 1
            else:
                high = middle
        return low * width


def take_first(
    sets: dict[tuple[int, str], PackedSet], count_max: int, bound: tuple[int, bytes] | None
) -> dict[bytes, int]:
    """Take the entries out that go first, of several sets: by the number that a set's key begins with, then by entry.
    At most so many, and none after `bound`; in order, each with its number. Sets that get empty are removed. Takes time
    in proportion to the number of sets."""
    if len(sets) == 1 and bound is None:
        ((key, only),) = sets.items()
        taken = dict.fromkeys(only.take(count_max), key[0])
        if not len(only):
            del sets[key]
        return taken
    taken = {}
    heads = [((key[0], each.first() or b""), key) for key, each in sets.items()]
    heapify(heads)
    while heads and len(taken) < count_max:
        rank, key = heads[0]
        if bound is not None and rank > bound:
            break
        (entry,) = sets[key].take(1)
        taken[entry] = rank[0]
        following = sets[key].first()
        if following is None:
            del sets[key]
            heappop(heads)
        else:
            heapreplace(heads, ((rank[0], following), key))
    return taken
