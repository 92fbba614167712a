"""What the service manager hears of this daemon while it runs: ready, how it is, alive; reloading and stopping.

Ready is said once, when a leader is known and the socket answers. Alive is said only after a look at the vitals, so
that a daemon that turns but does no work is restarted like one that has stopped.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from taskd.api.cluster_types import ClusterView, Ready
from taskd.daemon.logs import log
from taskd.daemon.notify import Notifier

READY_POLL_S = 0.1
STATUS_S = 5.0
UNWELL_POLL_S = 1.0  # Sooner than the next sign of life is due: most troubles pass.


class Looks(Protocol):
    """Where the daemon can be looked at."""

    def cluster(self) -> ClusterView: ...
    def ready(self) -> Ready: ...


class Signs(Protocol):
    """Where it can be heard whether it works."""

    async def why_not(self) -> str: ...


class Own(Protocol):
    """The worker in this process."""

    @property
    def running_count(self) -> int: ...
    @property
    def waiting_count(self) -> int: ...


class Manager:
    """Tells one service manager of one daemon."""

    def __init__(self, notifier: Notifier, looks: Looks, vitals: Signs, worker: Own | None) -> None:
        self._notifier = notifier
        self._looks = looks
        self._vitals = vitals
        self._worker = worker
        self._is_ready = False
        self._told = ""
        self._trouble = ""

    async def run(self) -> None:
        """Tell what there is to tell; until cancelled. Returns at once where no manager listens."""
        if not self._notifier.is_heard:
            return
        while not self._looks.ready().ready:
            self._tell_status()
            await asyncio.sleep(READY_POLL_S)
        self._is_ready = True
        self._notifier.ready(self._text())
        alive_s = self._notifier.watchdog_s
        if alive_s is None:
            await self._keep_status()
            return
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_status())
            group.create_task(self._show_life(alive_s))

    async def _keep_status(self) -> None:
        while True:
            await asyncio.sleep(STATUS_S)
            self._tell_status()

    async def _show_life(self, every_s: float) -> None:
        while True:
            trouble = await self._vitals.why_not()
            if not trouble:
                self._notifier.watchdog()
            if trouble != self._trouble:
                if trouble:
                    log("error", "this daemon stands still: it will be restarted if that lasts", reason=trouble)
                else:
                    log("info", "this daemon goes on")
                self._trouble = trouble
            await asyncio.sleep(min(every_s, UNWELL_POLL_S) if trouble else every_s)

    def reloading(self) -> None:
        """The settings are read again; `reloaded` follows."""
        if self._is_ready:  # Before that, the manager waits for the start, and READY would end it.
            self._notifier.reloading()

    def reloaded(self) -> None:
        """They are."""
        if self._is_ready:
            self._notifier.ready(self._text())

    def stopping(self, within_s: float) -> None:
        """We stop, and ask for that much time."""
        running = self._worker.running_count if self._worker is not None else 0
        text = f"stopping: {_tasks(running)} to end" if running else "stopping"
        self._notifier.stopping(text, within_s)

    def _tell_status(self) -> None:
        """Where it has changed."""
        told, text = self._told, self._text()
        if text != told:
            self._notifier.status(text)

    def _text(self) -> str:
        self._told = status_text(self._looks.cluster(), self._worker)
        return self._told


def status_text(view: ClusterView, worker: Own | None) -> str:
    """One line for people: the roles, who leads, the tasks, and what is wrong."""
    parts = [f"{','.join(view.roles)}: {_standing(view)}"]
    if view.by_leader:
        waiting = sum(view.tasks.values()) - view.running
        parts.append(f"{_count(view.workers, 'worker')}, {_tasks(view.running)} running, {waiting} waiting")
    elif worker is not None:
        parts.append(f"{_tasks(worker.running_count)} running here, {worker.waiting_count} waiting")
    if view.why:
        parts.append(view.why)
    return "; ".join(parts)


def _standing(view: ClusterView) -> str:
    if view.leader is None:
        return "no leader"
    if view.by_leader:
        return "leads"
    own = next((it.replication for it in view.replicas if it.node_id == view.node_id), None)
    copy = {"in_sync": ", in sync", "catching_up": ", catching up"}.get(own or "", "")
    return f"follows {view.leader_name}{copy}"


def _tasks(count: int) -> str:
    return _count(count, "task")


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
