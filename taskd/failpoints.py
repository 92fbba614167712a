"""Places at which a test can have taskd die, as by `kill -9`, between two steps that must not depend on each other.

`TASKD_FAILPOINT=NAME` in the environment kills the process when it first comes to the point of that name,
`NAME:COUNT` when it comes there for the COUNT-th time. Without it a point is a call of an empty function.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "TASKD_FAILPOINT"


class _Trap:
    """Waits for the hit that kills."""

    def __init__(self, wanted: str) -> None:
        """Raises ValueError."""
        self._name, colon, count = wanted.partition(":")
        self._hits_left = int(count) if colon else 1
        if not self._name or self._hits_left < 1:
            raise ValueError(f"{VARIABLE} must be NAME or NAME:COUNT, COUNT from 1 on, not {wanted!r}")

    def hit(self, name: str, *, with_parent: bool = False) -> None:
        """See the function of that name."""
        if name != self._name:
            return
        self._hits_left -= 1
        if self._hits_left:
            return
        if with_parent and (parent := os.getppid()) > 1:  # 1: it is gone already, and init has taken us over.
            os.kill(parent, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def hit(name: str, *, with_parent: bool = False) -> None:
    """The process came to the point `name`; where that kills it, `with_parent` has its parent killed first."""


if os.environ.get(VARIABLE):
    hit = _Trap(os.environ[VARIABLE]).hit
