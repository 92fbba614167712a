"""The leader's standbys: brings each up to date, streams every commit to them, and knows who holds a copy.

    MERGING ──it gave what we lacked──▶ CATCHING_UP ──its first word after the last page──▶ IN_SYNC

While one is in sync, nothing is promised that no standby has. When the last is gone, promises wait a moment for it to
come back, and then do without, which is said in every answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum

from msgspec import Struct

from taskd.core.deadlines import Deadlines
from taskd.core.effects import AnnounceNode, Commit, Effect, Log, Send
from taskd.core.flaps import Flaps
from taskd.core.giver import PAGE_BYTES, Giver
from taskd.core.merger import Merger
from taskd.core.outbox import Outbox
from taskd.core.seen import Seen
from taskd.core.settings import SchedulerSettings
from taskd.protocol import messages as msg

PUT_OFF_S = 10.0
PART_ROWS = 2000


class Stage(Enum):
    """How far a standby is."""

    MERGING = "merging"
    CATCHING_UP = "catching_up"
    IN_SYNC = "in_sync"
    STALLED = "stalled"  # connected, and behind for too long


class StandbyView(Struct, frozen=True):
    """A standby as the leader sees it. `lag_s`: for how long it has been behind."""

    node_id: int
    stage: str
    acknowledged_lsn: int
    lag_commits: int
    lag_s: float
    given: int = 0  # tasks, to one that catches up


class _Standby:
    """One attached standby."""

    __slots__ = ("acknowledged", "behind_since", "info", "may_lead_at", "seen", "since", "stage")

    def __init__(self, info: msg.NodeInfo, seen: Seen, now: float) -> None:
        self.info = info
        self.seen = seen
        self.stage = Stage.MERGING
        self.acknowledged = 0
        self.since = now  # it has been in this stage
        self.behind_since: float | None = None
        self.may_lead_at = 0.0  # not before, though it has been well for long enough


class Feed:
    """All attached standbys of one reign."""

    def __init__(
        self,
        term: msg.Term,
        settings: SchedulerSettings,
        outbox: Outbox,
        giver: Giver,
        merger: Merger,
        say: Callable[[Effect], None],
        merged: Callable[[float], None],
        flaps: Flaps,
    ) -> None:
        self.settings = settings
        self._term = term
        self._outbox = outbox
        self._giver = giver
        self._merger = merger
        self._say = say
        self._merged = merged
        self._flaps = flaps
        self._standbys: dict[int, _Standby] = {}
        self._expected: set[int] = set()  # to follow us, from the begin of our reign
        self._in_flight: Commit | None = None  # with `last_lsn`
        self.last_lsn = 0  # streamed
        self._progress_at = 0.0  # when a standby last brought us on, or had nothing to do
        self._timers: Deadlines[str] = Deadlines()
        self._is_told = False  # that there are copies

    def expect(self, node_ids: Iterable[int], now: float) -> None:
        """Others are connected that are about to follow us: what is promised waits a moment for them, so that a change
        of leaders is no gap in the copies."""
        self._expected = set(node_ids)
        self._outbox.needs_copy = True
        self._progress_at = now
        self._check_copies(now)

    def expect_nobody(self, now: float) -> None:
        """There were others, and none is connected: say that there is no copy, when somebody listens."""
        self._timers.set("lonely", now + self.settings.standby_grace_s)

    # -- Who is there --------------------------------------------------------------------------------------------------

    def attach(self, node: msg.NodeInfo, message: msg.Attach, now: float) -> None:
        """A scheduler follows us: first take what we lack, then give what it lacks."""
        node_id = node.node_id
        theirs = Seen(message.seen)
        self._giver.stop(node_id)
        self._merger.forget(node_id)
        self._standbys[node_id] = _Standby(node, theirs, now)
        self._check_copies(now)
        if self._outbox.seen.covers_all(theirs) and not message.has_strays:
            self._catch_up(node_id, now)
            return
        self._merger.expect(node_id, self._term, lambda now: self._gave(node_id, now))
        self._say(Send(node_id, msg.Wanted(self._term, self._outbox.seen.dots())))

    def _gave(self, node_id: int, now: float) -> None:
        self._merged(now)
        if node_id in self._standbys:
            self._catch_up(node_id, now)

    def _catch_up(self, node_id: int, now: float) -> None:
        standby = self._standbys[node_id]
        standby.stage, standby.since = Stage.CATCHING_UP, now
        # The commit on its way to the disk is in no page yet and was streamed before this standby was here.
        if self._in_flight is not None:
            for part in _parts(self._term, self._in_flight, self.last_lsn):
                self._say(Send(node_id, part))
        self._giver.start(node_id, self._term, standby.seen)

    def gone(self, node_id: int, now: float, *, is_orderly: bool) -> None:
        """A standby's connection is gone."""
        standby = self._standbys.pop(node_id, None)
        self._expected.discard(node_id)
        if standby is None:
            if not self._expected and not self._is_told:
                self._check_copies(now, may_wait=False)  # Nobody else is to come.
            return
        self._giver.stop(node_id)
        self._merger.forget(node_id)
        if standby.stage in (Stage.IN_SYNC, Stage.STALLED):
            self._say(AnnounceNode("standby.gone", node_id, standby.info.name))
        self._check_copies(now, may_wait=not is_orderly)

    @property
    def is_promising(self) -> bool:
        """Whether what is accepted now will have a copy: one is in sync, or about to be at the begin of our reign."""
        return bool(self.in_sync) or (self._outbox.needs_copy and not self._is_told)

    def held_until(self, node_id: int, now: float) -> float | None:
        """Up to when a standby in sync is known to hold everything, monotonic; None: it is not in sync."""
        standby = self._standbys.get(node_id)
        if standby is None or standby.stage not in (Stage.IN_SYNC, Stage.STALLED):
            return None
        return now if standby.behind_since is None else standby.behind_since

    @property
    def in_sync(self) -> list[int]:
        """Node ids of those that hold everything, lowest first."""
        return sorted(node_id for node_id, standby in self._standbys.items() if standby.stage is Stage.IN_SYNC)

    def is_level(self, node_id: int) -> bool:
        """Whether a standby holds everything that was decided so far."""
        standby = self._standbys.get(node_id)
        return standby is not None and standby.stage is Stage.IN_SYNC and standby.acknowledged >= self.last_lsn

    def views(self, now: float) -> list[StandbyView]:
        """All attached ones."""
        return [
            StandbyView(
                node_id,
                standby.stage.value,
                standby.acknowledged,
                max(0, self.last_lsn - standby.acknowledged) if standby.stage is not Stage.CATCHING_UP else 0,
                now - standby.behind_since if standby.behind_since is not None else 0.0,
                self._giver.given(node_id),
            )
            for node_id, standby in sorted(self._standbys.items())
        ]

    # -- The stream ----------------------------------------------------------------------------------------------------

    def stream(self, commit: Commit, lsn: int, now: float) -> None:
        """A commit of ours is on its way to the disk: have the standbys write it at the same time."""
        self._in_flight, self.last_lsn = commit, lsn
        fed = [(node_id, it) for node_id, it in self._standbys.items() if it.stage is not Stage.MERGING]
        parts = _parts(self._term, commit, lsn) if fed else []
        for node_id, standby in fed:
            for part in parts:
                self._say(Send(node_id, part))
            if standby.behind_since is None:
                standby.behind_since = now
        if self._timers.get("stall") is None:
            self._progress_at = now
            self._watch_for_stalls()

    def committed(self) -> None:
        """The commit on its way to the disk has arrived: pages that begin now show it."""
        self._in_flight = None

    def replicated(self, sender: int, message: msg.Replicated, now: float) -> list[Effect]:
        """A standby holds everything up to a commit; returns what waited for that."""
        standby = self._standbys.get(sender)
        if standby is None or message.term != self._term or standby.stage is Stage.MERGING:
            return []
        standby.acknowledged = max(standby.acknowledged, message.lsn)
        is_level = standby.acknowledged >= self.last_lsn
        standby.behind_since = None if is_level else now
        if standby.stage is Stage.CATCHING_UP or (standby.stage is Stage.STALLED and is_level):
            is_new = standby.stage is Stage.CATCHING_UP
            standby.stage, standby.since = Stage.IN_SYNC, now
            self._log("info", "standby in sync", node=standby.info.name, lsn=message.lsn)
            if is_new:
                self._say(AnnounceNode("standby.in_sync", sender, standby.info.name))
            self._check_copies(now)
        if standby.stage is not Stage.IN_SYNC:
            return []
        self._progress_at = now
        self._watch_for_stalls()
        return self._outbox.copied(message.lsn)

    # -- Durability ----------------------------------------------------------------------------------------------------

    def _check_copies(self, now: float, *, may_wait: bool = True) -> None:
        """Whether promises wait for standbys: while one is in sync, and a moment longer."""
        self._outbox.refuses_local = self.settings.min_replicas > 0
        if self.in_sync:
            self._timers.clear("lonely")
            if not self._is_told:
                self._outbox.needs_copy = self._is_told = True
                self._progress_at = now
                self._tell("durability.replicated", "a standby keeps a copy of everything")
        elif self._outbox.needs_copy:
            self._timers.clear("stall")
            waited_s = now - self._progress_at if self._outbox.lag else 0.0
            grace_s = max(0.0, self.settings.standby_grace_s - waited_s) if may_wait else 0.0
            self._timers.set("lonely", now + grace_s)

    def tick(self, now: float) -> list[Effect]:
        """Do what is due; returns what waited for a copy and does so no more."""
        released: list[Effect] = []
        for timer in self._timers.pop_due(now):
            if timer == "stall":
                self._give_up_stalled(now)
            elif timer == "lonely" and not self.in_sync:
                self._is_told = False
                text = "no standby keeps a copy any more: what is accepted from now on is on this machine's disk alone"
                self._log("warning", "durability is local", reason=text)
                self._tell("durability.local", text)
                released += self._outbox.do_without_copies()
        return released

    def _give_up_stalled(self, now: float) -> None:
        stall_s = 2 * self.settings.standby_grace_s
        behind = [it for it in self._standbys.values() if it.stage is Stage.IN_SYNC and it.behind_since is not None]
        for standby in behind:
            since = standby.behind_since
            assert since is not None
            if now - since >= stall_s - 1e-6:
                standby.stage, standby.since = Stage.STALLED, now
                self._log("warning", "standby does not keep up", node=standby.info.name)
                self._say(AnnounceNode("standby.behind", standby.info.node_id, standby.info.name))
        self._check_copies(now)
        self._watch_for_stalls()

    def _watch_for_stalls(self) -> None:
        """Look again when the one that is behind for longest counts as gone."""
        since = [
            it.behind_since
            for it in self._standbys.values()
            if it.stage is Stage.IN_SYNC and it.behind_since is not None
        ]
        if since:
            self._timers.set("stall", min(since) + 2 * self.settings.standby_grace_s)
        else:
            self._timers.clear("stall")

    def next_deadline(self, now: float) -> float | None:
        """When tick has something to do, or hand_over_to may change."""
        lower = [self._well_at(node_id) for node_id in self._standbys if node_id < self._term.node_id]
        due = [time for time in lower if now < time < float("inf")]
        timer = self._timers.next()
        return min(due if timer is None else (*due, timer), default=None)

    # -- Hand-over -----------------------------------------------------------------------------------------------------

    def hand_over_to(self, now: float) -> int | None:
        """A standby with a lower id that has been well for long enough; None: there is none."""
        for node_id in self.in_sync:
            if node_id < self._term.node_id and now >= self._well_at(node_id):
                return node_id
        return None

    def _well_at(self, node_id: int) -> float:
        standby = self._standbys[node_id]
        if standby.stage is not Stage.IN_SYNC:
            return float("inf")
        wait_s = self._flaps.wait_s(node_id, standby.since, self.settings.hand_over_after_s)
        return max(standby.since + wait_s, standby.may_lead_at)

    def put_off(self, node_id: int, now: float) -> None:
        """A hand-over has failed: do not stop for this standby again at once."""
        if node_id in self._standbys:
            self._standbys[node_id].may_lead_at = now + PUT_OFF_S

    def _tell(self, kind: str, detail: str) -> None:
        self._say(AnnounceNode(kind, self._term.node_id, detail))

    def _log(self, level: str, event: str, **fields: object) -> None:
        self._say(Log(level, event, fields))


def _parts(term: msg.Term, commit: Commit, lsn: int) -> list[msg.Replicate]:
    """A commit as messages, each far below a frame."""
    rows = [*commit.inserted, *commit.updated]
    parts: list[msg.Replicate] = []
    start = size = 0
    for position, row in enumerate(rows):
        size += len(row.spec) + len(row.record)
        if position > start and (size > PAGE_BYTES or position - start >= PART_ROWS):
            parts.append(msg.Replicate(term, lsn, tuple(rows[start:position]), (), (), (), is_last=False))
            start, size = position, len(row.spec) + len(row.record)
    others = tuple(dot for dot in commit.seen if dot.term != term)
    parts.append(
        msg.Replicate(term, lsn, tuple(rows[start:]), tuple(commit.nodes), tuple(commit.purged), others, is_last=True)
    )
    return parts
