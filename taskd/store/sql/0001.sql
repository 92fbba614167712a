-- Version 1: the tasks, the nodes, and what the database knows of itself.

CREATE TABLE meta (
    key   TEXT PRIMARY KEY,  -- store_id, writer: 16 random bytes each; term: the greatest seen, as JSON
    value BLOB NOT NULL
) STRICT, WITHOUT ROWID;

-- The columns are those of core.task.TaskRow, in its order. A table with row ids, because reports and params can be
-- large, and large rows make a WITHOUT ROWID tree deep and slow. The blobs come last, so that whoever looks at the
-- other columns never reads them.
CREATE TABLE tasks (
    id          BLOB PRIMARY KEY NOT NULL,  -- 16 bytes, UUIDv7: time-ordered, so that new ones are appended
    state       INTEGER NOT NULL,           -- core.task.TaskState: final from 20 on
    priority    INTEGER NOT NULL,
    queue       TEXT NOT NULL,
    type        TEXT NOT NULL,
    name        TEXT NOT NULL,
    owner       TEXT NOT NULL,
    submitted_s REAL NOT NULL,
    changed_s   REAL NOT NULL,
    finished_s  REAL NOT NULL,
    epoch       INTEGER NOT NULL,
    node_id     INTEGER NOT NULL,
    boot        INTEGER NOT NULL,
    lsn         INTEGER NOT NULL,
    spec        BLOB NOT NULL,              -- msgpack of core.task.TaskSpec
    record      BLOB NOT NULL               -- msgpack of core.task.Record
) STRICT;

-- What a starting scheduler loads and what people list most, whatever the number of finished tasks.
CREATE INDEX tasks_unfinished ON tasks (id) WHERE state < 20;

CREATE TABLE nodes (
    node_id      INTEGER PRIMARY KEY,
    name         TEXT NOT NULL,
    roles        TEXT NOT NULL,  -- separated by commas
    drain_reason TEXT,           -- NULL: not drained
    seen_s       REAL NOT NULL
) STRICT;
