"""Whether rows from another scheduler are such as a scheduler writes. What is not is refused, with all around it: a row
that was taken in unread would end the next one that has to lead with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite

import msgspec

from taskd.core.constraints import parse
from taskd.core.task import PRIORITY_MAX, Record, TaskSpec, TaskState, decode_record, decode_spec
from taskd.protocol.messages import NodeRow, TaskRow

_STATES = frozenset(TaskState)
_WITH_ATTEMPT = frozenset({TaskState.ASSIGNED, TaskState.RUNNING, TaskState.CANCELLING})


def misfit(rows: Iterable[TaskRow], nodes: Iterable[NodeRow]) -> str:
    """What is wrong with the first of these rows that cannot be; empty where all can."""
    for node in nodes:
        if not isfinite(node.seen_s):
            return f"node {node.node_id}: the time it was seen is no number"
    for row in rows:
        problem = _problem(row)
        if problem:
            return f"task {row.id.hex()}: {problem}"
    return ""


def _problem(row: TaskRow) -> str:
    try:
        spec, record = decode_spec(row.spec), decode_record(row.record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return f"it cannot be read: {error}"
    try:
        for text in spec.constraints:
            parse(text)
    except ValueError as error:
        return f"a constraint of it cannot be read: {error}"
    if row.state not in _STATES:
        return f"there is no state {row.state}"
    if (row.queue, row.type, row.priority) != (spec.queue, spec.type, spec.priority):
        return "its columns are not those of its specification"
    if abs(spec.priority) > PRIORITY_MAX:
        return f"its priority is {spec.priority}"
    if not all(map(isfinite, _times(row, spec, record))):
        return "one of its times is no number"
    if (record.open_attempt is not None) != (row.state in _WITH_ATTEMPT):
        return f"its attempts do not go with the state {TaskState(row.state).word}"
    return ""


def _times(row: TaskRow, spec: TaskSpec, record: Record) -> tuple[float, ...]:
    return (
        row.submitted_s, row.changed_s, row.finished_s, spec.submitted_s, spec.not_before_s, spec.deadline_s,
        record.due_s,
    )  # fmt: skip
