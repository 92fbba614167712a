"""What an operator may set of the leader; the defaults and the reasons are in config/taskd.toml."""

from __future__ import annotations

from msgspec import Struct


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
