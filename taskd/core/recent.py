"""Which tasks changed last, so that a peer that lacks only a little is served without looking through the table."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from taskd.core.seen import Seen
from taskd.protocol.messages import Dot, TaskRow, Term

IDS_MAX = 50_000


class Recent:
    """The last change of each task that changed lately. Everything up to `seen`, where it begins, counts as forgotten;
    beyond `ids_max` tasks the oldest changes are."""

    def __init__(self, seen: Seen, ids_max: int = IDS_MAX) -> None:
        self._ids_max = ids_max
        self._floor = seen.copy()  # of each term: up to there it knows nothing
        # In the order of the changes. A plain dict would look for its oldest entry among all that were taken out.
        self._last: OrderedDict[bytes, Dot] = OrderedDict()

    def note(self, dot: Dot, ids: Iterable[bytes]) -> None:
        """Tasks have changed with this commit, or rows of it have come from elsewhere."""
        last = self._last
        for task_id in ids:
            last[task_id] = dot
            last.move_to_end(task_id)
        while len(last) > self._ids_max:
            self._floor.advance(last.popitem(last=False)[1])

    def forget(self, ids: Iterable[bytes]) -> None:
        """These tasks were purged."""
        for task_id in ids:
            self._last.pop(task_id, None)

    def forget_all(self) -> None:
        """Tasks were purged, and which is not known here."""
        for dot in self._last.values():
            self._floor.advance(dot)
        self._last.clear()

    def forget_before(self, dots: Iterable[Dot]) -> None:
        """Up to these commits there may be rows of which nothing is known here."""
        for dot in dots:
            self._floor.advance(dot)

    def is_outdated(self, task_id: bytes, row: TaskRow | None) -> bool:
        """Whether a task has changed since this row, or its absence, was read."""
        last = self._last.get(task_id)
        return last is not None and (row is None or row.dot.rank() < last.rank())

    def beyond(self, theirs: Seen, ours: Seen) -> list[bytes] | None:
        """The tasks whose last change `theirs` does not cover and `ours` does; None where that goes further back than
        what is remembered."""
        lacking: set[Term] = set()
        for dot in ours.dots():
            known = theirs.lsn_of(dot.term)
            if known < dot.lsn:
                if known < self._floor.lsn_of(dot.term):
                    return None
                lacking.add(dot.term)
        if not lacking:
            return []
        return [task_id for task_id, dot in self._last.items() if dot.term in lacking and not theirs.covers(dot)]
