"""How often other schedulers went away without a word: who does so again and again waits longer until it leads."""

from __future__ import annotations

KEPT_S = 3600.0
WAIT_MAX_S = 600.0


class Flaps:
    """The times at which each scheduler was lost, monotonic. They outlive reigns: who leads, dies and comes back in
    turns is a standby of another reign each time."""

    def __init__(self) -> None:
        self._times: dict[int, list[float]] = {}

    def note(self, node_id: int, now: float) -> None:
        """A scheduler was lost."""
        times = [time for time in self._times.get(node_id, ()) if time > now - KEPT_S]
        self._times[node_id] = [*times, now]

    def wait_s(self, node_id: int, well_since: float, base_s: float) -> float:
        """For how long a scheduler that has been well since then stays a standby: `base_s`, doubled each time that it
        was lost again within an hour, at most ten minutes or `base_s`."""
        again = sum(1 for time in self._times.get(node_id, ()) if time > well_since - KEPT_S) - 1
        return min(base_s * 2.0 ** min(max(again, 0), 30), max(WAIT_MAX_S, base_s))
