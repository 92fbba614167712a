"""Results of attempts that are not, or no longer, the open attempt of their task.

A success decides a task that is undecided, whoever asked for it: the work is done. Of a task that is decided, the
result is written down beside it, so that second runs can be seen. What we cannot judge, because its leader's rows are
not here yet, stays with the worker, which sends it again; once all schedulers are here and none knows of it, the disk
that did is lost.
"""

from __future__ import annotations

from collections.abc import Callable

from taskd.core.effects import ReadRows
from taskd.core.events import RowsRead
from taskd.core.ledger import Ledger
from taskd.core.outbox import Continue, Outbox
from taskd.core.reads import Reads
from taskd.core.stats import Stats
from taskd.core.task import Outcome, Task
from taskd.protocol.messages import AttemptEnded, AttemptKey, Dot

CallOff = Callable[[int, Task, AttemptKey], None]
Acknowledge = Callable[[int, list[AttemptKey]], None]


class LateResults:
    """The leader's dealing with them."""

    def __init__(self, ledger: Ledger, outbox: Outbox, reads: Reads, stats: Stats) -> None:
        self._ledger = ledger
        self._outbox = outbox
        self._reads = reads
        self._stats = stats
        self._is_over = False

    def close(self) -> None:
        """We lead no more: what is being read comes too late."""
        self._is_over = True

    def take(
        self,
        sender: int,
        late: list[AttemptEnded],
        now_s: float,
        is_complete: bool,
        call_off: CallOff,
        acknowledge: Acknowledge,
    ) -> list[AttemptKey]:
        """Use them; returns those that may be acknowledged with what is written now. Others are acknowledged later, by
        `acknowledge`, or not at all. `is_complete`: everything that any scheduler knows is here."""
        ready: list[AttemptKey] = []
        decided: list[AttemptEnded] = []
        for ended in late:
            key = ended.key
            task = self._ledger.tasks.get(key.task_id)
            is_known = self._outbox.seen.covers(Dot(key.term, key.lsn)) or is_complete
            if task is not None and ended.outcome == Outcome.OK:
                superseded = task.key
                if superseded is not None:
                    call_off(task.record.attempts[-1].worker, task, superseded)
                self._ledger.late_success(task, ended, sender, now_s)
                ready.append(key)
            elif task is not None and is_known:
                self._ledger.note_late(task, ended, sender)
                ready.append(key)
            elif is_known:
                decided.append(ended)
            else:
                continue
            self._stats.late_results += 1
        if decided:
            self._write_down(sender, decided, acknowledge)
        return ready

    def _write_down(self, sender: int, late: list[AttemptEnded], acknowledge: Acknowledge) -> None:
        """Add results to tasks that have ended, which are on the disk alone."""
        by_id: dict[bytes, list[AttemptEnded]] = {}
        for ended in late:
            by_id.setdefault(ended.key.task_id, []).append(ended)

        def found(event: RowsRead, now: float) -> None:
            if self._is_over:
                return
            for row in event.rows:
                is_outdated = self._outbox.recent.is_outdated(row.id, row)
                if row.id in self._ledger.tasks or row.id in self._outbox or is_outdated:
                    by_id.pop(row.id)  # It changes right now; the worker sends the result again.
                    continue
                task = Task.from_row(row)
                for ended in by_id[row.id]:
                    self._ledger.note_late(task, ended, sender)
            # Purged tasks are among these: nothing is left to write down.
            acknowledge(sender, [ended.key for results in by_id.values() for ended in results])

        ids = list(by_id)
        self._outbox.then(Continue(lambda now: self._reads.ask(lambda call: ReadRows(call, ids), found)))
