"""The leader: takes submissions, hands attempts to workers, hears how they ended. Made by a claim, dropped at its end.

What becomes of a task is decided in ledger.py, which worker it gets in placement.py, who leads in election.py. This
file ties them to the messages of workers. Placement happens once a turn, in settle(), for all that the turn brought.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from random import Random

from taskd.core import events as ev
from taskd.core.adoption import Adoption
from taskd.core.backlog import Backlog
from taskd.core.deadlines import Deadlines, earliest
from taskd.core.dispatch import STUCK_EVERY_S, Dispatch
from taskd.core.effects import AnnounceNode, Effect, Log, ReadOld, Reply, Send
from taskd.core.late import LateResults
from taskd.core.ledger import Ledger
from taskd.core.nodes import KnownNodes
from taskd.core.outbox import Outbox
from taskd.core.reads import Reads
from taskd.core.roster import Roster, Worker
from taskd.core.settings import SchedulerSettings
from taskd.core.shelf import Shelf
from taskd.core.stats import Stats
from taskd.core.task import Task
from taskd.errors import NoLeader, NotFound, Overloaded
from taskd.protocol import messages as msg

AWAIT_WORKERS_S = 2.0  # A new leader waits so long for connected workers to say what they run already.


class Leader:
    """One reign. `utc` turns the monotonic `now` of events into UTC; `say` does at once what promises nothing."""

    def __init__(
        self,
        term: msg.Term,
        settings: SchedulerSettings,
        outbox: Outbox,
        reads: Reads,
        stats: Stats,
        random: Random,
        utc: Callable[[float], float],
        connected: Mapping[int, msg.NodeInfo],
        say: Callable[[Effect], None],
        nodes: KnownNodes,
    ) -> None:
        self.term = term
        self.settings = settings
        self.outbox = outbox
        self.stats = stats
        self.ledger = Ledger(outbox, stats, random, settings.crash_limit, settings.window)
        self.roster = Roster()
        self.utc = utc
        self._reads = reads
        self._connected = connected
        self._say = say
        self._write_worker = nodes.write_worker
        self.adoption = Adoption(self.ledger, self.roster, outbox, utc)
        self._shelf = Shelf(self.ledger, outbox, reads, utc, self._changed)
        self._late = LateResults(self.ledger, outbox, reads, stats, self._take_again, settings, utc)
        self._dispatch = Dispatch(term, self.ledger, self.roster, outbox)
        self._grace: Deadlines[int] = Deadlines()  # by worker: its open attempts are lost then
        self._timers: Deadlines[str] = Deadlines()
        self._awaited: dict[int, None] = {}  # workers whose word placement waits for
        self._unplaced = False  # something changed since the last placement
        self._acknowledged: dict[int, list[msg.AttemptKey]] = {}
        self._looking: dict[int, None] = {}  # calls about tasks that are being read
        self.is_stopping = False
        self._is_over = False
        self.is_merging: Callable[[], bool] = lambda: False
        self.is_complete: Callable[[float], bool] = lambda now: True  # everything that any scheduler knows is here

    # -- The begin of a reign ------------------------------------------------------------------------------------------

    def load(self, backlog: Backlog, now: float) -> None:
        """Take in unfinished tasks. Open attempts wait for their workers to come back."""
        for task in self.ledger.load(backlog, self.utc(now)):
            worker = self.roster.known(task.record.attempts[-1].worker)
            assert task.shape is not None
            worker.give(task, task.shape)

    def begin(self, now: float) -> None:
        """Everything is loaded: decide from now on."""
        for worker in self.roster:
            if worker.assigned:
                self._grace.set(worker.node_id, now + self.settings.restart_grace_s)
        for node_id, node in self._connected.items():
            if "worker" in node.roles:
                self._await(node_id, now)
        self._timers.set("purge", now + self.settings.purge_wait_s)
        self._timers.set("stuck", now + STUCK_EVERY_S)
        self._unplaced = True

    def close(self) -> None:
        """Another leads: what is still being read for us comes too late."""
        self._is_over = True
        self._shelf.close()
        self._late.close()
        for call in self._looking:
            self._say(Reply(call, NoLeader()))

    def _changed(self) -> None:
        self._unplaced = True

    def _await(self, node_id: int, now: float) -> None:
        """Hand nothing out before this worker has said what it runs, or what has become of it."""
        if not self._awaited:
            self._timers.set("await", now + AWAIT_WORKERS_S)
        self._awaited[node_id] = None

    def _arrived(self, node_id: int) -> None:
        self._awaited.pop(node_id, None)

    # -- Peers ---------------------------------------------------------------------------------------------------------

    def on_peer_down(self, event: ev.PeerDown, now: float) -> None:
        """A connection is gone. What a worker ran may go on there: wait for it, unless it said goodbye."""
        self._arrived(event.node_id)
        worker = self.roster.get(event.node_id)
        if worker is None or not worker.is_here:
            return
        worker.leaves(self.utc(now))
        self._remember(worker)
        self.outbox.then(AnnounceNode("node.lost", worker.node_id, event.reason))
        if event.is_orderly:
            self._log("info", "worker left", worker=worker.name, reason=event.reason)
            self._lose_all(worker, "its worker stopped", "worker_stopped", now)
        else:
            self._log("warning", "worker lost", worker=worker.name, reason=event.reason, open=len(worker.assigned))
            self._grace.set(worker.node_id, now + self.settings.worker_grace_s)

    def _lose_all(self, worker: Worker, reason: str, cause: str, now: float) -> None:
        for task in list(worker.assigned.values()):
            worker.release(task)
            self.ledger.lose(task, reason, cause, self.utc(now))
        self._unplaced = True

    # -- Workers' messages ---------------------------------------------------------------------------------------------

    def on_register(self, sender: int, message: msg.Register, now: float) -> None:
        """A worker brings its whole state. What it does not hold any more was lost; what is not wanted is cancelled."""
        term, node = self.term, self._connected.get(sender)
        if node is None:
            return  # It has gone while this waited.
        self._arrived(sender)
        worker = self.roster.known(sender)
        worker.arrives(node, message.offer, self.utc(now))
        self._grace.clear(sender)
        self._remember(worker)
        self.outbox.then(Send(sender, msg.Registered(term)))
        if message.unacknowledged:
            # They follow at once: what they decide must not be handed out again meanwhile.
            self._await(sender, now)
        here = {*message.held, *message.unacknowledged}
        for task in list(worker.assigned.values()):
            task.run_number, task.is_recalled = 0, False  # Of an earlier connection.
            if task.key not in here:
                worker.release(task)
                self.ledger.lose(task, "its worker no longer has it", "worker_restarted", self.utc(now))
        self._sort_out(worker, (*message.held, *message.unacknowledged), now)
        unsure = [key.task_id for key in worker.foreign]
        if unsure and self.ledger.has_cold:
            self._await(sender, now)
            self._shelf.have(unsure, partial(self._sort_out_again, worker), now)
        if worker.drain_reason is not None:
            self._dispatch.recall(worker, worker.not_begun)
        self._log("info", "worker registered", worker=worker.name, node=sender, slots=message.offer.slots)
        self.outbox.then(AnnounceNode("node.up", sender, worker.name))
        self._unplaced = True

    def _sort_out(self, worker: Worker, held: tuple[msg.AttemptKey, ...], now: float) -> None:
        """Judge the attempts that a worker holds; those that are not wanted are cancelled."""
        unwanted = self.adoption.sort_out(worker, held, now)
        if unwanted and worker.is_here:
            self.outbox.then(Send(worker.node_id, msg.Cancel(self.term, tuple(unwanted))))

    def _sort_out_again(self, worker: Worker, now: float) -> None:
        """Tasks of attempts that could not be judged are in memory now."""
        if worker.is_here:
            self._arrived(worker.node_id)
            self._sort_out(worker, tuple(worker.foreign), now)
            self._unplaced = True

    def on_offering(self, sender: int, message: msg.Offering, now: float) -> None:
        """A worker offers something else from now on."""
        worker = self._registered(sender)
        if worker is not None:
            worker.takes(message.offer)
            self._unplaced = True

    def on_inventory(self, sender: int, message: msg.Inventory, now: float) -> None:
        """Everything a worker holds: an attempt that it was sent and does not know is lost."""
        worker = self._registered(sender)
        if worker is None:
            return
        here = set(message.keys)
        for task in list(worker.assigned.values()):
            if task.run_number <= message.runs_seen and task.key not in here:
                worker.release(task)
                self.ledger.lose(task, "its worker no longer has it", "worker_forgot", self.utc(now))
                self._unplaced = True

    def on_started(self, sender: int, message: msg.Started, now: float) -> None:
        """Attempts have begun."""
        now_s = self.utc(now)
        for started in message.attempts:
            self.ledger.started(started, now_s)

    def on_finished(self, sender: int, message: msg.Finished, now: float) -> None:
        """Attempts have ended. All that we can judge are acknowledged, once what they changed is durable."""
        if self._registered(sender) is None:
            return  # It registers again and sends them again.
        self._arrived(sender)
        now_s = self.utc(now)
        acknowledged = self._acknowledged.setdefault(sender, [])
        late: list[msg.AttemptEnded] = []
        for ended in message.attempts:
            task = self.ledger.current(ended.key)
            if task is None:
                late.append(ended)
                continue
            # Mostly the sender; another where a worker came back under another node id.
            self.roster.known(task.record.attempts[-1].worker).release(task)
            self.ledger.ended(task, ended, now_s)
            acknowledged.append(ended.key)
        if late:
            acknowledged += self._late.take(
                sender, late, now, now_s, self.is_complete, self._call_off, self._acknowledge
            )
        self._unplaced = True

    def _take_again(self, sender: int, ended: list[msg.AttemptEnded], now: float) -> None:
        self.on_finished(sender, msg.Finished(tuple(ended)), now)

    def _call_off(self, worker_id: int, task: Task, key: msg.AttemptKey) -> None:
        """An attempt is needed no more: another one of its task has succeeded."""
        worker = self.roster.known(worker_id)
        worker.release(task)
        if worker.is_here:
            self.outbox.then(Send(worker_id, msg.Cancel(self.term, (key,))))

    def _acknowledge(self, worker_id: int, keys: list[msg.AttemptKey]) -> None:
        self._acknowledged.setdefault(worker_id, []).extend(keys)

    def _registered(self, node_id: int) -> Worker | None:
        worker = self.roster.get(node_id)
        return worker if worker is not None and worker.is_here else None

    # -- Clients -------------------------------------------------------------------------------------------------------

    def on_submitted(self, event: ev.Submitted, now: float) -> None:
        """Take all tasks of a submission, or none."""
        if len(self.ledger) + len(event.tasks) > self.settings.queued_max:
            text = f"{len(self.ledger)} tasks are unfinished already, of at most {self.settings.queued_max}"
            self.outbox.then(Reply(event.call, Overloaded(text + "; try again later")))
            return
        now_s = self.utc(now)
        accept = self.ledger.accept
        known = [new.id for new in event.tasks if not accept(new, now_s)]
        self.outbox.then(Reply(event.call, known, promises=True))
        self._unplaced = True

    def on_cancel_wanted(self, event: ev.CancelWanted, now: float) -> None:
        """Cancel what is unfinished."""
        self._looking[event.call] = None
        self._shelf.have(event.ids, partial(self._cancel, event), now)

    def _cancel(self, event: ev.CancelWanted, now: float) -> None:
        del self._looking[event.call]
        found = []
        by_worker: dict[int, list[msg.AttemptKey]] = {}
        for task_id in event.ids:
            task = self.ledger.tasks.get(task_id)
            if task is None:
                continue
            found.append(task_id)
            is_new = not task.record.cancel_wanted
            self.ledger.cancel(task, self.utc(now))
            if is_new and task.key is not None:
                by_worker.setdefault(task.record.attempts[-1].worker, []).append(task.key)
        for node_id, keys in by_worker.items():
            if self._registered(node_id) is not None:
                self.outbox.then(Send(node_id, msg.Cancel(self.term, tuple(keys))))
        self.outbox.then(Reply(event.call, found))

    def on_drain_wanted(self, event: ev.DrainWanted, now: float) -> None:
        """Give a worker nothing new and take back what it has not begun; or use it again."""
        worker = self.roster.get(event.node_id)
        if worker is None:
            self.outbox.then(Reply(event.call, NotFound(f"no worker has the node id {event.node_id}")))
            return
        worker.drain(event.reason)
        self._remember(worker)
        if event.reason is not None:
            self._dispatch.recall(worker, worker.not_begun)
        self.outbox.then(Reply(event.call, None))
        kind = "node.resumed" if event.reason is None else "node.drained"
        self.outbox.then(AnnounceNode(kind, worker.node_id, event.reason or ""))
        self._unplaced = True

    def _remember(self, worker: Worker) -> None:
        info = worker.info
        roles: tuple[msg.Role, ...] = info.roles if info is not None else ("worker",)
        row = msg.NodeRow(worker.node_id, worker.name, roles, worker.drain_reason, worker.seen_s)
        self._write_worker(row, is_here=info is not None)

    def on_settings_changed(self, settings: SchedulerSettings) -> None:
        """The operator has changed what may be changed while running."""
        self.settings = self._late.settings = settings
        self.ledger.queue.ask_all_again()
        self._unplaced = True

    # -- What other leaders have decided -------------------------------------------------------------------------------

    def merged(self, now: float) -> None:
        """Another scheduler has given us everything that we lacked: judge what workers run for it, or will bring."""
        for worker in self.roster:
            self._sort_out(worker, tuple(worker.foreign), now)
            if worker.assigned and not worker.is_here and self._grace.get(worker.node_id) is None:
                self._grace.set(worker.node_id, now + self.settings.restart_grace_s)
        self._unplaced = True

    # -- Placing -------------------------------------------------------------------------------------------------------

    def settle(self, now: float) -> None:
        """At the end of a turn: acknowledge what came, do what is due, and hand out what fits."""
        for node_id, keys in self._acknowledged.items():
            if keys:
                self.outbox.then(Send(node_id, msg.Acknowledged(self.term, tuple(keys))))
        self._acknowledged.clear()
        # Before anything is handed out: what has just expired must not begin.
        calendar_s, now_s = self.ledger.next_deadline_s(), self.utc(now)
        if calendar_s is not None and calendar_s <= now_s:
            self.ledger.tick(now_s)
            self._unplaced = True
        queue, may_hand_out = self.ledger.queue, not self.is_stopping and not self._awaited
        while True:
            if may_hand_out and (self._unplaced or queue.fresh):
                self._unplaced = False
                self._dispatch.hand_out(self.settings, now_s)
            self._shelf.settle(now)
            # What was handed out makes place for tasks that are in memory yet: their turn is now.
            if not (may_hand_out and queue.fresh):
                break

    # -- Time ----------------------------------------------------------------------------------------------------------

    def next_deadline(self, now: float, utc_offset_s: float) -> float | None:
        """When tick has something to do, monotonic."""
        calendar_s = self.ledger.next_deadline_s()
        return earliest(
            self._grace.next(), self._timers.next(), None if calendar_s is None else calendar_s - utc_offset_s
        )

    def tick(self, now: float) -> None:
        """Do what is due."""
        for timer in self._timers.pop_due(now):
            if timer == "await":
                self._awaited.clear()
                self._unplaced = True
            elif timer == "stuck":
                self._timers.set("stuck", now + STUCK_EVERY_S)
                self._dispatch.recall_stuck(self.utc(now))
            else:
                self._purge(now)
        for node_id in self._grace.pop_due(now):
            worker = self.roster.known(node_id)
            self._log("warning", "worker given up", worker=worker.name, open=len(worker.assigned))
            self._lose_all(worker, "its worker is gone", "worker_lost", now)

    def _purge(self, now: float) -> None:
        """Have finished tasks removed that are old enough."""
        self._timers.set("purge", now + self.settings.purge_wait_s)
        if not self.settings.finished_age_max_s or self.is_merging():
            return

        def found(event: ev.IdsRead, now: float) -> None:
            if self._is_over:
                return
            # While another's tasks come in, what we compared them with must stay.
            ids = [task_id for task_id in event.ids if task_id not in self.ledger.tasks and task_id not in self.outbox]
            if ids and not self.is_merging():
                self.outbox.purge(ids)
                if event.after is not None:
                    self._timers.set("purge", now + 1.0)

        before_s = self.utc(now) - self.settings.finished_age_max_s
        self._reads.ask(lambda call: ReadOld(call, before_s), found)

    def gives_up_s(self, node_id: int) -> float | None:
        """When the attempts of a worker that is away count as lost, UTC."""
        due = self._grace.get(node_id)
        return None if due is None else self.utc(due)

    def _log(self, level: str, event: str, **fields: object) -> None:
        self.outbox.then(Log(level, event, fields))
