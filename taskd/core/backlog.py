"""What is known of tasks that wait on the disk alone: their ids by what decides when it is their turn."""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct as Layout

import msgspec
from msgspec import Struct

from taskd.core.task import TaskState, decode_record
from taskd.protocol.messages import TaskRow

ID_BYTES = 16
ENTRY_BYTES = 8 + ID_BYTES

_TIME = Layout(">d")  # In this form times from 1970 on are in the order of their bytes.
_pack_time = _TIME.pack
_QUEUED = int(TaskState.QUEUED)
_DELAYED = (int(TaskState.SCHEDULED), int(TaskState.RETRYING))
_UNTOUCHED = b"\x90\xc2"  # How a record goes on that has no attempt, and that nobody wants cancelled.


class ReadyEntries(Struct, array_like=True):
    """Queued tasks of one shape, priority and queue: the spec of one of them, and the entries of when each was
    submitted."""

    spec: bytes
    queue: str
    entries: bytes


class DelayedEntries(Struct, array_like=True):
    """Tasks of one queue that wait for their time: the entries of when it comes."""

    state: int
    queue: str
    entries: bytes


class Backlog(Struct, array_like=True):
    """Unfinished tasks: those that wait in brief, the others whole; and entries of when some must have begun."""

    rows: list[TaskRow]
    ready: list[ReadyEntries]
    delayed: list[DelayedEntries]
    deadlines: bytes


class _ShapeOfSpec(Struct):
    """What of a spec says which workers fit, without the cost of decoding the rest."""

    constraints: tuple[str, ...] = ()
    resources: dict[str, int] = {}
    deadline_s: float = 0.0


_decode_shape = msgspec.msgpack.Decoder(_ShapeOfSpec).decode


def entry_of(due_s: float, task_id: bytes) -> bytes:
    """A time and a task, in a form whose order is that of the times."""
    return _pack_time(due_s) + task_id


def due_of(entry: bytes) -> tuple[float, bytes]:
    """The time and the task."""
    return _TIME.unpack_from(entry)[0], entry[8:]


class Sorter:
    """Puts unfinished tasks where they belong."""

    def __init__(self) -> None:
        self._ready: dict[tuple[object, ...], tuple[bytes, str, bytearray]] = {}
        self._delayed: dict[tuple[int, str], bytearray] = {}
        self._deadlines = bytearray()

    def takes(
        self,
        task_id: bytes,
        state: int,
        priority: int,
        queue: str,
        type: str,
        submitted_s: float,
        spec: bytes,
        record: bytes,
    ) -> bool:
        """One more task, in the order of their ids; False for one that is needed whole. Raises msgspec.DecodeError
        where it is damaged. A million take about a second."""
        if state == _QUEUED:
            if record[1:3] == _UNTOUCHED:
                may_have_begun = False
            else:
                known = decode_record(record)
                if known.cancel_wanted:
                    return False
                may_have_begun = known.may_have_begun
            key: tuple[object, ...] = (type, priority, queue)
            if b"constraints" in spec or b"resources" in spec or b"deadline_s" in spec:
                shape = _decode_shape(spec)
                key = (*key, shape.constraints, *shape.resources.items())
                if shape.deadline_s and not may_have_begun:
                    self._deadlines += entry_of(shape.deadline_s, task_id)
            group = self._ready.get(key)
            if group is None:
                group = self._ready[key] = (spec, queue, bytearray())
            group[2].extend(_pack_time(submitted_s) + task_id)
            return True
        if state not in _DELAYED:
            return False
        known = decode_record(record)
        if known.cancel_wanted:
            return False
        self._delayed.setdefault((state, queue), bytearray()).extend(entry_of(known.due_s, task_id))
        if b"deadline_s" in spec and not known.may_have_begun:
            deadline_s = _decode_shape(spec).deadline_s
            if deadline_s:
                self._deadlines += entry_of(deadline_s, task_id)
        return True

    def backlog(self, whole: list[TaskRow]) -> Backlog:
        """All that were taken, and with them those that are needed whole."""
        ready = [ReadyEntries(spec, queue, bytes(entries)) for spec, queue, entries in self._ready.values()]
        delayed = [DelayedEntries(state, queue, bytes(entries)) for (state, queue), entries in self._delayed.items()]
        return Backlog(whole, ready, delayed, bytes(self._deadlines))


def sort_out(rows: Iterable[TaskRow]) -> Backlog:
    """Unfinished tasks as a Backlog. Raises msgspec.DecodeError where one is damaged."""
    sorter = Sorter()
    return sorter.backlog([row for row in rows if not sorter.takes(*_parts(row))])


def _parts(row: TaskRow) -> tuple[bytes, int, int, str, str, float, bytes, bytes]:
    return row.id, row.state, row.priority, row.queue, row.type, row.submitted_s, row.spec, row.record
