"""What the cluster remembers of its nodes, those that are away included; written down and copied like tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from taskd.core.outbox import Outbox
from taskd.core.task import decode_record
from taskd.protocol.messages import NodeInfo, NodeRow, TaskRow

AWAY_MAX_S = 7 * 86_400.0  # A scheduler that was not here for so long is taken for given up.


class KnownNodes(Mapping[int, NodeRow]):
    """Node rows by node id, as they are on the disk or on their way there."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._rows: dict[int, NodeRow] = {}

    def __getitem__(self, node_id: int) -> NodeRow:
        return self._rows[node_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def load(self, rows: list[NodeRow]) -> None:
        """What the disk holds at start."""
        self._rows = {row.node_id: row for row in rows}

    def write(self, row: NodeRow) -> None:
        """Remember this; nothing is written where nothing has changed."""
        if self._rows.get(row.node_id) != row:
            self._rows[row.node_id] = row
            self._outbox.node(row)

    def write_worker(self, row: NodeRow, *, is_here: bool) -> None:
        """Remember a worker. Of one that is not here only what it was before is known of its roles; and of one that is
        a scheduler as well, it counts when it last was in sync."""
        old = self._rows.get(row.node_id)
        if old is not None:
            roles = row.roles if is_here else old.roles
            seen_s = old.seen_s if "scheduler" in roles and "scheduler" in old.roles else row.seen_s
            row = NodeRow(row.node_id, row.name, roles, row.drain_reason, seen_s)
        self.write(row)

    def write_scheduler(self, node: NodeInfo, seen_s: float) -> None:
        """Remember a scheduler: `seen_s` is when it last held everything, 0 for never."""
        old = self._rows.get(node.node_id)
        drain_reason = old.drain_reason if old is not None else None
        self.write(NodeRow(node.node_id, node.name, node.roles, drain_reason, seen_s))

    def learn(self, row: NodeRow) -> bool:
        """What another leader remembered counts where it is newer; whether it was."""
        old = self._rows.get(row.node_id)
        if old is not None and old.seen_s >= row.seen_s:
            return False
        self.write(row)
        return True

    def workers(self) -> Iterator[NodeRow]:
        return (row for row in self._rows.values() if "worker" in row.roles)

    def schedulers(self, now_s: float) -> Iterator[NodeRow]:
        """Those that have not been given up."""
        return (row for row in self._rows.values() if "scheduler" in row.roles and row.seen_s > now_s - AWAY_MAX_S)


def is_doubtful(row: TaskRow, away: Iterable[NodeRow]) -> bool:
    """Whether another end of a task may still come to light: its own was decided after a scheduler that is away had
    last held everything, and by another one than that."""
    suspects = [other.node_id for other in away if other.seen_s < row.finished_s]
    if not suspects:
        return False
    decided = decode_record(row.record).decided
    return decided is None or any(node_id != decided.term.node_id for node_id in suspects)
