"""How the database is changed: everything that a commit holds, on a connection whose transaction is open."""

# ruff: noqa: S608 - the SQL is made of column names and conditions of our own; values are always bound

from __future__ import annotations

import apsw

from taskd.core.effects import Purge
from taskd.errors import StoreError
from taskd.protocol.messages import TaskRow
from taskd.store import wire
from taskd.store.queries import IS_COVERED, TOP, WITH_COVER, cover

CHANGING = ("id", "state", "changed_s", "finished_s", "epoch", "node_id", "boot", "lsn", "record")
"""The columns of an updated row, in the order in which they are sent: all that changes in the life of a task."""

INSERT = f"INSERT INTO tasks VALUES ({', '.join('?' * len(TaskRow.__struct_fields__))})"
UPDATE = f"UPDATE tasks SET {', '.join(f'{name} = ?{n}' for n, name in enumerate(CHANGING, 1) if n > 1)} WHERE id = ?1"

# The order of protocol.messages.Dot.rank. The whole row is replaced, so that the greatest dot alone says what is there.
_TAKE = f"""{INSERT} ON CONFLICT (id) DO UPDATE
    SET {", ".join(f"{name} = excluded.{name}" for name in TaskRow.__struct_fields__ if name != "id")}
    WHERE (excluded.epoch, -excluded.node_id, excluded.boot, excluded.lsn) > (epoch, -node_id, boot, lsn)"""
_NODE = "INSERT OR REPLACE INTO nodes VALUES (?, ?, ?, ?, ?)"
_META = "INSERT OR REPLACE INTO meta VALUES (?, ?)"
_SEEN = "INSERT INTO seen VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET lsn = excluded.lsn WHERE excluded.lsn > lsn"
_NOT_RESTORED = "DELETE FROM meta WHERE key = 'restored'"
_REMOVE = "DELETE FROM tasks WHERE id IN carray(?)"
_REMOVE_ABSENT = f"""{WITH_COVER} DELETE FROM tasks
    WHERE id > :after AND id <= :until AND id NOT IN (SELECT value FROM carray(:present)) AND {IS_COVERED}"""
_REMOVE_ALL = f"{WITH_COVER} DELETE FROM tasks WHERE id > :after AND id <= :until AND {IS_COVERED}"


def apply(connection: apsw.Connection, write: wire.Write) -> None:
    """Do everything that was asked. Raises apsw.Error, StoreError; then some of it may be done.

    Rows come first, purges after them: of several commits of a leader, taken together, the purge is always the last
    to speak of a task.
    """
    execute, execute_many = connection.execute, connection.executemany
    if write.term is not None:
        execute(_META, ("term", write.term))
        execute(_NOT_RESTORED)  # It knows a leader now, or is one.
    if write.nodes:
        execute_many(_NODE, write.nodes)
    if write.inserted:
        execute_many(INSERT, write.inserted)
    if write.taken:
        execute_many(_TAKE, write.taken)
    if write.updated:
        _update(connection, write.updated)
    if write.purged:
        execute(_REMOVE, (apsw.carray(tuple(write.purged)),))
    for purge in write.purges:
        _purge(connection, purge)
    if write.seen:
        execute_many(_SEEN, write.seen)
    if write.last_purge is not None:
        execute(_META, ("purged", write.last_purge))
    if write.has_strays is not None:
        execute(_META, ("strays", bytes([write.has_strays])))


def _update(connection: apsw.Connection, updated: list[list[apsw.SQLiteValue]]) -> None:
    changes = connection.total_changes()
    connection.executemany(UPDATE, updated)
    missing = len(updated) - (connection.total_changes() - changes)
    if missing:
        raise StoreError(f"{connection.filename} lacks {missing} of {len(updated)} tasks that were to be changed")


def _purge(connection: apsw.Connection, purge: Purge) -> None:
    values = {"after": purge.after, "until": purge.until or TOP, "cover": cover(purge.seen)}
    if purge.present:
        connection.execute(_REMOVE_ABSENT, {**values, "present": apsw.carray(purge.present)})
    else:  # An array of nothing cannot be bound.
        connection.execute(_REMOVE_ALL, values)
