"""The join of two versions of one task, made by leaders that did not know of each other.

A task is a product of parts, and each part has a join of its own: attempts by their token, further along wins; the wish
to cancel, or; the decision, the greatest by rank and then by the commit that made it. So histories can be joined in any
order, and again, with the same result. (Shapiro, Preguiça, Baquero, Zawirski: "Conflict-free Replicated Data Types",
SSS 2011.)
"""

from __future__ import annotations

from msgspec import Struct

from taskd.core.task import RAN_TWICE, Attempt, Outcome, Record, TaskState, decode_record
from taskd.protocol.messages import Dot, TaskRow, Term

_RANK = {
    TaskState.EXPIRED: 1, TaskState.CANCELLED: 2, TaskState.FAILED: 3, TaskState.TIMED_OUT: 3, TaskState.SUCCEEDED: 4,
}  # fmt: skip
_NEVER = Dot(Term(0, 0, 0), 0)

_Token = tuple[int, tuple[int, int, int], int]


class Joined(Struct, frozen=True):
    """What both versions come to."""

    state: TaskState
    record: Record
    changed_s: float
    finished_s: float


def join(mine: TaskRow, theirs: TaskRow) -> Joined:
    """Both rows are of the same task. Raises msgspec.DecodeError where one is damaged."""
    one, other = decode_record(mine.record), decode_record(theirs.record)
    attempts = _join_attempts(one.attempts, other.attempts)
    accepted = min((dot for dot in (one.accepted, other.accepted) if dot is not None), key=Dot.rank, default=None)
    cancel_wanted = one.cancel_wanted or other.cancel_wanted
    changed_s = max(mine.changed_s, theirs.changed_s)
    final = [(row, record) for row, record in ((mine, one), (theirs, other)) if TaskState(row.state).is_final]
    if final:
        row, winner = max(final, key=lambda it: _decision_rank(*it))
        attempts = _closed_but(attempts, None)
        if winner.attempts:  # The one that speaks for the task is the last.
            token = _token(winner.attempts[-1])
            attempts.sort(key=lambda attempt: (_token(attempt) == token, _token(attempt)))
        record = Record(attempts, cancel_wanted, 0.0, winner.reason, accepted, winner.decided)
        return Joined(TaskState(row.state), record, changed_s, row.finished_s)
    still_open = [attempt for attempt in attempts if attempt.outcome is None]
    current = max(still_open, key=lambda attempt: (attempt.term.rank(), attempt.lsn), default=None)
    attempts = _closed_but(attempts, current)
    attempts.sort(key=lambda attempt: (attempt is current, _token(attempt)))
    due_s = max(one.due_s, other.due_s) if current is None else 0.0
    record = Record(attempts, cancel_wanted, due_s, "", accepted, None)
    return Joined(_open_state(record, current), record, changed_s, 0.0)


def same(row: TaskRow, joined: Joined) -> bool:
    """Whether a row says already what the join says."""
    is_equal = row.state == joined.state and row.changed_s == joined.changed_s and row.finished_s == joined.finished_s
    return is_equal and decode_record(row.record) == joined.record


def _open_state(record: Record, current: Attempt | None) -> TaskState:
    if current is not None:
        if record.cancel_wanted:
            return TaskState.CANCELLING
        return TaskState.RUNNING if current.started_s else TaskState.ASSIGNED
    if record.due_s:
        return TaskState.RETRYING if record.attempts else TaskState.SCHEDULED
    return TaskState.QUEUED


def _decision_rank(row: TaskRow, record: Record) -> tuple[object, ...]:
    decided = record.decided or _NEVER
    # The rest makes the order total where nothing else tells two decisions apart.
    return _RANK[TaskState(row.state)], decided.rank(), row.state, row.finished_s, record.reason


def _token(attempt: Attempt) -> _Token:
    return attempt.number, attempt.term.rank(), attempt.lsn


def _join_attempts(ours: list[Attempt], theirs: list[Attempt]) -> list[Attempt]:
    joined: dict[_Token, Attempt] = {}
    for attempt in (*ours, *theirs):
        token = _token(attempt)
        known = joined.get(token)
        joined[token] = attempt if known is None else _join_attempt(known, attempt)
    return [joined[token] for token in sorted(joined)]


def _join_attempt(one: Attempt, other: Attempt) -> Attempt:
    further = max(one, other, key=_progress)
    return Attempt(
        further.number, further.term, further.lsn, max(one.worker, other.worker),
        max(one.dispatched_s, other.dispatched_s), max(one.started_s, other.started_s), further.ended_s,
        further.outcome, further.report, further.reason,
    )  # fmt: skip


def _progress(attempt: Attempt) -> tuple[object, ...]:
    """How far an attempt is: what its worker said of its end counts above what a leader assumed."""
    outcome = attempt.outcome
    if outcome is None:
        return 0, 0, 0.0, b"", ""
    stage = 1 if outcome is Outcome.LOST else 2
    return stage, -int(outcome), attempt.ended_s, attempt.report, attempt.reason


def _closed_but(attempts: list[Attempt], current: Attempt | None) -> list[Attempt]:
    """The attempts, all open ones but `current` given up. All that is written is known in every version of them, so
    that it does not matter in which join it is done."""
    return [
        attempt
        if attempt.outcome is not None or attempt is current
        else Attempt(
            attempt.number, attempt.term, attempt.lsn, attempt.worker, attempt.dispatched_s, attempt.started_s,
            attempt.dispatched_s, Outcome.LOST, b"", RAN_TWICE,
        )
        for attempt in attempts
    ]  # fmt: skip
