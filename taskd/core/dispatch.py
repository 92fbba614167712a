"""Hands tasks out to workers, and asks back what has not begun: from what placement says to the messages that leave."""

from __future__ import annotations

from math import inf

from taskd.core.effects import Send
from taskd.core.ledger import Ledger
from taskd.core.outbox import Outbox
from taskd.core.placement import RECALL_WAITED_S, misplaced, place
from taskd.core.roster import Roster, Worker
from taskd.core.settings import SchedulerSettings
from taskd.core.task import Task
from taskd.protocol.messages import Assignment, Recall, Run, Term

STUCK_EVERY_S = RECALL_WAITED_S  # Between two looks for what waits at a worker for long.
RUN_BYTES_MAX = 1 << 20  # Of specs in one Run message: far below a frame, so that no worker waits long for the first.


class Dispatch:
    """One reign's."""

    def __init__(self, term: Term, ledger: Ledger, roster: Roster, outbox: Outbox) -> None:
        self._term = term
        self._ledger = ledger
        self._roster = roster
        self._outbox = outbox

    def hand_out(self, settings: SchedulerSettings, now_s: float) -> None:
        """Give workers what fits."""
        ledger = self._ledger
        if len(ledger.queue):
            self._place(settings, now_s)
        if not len(ledger.queue):
            # With nothing queued, work that waits at one worker while another could begin it is taken back.
            for worker, tasks in misplaced(self._roster, now_s):
                self.recall(worker, tasks)

    def recall_stuck(self, now_s: float) -> None:
        """Take back what has waited at a worker for long while another one could begin it, whatever else is queued:
        nothing of that can have been for the other one."""
        for worker, tasks in misplaced(self._roster, now_s, inf):
            self.recall(worker, tasks)

    def _place(self, settings: SchedulerSettings, now_s: float) -> None:
        runs: dict[int, list[Assignment]] = {}
        sizes: dict[int, int] = {}
        begin = self._ledger.begin
        for task, worker in place(self._ledger.queue, self._roster, settings.prefetch_s, settings.prefetch_max):
            node_id = worker.node_id
            key = begin(task, node_id, now_s)
            batch = runs.get(node_id)
            if batch is None:
                batch = runs[node_id] = []
                sizes[node_id] = 0
            task.run_number = worker.runs_sent + 1
            batch.append(Assignment(key, task.spec_bytes))
            sizes[node_id] += len(task.spec_bytes)
            if sizes[node_id] > RUN_BYTES_MAX:
                self._send_run(worker, runs.pop(node_id))
        for node_id, batch in runs.items():
            self._send_run(self._roster.known(node_id), batch)

    def _send_run(self, worker: Worker, batch: list[Assignment]) -> None:
        worker.runs_sent += 1
        self._outbox.then(Send(worker.node_id, Run(self._term, tuple(batch))))

    def recall(self, worker: Worker, tasks: list[Task]) -> None:
        """Ask for attempts back, unless they have begun."""
        if not tasks or not worker.is_here:
            return
        for task in tasks:
            task.is_recalled = True
        keys = tuple(task.key for task in tasks if task.key is not None)
        self._outbox.then(Send(worker.node_id, Recall(self._term, keys)))
