"""A whole cluster in one thread: real nodes of the core, and plain stand-ins for disk, network, clock and processes.

Everything is delivered at once and in order, unless a test holds it back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random
from uuid import UUID

from taskd.core import effects as fx
from taskd.core import events as ev
from taskd.core.backlog import sort_out
from taskd.core.node import Node
from taskd.core.settings import SchedulerSettings
from taskd.core.task import Outcome, Record, TaskSpec, TaskState, decode_record, encode, units
from taskd.protocol import messages as msg
from taskd.protocol.messages import NodeRow, TaskRow

Work = Callable[[fx.Begin], Outcome | None]  # what a command does: ends at once with an outcome, or goes on (None)


def info(node_id: int, *roles: msg.Role, boot: int = 1) -> msg.NodeInfo:
    return msg.NodeInfo(node_id, f"node{node_id}", roles, node_id.to_bytes(16, "big"), boot, "test")


def offer(slots: int = 2, **capacity: float) -> msg.Offer:
    amounts = {"cpus": units(slots)} | {name: units(amount) for name, amount in capacity.items()}
    return msg.Offer(slots, amounts, {}, ("command", "http"))


class Host:
    """One machine: the running node, and what survives it."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.rows: dict[bytes, TaskRow] = {}
        self.node_rows: dict[int, NodeRow] = {}
        self.term: msg.Term | None = None
        self.journal: list[fx.Journal] = []
        self.running: dict[msg.AttemptKey, fx.Begin] = {}
        self.signals: list[fx.Effect] = []
        self.exited: fx.Exit | None = None
        self.held_commits: list[fx.Commit] = []
        self.seen: dict[msg.Term, int] = {}
        self.last_purge: msg.Dot | None = None
        self.has_strays = False

    def write(self, commit: fx.Commit) -> None:
        """Put a commit on the disk."""
        self.term = commit.term or self.term
        for row in commit.inserted:
            assert row.id not in self.rows, "inserted twice"
        for row in commit.updated:
            assert row.id in self.rows, "updated what does not exist"
        self.rows.update((row.id, row) for row in (*commit.inserted, *commit.updated))
        for row in commit.taken:
            old = self.rows.get(row.id)
            if old is None or old.dot.rank() < row.dot.rank():
                self.rows[row.id] = row
        for task_id in commit.purged:
            self.rows.pop(task_id, None)
        for purge in commit.purges:
            covered = {dot.term: dot.lsn for dot in purge.seen}
            for task_id, row in list(self.rows.items()):
                is_inside = purge.after < task_id and (not purge.until or task_id <= purge.until)
                is_covered = row.lsn <= covered.get(row.dot.term, 0)
                if is_inside and is_covered and task_id not in purge.present:
                    del self.rows[task_id]
        for dot in commit.seen:
            self.seen[dot.term] = max(dot.lsn, self.seen.get(dot.term, 0))
        self.last_purge = commit.last_purge or self.last_purge
        if commit.has_strays is not None:
            self.has_strays = commit.has_strays
        self.node_rows.update((row.node_id, row) for row in commit.nodes)

    def loaded(self) -> ev.Loaded:
        seen = [msg.Dot(term, lsn) for term, lsn in self.seen.items()]
        return ev.Loaded(
            self.term,
            seen,
            list(self.node_rows.values()),
            self.last_purge,
            is_empty=not seen,
            has_strays=self.has_strays,
        )

    def read(self, effect: fx.Effect) -> ev.Event:
        """What the disk answers."""
        rows = [self.rows[task_id] for task_id in sorted(self.rows)]
        match effect:
            case fx.ReadBacklog(call, after):
                waiting = (row for row in rows if row.id > after and row.state < TaskState.SUCCEEDED)
                return ev.BacklogRead(call, sort_out(waiting))
            case fx.ReadLacking(call, seen, after):
                covered = {dot.term: dot.lsn for dot in seen}
                return ev.RowsRead(
                    call, [row for row in rows if row.id > after and row.lsn > covered.get(row.dot.term, 0)]
                )
            case fx.ReadRows(call, ids):
                return ev.RowsRead(call, [self.rows[task_id] for task_id in ids if task_id in self.rows])
            case fx.ReadIds(call, after):
                return ev.IdsRead(call, [row.id for row in rows if row.id > after])
            case fx.ReadOld(call, before_s):
                return ev.IdsRead(call, [row.id for row in rows if 0 < row.finished_s < before_s])
        raise AssertionError(effect)


