"""placeholder until the real one lands"""

from __future__ import annotations

from taskd.core.seen import Seen
from taskd.protocol.messages import Dot


class Recent:
    def __init__(self, seen: Seen, ids_max: int = 50_000) -> None:
        self._floor = seen.copy()
        self._notes: list[tuple[Dot, list[bytes]]] = []

    def note(self, dot: Dot, ids: list[bytes]) -> None:
        self._notes.append((dot, ids))

    def beyond(self, theirs: Seen, ours: Seen) -> list[bytes] | None:
        for dot in ours.dots():
            if theirs.lsn_of(dot.term) < min(dot.lsn, self._floor.lsn_of(dot.term)):
                return None
        found: dict[bytes, None] = {}
        for dot, ids in self._notes:
            if not theirs.covers(dot):
                found.update(dict.fromkeys(ids))
        return list(found)
