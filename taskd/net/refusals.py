"""Refused connections in the log: one line a minute for each source, however often it comes and whatever it does."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

LOGGED_S = 60.0
SOURCES_MAX = 1000
LINES_MAX = 60  # In a minute, of all sources: whoever has many addresses does not fill the log either.


class Refusals:
    """Counts what was refused, and says so now and then."""

    def __init__(self, log: Callable[..., None]) -> None:
        self.count = 0
        self._log = log
        self._sources: OrderedDict[str, tuple[float, int]] = OrderedDict()  # when last logged, how many since
        self._minute_begun = 0.0
        self._lines = 0
        self._unsaid = 0  # of sources that had no line

    def note(self, source: str, address: str, reason: str, now: float) -> None:
        """A connection was refused. `source` is what has one line a minute; `address` and `reason` are for the line."""
        self.count += 1
        self.say(source, now, "warning", "peer refused", address=address, reason=reason)

    def say(self, source: str, now: float, level: str, event: str, **fields: object) -> None:
        """A line about something that a source does, unless it had one within the minute."""
        logged_at, count = self._sources.pop(source, (now - LOGGED_S, 0))
        if now - logged_at < LOGGED_S:
            self._sources[source] = (logged_at, count + 1)
            return
        if now - self._minute_begun >= LOGGED_S:
            self._minute_begun, self._lines = now, 0
        if len(self._sources) >= SOURCES_MAX:
            self._sources.popitem(last=False)
        if self._lines >= LINES_MAX:
            self._unsaid += 1 + count
            return
        self._lines += 1
        self._sources[source] = (now, 0)
        others = {"others": self._unsaid} if self._unsaid else {}
        self._unsaid = 0
        self._log(level, event, **fields, before=count, **others)
