"""Rows and commits for the tests of stores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from taskd.core.backlog import Backlog
from taskd.core.effects import Commit
from taskd.core.task import Record, TaskSpec, TaskState, encode
from taskd.protocol.messages import Dot, NodeRow, TaskRow, Term
from taskd.store.base import Query, Store

BOOT = (1 << 63) - 1
EMPTY_RECORD = encode(Record([]))


def task_id(number: int) -> bytes:
    """Ids in the order of their numbers."""
    return (number << 40).to_bytes(10) + number.to_bytes(6)


def task_row(number: int, state: TaskState = TaskState.QUEUED, **columns: Any) -> TaskRow:
    """A task. Further columns as in TaskRow; `labels` and `env` go into its spec."""
    spec = TaskSpec("noop", labels=columns.pop("labels", {}), env=columns.pop("env", {}))
    row = TaskRow(
        id=task_id(number),
        state=int(state),
        priority=0,
        queue="default",
        type="noop",
        name="",
        owner="ann",
        submitted_s=1_767_225_600.5,
        changed_s=1_767_225_600.5,
        finished_s=0.0,
        epoch=1,
        node_id=5,
        boot=BOOT,
        lsn=1,
        spec=encode(spec),
        record=EMPTY_RECORD,
    )
    return msgspec.structs.replace(row, **columns)


def commit(
    inserted: Iterable[TaskRow] = (),
    updated: Iterable[TaskRow] = (),
    nodes: Iterable[NodeRow] = (),
    term: Term | None = None,
    **more: Any,
) -> Commit:
    """A commit. Further fields as in Commit."""
    return Commit(1, term, list(inserted), list(updated), list(nodes), **more)


def dot(epoch: int, node_id: int, boot: int, lsn: int) -> Dot:
    return Dot(Term(epoch, node_id, boot), lsn)


async def unfinished(store: Store) -> list[TaskRow]:
    """All unfinished tasks, by id."""
    states = tuple(state for state in TaskState if not state.is_final)
    return (await store.list(Query(states=states, limit=100_000)))[::-1]


async def backlog(store: Store) -> tuple[list[Backlog], list[bytes]]:
    """What a leader loads, in slices; and where each slice but the last ended."""
    parts, ends = [], []
    after: bytes | None = b""
    while after is not None:
        part, after = await store.backlog(after)
        parts.append(part)
        ends += [after] if after is not None else []
    return parts, ends


def numbers(rows: Iterable[TaskRow]) -> list[int]:
    """Which tasks these are."""
    return [int.from_bytes(row.id[10:]) for row in rows]
