-- Version 2: how much of each leader's commits is here, so that schedulers can tell each other what they lack.
-- In meta, `purged` is the last commit that removed tasks, a protocol.messages.Dot as JSON.

CREATE TABLE seen (
    epoch   INTEGER NOT NULL,
    node_id INTEGER NOT NULL,
    boot    INTEGER NOT NULL,
    lsn     INTEGER NOT NULL,  -- every commit of that term up to this one is here
    PRIMARY KEY (epoch, node_id, boot)
) STRICT, WITHOUT ROWID;

-- Until now a database held the commits of its own scheduler, all of them.
INSERT INTO seen SELECT epoch, node_id, boot, max(lsn) FROM tasks GROUP BY epoch, node_id, boot;
