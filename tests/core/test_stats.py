"""What the leader counts stays small, whatever is submitted."""

from __future__ import annotations

from taskd.core.stats import NAMES_MAX, OTHER, Stats
from taskd.core.task import Outcome


def test_queues_beyond_a_bound_are_counted_together() -> None:
    stats = Stats()
    for number in range(NAMES_MAX + 5):
        stats.count_submitted("command", f"queue{number}")
        stats.count_finished("command", f"queue{number}", Outcome.OK)
    stats.count_submitted("command", "queue0")
    assert len(stats.submitted) == len(stats.finished) == NAMES_MAX + 1
    assert stats.submitted["command", "queue0"] == 2
    assert stats.submitted[OTHER, OTHER] == stats.finished[OTHER, OTHER, Outcome.OK] == 5
