"""Clients that submit on and on, as applications do while a cluster has its troubles."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from types import TracebackType
from typing import Any

from tests.integration.cluster import Daemon, UnixConnection, eventually
from tests.integration.history import History


class Load:
    """One client: submits through one node, waits for the answer, pauses, and again; from `with` to its end.

    It goes on after errors, which the history notes. A pause keeps what is submitted below what the workers can do.
    """

    def __init__(
        self,
        history: History,
        node: Daemon,
        task: Callable[[], dict[str, Any]] | None = None,
        *,
        pause_s: float = 0.01,
        tasks_per_request: int = 1,
    ) -> None:
        self.answers: list[tuple[float, float]] = []  # of each answered request: when it was asked, and answered
        self._history = history
        self._node = node
        self._task = task or history.handler
        self._pause_s = pause_s
        self._count = tasks_per_request
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"load through {node.home.name}")

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        with closing(UnixConnection(self._node.socket, 60)) as connection:
            while not self._is_over.wait(self._pause_s):
                tasks = [self._task() for _ in range(self._count)]
                first, *_ = self._history.submit_on(connection, self._node.home.name, tasks)
                if first.id:
                    self.answers.append((first.asked, first.answered))

    def wait_for(self, count: int, timeout_s: float = 60) -> None:
        """Wait until so many more requests have been answered."""
        wanted = len(self.answers) + count
        eventually(lambda: len(self.answers) >= wanted, timeout_s)

    def first_answer_after(self, at: float, timeout_s: float = 60) -> float:
        """When the first request that was made after `at` was answered; both monotonic, in seconds."""

        def found() -> float:
            # The newest come last, and the one wanted is among the last.
            return min((answered for asked, answered in self.answers[-100:] if asked > at), default=0.0)

        return eventually(found, timeout_s)