class World:
    """Hosts by node id, the time, and everything on its way."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.utc_offset_s = 1_700_000_000.0
        self.hosts: dict[int, Host] = {}
        self.links: set[tuple[int, int]] = set()
        self.work: Work = lambda begin: None
        self.holds_commits = False
        self.holds_reads = False
        self.held_reads: list[tuple[int, fx.Effect]] = []
        self.is_founder = True
        self.last_reply: object = None
        self.replies: dict[int, object] = {}
        self.durability: dict[int, str] = {}
        self.announced: list[tuple[int, fx.AnnounceNode]] = []
        self.superseded: list[tuple[int, fx.Superseded]] = []
        self.started: list[tuple[int, fx.Begin]] = []
        self.sent: list[tuple[int, int, msg.Message]] = []
        self.logs: list[fx.Log] = []
        self._calls = 0
        self._ids = 0
        self._todo: deque[tuple[int, ev.Event]] = deque()

    def post(self, node_id: int, event: ev.Event, source: int = 0) -> None:
        """Put an event on its way to a node, from a peer or (0) from its own machine."""
        self._todo.append((node_id, event))

    # -- Building ------------------------------------------------------------------------------------------------------

    def add(
        self, node_id: int, *roles: msg.Role, settings: SchedulerSettings | None = None, offer: msg.Offer | None = None
    ) -> Host:
        return self._boot(node_id, roles, settings or SchedulerSettings(), offer or OFFER, Host, 1)

    def _boot(
        self, node_id: int, roles: tuple[msg.Role, ...], settings: SchedulerSettings, offered: msg.Offer,
        make: Callable[[Node], Host], boot: int,
    ) -> Host:  # fmt: skip
        node = Node(
            info(node_id, *roles, boot=boot), Random(node_id * 1000 + boot),
            settings if "scheduler" in roles else None, offered if "worker" in roles else None,
            is_founder=self.is_founder,
        )  # fmt: skip
        host = self.hosts[node_id] = make(node)
        node.handle(ev.ClockRead(self.utc_offset_s), self.now)
        if "scheduler" in roles:
            node.handle(host.loaded(), self.now)
        if "worker" in roles:
            node.handle(self._journal_of(host), self.now)
        for other in list(self.hosts):
            if other != node_id and self.hosts[other].exited is None:
                self.connect(node_id, other)
        self.settle()
        return host

    @staticmethod
    def _journal_of(host: Host) -> ev.JournalLoaded:
        term, begun, ended, proof = None, {}, {}, b""
        for entry in host.journal:
            if entry.term is not None:
                term, proof = entry.term, entry.proof
            begun.update(dict.fromkeys(entry.begun))
            for outcome in entry.ended:
                begun.pop(outcome.key, None)
                ended[outcome.key] = outcome
            for key in entry.acknowledged:
                ended.pop(key, None)
        return ev.JournalLoaded(term, list(begun), list(ended.values()), proof)

    def cluster(self, workers: int = 1, **options: object) -> World:
        """One scheduler (1) that leads and some workers (11, 12, …)."""
        self.add(1, "scheduler", settings=options.get("settings"))  # type: ignore[arg-type]
        for number in range(workers):
            self.add(11 + number, "worker", offer=options.get("offer"))  # type: ignore[arg-type]
        self.run(1.0)
        assert self.scheduler.leads
        return self

    @property
    def scheduler(self):
        scheduler = self.hosts[1].node.scheduler
        assert scheduler is not None
        return scheduler

    # -- The network ---------------------------------------------------------------------------------------------------

    def connect(self, one: int, other: int) -> None:
        if "scheduler" not in self.hosts[one].node.info.roles + self.hosts[other].node.info.roles:
            return
        self.links |= {(one, other), (other, one)}
        self.post(one, ev.PeerUp(self.hosts[other].node.info), other)
        self.post(other, ev.PeerUp(self.hosts[one].node.info), one)

    def cut(self, one: int, other: int, is_orderly: bool = False) -> None:
        if (one, other) in self.links:
            self.links -= {(one, other), (other, one)}
            for end, peer in ((one, other), (other, one)):
                self.post(end, ev.PeerDown(peer, "cut", is_orderly), peer)
        self.settle()

    def crash(self, node_id: int) -> None:
        """kill -9: what is in memory is gone, and all its processes."""
        host = self.hosts[node_id]
        host.exited = fx.Exit(137, "crashed")
        host.running.clear()
        host.held_commits.clear()
        self._todo = deque((to, event) for to, event in self._todo if to != node_id)
        for one, other in list(self.links):
            if one == node_id:
                self.links -= {(one, other), (other, one)}
                self.post(other, ev.PeerDown(node_id, "reset"), node_id)
        self.settle()

    def restart(self, node_id: int) -> Host:
        """Start again on the same disk."""
        old = self.hosts[node_id]
        node = old.node
        settings = node.scheduler.settings if node.scheduler is not None else SchedulerSettings()
        offered = node.worker.offer if node.worker is not None else OFFER

        def make(fresh: Node) -> Host:
            host = Host(fresh)
            host.rows, host.node_rows, host.term, host.journal = old.rows, old.node_rows, old.term, old.journal
            host.seen, host.last_purge, host.has_strays = old.seen, old.last_purge, old.has_strays
            return host

        return self._boot(node.info.node_id, node.info.roles, settings, offered, make, node.info.boot + 1)

    def wipe(self, node_id: int) -> Host:
        """Start again on an empty disk; nobody says that it has just made the cluster's key."""
        node = self.hosts[node_id].node
        settings = node.scheduler.settings if node.scheduler is not None else SchedulerSettings()
        self.is_founder = False
        try:
            return self._boot(node_id, node.info.roles, settings, OFFER, Host, node.info.boot + 1)
        finally:
            self.is_founder = True

    def fresh_id(self) -> bytes:
        """The id of a new task."""
        self._ids += 1
        return UUID(int=self._ids).bytes

    # -- Time ----------------------------------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        """Let time pass, from deadline to deadline."""
        end = self.now + seconds
        self.settle()
        while True:
            due = [
                (deadline, node_id)
                for node_id, host in self.hosts.items()
                if host.exited is None and (deadline := host.node.next_deadline(self.now)) is not None
            ]
            if not due or min(due)[0] > end:
                break
            self.now = max(self.now, min(due)[0])
            self.post(min(due)[1], ev.Ticked())
            self.settle()
        self.now = end
        self.settle()

    def hears(self, node_id: int, event: ev.Event) -> None:
        """An event reaches a node."""
        self.hosts[node_id].node.handle(event, self.now)

    def settle(self) -> None:
        """Deliver everything that is on its way."""
        for _ in range(100_000):
            if self._todo:
                node_id, event = self._todo.popleft()
                if self.hosts[node_id].exited is None:
                    self.hears(node_id, event)
            busy = False
            for node_id, host in list(self.hosts.items()):
                if host.exited is None:
                    for effect in host.node.take_effects(self.now):
                        busy = True
                        self.does(node_id, host, effect)
            if not busy and not self._todo:
                return
        raise AssertionError("the cluster does not settle")

    def does(self, node_id: int, host: Host, effect: fx.Effect) -> None:
        """A node wants something done."""
        match effect:
            case fx.Send(to, message):
                self.sent.append((node_id, to, message))
                if (node_id, to) in self.links:
                    self.post(to, ev.Received(node_id, [message]), node_id)
            case fx.Commit():
                host.held_commits.append(effect)
                if not self.holds_commits:
                    self.commit(node_id)
            case fx.Reply(call, answer, durability):
                self.replies[call] = answer
                self.durability[call] = durability
            case fx.ReadBacklog() | fx.ReadLacking() | fx.ReadRows() | fx.ReadIds() | fx.ReadOld():
                self.held_reads.append((node_id, effect))
                if not self.holds_reads:
                    self.read()
            case fx.AnnounceNode():
                self.announced.append((node_id, effect))
            case fx.Superseded():
                self.superseded.append((node_id, effect))
            case fx.Start(attempts):
                for begin in attempts:
                    self._begin(node_id, host, begin)
            case fx.Terminate() | fx.Kill():
                host.signals.append(effect)
            case fx.Journal():
                host.journal.append(effect)
            case fx.Log():
                self.logs.append(effect)
            case fx.Exit():
                host.exited = effect

    def read(self) -> None:
        """A disk has made the oldest reading that is held."""
        node_id, effect = self.held_reads.pop(0)
        self.post(node_id, self.hosts[node_id].read(effect))

    def commit(self, node_id: int) -> None:
        """The disk of a node is done with its oldest commit."""
        commit = self.hosts[node_id].held_commits.pop(0)
        self.hosts[node_id].write(commit)
        self.post(node_id, ev.Committed(commit.seq))

    # -- Work ----------------------------------------------------------------------------------------------------------

    def _begin(self, node_id: int, host: Host, begin: fx.Begin) -> None:
        self.started.append((node_id, begin))
        host.running[begin.key] = begin
        started = msg.AttemptStarted(begin.key, self.utc)
        outcome = self.work(begin)
        if outcome is None:
            self.post(node_id, ev.Progressed([started], []))
        else:
            del host.running[begin.key]
            ended = msg.AttemptEnded(begin.key, outcome, self.utc, self.utc, b"")
            self.post(node_id, ev.Progressed([], [ended]))

    def end(self, task_id: bytes, outcome: Outcome = Outcome.OK, took_s: float = 0.0) -> None:
        """The process of a running task ends."""
        for node_id, host in self.hosts.items():
            for key in list(host.running):
                if key.task_id == task_id:
                    del host.running[key]
                    ended = msg.AttemptEnded(key, outcome, self.utc - took_s, self.utc, b"")
                    self.post(node_id, ev.Progressed([], [ended]))
                    self.settle()
                    return
        raise AssertionError(f"{task_id.hex()} does not run anywhere")

    @property
    def utc(self) -> float:
        return self.now + self.utc_offset_s

    # -- Clients -------------------------------------------------------------------------------------------------------

    def submit(self, count: int = 1, type: str = "command", **options: object) -> list[bytes]:
        """Submit tasks at the leader; returns their ids."""
        spec = TaskSpec(type, argv=("true",), submitted_s=self.utc, **options)  # type: ignore[arg-type]
        encoded = encode(spec)
        ids = [self.fresh_id() for _ in range(count)]
        tasks = [ev.NewTask(task_id, spec, encoded) for task_id in ids]
        self.ask(lambda call: ev.Submitted(call, tasks))
        return ids

    def ask(self, make: Callable[[int], ev.Event], node_id: int = 1) -> object:
        """Put a client's wish; returns the reply, or None while there is none."""
        self._calls += 1
        self.post(node_id, make(self._calls))
        self.settle()
        return self.replies.get(self._calls)

    def cancel(self, *ids: bytes) -> object:
        return self.ask(lambda call: ev.CancelWanted(call, list(ids)))

    def state(self, task_id: bytes) -> TaskState:
        """As the leader's disk has it."""
        return TaskState(self.hosts[1].rows[task_id].state)

    def record(self, task_id: bytes) -> Record:
        return decode_record(self.hosts[1].rows[task_id].record)

    def outcomes(self, task_id: bytes) -> list[Outcome | None]:
        return [attempt.outcome for attempt in self.record(task_id).attempts]

    def where(self, task_id: bytes) -> list[int]:
        """The workers that began it, in order."""
        return [node_id for node_id, begin in self.started if begin.key.task_id == task_id]


OFFER = offer()
