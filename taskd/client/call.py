"""One request of a client as a value, what its refusals mean, and how long to be patient. Both clients use it."""

from __future__ import annotations

import errno
import json
import math
import time
from typing import NamedTuple

from taskd.client.errors import ApiError, ConnectionLost, NoDaemon, TaskdError

TIMEOUT_S = 30.0  # A daemon that is silent for so long where it should answer at once is not alive.
PATIENCE_S = 10.0  # Of the Python clients: longer than a scheduler takes to restart, or another one to take over.
IDLE_MAX = 8  # Connections kept for later calls.
CALLS_MAX = 32  # Of one AsyncClient at once, each on a connection: daemons and descriptors bear more, but none help.
FINISH_S = 0.1  # The end of an answer follows its last line at once; else a new connection is cheaper.
ERROR_BYTES_MAX = 1 << 20  # Of the body of a refusal.
DELAY_FIRST_S = 0.05
DELAY_MAX_S = 1.0
FULL_DELAY_S = 0.2  # Between two attempts to submit to a daemon that is full.
ANSWER_S = 1.0  # For what a daemon answers at once, where the caller's own time is up: a poll has no time of its own.
RECEIVED_S = 0.001  # Enough to read what has come already.
STEP_S_MAX = 86_400.0  # Of one wait for a socket, which cannot wait for ages; whoever waits longer waits again.

CLOSED = "the client is closed"  # The ValueError of whoever uses it still.

# Refusals that pass by themselves: leadership changes hands, a relay broke off.
_PASSING = frozenset({"no_leader", "unavailable"})
_TOO_MANY = "rate_limited"


class Call(NamedTuple):
    """A request. `is_repeatable`: sending it twice does no more than sending it once. `timeout_s` bounds the silence of
    the daemon before its answer begins, and within one that is read whole; None is without a bound."""

    method: str
    target: str
    body: bytes = b""
    is_repeatable: bool = True
    timeout_s: float | None = TIMEOUT_S


class Deadline:
    """When a caller's patience ends; without `timeout_s`, or where it is infinite, never."""

    def __init__(self, timeout_s: float | None) -> None:
        """Raises ValueError for what is not a number."""
        if timeout_s is not None and math.isnan(timeout_s):
            raise ValueError("the timeout is not a number of seconds: NaN")
        self._end_s = None if timeout_s is None or timeout_s == math.inf else time.monotonic() + timeout_s

    @property
    def is_over(self) -> bool:
        """Whether nothing is left."""
        return self._end_s is not None and self._end_s <= time.monotonic()

    def left_s(self) -> float | None:
        """How much is left, at most STEP_S_MAX. Raises TimeoutError where nothing is."""
        if self.is_over:
            raise TimeoutError("the tasks have not ended in time")
        return self.silence_s(0.0)

    def silence_s(self, least_s: float) -> float | None:
        """For how long to wait for the daemon's next word: what is left, but at least `least_s`, at most STEP_S_MAX."""
        return None if self._end_s is None else min(max(self._end_s - time.monotonic(), least_s), STEP_S_MAX)

    def pause_s(self, wanted_s: float) -> float:
        """How long to pause who would pause for `wanted_s`. Raises TimeoutError where nothing is left."""
        left_s = self.left_s()
        return wanted_s if left_s is None else min(wanted_s, left_s)

    def bounded(self, call: Call) -> Call:
        """The call, with no more time for its answer than is left, or ANSWER_S."""
        silence_s = self.silence_s(ANSWER_S)
        if silence_s is None or (call.timeout_s is not None and call.timeout_s <= silence_s):
            return call
        return call._replace(timeout_s=silence_s)


ENDLESS = Deadline(None)


class Patience:
    """Paces the attempts to reach a daemon again, within a budget that starts with the first trouble."""

    def __init__(self, budget_s: float) -> None:
        self._budget_s = budget_s
        self._end_s: float | None = None
        self._delay_s = DELAY_FIRST_S

    def next_delay_s(self, now_s: float) -> float | None:
        """How long to wait before the next attempt; None when it is time to give up. `now_s` is monotonic."""
        if self._end_s is None:
            self._end_s = now_s + self._budget_s
        left_s = self._end_s - now_s
        if left_s <= 0:
            return None
        delay_s = min(self._delay_s, left_s)
        self._delay_s = min(self._delay_s * 2, DELAY_MAX_S)
        return delay_s

    def restore(self) -> None:
        """The daemon answered: the next trouble gets the whole budget again."""
        self._end_s = None
        self._delay_s = DELAY_FIRST_S


def is_worth_repeating(error: TaskdError, is_repeatable: bool, has_answered: bool) -> bool:
    """Whether a call that failed may succeed when it is sent again. `has_answered`: this daemon has been heard of
    before, so that it is rather restarting than missing."""
    if isinstance(error, ApiError):
        # A request too many was not looked at.
        return error.code == _TOO_MANY or (is_repeatable and error.code in _PASSING)
    if isinstance(error, ConnectionLost):
        return is_repeatable
    return isinstance(error, NoDaemon) and has_answered  # Nothing was sent: even what is not repeatable may try again.


def trouble_connecting(error: OSError, otherwise: NoDaemon) -> NoDaemon | OSError:
    """What to raise for an error while connecting: that we lack descriptors says nothing about the daemon."""
    if error.errno not in (errno.EMFILE, errno.ENFILE):
        return otherwise
    where = "this process" if error.errno == errno.EMFILE else "this machine"
    return OSError(
        error.errno, f"{where} has too many files open to connect to the daemon: raise the limit of open files"
    )


def error_from(status: int, body: bytes) -> ApiError:
    """The error in the body of an answer; of whatever else answered with a failing status, what can be said."""
    error = None
    try:
        document = json.loads(body)
    except ValueError:
        document = None
    if isinstance(document, dict):
        error = document.get("error")
    if not isinstance(error, dict):
        text = body[:200].decode("utf-8", "replace").strip()
        message = f"the daemon answered with status {status}" + (f": {text}" if text else "")
        return ApiError(status, f"http_{status}", message)
    return ApiError(status, str(error.get("code", "")), str(error.get("message", "")), error.get("field"))
