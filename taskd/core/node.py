"""One daemon's roles together: handle(event, now), then take_effects(now) once a turn, and next_deadline(now).

A node that is scheduler and worker at once talks to itself with the same messages, without a network between.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

from taskd.core import events as ev
from taskd.core.deadlines import earliest
from taskd.core.effects import Effect, Exit, Send
from taskd.core.outbox import Continue
from taskd.core.scheduler import Scheduler
from taskd.core.settings import SchedulerSettings
from taskd.core.worker import Worker
from taskd.protocol import messages as msg

ROUNDS_MAX = 1000  # Of a node's talk with itself in one turn; more would be a loop of our own making.


class Node:
    """The pure daemon. `now` is monotonic seconds, never going back, counting suspend."""

    def __init__(
        self,
        info: msg.NodeInfo,
        random: Random,
        scheduler_settings: SchedulerSettings | None = None,
        offer: msg.Offer | None = None,
        *,
        is_founder: bool = False,
    ) -> None:
        """`is_founder`: this process has just made the cluster's key, so that nobody else can have its tasks."""
        self.info = info
        self.scheduler = (
            Scheduler(info, scheduler_settings, random, is_founder=is_founder)
            if scheduler_settings is not None
            else None
        )
        self.worker = Worker(info, offer) if offer is not None else None
        self.is_stopping = False
        self._utc_offset_s = 0.0
        self._pending: list[Effect] = []
        for role in (self.scheduler, self.worker):
            if role is not None:
                role.utc = self.utc
        self._on_event: dict[type[ev.Event], Callable[[Any, float], None]] = {
            ev.Received: self._on_received,
            ev.Progressed: self._on_progressed,
            ev.Submitted: self._on_client("on_submitted"),
            ev.CancelWanted: self._on_client("on_cancel_wanted"),
            ev.DrainWanted: self._on_client("on_drain_wanted"),
            ev.SettingsChanged: self._on_scheduler("on_settings_changed"),
            ev.KeysChanged: self._on_scheduler("on_keys_changed"),
            ev.Committed: self._on_committed,
            ev.CommitFailed: self._on_commit_failed,
            ev.BacklogRead: self._on_scheduler("on_read"),
            ev.RowsRead: self._on_scheduler("on_read"),
            ev.IdsRead: self._on_scheduler("on_read"),
            ev.ReadFailed: self._on_scheduler("on_read_failed"),
            ev.Collided: self._on_collided,
            ev.Stalled: self._on_stalled,
            ev.Ticked: self._on_ticked,
            ev.PeerUp: self._on_peer_up,
            ev.PeerDown: self._on_peer_down,
            ev.Loaded: self._on_scheduler("on_loaded"),
            ev.JournalLoaded: self._on_journal_loaded,
            ev.OfferChanged: self._on_offer_changed,
            ev.ClockRead: self._on_clock_read,
            ev.StopWanted: self._on_stop_wanted,
        }
        self._to_scheduler: dict[type[msg.Message], Callable[[int, Any, float], None]] = {}
        if (scheduler := self.scheduler) is not None:
            self._to_scheduler = {
                msg.Leading: scheduler.on_leading,
                msg.Claim: scheduler.on_claim,
                msg.Denied: scheduler.on_denied,
                msg.Page: scheduler.on_page,
                msg.PageTaken: scheduler.on_page_taken,
                msg.Attach: scheduler.on_attach,
                msg.Wanted: scheduler.on_wanted,
                msg.Replicate: scheduler.on_replicate,
                msg.Replicated: scheduler.on_replicated,
                msg.HandOver: scheduler.on_hand_over,
                msg.Register: scheduler.on_register,
                msg.Inventory: partial(scheduler.on_worker, "on_inventory"),
                msg.Started: partial(scheduler.on_worker, "on_started"),
                msg.Finished: partial(scheduler.on_worker, "on_finished"),
                msg.Offering: partial(scheduler.on_worker, "on_offering"),
            }
        self._to_worker: dict[type[msg.Message], Callable[[int, Any, float], None]] = {}
        if (worker := self.worker) is not None:
            self._to_worker = {
                msg.Leading: worker.on_leading,
                msg.Registered: worker.on_registered,
                msg.Run: worker.on_run,
                msg.Cancel: worker.on_cancel,
                msg.Recall: worker.on_recall,
                msg.Acknowledged: worker.on_acknowledged,
            }

    def utc(self, now: float) -> float:
        """UTC seconds at the monotonic `now`."""
        return now + self._utc_offset_s

    def handle(self, event: ev.Event, now: float) -> None:
        """Take in what happened. What follows is asked for with take_effects."""
        self._on_event[type(event)](event, now)

    def take_effects(self, now: float) -> list[Effect]:
        """What is to be done now, in order. Call it at the end of each turn that had events."""
        done: list[Effect] = []
        for _ in range(ROUNDS_MAX):
            effects, self._pending = self._pending, []
            if self.worker is not None:
                effects += self.worker.settle(now)
            if self.scheduler is not None:
                effects += self.scheduler.settle(now)
            is_settled = True
            for effect in effects:
                if type(effect) is Send and effect.node_id == self.info.node_id:
                    self._deliver_here(effect.message, now)
                    is_settled = False
                elif type(effect) is Continue:
                    effect.go_on(now)
                    is_settled = False
                else:
                    done.append(effect)
            # To settle once more would find nothing, which costs as much as the first time; the simulator looks.
            if is_settled:
                break
        else:
            raise AssertionError("a node does not stop talking to itself")
        if self.is_stopping and self._has_stopped():
            self.is_stopping = False
            done.append(Exit(0, "stopped"))
        return done

    def _has_stopped(self) -> bool:
        is_worker_done = self.worker is None or self.worker.has_stopped
        return is_worker_done and (self.scheduler is None or self.scheduler.has_stopped)

    def next_deadline(self, now: float) -> float | None:
        """When to send Ticked, monotonic, or None."""
        return earliest(
            self.scheduler.next_deadline(now, self._utc_offset_s) if self.scheduler is not None else None,
            self.worker.next_deadline() if self.worker is not None else None,
        )

    # -- Events to roles -----------------------------------------------------------------------------------------------

    def _on_scheduler(self, name: str) -> Callable[[Any, float], None]:
        def missing(event: ev.Event, now: float) -> None:
            raise AssertionError(f"{type(event).__name__} at a node that is no scheduler")

        return getattr(self.scheduler, name) if self.scheduler is not None else missing

    def _on_client(self, name: str) -> Callable[[Any, float], None]:
        return partial(self.scheduler.on_client, name) if self.scheduler is not None else self._on_scheduler(name)

    def _on_received(self, event: ev.Received, now: float) -> None:
        for message in event.messages:
            self._dispatch(event.node_id, message, now)

    def _dispatch(self, sender: int, message: msg.Message, now: float) -> None:
        kind = type(message)
        if (to_scheduler := self._to_scheduler.get(kind)) is not None:
            to_scheduler(sender, message, now)
        if (to_worker := self._to_worker.get(kind)) is not None:
            to_worker(sender, message, now)

    def _deliver_here(self, message: msg.Message, now: float) -> None:
        self._dispatch(self.info.node_id, message, now)

    def _on_progressed(self, event: ev.Progressed, now: float) -> None:
        assert self.worker is not None
        self.worker.on_progressed(event, now)

    def _on_committed(self, event: ev.Committed, now: float) -> None:
        assert self.scheduler is not None
        self._pending += self.scheduler.on_committed(event)

    def _on_commit_failed(self, event: ev.CommitFailed, now: float) -> None:
        assert self.scheduler is not None
        self._pending += self.scheduler.on_commit_failed(event)

    def _on_ticked(self, event: ev.Ticked, now: float) -> None:
        if self.scheduler is not None:
            self.scheduler.tick(now)
        if self.worker is not None:
            self.worker.tick(now)

    def _on_peer_up(self, event: ev.PeerUp, now: float) -> None:
        if self.scheduler is not None:
            self.scheduler.on_peer_up(event, now)
        if self.worker is not None:
            self.worker.on_peer_up(event)

    def _on_stalled(self, event: ev.Stalled, now: float) -> None:
        if self.scheduler is not None:
            self.scheduler.on_stalled(event, now)

    def _on_collided(self, event: ev.Collided, now: float) -> None:
        if self.scheduler is not None:
            self.scheduler.on_collided(event, now)
        elif self.worker is not None:
            self.worker.on_collided(event)

    def _on_peer_down(self, event: ev.PeerDown, now: float) -> None:
        if self.scheduler is not None:
            self.scheduler.on_peer_down(event, now)
        if self.worker is not None:
            self.worker.on_peer_down(event, now)

    def _on_journal_loaded(self, event: ev.JournalLoaded, now: float) -> None:
        assert self.worker is not None
        self.worker.on_journal_loaded(event, now)
        if self.scheduler is not None:
            # A node talks to itself as to any other.
            self.scheduler.on_peer_up(ev.PeerUp(self.info), now)

    def _on_offer_changed(self, event: ev.OfferChanged, now: float) -> None:
        assert self.worker is not None
        self.worker.on_offer_changed(event, now)

    def _on_clock_read(self, event: ev.ClockRead, now: float) -> None:
        self._utc_offset_s = event.utc_offset_s

    def _on_stop_wanted(self, event: ev.StopWanted, now: float) -> None:
        self.is_stopping = True
        if self.scheduler is not None:
            self.scheduler.on_stop_wanted(now)
        if self.worker is not None:
            self.worker.on_stop_wanted(event, now)
