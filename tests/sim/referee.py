"""The judge: knows the promises of PROTOCOL.md and nothing of how they are kept. Whatever is broken raises Violation.

It sees what reaches disks, what nodes say to each other, to workers and to clients, and which processes begin and end.
The numbers are those of the list of invariants in docs/protocol.md. What holds at the end is in verdict.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from taskd.core import effects as fx
from taskd.core.roster import NOTHING_OFFERED
from taskd.core.task import RAN_TWICE, Outcome, TaskState
from taskd.errors import TaskdError
from taskd.protocol import messages as msg
from taskd.protocol.messages import AttemptKey, Dot, TaskRow, Term
from tests.sim.disk import Database, covers
from tests.sim.rows import incoherence, is_final, key_of, missing_in, rank, record_of, spec_of, token_of

if TYPE_CHECKING:
    from tests.sim.clients import Wish
    from tests.sim.host import Host
    from tests.sim.world import World

EPOCH_JUMP_MAX = 1 << 20
COMMITTED_S = 0.01  # within it a daemon hears that its commit is written
Before = tuple[Term | None, dict[bytes, TaskRow | None], dict[Term, int]]
"""What a commit meets on the disk: the greatest term, the rows it writes over, and how much was seen."""


class Violation(AssertionError):
    """A promise was broken: which of the list, and how."""

    def __init__(self, invariant: str, text: str) -> None:
        super().__init__(f"invariant {invariant}: {text}")
        self.invariant = invariant


class Reign:
    """One term: who leads under it, and every commit that was asked for in it."""

    def __init__(self, term: Term, host: Host, since: float) -> None:
        self.term = term
        self.host = host
        self.since = since  # decided to claim
        self.boot = host.boot
        self.commits: dict[int, tuple[float, list[TaskRow], list[bytes]]] = {}
        self.seen_before: dict[Term, int] | None = None  # of the leader, when it first said that it leads
        self.asked: dict[int, dict[Term, int]] = {}  # by host: what it had seen when it was asked for its rows
        self.is_begun = False
        self.is_said = False
        self.copied_lsn = 0  # up to there a standby has said that it has everything


class Copy:
    """A standby in sync, as its leader knows it."""

    def __init__(self, term: Term, since: float, lsn: int) -> None:
        self.term = term
        self.since = since
        self.lsn = lsn  # acknowledged
        self.is_behind = False  # it took too long with a commit, and does not count until it has them all


class Sight:
    """What one process has been told by others."""

    def __init__(self) -> None:
        self.says: dict[int, msg.Leading] = {}
        self.says_since: dict[int, float] = {}
        self.asked_at = 0.0  # when its latest commit was asked for
        self.written_at = 0.0  # and when the one before it was written: no two are on their way at once
        self.attached: dict[int, Term] = {}  # standbys that follow us, by their own word on this connection
        self.synced: dict[int, Copy] = {}  # of those the ones in sync with our own term
        self.handed: Term | None = None  # the term that was handed over to us
        self.has_handed = False  # our reign to another, which has to take over now
        self.stood_still_at = 0.0  # until then, for so long that others may have gone on
        self.term: Term | None = None  # the greatest that a worker obeyed
        self.allowed: dict[AttemptKey, None] = {}  # attempts that a leader gave to this worker, rightly
        self.acknowledged: dict[AttemptKey, None] = {}  # outcomes that this worker may forget
        self.to_announce: dict[bytes, int] = {}  # decisions that replace others which were told


class Referee:
    """Judges one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.reigns: dict[Term, Reign] = {}
        self.sights: dict[int, Sight] = {}
        self.dots: dict[int, Dot | None] = {}  # by host: of the commit that is on its way to the disk
        self.minted: dict[AttemptKey, int] = {}  # for which worker
        self.closed: dict[AttemptKey, Dot] = {}  # by which commit an attempt first ended
        self.let_in: dict[bytes, None] = {}  # tasks that some leader took for ready
        self.begun: dict[AttemptKey, int] = {}
        self.ended: dict[AttemptKey, Outcome] = {}
        self.reported: dict[AttemptKey, int] = {}  # outcomes as their workers wrote them down
        self.accepted: dict[bytes, str] = {}  # with which durability
        self.told: dict[bytes, tuple[int, Dot]] = {}  # the weightiest decision that was announced, and what made it
        self.purged: dict[bytes, None] = {}
        self.gone: dict[Database, dict[bytes, dict[Term, int]]] = {}  # rows that were purged there, and what was seen
        self.reborn: dict[bytes, None] = {}  # tasks that a client submitted again after they had been purged
        self.excused: dict[bytes, None] = {}  # tasks of which something was on a lost disk alone
        self._begun_counts: Counter[bytes] = Counter()

    def begun_count(self, task_id: bytes) -> int:
        """How many attempts of a task have begun."""
        return self._begun_counts[task_id]

    def sight(self, host: Host) -> Sight:
        """Of the process that runs there now."""
        return self.sights[host.index]

    # -- Processes come and go ---------------------------------------------------------------------------------------

    def on_started(self, host: Host) -> None:
        """A daemon starts on its disk."""
        sight = self.sights[host.index] = Sight()
        sight.term = host.journal.replay()[0]

    def on_ended(self, host: Host) -> None:
        """A daemon is gone: it owes nothing any more."""
        self.sights[host.index] = Sight()

    def on_stood_still(self, host: Host) -> None:
        """A daemon goes on after a stop that it was told of."""
        self.sight(host).stood_still_at = self.world.engine.now

    def on_journal_cut(self, host: Host) -> None:
        """The end of a journal was lost with the machine."""

    def on_peer_lost(self, host: Host, node_id: int) -> None:
        """A daemon has noticed that a connection is gone."""
        sight = self.sight(host)
        sight.says.pop(node_id, None)
        sight.attached.pop(node_id, None)
        sight.synced.pop(node_id, None)
        # Who is lost on the way to a reign is left out, unless it comes back in time to be asked again.
        lost = [other.index for other in self.world.hosts if other.node_id == node_id]
        for reign in self.reigns.values():
            if reign.boot == host.boot and not reign.is_said:
                for index in lost:
                    reign.asked.pop(index, None)

    def on_database_lost(self, host: Host, new: Database) -> None:
        """A disk is about to be replaced, by an empty one or an old copy. What was on it alone cannot be asked for."""
        others = [other.database for other in self.world.hosts if other is not host and other.is_scheduler]
        for task_id, row in host.database.rows.items():
            rests = [(database.rows[task_id], database) for database in (*others, new) if task_id in database.rows]
            # What a standby took before it had caught up does not count as a copy.
            if all(missing_in(rest, row) or not covers(database.seen, rest.dot) for rest, database in rests):
                self.excused[task_id] = None
        self.gone.pop(host.database, None)

    # -- Disks ---------------------------------------------------------------------------------------------------------

    def on_commit_asked(self, host: Host, commit: fx.Commit) -> None:
        """A scheduler wants something written: its decisions are known from here on, others may hear of them first."""
        term = commit.term
        sight, now = self.sight(host), self.world.engine.now
        # A claim that was dropped before it was written leaves its term, so that the number is not used again.
        is_claim = any(dot.term == term for dot in commit.seen)
        if (
            is_claim
            and term is not None
            and term not in self.reigns
            and (term.node_id, term.boot) == (host.node_id, host.boot)
        ):
            # While another commit was on its way, whoever decided to claim may not have heard yet of what came since.
            has_waited = now - sight.written_at < COMMITTED_S
            self._begin_reign(host, term, decided_after=sight.asked_at if has_waited else now)
        sight.asked_at = now
        dot = self.dots[host.index] = self._own_dot(host, commit)
        if dot is None:
            if commit.inserted or commit.updated:
                raise Violation("3", f"{host.name} decides without a term of its own")
            for task_id in commit.purged:
                if task_id not in self.purged:
                    raise Violation("8", f"{host.name} removes {task_id.hex()[-4:]}, and no leader purged it")
            return
        reign = self.reigns[dot.term]
        if dot.lsn != len(reign.commits) + 1:
            raise Violation("8", f"{host.name} gives commit number {dot.lsn} after {len(reign.commits)}")
        rows = [*commit.inserted, *commit.updated]
        reign.commits[dot.lsn] = (self.world.engine.now, rows, commit.purged)
        for row in commit.inserted:
            accepted = record_of(row.record).accepted
            # Submitted again; or also to another leader, which no history tells that it was purged here.
            if row.id in self.purged and accepted is not None and not covers(host.database.seen, accepted):
                self.reborn[row.id] = None
        for row in rows:
            self._check_own_row(host, row, dot)
        for task_id in commit.purged:
            self._check_purge(host, task_id)

    def _own_dot(self, host: Host, commit: fx.Commit) -> Dot | None:
        """What names a commit of a leader; that of a standby can only repeat one of its earlier reigns."""
        for dot in commit.seen:
            if dot.term.node_id == host.node_id and dot.term.boot == host.boot:
                reign = self.reigns.get(dot.term)
                if reign is None:
                    raise Violation("4", f"{host.name} decides under {dot.term}, which it never made durable")
                if dot.lsn > len(reign.commits):
                    return dot
        return None

    def _begin_reign(self, host: Host, term: Term, decided_after: float) -> None:
        greatest = host.database.term
        if greatest is not None and term.epoch <= greatest.epoch:
            raise Violation("4", f"{host.name} claims epoch {term.epoch} and has seen {greatest.epoch}")
        sight = self.sight(host)
        for node_id in host.peers.open if sight.handed is None else ():
            said = sight.says.get(node_id)
            if said is None or sight.says_since[node_id] > decided_after:
                continue
            if said.term is not None and said.term.node_id != host.node_id:
                raise Violation("9", f"{host.name} claims while {node_id} says that it follows {said.term}")
            if said.may_lead and node_id < host.node_id and not sight.has_handed:
                raise Violation("9", f"{host.name} claims while {node_id} is there and would lead")
        sight.handed, sight.has_handed = None, False
        self.reigns[term] = Reign(term, host, decided_after)

    def _check_own_row(self, host: Host, row: TaskRow, dot: Dot) -> None:
        """A row that a leader writes under its own term."""
        if row.dot != dot:
            raise Violation("8", f"{host.name} writes {row.id.hex()[-4:]} as of {row.dot} in commit {dot}")
        if text := incoherence(row):
            raise Violation("2", f"{host.name} writes {row.id.hex()[-4:]}: {text}")
        old = host.database.rows.get(row.id)
        record = record_of(row.record)
        known = {token_of(attempt) for attempt in record_of(old.record).attempts} if old is not None else ()
        for attempt in record.attempts:
            key = key_of(row, attempt)
            if attempt.outcome is not None and key not in self.closed:
                self.closed[key] = dot
            if token_of(attempt) in known or key in self.minted:
                continue
            if (attempt.term, attempt.lsn) != (dot.term, dot.lsn):
                raise Violation("3", f"{host.name} brings up attempt {key}, which nobody minted")
            if old is not None and is_final(old):
                raise Violation("10", f"{host.name} has {row.id.hex()[-4:]} begin again after it was decided")
            spec = spec_of(row.spec)
            # A task that one leader has let into the queue by its clock stays there.
            is_early = attempt.dispatched_s < spec.not_before_s
            if is_early and row.id not in self.let_in and (old is None or old.state == TaskState.SCHEDULED):
                raise Violation("10", f"{host.name} has {row.id.hex()[-4:]} begin before its time")
            # What another leader handed out is learned of while ours is on its way to the disk: both ran, then.
            # So had one that was given up for that reason, whenever its end is heard of.
            lost = [it for it in record.attempts if it.outcome is Outcome.LOST and it.started_s]
            losses = [it for it in lost if token_of(it) in known and it.reason != RAN_TWICE]
            if spec.on_lost == "fail" and losses:
                raise Violation("3", f"{host.name} has {row.id.hex()[-4:]} run again, and on_lost is fail")
            self.minted[key] = attempt.worker
        is_taken_for_ready = old is not None and old.state == TaskState.SCHEDULED and row.state == TaskState.QUEUED
        if is_taken_for_ready and host.utc() < spec_of(row.spec).not_before_s - self.world.clock_error_s - 0.001:
            raise Violation("10", f"{host.name} takes {row.id.hex()[-4:]} for ready before its time")
        if row.state != TaskState.SCHEDULED:
            self.let_in[row.id] = None
        if row.state == TaskState.SUCCEEDED:
            self._check_success(row)

    def _check_success(self, row: TaskRow) -> None:
        for attempt in record_of(row.record).attempts:
            key = key_of(row, attempt)
            if attempt.outcome is Outcome.OK and self.ended.get(key) is Outcome.OK:
                if self.begun.get(key) != attempt.worker or self.minted.get(key) != attempt.worker:
                    raise Violation("3", f"{key} was minted for {attempt.worker} and run by {self.begun.get(key)}")
                return
        raise Violation("3", f"{row.id.hex()[-4:]} has succeeded, and no attempt of it did")

    def _check_purge(self, host: Host, task_id: bytes) -> None:
        row = host.database.rows.get(task_id)
        if row is not None and task_id not in self.purged:  # Else it follows what another leader has purged.
            age_s = host.utc() - row.finished_s
            if not is_final(row) or age_s < host.settings.finished_age_max_s - 1.0 - self.world.clock_error_s:
                raise Violation("8", f"{host.name} purges {task_id.hex()[-4:]} too early")
        self.purged[task_id] = None

    def before_write(self, host: Host, commit: fx.Commit) -> Before:
        """What stands where the commit will write."""
        rows = host.database.rows
        changed: dict[bytes, TaskRow | None] = {}
        for row in (*commit.inserted, *commit.updated, *commit.taken):
            changed[row.id] = rows.get(row.id)
        if commit.purges:
            changed.update(rows)
        seen = host.database.seen
        return host.database.term, changed, dict(seen)

    def after_write(self, host: Host, commit: fx.Commit, before: Before) -> None:
        """A commit is durable."""
        database = host.database
        self.sight(host).written_at = self.world.engine.now
        greatest, changed, greatest_seen = before
        self._check_term(host, commit, greatest)
        own_dot = self.dots.get(host.index)
        gone = self.gone.setdefault(database, {})
        for task_id in commit.purged:
            gone[task_id] = greatest_seen
        for task_id, old in changed.items():
            if task_id in self.reborn:
                continue
            new = database.rows.get(task_id)
            if new is None:
                if old is not None and task_id not in self.purged:
                    raise Violation("8", f"{task_id.hex()[-4:]} vanishes at {host.name}, and nobody purged it")
                gone[task_id] = greatest_seen
            elif old is None:
                self._check_new(host, new, own_dot, greatest_seen)
            elif new is not old:
                # What a standby took before it had caught up is not in its history yet: a newer row may overtake it.
                is_in_history = covers(greatest_seen, old.dot)
                if is_in_history and task_id not in self.purged and (text := missing_in(new, old)):
                    raise Violation("7", f"{host.name} writes over {task_id.hex()[-4:]} and loses {text}")
                if own_dot is not None and is_final(old) and (old.state != new.state) and task_id in self.told:
                    self.sight(host).to_announce[task_id] = new.state
        for dot in commit.seen:
            self._check_seen(host, dot, greatest_seen.get(dot.term, 0), own_dot)

    def _check_term(self, host: Host, commit: fx.Commit, before: Term | None) -> None:
        greatest, term = host.database.term, commit.term
        if term is not None and before is not None:
            if term.rank() < before.rank():
                raise Violation("4", f"the greatest term at {host.name} goes back from {before} to {term}")
            if term.epoch > before.epoch + EPOCH_JUMP_MAX:
                raise Violation("4", f"{host.name} takes an epoch far above its own")
        dot = self.dots.get(host.index)
        if dot is not None and greatest is not None and greatest.rank() > dot.term.rank():
            raise Violation("4", f"{host.name} decides under {dot.term}, and has seen {greatest}")

    def _check_new(self, host: Host, row: TaskRow, own_dot: Dot | None, greatest_seen: Mapping[Term, int]) -> None:
        accepted = record_of(row.record).accepted
        if accepted is None:
            raise Violation("8", f"{row.id.hex()[-4:]} does not say which commit took it")
        seen = self.gone.get(host.database, {}).get(row.id)
        if accepted == own_dot or seen is None:
            return
        # What another leader has changed or accepted, without knowing of the purge, comes back to those that follow it;
        # and to a leader where that did not know of the acceptance by which it would tell that there was a purge.
        term = host.database.term
        is_leading = term is not None and term.node_id == host.node_id
        if covers(seen, row.dot) or (is_leading and covers(greatest_seen, accepted)):
            raise Violation("8", f"{row.id.hex()[-4:]} was purged at {host.name} and returns")

    def _check_seen(self, host: Host, dot: Dot, before: int, own_dot: Dot | None) -> None:
        """Whoever says that it has seen a commit has to have everything that was in it."""
        if dot.lsn < before:
            raise Violation("8", f"{host.name} has seen {before} commits of {dot.term} and now {dot.lsn}")
        reign = self.reigns.get(dot.term)
        if reign is None:
            raise Violation("8", f"{host.name} has seen {dot}, which nobody wrote")
        if dot == own_dot:
            if dot.lsn != before + 1:
                raise Violation("8", f"{host.name} leaves out commits of its own before {dot}")
            return
        rows = host.database.rows
        for lsn in range(before + 1, dot.lsn + 1):
            commit = reign.commits.get(lsn)
            if commit is None:
                raise Violation("8", f"{host.name} has seen commit {lsn} of {dot.term}, which was never made")
            for row in commit[1]:
                if row.id in self.purged:
                    continue  # Whoever decides something about it beside the purge keeps what it has.
                mine = rows.get(row.id)
                if mine is None:
                    raise Violation("8", f"{host.name} has seen {lsn} of {dot.term}, and lacks {row.id.hex()[-4:]}")
                if text := missing_in(mine, row):
                    raise Violation(
                        "8", f"{host.name} has seen {lsn} of {dot.term}, and of {row.id.hex()[-4:]} lacks {text}"
                    )

    def on_commit_failed(self, host: Host) -> None:
        """A commit has failed: only a new process may go on from there."""

    # -- What nodes say ------------------------------------------------------------------------------------------------

    def on_sent(self, host: Host, to: int, message: msg.Message, is_connected: bool) -> None:
        """A node asks for a message to be sent."""
        check = _ON_SENT.get(type(message))
        if check is not None:
            check(self, host, to, message)

    def _sent_run(self, host: Host, to: int, message: msg.Run) -> None:
        self._check_leads(host, message.term, "hands out attempts")
        for assignment in message.assignments:
            key = assignment.key
            if self.minted.get(key) != to:
                raise Violation("3", f"{host.name} sends {key} to {to}, minted for {self.minted.get(key)}")
            row = host.database.rows.get(key.task_id)
            if row is None or not any(key_of(row, attempt) == key for attempt in record_of(row.record).attempts):
                raise Violation("3", f"{host.name} hands out {key}, which is not on its disk")
            self._check_copied(host, Dot(key.term, key.lsn), "hands out an attempt")

    def _check_leads(self, host: Host, term: Term, what: str) -> None:
        if host.database.term != term or term not in self.reigns or self.reigns[term].boot != host.boot:
            raise Violation("4", f"{host.name} {what} under {term}, and its greatest is {host.database.term}")

    def _check_copied(self, host: Host, dot: Dot, what: str) -> None:
        """While a standby is in sync nothing leaves that only the leader has."""
        reign = self.reigns.get(dot.term)
        if reign is None or reign.boot != host.boot:
            return
        asked_at = reign.commits[dot.lsn][0]
        for copy in self.sight(host).synced.values():
            if copy.term != dot.term:
                continue
            self._look_behind(host, reign, copy)
            if copy.since <= asked_at and not copy.is_behind and not self._has_copy(host, dot):
                raise Violation("1", f"{host.name} {what} of commit {dot.lsn}, and no standby in sync has that")

    def _look_behind(self, host: Host, reign: Reign, copy: Copy) -> None:
        """A standby that acknowledges nothing for twice the grace counts as gone."""
        commit = reign.commits.get(copy.lsn + 1)
        if commit is not None and self.world.engine.now - commit[0] >= 2 * host.settings.standby_grace_s - 0.01:
            copy.is_behind = True

    def _on_replicated(self, host: Host, sender: int, message: msg.Replicated) -> None:
        reign = self.reigns.get(message.term)
        if reign is None or reign.boot != host.boot or host.database.term != message.term:
            return
        sight = self.sight(host)
        if sight.attached.get(sender) != message.term:
            return  # The answer to a commit that came before it lost us: it begins anew.
        synced = sight.synced
        if sender not in synced or synced[sender].term != message.term:
            synced[sender] = Copy(message.term, self.world.engine.now, message.lsn)
        copy = synced[sender]
        self._look_behind(host, reign, copy)
        copy.lsn = max(copy.lsn, message.lsn)
        if copy.is_behind and copy.lsn >= len(reign.commits):
            copy.is_behind, copy.since = False, self.world.engine.now

    def _has_copy(self, host: Host, dot: Dot) -> bool:
        return dot.lsn <= self.reigns[dot.term].copied_lsn or any(
            other.is_scheduler and other is not host and covers(other.database.seen, dot) for other in self.world.hosts
        )

    def _sent_acknowledged(self, host: Host, to: int, message: msg.Acknowledged) -> None:
        self._check_leads(host, message.term, "acknowledges")
        for key in message.keys:
            row = host.database.rows.get(key.task_id)
            if row is None:
                if self._is_known_elsewhere(host, key.task_id):
                    raise Violation("6", f"{host.name} acknowledges {key}, and has no such task")
                continue
            attempts = {key_of(row, attempt): attempt for attempt in record_of(row.record).attempts}
            attempt = attempts.get(key)
            is_success = self.reported.get(key) == Outcome.OK
            if is_final(row):
                pass
            elif is_success:
                raise Violation("6", f"{host.name} acknowledges the success {key}, and the task is not decided")
            elif attempt is None or attempt.outcome is None:
                raise Violation("6", f"{host.name} acknowledges {key}, and its outcome is not on the disk")
            if key in self.closed:
                self._check_copied(host, self.closed[key], "acknowledges an outcome")

    def _is_known_elsewhere(self, host: Host, task_id: bytes) -> bool:
        """Whether a scheduler that this one knows of has the task. What no disk has any more is asked for in vain."""
        known = {node_id for node_id in host.database.nodes if not self.world.is_id_shared(node_id)}
        return task_id not in self.purged and any(
            task_id in other.database.rows and other.node_id in known for other in self.world.schedulers
        )

    def _sent_replicated(self, host: Host, to: int, message: msg.Replicated) -> None:
        database, term = host.database, message.term
        if database.term is None or database.term.rank() > term.rank():
            raise Violation("4", f"{host.name} serves {term}, and has seen {database.term}")
        if database.seen.get(term, 0) < message.lsn:
            raise Violation("8", f"{host.name} says that it has {message.lsn} of {term}, and has {database.seen}")
        reign = self.reigns.get(term)
        if reign is not None:
            reign.copied_lsn = max(reign.copied_lsn, message.lsn)
        before = reign.seen_before if reign is not None else None
        for earlier, lsn in (before or {}).items():
            if database.seen.get(earlier, 0) < lsn and earlier != term:
                raise Violation("8", f"{host.name} says that it is in sync with {term}, and lacks {earlier} {lsn}")

    def _sent_claim(self, host: Host, to: int, message: msg.Claim) -> None:
        if host.database.term != message.term:
            raise Violation("4", f"{host.name} claims {message.term}, which is not durable")

    def _sent_page(self, host: Host, to: int, message: msg.Page) -> None:
        greatest = host.database.term
        if greatest is None or greatest.rank() < message.term.rank():
            raise Violation("4", f"{host.name} answers {message.term} before that is durable at it")

    def _sent_leading(self, host: Host, to: int, message: msg.Leading) -> None:
        term = message.term
        reign = self.reigns.get(term) if term is not None else None
        if reign is None or reign.boot != host.boot or reign.is_said:
            return
        reign.is_said = True
        database = host.database
        if database.term != term:
            raise Violation("4", f"{host.name} says that it leads under {term}, and that is not its greatest")
        reign.seen_before = dict(database.seen)
        sight = self.sight(host)
        for other in self.world.hosts:
            if other is host or not other.is_scheduler or other.node_id not in host.peers.open:
                continue
            had = reign.asked.get(other.index)
            if had is None:
                is_old = sight.says_since.get(other.node_id, reign.since) < reign.since and other.node_id in sight.says
                if is_old and not self.world.is_id_shared(other.node_id):
                    raise Violation("1", f"{host.name} leads, and has not asked {other.name} what it has")
            else:
                for earlier, lsn in had.items():
                    if database.seen.get(earlier, 0) < lsn:
                        raise Violation("1", f"{host.name} leads without what {other.name} had: {lsn} of {earlier}")

    def _sent_register(self, host: Host, to: int, message: msg.Register) -> None:
        term = message.term
        if term is None or term.node_id != to or message.offer == NOTHING_OFFERED:
            return  # It says only that it obeys another, or obeyed an earlier life of this one.
        told = self.sight(host).acknowledged
        for key in host.journal.replay()[2]:
            if key not in message.unacknowledged and key not in told:
                raise Violation("6", f"worker {host.name} has written down the outcome of {key} and does not report it")

    def _sent_hand_over(self, host: Host, to: int, message: msg.HandOver) -> None:
        sight = self.sight(host)
        sight.has_handed = True
        # What it has said counts: that its disk was lost meanwhile is not known here before its connection breaks.
        copy = sight.synced.get(to)
        has_said_so = copy is not None and copy.term == message.term and copy.lsn >= message.lsn
        if not has_said_so and not any(
            other.node_id == to and covers(other.database.seen, Dot(message.term, message.lsn))
            for other in self.world.hosts
        ):
            raise Violation("1", f"{host.name} hands over to {to}, which lacks commits of it")
        commits = self.reigns[message.term].commits
        if message.lsn < max(commits, default=0):
            raise Violation("1", f"{host.name} hands over at {message.lsn}, and has decided until {max(commits)}")

    def on_delivered(self, host: Host, sender: int, message: msg.Message) -> None:
        """A node is told something by another."""
        sight = self.sight(host)
        match message:
            case msg.Leading():
                before = sight.says.get(sender)
                if before is None or (before.term, before.may_lead) != (message.term, message.may_lead):
                    sight.says_since[sender] = self.world.engine.now
                sight.says[sender] = message
            case msg.Replicated():
                self._on_replicated(host, sender, message)
            case msg.Attach(term, _, _):
                sight.attached[sender] = term
                sight.synced.pop(sender, None)  # It begins anew, and is not in sync until it says so again.
            case msg.HandOver(term, _):
                sight.handed = term
            case msg.Claim(term, _):
                if term in self.reigns:
                    self.reigns[term].asked[host.index] = dict(host.database.seen)
            case msg.Denied(term, _, _):
                if term in self.reigns:
                    self.reigns[term].asked.clear()
            case msg.Acknowledged(_, keys):
                sight.acknowledged.update(dict.fromkeys(keys))
            case msg.Run(term, assignments):
                if sight.term is None or term.rank() >= sight.term.rank():
                    for assignment in assignments:
                        sight.allowed[assignment.key] = None

    def on_follow(self, host: Host, effect: fx.Follow) -> None:
        """A node relays to this leader from now on."""
        if effect.leader == host.node_id and effect.term != host.database.term:
            raise Violation("4", f"{host.name} follows itself under {effect.term}, which is not durable")
        reign = self.reigns.get(effect.term) if effect.term is not None else None
        if reign is not None and reign.boot == host.boot and not reign.is_begun:
            reign.is_begun = True
            if reign.since < self.sight(host).stood_still_at:
                raise Violation("9", f"{host.name} leads by a claim that is older than its standing still")

    # -- Workers -------------------------------------------------------------------------------------------------------

    def on_journal(self, host: Host, entry: fx.Journal) -> None:
        """A worker writes down something."""
        sight = self.sight(host)
        for outcome in entry.ended:
            self.reported[outcome.key] = outcome.outcome
        if entry.term is not None:
            if sight.term is not None and entry.term.rank() < sight.term.rank():
                raise Violation("4", f"worker {host.name} obeys {entry.term} after {sight.term}")
            sight.term = entry.term

    def on_begun(self, host: Host, begin: fx.Begin) -> None:
        """A worker starts a process."""
        key = begin.key
        if key in self.begun:
            raise Violation("3", f"{key} begins twice, at {self.begun[key]} and {host.name}")
        worker = self.minted.get(key)
        if worker is None:
            # A node that is scheduler and worker at once talks to itself without a network.
            raise Violation("3", f"{host.name} begins {key}, which nobody minted")
        if worker != host.node_id:
            raise Violation("3", f"{host.name} begins {key}, which was minted for {worker}")
        if key not in self.sight(host).allowed and not host.is_scheduler:
            raise Violation("4", f"{host.name} begins {key} of a leader below its greatest term")
        self.begun[key] = host.node_id
        self._begun_counts[key.task_id] += 1

    def on_process_ended(self, host: Host, key: AttemptKey, outcome: Outcome) -> None:
        """A process has ended, whatever becomes of the word."""
        self.ended[key] = outcome

    # -- Clients -------------------------------------------------------------------------------------------------------

    def on_reply(self, host: Host, wish: Wish, effect: fx.Reply) -> None:
        """A client's call is answered by the leader."""
        if isinstance(effect.answer, TaskdError):
            return
        rows = host.database.rows
        if wish.kind == "submit":
            for task in wish.tasks:
                row = rows.get(task.id)
                if row is None:
                    if task.id in self.purged:
                        continue
                    raise Violation("1", f"{host.name} accepts {task.id.hex()[-4:]}, and it is not on its disk")
                self._check_accepted(host, row, effect.durability)
                if self.accepted.get(task.id) != "replicated":
                    self.accepted[task.id] = effect.durability
        elif wish.kind == "cancel":
            answer = effect.answer
            assert isinstance(answer, list)
            for task_id in answer:
                row = rows.get(task_id)
                if row is None and task_id in self.purged:
                    continue  # The answer waited for a standby for so long that its task's time was over.
                if row is None or not (is_final(row) or record_of(row.record).cancel_wanted):
                    raise Violation(
                        "6", f"{host.name} says that {task_id.hex()[-4:]} is cancelled, and has not so on disk"
                    )

    def _check_accepted(self, host: Host, row: TaskRow, durability: str) -> None:
        if durability not in ("local", "replicated"):
            raise Violation("1", f"{host.name} accepts tasks and does not say how durably: {durability!r}")
        accepted = record_of(row.record).accepted
        if accepted is None:
            raise Violation("8", f"{row.id.hex()[-4:]} does not say which commit took it")
        if durability == "local" and host.settings.min_replicas:
            raise Violation("1", f"{host.name} accepts a task alone, and is not to")
        if durability == "replicated" and not self._is_elsewhere(host, row.id):
            raise Violation("1", f"{host.name} says that {row.id.hex()[-4:]} is replicated, and no other disk has it")
        self._check_copied(host, accepted, "accepts a task")

    def _is_elsewhere(self, host: Host, task_id: bytes) -> bool:
        return task_id in self.purged or any(
            other is not host and (task_id in other.database.rows or task_id in other.lost_ids)
            for other in self.world.hosts
        )

    def on_second_reply(self, host: Host, effect: fx.Reply) -> None:
        """An answer that nobody waits for."""
        raise Violation("6", f"{host.name} answers call {effect.call} twice, or one that was never made")

    def on_announced(self, host: Host, changes: list[fx.Change]) -> None:
        """Waiters and streams are told of changes."""
        sight = self.sight(host)
        for change in changes:
            if not change.state.is_final:
                continue
            row = host.database.rows.get(change.id)
            if row is None:
                if change.id not in self.purged:
                    raise Violation("5", f"{host.name} announces {change.id.hex()[-4:]}, and it is not on its disk")
                continue
            if rank(row.state) < rank(change.state):
                raise Violation("5", f"{host.name} announces {change.state.name}, and its disk says {row.state}")
            decided = record_of(row.record).decided
            if decided is None:
                raise Violation("5", f"{host.name} announces {change.id.hex()[-4:]}, and its row has no decision")
            told = self.told.get(change.id)
            is_less = told is not None and rank(told[0]) > rank(change.state)
            if told is not None and is_less and covers(host.database.seen, told[1]) and change.id not in self.purged:
                before = TaskState(told[0]).name
                raise Violation(
                    "5", f"{change.id.hex()[-4:]} was {before}, and {host.name} makes it {change.state.name}"
                )
            if row.state == change.state:
                self._check_copied(host, decided, "announces a decision")
            if told is None or rank(told[0]) <= rank(change.state):
                self.told[change.id] = (int(change.state), decided)
            sight.to_announce.pop(change.id, None)

    def on_rows_announced(self, host: Host, rows: list[TaskRow]) -> None:
        """Waiters and streams at a standby are told of rows that it took."""
        for row in rows:
            mine = host.database.rows.get(row.id)
            if is_final(row) and (mine is None or rank(mine.state) < rank(row.state)) and row.id not in self.purged:
                raise Violation("5", f"{host.name} announces {row.id.hex()[-4:]}, and its disk does not say so")

    def on_superseded(self, host: Host, effect: fx.Superseded) -> None:
        """Streams are told that a result was replaced by another leader's."""
        self.sight(host).to_announce.pop(effect.id, None)


_ON_SENT = {
    msg.Run: Referee._sent_run, msg.Acknowledged: Referee._sent_acknowledged, msg.Replicated: Referee._sent_replicated,
    msg.Claim: Referee._sent_claim, msg.Page: Referee._sent_page, msg.Leading: Referee._sent_leading,
    msg.HandOver: Referee._sent_hand_over, msg.Register: Referee._sent_register,
}  # fmt: skip
