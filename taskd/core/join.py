"""placeholder until the real one lands"""

from __future__ import annotations

from msgspec import Struct

from taskd.core.task import Record, TaskState
from taskd.protocol.messages import TaskRow


class Joined(Struct):
    state: TaskState
    record: Record
    changed_s: float
    finished_s: float


def join(mine: TaskRow, theirs: TaskRow) -> Joined:
    raise NotImplementedError


def same(row: TaskRow, joined: Joined) -> bool:
    raise NotImplementedError
