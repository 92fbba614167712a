"""Why nothing is heard of a task: told to whoever follows one that has not begun."""

from __future__ import annotations

import time

from taskd.cli.output import clean, short, warn
from taskd.cli.session import Session
from taskd.client import calls
from taskd.errors import TaskdError

SILENCE_S = 1.0  # A task that has not begun by then has a reason worth telling.
ASK_AGAIN_S = 5.0

# Reasons that are over before they are read.
_BRIEF = frozenset({"Starting", "Running", "Ended"})
# Reasons that do not go away by themselves: another node is needed, or another task.
_LASTING = frozenset({"NoHandler", "NoMatchingNode"})


class Silence:
    """Says why a task waits, once for each reason, until it has begun."""

    def __init__(self, session: Session, task_id: str) -> None:
        self._session = session
        self._id = task_id
        self._asked_s = 0.0
        self._has_begun = False
        self._told = ""

    def tell(self) -> None:
        """Nothing has happened for a while. Raises ApiError, NoDaemon."""
        now_s = time.monotonic()
        if self._has_begun or (now_s - self._asked_s < ASK_AGAIN_S and self._told):
            return
        self._asked_s = now_s
        why = self._session.ask(calls.explain(self._id))
        self._has_begun = why["state"] in ("running", "cancelling")
        if why["reason"] not in _BRIEF and why["text"] != self._told:
            self._told = why["text"]
            warn(f"task {short(self._id)} waits: {clean(why['text'])}")


def warn_of_no_place(session: Session, task_id: str) -> None:
    """Say so where no connected worker will ever run a task that was just accepted."""
    try:
        why = session.ask(calls.explain(task_id))
    except TaskdError:
        return  # It is accepted, whatever became of this question.
    if why["reason"] in _LASTING:
        warn(f"task {short(task_id)} waits: {clean(why['text'])}; see `taskd explain {short(task_id)}`")
