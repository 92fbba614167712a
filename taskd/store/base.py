"""What a scheduler asks of its database, whichever it is. Times are UTC seconds, ids 16 bytes.

Writing is one commit at a time, in the order asked. Reading sees only what is durable, and never waits for a writer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

from taskd.core.backlog import Backlog
from taskd.core.effects import Commit
from taskd.core.events import Loaded
from taskd.protocol.messages import Dot, TaskRow


class Query(Struct, frozen=True):
    """Which tasks to list, newest first. Empty fields match everything; several values of one field match any."""

    states: tuple[int, ...] = ()
    queues: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()  # all of them must match
    before: bytes = b""  # only ids below this one: where the last page ended
    limit: int = 100  # 1..10,000


class Store(Protocol):
    """A scheduler's database."""

    store_id: bytes  # 16 random bytes, made with the database

    def load(self) -> Loaded:
        """What a scheduler needs at start, tasks aside. Raises StoreError."""

    async def backlog(self, after: bytes) -> tuple[Backlog, bytes | None]:
        """Unfinished tasks by id, above `after`, some thousands; and where to go on, None at the end."""

    async def lacking(self, seen: Sequence[Dot], after: bytes) -> tuple[list[TaskRow], bytes | None]:
        """Tasks by id, above `after`, whose last change `seen` (term, greatest lsn) does not cover: at most some
        hundred or about 1 MiB of them; and where to go on, None at the end."""

    async def rows(self, ids: Sequence[bytes]) -> list[TaskRow]:
        """The rows of those ids that exist, of any number."""

    async def ids(self, after: bytes) -> tuple[list[bytes], bytes | None]:
        """All ids above `after`, ascending, some ten thousand; and where to go on, None at the end."""

    async def ended_before(self, time_s: float) -> list[bytes]:
        """Ids of tasks that had ended before that time (UTC), the oldest ids first, a few thousand."""

    async def commit(self, commit: Commit) -> None:
        """Make the rows durable, all or none. Raises StoreError: then whether they are is unknown."""

    def get(self, ids: list[bytes]) -> list[TaskRow]:
        """The rows of those ids that exist, in the order of `ids`. Quick, for the event loop: up to 1,000 ids."""

    def existing(self, ids: list[bytes]) -> set[bytes]:
        """Which of these ids are taken. Quick, for any number of ids."""

    async def ending_in(self, suffix: str, limit: int = 2) -> list[bytes]:
        """Ids whose hexadecimal form, without hyphens, ends so; newest first, at most `limit`."""

    async def list(self, query: Query) -> list[TaskRow]:
        """One page of tasks, newest first."""

    async def newest(self, owner: str) -> bytes | None:
        """The newest task of this owner."""

    def newest_id(self) -> bytes:
        """The greatest id of all tasks, 16 zero bytes where there is none. Quick."""

    async def counts(self) -> dict[tuple[int, str], int]:
        """How many tasks there are, by (state, queue)."""

    def size_bytes(self) -> int:
        """Bytes on disk, write-ahead log included."""

    def free_bytes(self) -> int:
        """Bytes free on the database's disk."""

    def close(self) -> None:
        """Let go of the files, in good order."""
