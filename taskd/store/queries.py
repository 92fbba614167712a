"""How the database is read. Plain functions on a connection; they raise apsw.Error.

What can take long is cut into slices: a slice looks at a bounded number of tasks, newest first for people and by id for
schedulers, and says where the next one begins. So however many tasks there are, no reader holds up another or keeps the
write-ahead log from being emptied.
"""

# ruff: noqa: S608 - the SQL is made of column names and conditions of our own; values are always bound

from __future__ import annotations

from array import array
from collections.abc import Sequence

import apsw
import msgspec
from msgspec import Struct

from taskd.core.backlog import Backlog, Sorter
from taskd.core.events import Loaded
from taskd.core.task import TaskState
from taskd.protocol.messages import Dot, NodeRow, TaskRow, Term
from taskd.store.base import Query

SLICE_TASKS = 20_000  # Looked at in one slice: about 10 ms.
SLICE_IDS = 100_000  # The same where ids are enough, which are read from the index alone.
SLICE_BYTES = 4 << 20  # Of specs and records in the answer to one slice; a single row may be larger.
UNFINISHED_ROWS = 10_000  # In one answer: some 30 ms.
LACKING_ROWS = 500  # In one answer, which one message carries to another scheduler,
LACKING_BYTES = 1 << 20  # and so many bytes of specs and records; a single row may be larger.
FETCH_IDS = 2000  # In one request.
IDS = 20_000  # In one answer.
TOP = b"\xff" * 17  # Above every id.

COLUMNS = ", ".join(TaskRow.__struct_fields__)
_GET = f"SELECT {COLUMNS} FROM carray(?) CROSS JOIN tasks ON id = value"  # CROSS JOIN keeps the order of the array.
_EXISTING = "SELECT value FROM carray(?) CROSS JOIN tasks ON id = value"

_BY_ID = "INDEXED BY sqlite_autoindex_tasks_1 WHERE true"
_BY_UNFINISHED_ID = "INDEXED BY tasks_unfinished WHERE state < 20"

_BACKLOG = f"""SELECT id, state, priority, queue, type, submitted_s, spec, record FROM tasks {_BY_UNFINISHED_ID}
    AND id > ? ORDER BY id LIMIT ?"""

_encode = msgspec.msgpack.Encoder().encode
_encode_json = msgspec.json.Encoder().encode
_decode_term = msgspec.json.Decoder(Term).decode
_decode_dot = msgspec.json.Decoder(Dot).decode

# Whether dots that are given, `:cover`, cover the last change of a task. The casts give the columns the type of those
# of the table: without it SQLite cannot look a term up, and would compare each task with all of them.
WITH_COVER = """WITH cover (epoch, node_id, boot, lsn) AS MATERIALIZED (
    SELECT CAST(value ->> '$[0][0]' AS INTEGER), CAST(value ->> '$[0][1]' AS INTEGER),
        CAST(value ->> '$[0][2]' AS INTEGER), CAST(value ->> '$[1]' AS INTEGER)
    FROM json_each(:cover))"""
IS_COVERED = """EXISTS (
    SELECT 1 FROM cover WHERE cover.epoch = tasks.epoch AND cover.node_id = tasks.node_id
    AND cover.boot = tasks.boot AND cover.lsn >= tasks.lsn)"""

_LACKING = f"""{WITH_COVER} SELECT {COLUMNS} FROM tasks INDEXED BY sqlite_autoindex_tasks_1
    WHERE id > :after AND id <= :until AND NOT {IS_COVERED} ORDER BY id LIMIT :limit"""


class _Labels(Struct):
    """The labels of a spec, without the cost of decoding the rest."""

    labels: dict[str, str] = {}


_decode_labels = msgspec.msgpack.Decoder(_Labels).decode


# -- Quick enough for the event loop -----------------------------------------------------------------------------------


def load(connection: apsw.Connection) -> Loaded:
    """What a scheduler needs at start, tasks aside. Also raises msgspec.DecodeError where the database is damaged."""
    with connection:  # One snapshot.
        meta = dict(
            connection.execute("SELECT key, value FROM meta WHERE key IN ('term', 'purged', 'strays', 'restored')")
        )
        seen = [
            Dot(Term(epoch, node_id, boot), lsn)
            for epoch, node_id, boot, lsn in connection.execute("SELECT epoch, node_id, boot, lsn FROM seen")
        ]
        has_tasks = connection.execute("SELECT EXISTS (SELECT 1 FROM tasks)").get
        nodes = [
            NodeRow(node_id, name, tuple(roles.split(",")) if roles else (), drain_reason, seen_s)
            for node_id, name, roles, drain_reason, seen_s in connection.execute("SELECT * FROM nodes ORDER BY node_id")
        ]
    term = _decode_term(meta["term"]) if "term" in meta else None
    purged = _decode_dot(meta["purged"]) if "purged" in meta else None
    has_strays = meta.get("strays") == b"\x01"
    is_empty = (not seen and (has_strays or not has_tasks)) or "restored" in meta
    return Loaded(term, seen, nodes, purged, is_empty, has_strays)


