"""The leader's tasks: what becomes of each one, from acceptance to the end. Every change is written to the outbox.

Where they are, in memory or on the disk alone, is in holdings.py.

`now_s` is UTC throughout: tasks live by the calendar, connections by the monotonic clock.
"""

from __future__ import annotations

from random import Random

from taskd.core import retry
from taskd.core.calendar import Due
from taskd.core.events import NewTask
from taskd.core.holdings import Holdings
from taskd.core.outbox import Outbox
from taskd.core.stats import Stats
from taskd.core.task import (
    ASSIGNED,
    CANCELLED,
    CANCELLING,
    EXPIRED,
    FAILED,
    QUEUED,
    REPORTS_KEPT,
    RETRYING,
    RUNNING,
    SCHEDULED,
    SUCCEEDED,
    Attempt,
    Outcome,
    Record,
    Task,
    TaskState,
)
from taskd.protocol.messages import AttemptEnded, AttemptKey, AttemptStarted

# Looked up once, as the states: see task.py.
_OUTCOMES = {int(outcome): outcome for outcome in Outcome}
_OK, _EXCEPTION, _LOST, _PREEMPTED = Outcome.OK, Outcome.EXCEPTION, Outcome.LOST, Outcome.PREEMPTED


class Ledger(Holdings):
    """One reign's tasks."""

    def __init__(self, outbox: Outbox, stats: Stats, random: Random, crash_limit: int, window: int) -> None:
        super().__init__(outbox, window)
        self._stats = stats
        self._random = random
        self._crash_limit = crash_limit

    # -- From the outside ----------------------------------------------------------------------------------------------

    def accept(self, new: NewTask, now_s: float) -> bool:
        """Take a new task; False where its id is known already: the same submission, sent again."""
        if new.id in self.tasks or new.id in self._outbox:
            return False
        spec = new.spec
        is_early = spec.not_before_s > now_s
        state = SCHEDULED if is_early else QUEUED
        task = Task(new.id, spec, new.spec_bytes, state, Record([], due_s=spec.not_before_s if is_early else 0.0))
        self.tasks[new.id] = task
        self.counts.add(state, spec.queue)
        self._index(task)
        self._outbox.insert(task)
        self._stats.count_submitted(spec.type, spec.queue)
        return True

    def cancel(self, task: Task, now_s: float) -> None:
        """Want a task cancelled: at once where no attempt is open, otherwise when that has ended."""
        if task.record.cancel_wanted:
            return
        task.record.cancel_wanted = True
        if task.key is None:
            self._finish(task, CANCELLED, now_s)
        else:
            self._move(task, CANCELLING, now_s)
            self._outbox.update(task)

    # -- Attempts ------------------------------------------------------------------------------------------------------

    def begin(self, task: Task, worker: int, now_s: float) -> AttemptKey:
        """Mint the next attempt of a task just taken from the queue, for this worker."""
        outbox = self._outbox
        attempts = task.record.attempts
        number = len(attempts) + 1
        if number == 1:
            self._stats.wait.observe(now_s - max(task.spec.submitted_s, task.spec.not_before_s))
        if task.spec.deadline_s:
            self._calendar.clear(Due.TOO_LATE, task.id)
        attempts.append(Attempt(number, outbox.term, outbox.lsn, worker, now_s))
        key = task.key = AttemptKey(task.id, number, outbox.term, outbox.lsn)
        task.is_recalled = False
        self._move(task, ASSIGNED, now_s)
        outbox.update(task)
        return key

    def current(self, key: AttemptKey) -> Task | None:
        """The task whose open attempt this is, or None: the attempt is over, or not of this history."""
        task = self.tasks.get(key.task_id)
        return task if task is not None and task.key == key else None

    def started(self, started: AttemptStarted, now_s: float) -> None:
        """A worker began an attempt."""
        task = self.current(started.key)
        if task is None or task.state is not ASSIGNED:
            return  # Ended, cancelled or lost in the meantime.
        task.record.attempts[-1].started_s = started.started_s
        self._move(task, RUNNING, now_s)
        self._outbox.update(task)

    def ended(self, task: Task, ended: AttemptEnded, now_s: float) -> None:
        """The open attempt of a task has ended: decide what follows."""
        outcome = _OUTCOMES.get(ended.outcome, _EXCEPTION)  # which is what one of a newer worker is taken for
        attempt = task.record.attempts[-1]
        attempt.started_s = ended.started_s or attempt.started_s
        attempt.ended_s = ended.ended_s
        attempt.report = ended.report
        if ended.started_s and outcome is not _PREEMPTED:
            duration_s = max(0.0, ended.ended_s - ended.started_s)
            self._stats.duration.observe(duration_s)
            assert task.shape is not None
            task.shape.ran(duration_s)
        if outcome is _LOST:
            # Its worker knows from its journal that it had begun, and not when: at this time or later.
            attempt.started_s = attempt.started_s or attempt.dispatched_s
            self.lose(task, "its worker restarted", "worker_restarted", now_s)
            return
        self._close(task, attempt, outcome)
        if outcome is _OK:
            self._finish(task, SUCCEEDED, now_s)
        elif task.record.cancel_wanted:
            self._finish(task, CANCELLED, now_s)
        elif outcome is _PREEMPTED:
            if ended.started_s and task.spec.on_lost == "fail":
                self._finish(task, FAILED, now_s, "its worker stopped while it ran, and on_lost is fail")
            else:
                self._requeue(task, now_s)
        else:
            self._failed(task, outcome, now_s)

    def lose(self, task: Task, reason: str, cause: str, now_s: float) -> None:
        """The open attempt is lost with its worker: again, unless the task must not or has done so too often."""
        attempt = task.record.attempts[-1]
        attempt.reason = reason
        attempt.ended_s = attempt.ended_s or now_s
        self._close(task, attempt, _LOST)
        self._stats.lost[cause] += 1
        count = retry.losses(task.record)
        if task.record.cancel_wanted:
            self._finish(task, CANCELLED, now_s, reason)
        elif task.spec.on_lost == "fail":
            self._finish(task, FAILED, now_s, f"lost ({reason}), and on_lost is fail")
        elif count >= self._crash_limit:
            self._finish(task, FAILED, now_s, f"lost {count} times: it may be what takes its workers down")
        else:
            self._requeue(task, now_s)

    # -- Attempts that are not the open one ----------------------------------------------------------------------------

    def resume(self, task: Task, key: AttemptKey, worker: int, now_s: float) -> None:
        """A queued task is at a worker already, from a leader whose word did not reach us: that is its open attempt."""
        self.queue.remove(task)
        self._calendar.clear(Due.TOO_LATE, task.id)
        task.record.attempts.append(Attempt(key.number, key.term, key.lsn, worker, now_s))
        task.key = key
        task.shape = self.queue.shape_of(task.spec)
        self._move(task, ASSIGNED, now_s)
        self._outbox.update(task)

    def late_success(self, task: Task, ended: AttemptEnded, worker: int, now_s: float) -> None:
        """An attempt that had been given up, or of which we knew nothing, has succeeded: the task is done."""
        attempt = task.record.open_attempt
        if attempt is not None:
            attempt.reason = "another attempt succeeded first"
            attempt.ended_s = now_s
            self._close(task, attempt, _LOST)
        late = task.attempt(ended.key) or Attempt(ended.key.number, ended.key.term, ended.key.lsn, worker, 0.0)
        _write_result(late, ended)
        # The one that speaks for the task is the last.
        task.record.attempts = [other for other in task.record.attempts if other is not late] + [late]
        self._finish(task, SUCCEEDED, now_s)

    def note_late(self, task: Task, ended: AttemptEnded, worker: int) -> None:
        """Write down the result of an attempt that decides nothing any more."""
        attempts = task.record.attempts
        late = task.attempt(ended.key)
        if late is None:
            late = Attempt(ended.key.number, ended.key.term, ended.key.lsn, worker, ended.started_s)
            attempts.insert(max(0, len(attempts) - 1), late)  # The last one speaks for the task.
        speaks = task.state >= SUCCEEDED and late is attempts[-1]
        if late.outcome is None or (late.outcome is _LOST and not speaks):
            _write_result(late, ended)
            self._outbox.update(task)

    def _failed(self, task: Task, outcome: Outcome, now_s: float) -> None:
        count = retry.failures(task.record)
        if count > task.spec.retries:
            self._finish(task, retry.final_state(outcome), now_s)
            return
        self._stats.retries += 1
        task.record.due_s = now_s + retry.delay_s(task.spec.backoff, count, self._random)
        self._move(task, RETRYING, now_s)
        self._calendar.set(Due.READY, task.id, task.record.due_s)
        self._outbox.update(task)

    def _close(self, task: Task, attempt: Attempt, outcome: Outcome) -> None:
        attempt.outcome = outcome
        task.key = None
        attempts = task.record.attempts
        if len(attempts) > REPORTS_KEPT:
            attempts[-1 - REPORTS_KEPT].report = b""

    def _requeue(self, task: Task, now_s: float) -> None:
        self._move(task, QUEUED, now_s)
        self.queue.push(task)
        self._set_deadline(task)
        self._outbox.update(task)

    def _finish(self, task: Task, state: TaskState, now_s: float, reason: str = "") -> None:
        if task.state is QUEUED:
            self.queue.remove(task)
        self._calendar.clear(Due.READY, task.id)
        self._calendar.clear(Due.TOO_LATE, task.id)
        task.record.reason = reason
        self._move(task, state, now_s)
        del self.tasks[task.id]
        attempts = task.record.attempts
        outcome = attempts[-1].outcome if attempts else None
        spec = task.spec
        self._stats.count_finished(spec.type, spec.queue, _PREEMPTED if outcome is None else outcome)
        self._outbox.update(task)

    def _on_due(self, kind: Due, task_id: bytes, now_s: float) -> None:
        task = self.tasks.get(task_id)
        if task is None:
            return  # Its time to begin and its deadline came together: it has just expired.
        if kind is Due.READY:
            task.record.due_s = 0.0
            self._requeue(task, now_s)
        else:
            self._finish(task, EXPIRED, now_s, "its deadline to begin has passed")


def _write_result(attempt: Attempt, ended: AttemptEnded) -> None:
    outcome = _OUTCOMES.get(ended.outcome, _EXCEPTION)
    # What was lost stays so, unless it has succeeded after all: it was counted as that, and most that end later were
    # ended because they were lost. As a failure it would take one of the retries.
    if attempt.outcome is not _LOST or outcome is Outcome.OK:
        attempt.outcome = outcome
    attempt.started_s = ended.started_s or attempt.started_s
    attempt.ended_s = ended.ended_s
    attempt.report = ended.report
