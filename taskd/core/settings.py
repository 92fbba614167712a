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