def get(connection: apsw.Connection, ids: list[bytes]) -> list[TaskRow]:
    """The rows of those ids that exist, in the order of `ids`."""
    if not ids:
        return []
    return [TaskRow(*row) for row in connection.execute(_GET, (apsw.carray(tuple(ids)),))]


def existing(connection: apsw.Connection, ids: list[bytes]) -> set[bytes]:
    """Which of these ids are taken."""
    if not ids:
        return set()
    return {id for (id,) in connection.execute(_EXISTING, (apsw.carray(tuple(ids)),))}


def newest_id(connection: apsw.Connection) -> bytes:
    """The greatest id of all tasks, 16 zero bytes where there is none."""
    id = connection.execute("SELECT max(id) FROM tasks").get
    assert id is None or isinstance(id, bytes)
    return id or bytes(16)


def cover(seen: Sequence[Dot]) -> bytes:
    """Dots as `:cover` of WITH_COVER."""
    return _encode_json(seen)


# -- In slices, newest first -------------------------------------------------------------------------------------------


def scan(connection: apsw.Connection, query: Query, limit: int) -> tuple[list[TaskRow], bytes]:
    """One slice of the tasks that match, newest first, at most `limit`; and `before` of the next slice, empty when
    there is none."""
    index, conditions, values = _conditions(query)
    before = query.before or TOP
    end = _end_of_slice(connection, index, before, SLICE_TASKS)
    sql = f"SELECT {COLUMNS} FROM tasks {index} AND id < ? AND id >= ? {conditions} ORDER BY id DESC"
    rows: list[TaskRow] = []
    size_bytes = 0
    for values_of_row in connection.execute(sql, (before, end, *values)):
        row = TaskRow(*values_of_row)
        if not _has_labels(row.spec, query.labels):
            continue
        rows.append(row)
        size_bytes += len(row.spec) + len(row.record)
        if len(rows) >= limit or size_bytes >= SLICE_BYTES:
            return rows, row.id
    return rows, end


def scan_ids(connection: apsw.Connection, suffix: str, before: bytes, limit: int) -> tuple[list[bytes], bytes]:
    """One slice of the ids whose hexadecimal form ends so, newest first; and `before` of the next. `limit` of them end
    the search."""
    before = before or TOP
    end = _end_of_slice(connection, _BY_ID, before, SLICE_IDS)
    sql = f"SELECT id FROM tasks {_BY_ID} AND id < ? AND id >= ? AND substr(hex(id), ?) = ? ORDER BY id DESC LIMIT ?"
    return [id for (id,) in connection.execute(sql, (before, end, -len(suffix), suffix.upper(), limit))], end


def count(connection: apsw.Connection, before: bytes) -> tuple[list[tuple[int, str, int]], bytes]:
    """One slice of the counts by (state, queue); and `before` of the next."""
    before = before or TOP
    end = _end_of_slice(connection, _BY_ID, before, SLICE_TASKS)
    sql = f"SELECT state, queue, count(*) FROM tasks {_BY_ID} AND id < ? AND id >= ? GROUP BY state, queue"
    return [(state, queue, number) for state, queue, number in connection.execute(sql, (before, end))], end


def _end_of_slice(connection: apsw.Connection, index: str, before: bytes, tasks: int) -> bytes:
    """The lowest id of the slice; empty, which is below every id, for the last one."""
    sql = f"SELECT id FROM tasks {index} AND id < ? ORDER BY id DESC LIMIT 1 OFFSET ?"
    end = connection.execute(sql, (before, tasks - 1)).get
    assert end is None or isinstance(end, bytes)
    return end or b""


def _conditions(query: Query) -> tuple[str, str, list[apsw.SQLiteValue]]:
    """The index to walk along, further conditions, and their values."""
    conditions = ""
    values: list[apsw.SQLiteValue] = []
    for column, wanted in (
        ("queue", query.queues), ("type", query.types), ("owner", query.owners), ("name", query.names),
    ):  # fmt: skip
        # No text of a task has a NUL in it, and an array of texts cannot hold one.
        possible = tuple(text for text in wanted if "\0" not in text)
        if possible:
            conditions += f" AND {column} IN carray(?)"
            values.append(apsw.carray(possible))
        elif wanted:
            conditions += " AND false"
    for label in query.labels:
        # In msgpack a label is its key and then its value, whatever stands around: a quick look for these bytes passes
        # over nearly all tasks without the label, and never over one that has it.
        conditions += " AND instr(spec, ?)"
        values.append(b"".join(map(_encode, label)))
    if not query.states:
        return _BY_ID, conditions, values
    conditions = " AND state IN carray(?)" + conditions
    values.insert(0, apsw.carray(array("q", query.states)))
    is_unfinished = all(state < TaskState.SUCCEEDED for state in query.states)
    return _BY_UNFINISHED_ID if is_unfinished else _BY_ID, conditions, values


