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
from taskd.core.settings import SchedulerSettings
from taskd.core.stats import Stats
from taskd.core.task import Outcome, Task, TaskState
from taskd.protocol.messages import AttemptEnded, AttemptKey, Dot

CallOff = Callable[[int, Task, AttemptKey], None]
Acknowledge = Callable[[int, list[AttemptKey]], None]
IsComplete = Callable[[float], bool]  # at a monotonic time
TakeAgain = Callable[[int, list[AttemptEnded], float], None]


class LateResults:
    """The leader's dealing with them."""

    def __init__(
        self, ledger: Ledger, outbox: Outbox, reads: Reads, stats: Stats, take_again: TakeAgain,
        settings: SchedulerSettings, utc: Callable[[float], float],
    ) -> None:  # fmt: skip
        self.settings = settings
        self._ledger = ledger
        self._outbox = outbox
        self._reads = reads
        self._stats = stats
        self._take_again = take_again
        self._utc = utc
        self._is_over = False

    def close(self) -> None:
        """We lead no more: what is being read comes too late."""
        self._is_over = True

    def take(
        self,
        sender: int,
        late: list[AttemptEnded],
        now: float,
        now_s: float,
        is_complete: IsComplete,
        call_off: CallOff,
        acknowledge: Acknowledge,
    ) -> list[AttemptKey]:
        """Use them; returns those that may be acknowledged with what is written now. Others are acknowledged later, by
        `acknowledge`, or not at all. `is_complete`: whether everything that any scheduler knows is here."""
        is_all_here = is_complete(now)
        ready: list[AttemptKey] = []
        elsewhere: dict[AttemptEnded, bool] = {}  # of tasks that are not in memory, and whether we can judge them
        for ended in late:
            key = ended.key
            task = self._ledger.tasks.get(key.task_id)
            is_known = self._outbox.seen.covers(Dot(key.term, key.lsn)) or is_all_here
            if task is not None and ended.outcome == Outcome.OK:
                superseded = task.key
                if superseded is not None:
                    call_off(task.record.attempts[-1].worker, task, superseded)
                self._ledger.late_success(task, ended, sender, now_s)
            elif task is not None and is_known:
                self._ledger.note_late(task, ended, sender)
            else:
                if task is None and (is_known or self._ledger.has_cold):
                    elsewhere[ended] = is_known
                continue
            ready.append(key)
            self._stats.late_results += 1
        if elsewhere:
            self._look_up(sender, elsewhere, is_complete, acknowledge)
        return ready

    def _look_up(
        self, sender: int, elsewhere: dict[AttemptEnded, bool], is_complete: IsComplete, acknowledge: Acknowledge
    ) -> None:
        """Results of tasks that are on the disk alone. They are written down beside those that have ended; those of
        unfinished ones are taken again, now that the tasks are in memory."""
        ids = sorted({ended.key.task_id for ended in elsewhere})

        def found(event: RowsRead, now: float) -> None:
            if self._is_over:
                return
            rows = {row.id: row for row in event.rows}
            ended_tasks: dict[bytes, Task] = {}
            done: list[AttemptKey] = []
            here: list[AttemptEnded] = []
            for ended, is_known in elsewhere.items():
                task_id = ended.key.task_id
                row = rows.get(task_id)
                if row is not None and row.state < TaskState.SUCCEEDED:
                    self._ledger.warm(row)
                if task_id in self._ledger.tasks:
                    here.append(ended)
                    continue
                # A scheduler may have come or gone while we read: what it has, and we had not when we asked, counts.
                is_known_still = self._outbox.seen.covers(Dot(ended.key.term, ended.key.lsn)) or is_complete(now)
                if not (is_known and is_known_still) or self._outbox.is_outdated(task_id, row):
                    continue  # We cannot judge it; or it changes right now, and the worker sends the result again.
                # Otherwise it was purged, or is about to be, and nothing is left to write down.
                if row is not None and not self.settings.may_be_purged(row.finished_s, self._utc(now)):
                    task = ended_tasks.setdefault(task_id, Task.from_row(row))
                    self._ledger.note_late(task, ended, sender)
                done.append(ended.key)
                self._stats.late_results += 1
            acknowledge(sender, done)
            if here:
                self._take_again(sender, here, now)

        self._outbox.then(Continue(lambda now: self._reads.ask(lambda call: ReadRows(call, ids), found)))
