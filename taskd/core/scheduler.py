"""The leader: takes submissions, hands attempts to workers, hears how they ended. Also a scheduler that does not lead.

What becomes of a task is decided in ledger.py, which worker it gets in placement.py, who leads in election.py. This
file ties them to the messages of workers. Placement happens once a turn, in settle(), for all that the turn brought.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from taskd.core import events as ev
from taskd.core.deadlines import Deadlines
from taskd.core.effects import AnnounceNode, Exit, Follow, Log, Reply, Send
from taskd.core.election import Election
from taskd.core.ledger import Ledger
from taskd.core.outbox import Outbox
from taskd.core.placement import misplaced, place
from taskd.core.roster import Roster, Worker
from taskd.core.settings import SchedulerSettings
from taskd.core.stats import Stats
from taskd.core.task import Task, TaskState
from taskd.errors import NoLeader, NotFound, Overloaded, Unavailable
from taskd.protocol import messages as msg
from taskd.protocol.messages import NodeRow

RUN_BYTES_MAX = 1 << 20  # Of specs in one Run message: far below a frame, so that no worker waits long for the first.


class Scheduler:
    """The scheduler role of one node. `utc` turns the monotonic `now` of events into UTC."""

    def __init__(self, node: msg.NodeInfo, settings: SchedulerSettings, random: Random) -> None:
        self.node = node
        self.settings = settings
        self.outbox = Outbox()
        self.stats = Stats()
        self.ledger = Ledger(self.outbox, self.stats, random, settings.crash_limit)
        self.roster = Roster()
        self.election = Election(node)
        self.utc: Callable[[float], float] = float
        self._connected: dict[int, msg.NodeInfo] = {}
        self._grace: Deadlines[int] = Deadlines()  # by worker: its open attempts are lost then
        self._unplaced = False  # something changed since the last placement
        self.is_stopping = False
        self._acknowledged: dict[int, list[msg.AttemptKey]] = {}

    @property
    def leads(self) -> bool:
        return self.election.leading is not None

    # -- Start and leadership ------------------------------------------------------------------------------------------

    def on_loaded(self, event: ev.Loaded, now: float) -> None:
        """The database was read. Open attempts wait for their workers to come back."""
        self.election.greatest = event.term
        for row in event.nodes:
            self.roster.load_row(row)
        for task in self.ledger.load(event.tasks):
            worker = self.roster.known(task.record.attempts[-1].worker)
            assert task.shape is not None
            worker.give(task, task.shape)
        self.election.join(now)

    def consider(self, now: float) -> None:
        """Claim leadership if it is ours to take. Everything that follows waits behind the durable term."""
        if self.is_stopping or not self.election.may_claim(now):
            return
        term = self.election.claim()
        self.outbox.begin(term)
        self.stats.leader_changes += 1
        self.outbox.then(Follow(self.node.node_id, term))
        self._log("info", "leading", epoch=term.epoch, tasks=len(self.ledger.tasks))
        self.outbox.then(AnnounceNode("leader.changed", self.node.node_id, f"epoch {term.epoch}"))
        for node_id in self._connected:
            self.outbox.then(Send(node_id, msg.Leading(term)))
        for worker in self.roster:
            if worker.assigned:
                self._grace.set(worker.node_id, now + self.settings.restart_grace_s)
        self._unplaced = True

    def on_leading(self, sender: int, message: msg.Leading, now: float) -> None:
        """Another scheduler says whom it follows."""
        before = self.election.greatest
        try:
            must_step_down = self.election.heard(sender, message.term)
        except ValueError as error:
            self._log("error", "term refused", peer=sender, reason=str(error))
            return
        if self.election.greatest is not None and self.election.greatest != before:
            self.outbox.note(self.election.greatest)
        if must_step_down:
            self._log("warning", "stepping down: another scheduler leads", leader=sender)
            # What is in memory no longer decides anything; the next process reads it back from the disk.
            self.outbox.then(Exit(1, f"scheduler {sender} leads with a greater term"))
        elif self.election.followed is not None and not self.leads:
            self.outbox.then(Follow(*self.election.followed))

    # -- Peers ---------------------------------------------------------------------------------------------------------

    def on_peer_up(self, event: ev.PeerUp, now: float) -> None:
        """A node is connected: tell it whom we follow."""
        node = event.node
        self._connected[node.node_id] = node
        if "scheduler" in node.roles:
            self.election.peer_up(node)
        self.outbox.then(Send(node.node_id, msg.Leading(self._followed_term())))

    def _followed_term(self) -> msg.Term | None:
        if self.election.leading is not None:
            return self.election.leading
        return self.election.followed[1] if self.election.followed is not None else None

    def on_peer_down(self, event: ev.PeerDown, now: float) -> None:
        """A connection is gone. What a worker ran may go on there: wait for it, unless it said goodbye."""
        self._connected.pop(event.node_id, None)
        followed = self.election.followed
        self.election.peer_down(event.node_id)
        if followed is not None and self.election.followed is None:
            self.outbox.then(Follow(None, None))
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
        term = self.election.leading
        if term is None:
            self.outbox.then(Send(sender, msg.Leading(self._followed_term())))
            return
        if message.term is not None and message.term.rank() > term.rank():
            self._on_greater_term(sender, message.term)
            return
        worker = self.roster.known(sender)
        worker.arrives(self._connected[sender], message.offer, self.utc(now))
        self._grace.clear(sender)
        self._remember(worker)
        self.outbox.then(Send(sender, msg.Registered(term)))
        here = {*message.held, *message.unacknowledged}
        for task in list(worker.assigned.values()):
            task.run_number, task.is_recalled = 0, False  # Of an earlier connection.
            if task.key not in here:
                worker.release(task)
                self.ledger.lose(task, "its worker no longer has it", "worker_restarted", self.utc(now))
        unwanted = [key for key in message.held if not self._wants(key)]
        if unwanted:
            self.outbox.then(Send(sender, msg.Cancel(term, tuple(unwanted))))
        if worker.drain_reason is not None:
            self._recall(worker, worker.not_begun)
        self._log("info", "worker registered", worker=worker.name, node=sender, slots=message.offer.slots)
        self.outbox.then(AnnounceNode("node.up", sender, worker.name))
        self._unplaced = True

    def _on_greater_term(self, sender: int, term: msg.Term) -> None:
        """A worker has obeyed a later leader that we never heard of, and will not obey us: lead again, above it."""
        try:
            self.election.learn(term)
        except ValueError as error:
            self._log("error", "term refused", peer=sender, reason=str(error))
            return
        self._log("warning", "stepping down: a worker has obeyed a greater term", worker=sender, epoch=term.epoch)
        self.outbox.note(term)
        self.outbox.then(Exit(1, "a worker has obeyed a greater term"))

    def _wants(self, key: msg.AttemptKey) -> bool:
        task = self.ledger.current(key)
        return task is not None and task.state is not TaskState.CANCELLING

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
        """Attempts have ended. All are acknowledged, late ones too, once what they changed is durable."""
        if self._registered(sender) is None:
            return  # It registers again and sends them again.
        now_s = self.utc(now)
        acknowledged = self._acknowledged.setdefault(sender, [])
        for ended in message.attempts:
            task = self.ledger.current(ended.key)
            if task is None:
                self.stats.late_results += 1
            else:
                # Mostly the sender; another where a worker came back under another node id.
                self.roster.known(task.record.attempts[-1].worker).release(task)
                self.ledger.ended(task, ended, now_s)
            acknowledged.append(ended.key)
        self._unplaced = True

    def _registered(self, node_id: int) -> Worker | None:
        worker = self.roster.get(node_id)
        return worker if worker is not None and worker.is_here and self.leads else None

    # -- Clients -------------------------------------------------------------------------------------------------------

    def on_submitted(self, event: ev.Submitted, now: float) -> None:
        """Take all tasks of a submission, or none."""
        if not self.leads:
            self.outbox.then(Reply(event.call, NoLeader()))
            return
        if self.is_stopping:
            self.outbox.then(Reply(event.call, Unavailable("the scheduler is stopping; try again in a moment")))
            return
        if len(self.ledger.tasks) + len(event.tasks) > self.settings.queued_max:
            text = f"{len(self.ledger.tasks)} tasks are unfinished already, of at most {self.settings.queued_max}"
            self.outbox.then(Reply(event.call, Overloaded(text + "; try again later")))
            return
        now_s = self.utc(now)
        accept = self.ledger.accept
        known = [new.id for new in event.tasks if not accept(new, now_s)]
        self.outbox.then(Reply(event.call, known))
        self._unplaced = True

    def on_cancel_wanted(self, event: ev.CancelWanted, now: float) -> None:
        """Cancel what is unfinished."""
        if not self.leads:
            self.outbox.then(Reply(event.call, NoLeader()))
            return
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
        assert self.election.leading is not None
        for node_id, keys in by_worker.items():
            if self._registered(node_id) is not None:
                self.outbox.then(Send(node_id, msg.Cancel(self.election.leading, tuple(keys))))
        self.outbox.then(Reply(event.call, found))

    def on_drain_wanted(self, event: ev.DrainWanted, now: float) -> None:
        """Give a worker nothing new and take back what it has not begun; or use it again."""
        if not self.leads:
            self.outbox.then(Reply(event.call, NoLeader()))
            return
        worker = self.roster.get(event.node_id)
        if worker is None:
            self.outbox.then(Reply(event.call, NotFound(f"no worker has the node id {event.node_id}")))
            return
        worker.drain(event.reason)
        self._remember(worker)
        if event.reason is not None:
            self._recall(worker, worker.not_begun)
        self.outbox.then(Reply(event.call, None))
        kind = "node.resumed" if event.reason is None else "node.drained"
        self.outbox.then(AnnounceNode(kind, worker.node_id, event.reason or ""))
        self._unplaced = True

    def _remember(self, worker: Worker) -> None:
        roles: tuple[str, ...] = worker.info.roles if worker.info is not None else ("worker",)
        self.outbox.node(NodeRow(worker.node_id, worker.name, roles, worker.drain_reason, worker.seen_s))

    def on_stop_wanted(self) -> None:
        """Begin nothing new; what comes in is still recorded and acknowledged until nothing waits for the disk."""
        self.is_stopping = True

    def on_settings_changed(self, event: ev.SettingsChanged, now: float) -> None:
        """The operator has changed what may be changed while running."""
        self.settings = event.settings
        self.ledger.queue.ask_all_again()
        self._unplaced = True

    # -- Placing -------------------------------------------------------------------------------------------------------

    def settle(self, now: float) -> None:
        """At the end of a turn: acknowledge what came, do what is due, and hand out what fits."""
        term = self.election.leading
        if term is None:
            return
        for node_id, keys in self._acknowledged.items():
            self.outbox.then(Send(node_id, msg.Acknowledged(term, tuple(keys))))
        self._acknowledged.clear()
        # Before anything is handed out: what has just expired must not begin.
        calendar_s, now_s = self.ledger.next_deadline_s(), self.utc(now)
        if calendar_s is not None and calendar_s <= now_s:
            self.ledger.tick(now_s)
            self._unplaced = True
        if not self._unplaced or self.is_stopping:
            return
        self._unplaced = False
        if len(self.ledger.queue):
            self._place(term, now)
        if not len(self.ledger.queue):
            # With nothing queued, work that waits at one worker while another could begin it is taken back.
            for worker, tasks in misplaced(self.roster):
                self._recall(worker, tasks)

    def _place(self, term: msg.Term, now: float) -> None:
        now_s = self.utc(now)
        settings = self.settings
        runs: dict[int, list[msg.Assignment]] = {}
        sizes: dict[int, int] = {}
        begin = self.ledger.begin
        for task, worker in place(self.ledger.queue, self.roster, settings.prefetch_s, settings.prefetch_max):
            node_id = worker.node_id
            key = begin(task, node_id, now_s)
            batch = runs.get(node_id)
            if batch is None:
                batch = runs[node_id] = []
                sizes[node_id] = 0
            task.run_number = worker.runs_sent + 1
            batch.append(msg.Assignment(key, task.spec_bytes))
            sizes[node_id] += len(task.spec_bytes)
            if sizes[node_id] > RUN_BYTES_MAX:
                self._send_run(worker, term, runs.pop(node_id))
        for node_id, batch in runs.items():
            self._send_run(self.roster.known(node_id), term, batch)

    def _send_run(self, worker: Worker, term: msg.Term, batch: list[msg.Assignment]) -> None:
        worker.runs_sent += 1
        self.outbox.then(Send(worker.node_id, msg.Run(term, tuple(batch))))

    def _recall(self, worker: Worker, tasks: list[Task]) -> None:
        term = self.election.leading
        if not tasks or term is None or not worker.is_here:
            return
        for task in tasks:
            task.is_recalled = True
        keys = tuple(task.key for task in tasks if task.key is not None)
        self.outbox.then(Send(worker.node_id, msg.Recall(term, keys)))

    # -- Time ----------------------------------------------------------------------------------------------------------

    def next_deadline(self, now: float, utc_offset_s: float) -> float | None:
        """When tick has something to do, monotonic."""
        due = [self.election.next_deadline(now)]
        if self.leads:
            due.append(self._grace.next())
            calendar_s = self.ledger.next_deadline_s()
            due.append(None if calendar_s is None else calendar_s - utc_offset_s)
        return min((time for time in due if time is not None), default=None)

    def tick(self, now: float) -> None:
        """Do what is due."""
        self.consider(now)
        if not self.leads:
            return
        for node_id in self._grace.pop_due(now):
            worker = self.roster.known(node_id)
            self._log("warning", "worker given up", worker=worker.name, open=len(worker.assigned))
            self._lose_all(worker, "its worker is gone", "worker_lost", now)

    def gives_up_s(self, node_id: int) -> float | None:
        """When the attempts of a worker that is away count as lost, UTC."""
        due = self._grace.get(node_id)
        return None if due is None else self.utc(due)

    def on_commit_failed(self, event: ev.CommitFailed) -> list[Reply | Exit]:
        """The disk failed us: what waits must not happen. Whoever waits is told; the next process reads the truth."""
        error = Unavailable("the scheduler could not write to its disk; whether the call took effect is not known")
        calls = [effect.call for effect in self.outbox.drop() if isinstance(effect, Reply)]
        return [*(Reply(call, error) for call in calls), Exit(1, f"commit failed: {event.reason}")]

    def _log(self, level: str, event: str, **fields: object) -> None:
        self.outbox.then(Log(level, event, fields))
