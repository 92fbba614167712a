"""How many requests one user may make: a token bucket for each, so that a loop gone wrong slows down its user only."""

from __future__ import annotations

BURST_S = 2.0  # Of requests at the full rate, at once.
USERS_KEPT = 1024


class Budgets:
    """`per_s`: requests of one user in the long run; 0 for any number."""

    def __init__(self, per_s: int) -> None:
        self._per_s = per_s
        self._burst = max(1.0, per_s * BURST_S)
        self._left: dict[str, tuple[float, float]] = {}  # by user: how many more, and when that was so

    def take(self, user: str, now: float) -> bool:
        """Whether this user may make one more request, at the monotonic `now`."""
        if not self._per_s:
            return True
        left, at = self._left.pop(user, (self._burst, now))
        left = min(self._burst, left + (now - at) * self._per_s)
        if len(self._left) >= USERS_KEPT:
            del self._left[next(iter(self._left))]  # Who has been quiet for longest: his bucket is full, or nearly so.
        self._left[user] = (left - 1.0 if left >= 1.0 else left, now)
        return left >= 1.0