def _has_labels(spec: bytes, labels: tuple[tuple[str, str], ...]) -> bool:
    if not labels:
        return True
    found = _decode_labels(spec).labels
    return all(found.get(key) == value for key, value in labels)


# -- In slices, by id --------------------------------------------------------------------------------------------------


def backlog(connection: apsw.Connection, after: bytes) -> tuple[Backlog, bytes]:
    """One slice of the unfinished tasks; and `after` of the next slice, empty when there is none. Also raises
    msgspec.DecodeError where the database is damaged."""
    sorter = Sorter()
    size_bytes = 0
    end = b""
    whole: list[bytes] = []
    for parts in sorter.sift(connection.execute(_BACKLOG, (after, UNFINISHED_ROWS))):
        whole.append(parts[0])
        size_bytes += len(parts[-2]) + len(parts[-1])
        if size_bytes > SLICE_BYTES:
            end = parts[0]
            break
    found = sorter.backlog(get(connection, whole))
    return found, end or (sorter.last_id if sorter.count == UNFINISHED_ROWS else b"")


def lacking(connection: apsw.Connection, seen: Sequence[Dot], after: bytes) -> tuple[list[TaskRow], bytes]:
    """One slice of the tasks whose last change `seen` does not cover; and `after` of the next."""
    end = _upper_end_of_slice(connection, after, TOP)
    values = {"cover": cover(seen), "after": after, "until": end or TOP, "limit": LACKING_ROWS}
    rows, is_cut = _rows(connection.execute(_LACKING, values), LACKING_BYTES)
    return rows, rows[-1].id if is_cut or len(rows) == LACKING_ROWS else end


def fetch(connection: apsw.Connection, ids: list[bytes]) -> tuple[list[TaskRow], bytes]:
    """The rows of those ids that exist, so many as fit; and the last id looked at, empty when it was all of them."""
    rows, is_cut = _rows(connection.execute(_GET, (apsw.carray(tuple(ids)),)), SLICE_BYTES)
    return rows, rows[-1].id if is_cut else b""


def ids(connection: apsw.Connection, after: bytes) -> tuple[list[bytes], bytes]:
    """One slice of all ids; and `after` of the next."""
    found = connection.execute(f"SELECT id FROM tasks {_BY_ID} AND id > ? ORDER BY id LIMIT ?", (after, IDS))
    ids = [id for (id,) in found]
    return ids, ids[-1] if len(ids) == IDS else b""


def ended(connection: apsw.Connection, before_s: float, after: bytes, limit: int) -> tuple[list[bytes], bytes]:
    """One slice of the ids of tasks that had ended before that time; and `after` of the next. `limit` of them end the
    search. Nothing ends before it begins: ids, which carry their time, that are later than `before_s` are not looked
    at. One whose maker's clock was ahead is found later by as much."""
    until = _last_id_of(before_s)
    end = _upper_end_of_slice(connection, after, until)
    sql = f"""SELECT id FROM tasks {_BY_ID} AND id > ? AND id <= ? AND finished_s > 0 AND finished_s < ?
        ORDER BY id LIMIT ?"""
    return [id for (id,) in connection.execute(sql, (after, end or until, before_s, limit))], end


def _rows(found: apsw.Cursor, bytes_max: int) -> tuple[list[TaskRow], bool]:
    """What was found, and whether it was cut short because specs and records have come to so many bytes."""
    rows: list[TaskRow] = []
    size_bytes = 0
    for values in found:
        row = TaskRow(*values)
        rows.append(row)
        size_bytes += len(row.spec) + len(row.record)
        if size_bytes >= bytes_max:
            return rows, True
    return rows, False


def _upper_end_of_slice(connection: apsw.Connection, after: bytes, until: bytes) -> bytes:
    """The highest id of the slice; empty for the last one, which goes up to `until`."""
    sql = f"SELECT id FROM tasks {_BY_ID} AND id > ? AND id <= ? ORDER BY id LIMIT 1 OFFSET ?"
    end = connection.execute(sql, (after, until, SLICE_TASKS - 1)).get
    assert end is None or isinstance(end, bytes)
    return end or b""


def _last_id_of(time_s: float) -> bytes:
    """The highest id that can have been made up to that time: the first 48 bits of one are its milliseconds."""
    time_ms = int(min(max(time_s, 0.0) * 1000, (1 << 48) - 1))
    return time_ms.to_bytes(6) + b"\xff" * 10
