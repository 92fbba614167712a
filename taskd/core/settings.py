"""What an operator may set of the leader; the defaults and the reasons are in config/taskd.toml."""

from __future__ import annotations

from msgspec import Struct

PURGE_S = 60.0
PURGE_MIN_S = 1.0  # Where finished tasks are kept for seconds only.


class SchedulerSettings(Struct, frozen=True):
    """Durations in seconds; `prefetch_max` is per slot."""

    queued_max: int = 10_000_000
    worker_grace_s: float = 5.0
    restart_grace_s: float = 10.0
    prefetch_s: float = 0.05
    prefetch_max: int = 512
    crash_limit: int = 3
    min_replicas: int = 0
    standby_grace_s: float = 2.5
    hand_over_after_s: float = 10.0
    empty_wait_s: float = 10.0
    finished_age_max_s: float = 7 * 86_400.0
    window: int = 8192  # tasks that wait in memory, of each shape; the others are on the disk alone

    @property
    def purge_wait_s(self) -> float:
        """Between two looks for finished tasks that are old enough to be removed."""
        return min(PURGE_S, max(PURGE_MIN_S, self.finished_age_max_s / 10))

    def may_be_purged(self, finished_s: float, now_s: float) -> bool:
        """Whether a task that ended then may be removed at any moment, so that nothing is to be written about it."""
        return bool(self.finished_age_max_s) and finished_s <= now_s - self.finished_age_max_s
