"""What a row of a task says, and whether one version of it holds everything that another says."""

from __future__ import annotations

from functools import lru_cache

from taskd.core.task import Attempt, Outcome, Record, TaskSpec, TaskState, decode_record, decode_spec
from taskd.protocol.messages import AttemptKey, TaskRow, Term

_S = TaskState
# PROTOCOL.md: succeeded > failed > cancelled > skipped; a task that timed out has failed, one that expired was skipped.
RANK = {_S.SUCCEEDED: 4, _S.FAILED: 3, _S.TIMED_OUT: 3, _S.CANCELLED: 2, _S.EXPIRED: 1}
OPEN = (_S.ASSIGNED, _S.RUNNING, _S.CANCELLING)

Token = tuple[int, Term, int]


@lru_cache(maxsize=4096)
def record_of(encoded: bytes) -> Record:
    """The record of a row; not to be changed."""
    return decode_record(encoded)


@lru_cache(maxsize=1024)
def spec_of(encoded: bytes) -> TaskSpec:
    """The spec of a row."""
    return decode_spec(encoded)


def token_of(attempt: Attempt) -> Token:
    """What names an attempt within its task."""
    return (attempt.number, attempt.term, attempt.lsn)


def key_of(row: TaskRow, attempt: Attempt) -> AttemptKey:
    """What names an attempt."""
    return AttemptKey(row.id, attempt.number, attempt.term, attempt.lsn)


def rank(state: int) -> int:
    """How much a decision weighs, 0 while there is none."""
    return RANK.get(TaskState(state), 0)


def is_final(row: TaskRow) -> bool:
    """Whether the task is decided."""
    return row.state >= TaskState.SUCCEEDED


def missing_in(newer: TaskRow, older: TaskRow) -> str:
    """What `older` says and `newer` does not, in words; empty where nothing is missing."""
    if newer.record is older.record or newer.record == older.record:
        return "" if newer.state == older.state else f"state {newer.state} instead of {older.state}"
    new, old = record_of(newer.record), record_of(older.record)
    if old.cancel_wanted and not new.cancel_wanted:
        return "the wish to cancel"
    if rank(older.state) > rank(newer.state):
        return f"the decision {TaskState(older.state).name}"
    attempts = {token_of(attempt): attempt for attempt in new.attempts}
    for attempt in old.attempts:
        twin = attempts.get(token_of(attempt))
        if twin is None:
            return f"attempt {attempt.number} of lsn {attempt.lsn}"
        if attempt.started_s and not twin.started_s:
            return f"that attempt {attempt.number} began"
        if attempt.outcome is not None and twin.outcome is None:
            return f"that attempt {attempt.number} ended"
        is_real = attempt.outcome not in (None, Outcome.LOST)
        if is_real and twin.outcome is not attempt.outcome:
            return f"that attempt {attempt.number} ended with {attempt.outcome!r}"
    return ""


def incoherence(row: TaskRow) -> str:
    """What a row says that cannot be, in words; empty where it is sound."""
    state, record = TaskState(row.state), record_of(row.record)
    open_count = sum(1 for attempt in record.attempts if attempt.outcome is None)
    if open_count != (state in OPEN):
        return f"{state.name} with {open_count} open attempts"
    if (row.finished_s > 0) != state.is_final:
        return f"{state.name}, finished at {row.finished_s}"
    if len({token_of(attempt) for attempt in record.attempts}) != len(record.attempts):
        return "one attempt twice"
    if state is TaskState.SUCCEEDED and all(attempt.outcome is not Outcome.OK for attempt in record.attempts):
        return "succeeded without a success"
    return ""
