"""Brings tasks from the disk into memory and lets go of them again: the readings and waits behind the backlog."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from taskd.core.effects import ReadRows
from taskd.core.events import RowsRead
from taskd.core.holdings import Holdings, Wanted
from taskd.core.outbox import Continue, Outbox
from taskd.core.reads import Reads


class Shelf:
    """One reign's. `utc` turns the monotonic `now` into UTC; `changed` is told when tasks have come."""

    def __init__(
        self,
        holdings: Holdings,
        outbox: Outbox,
        reads: Reads,
        utc: Callable[[float], float],
        changed: Callable[[], None],
    ) -> None:
        self._holdings = holdings
        self._outbox = outbox
        self._reads = reads
        self._utc = utc
        self._changed = changed
        self._is_chilling = False
        self._is_over = False

    def close(self) -> None:
        """Another leads: what is being read comes too late."""
        self._is_over = True

    def settle(self, now: float) -> None:
        """At the end of a turn: let go of what may be on the disk alone, and have read whose turn it is."""
        holdings = self._holdings
        if holdings.could_chill and not self._is_chilling:
            self._is_chilling = True
            self._outbox.then(Continue(self._chill))
        for wanted in holdings.wanted(self._utc(now)):
            self._read(wanted)

    def _chill(self, now: float) -> None:
        self._is_chilling = False
        if not self._is_over:
            self._holdings.chill()

    def _read(self, wanted: Wanted) -> None:
        self._reads.ask(lambda call: ReadRows(call, wanted.ids), partial(self._came, wanted))

    def _came(self, wanted: Wanted, event: RowsRead, now: float) -> None:
        if not self._is_over:
            wanted.then(event.rows, self._utc(now))
            self._changed()

    def have(self, ids: Iterable[bytes], then: Callable[[float], None], now: float) -> None:
        """Have those of these tasks in memory that are unfinished, then go on; at once where all that are are there."""
        holdings = self._holdings
        missing = sorted(task_id for task_id in ids if task_id not in holdings.tasks) if holdings.has_cold else []
        if not missing:
            then(now)
            return

        def found(event: RowsRead, now: float) -> None:
            if self._is_over:
                return
            rows = {row.id: row for row in event.rows}
            for row in event.rows:
                holdings.warm(row)
            # Some may have been in memory, changed there and left it again while we read: those are read again.
            outdated = self._outbox.is_outdated
            self.have([task_id for task_id in missing if outdated(task_id, rows.get(task_id))], then, now)

        self._outbox.then(Continue(lambda now: self._reads.ask(lambda call: ReadRows(call, missing), found)))
