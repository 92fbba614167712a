"""One machine: its disk, its clock, and the daemon on it, which is a real Node in a simulated shell."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

from taskd.core import effects as fx
from taskd.core import events as ev
from taskd.core.node import Node
from taskd.core.settings import SchedulerSettings
from taskd.protocol import messages as msg
from tests.sim.clients import Relay
from tests.sim.disk import JournalFile
from tests.sim.peers import Peers
from tests.sim.referee import Violation
from tests.sim.work import Processes

if TYPE_CHECKING:
    from tests.sim.world import World

UTC_S = 1_800_000_000.0  # When simulated time begins.
STALL_S = 1.25  # The shell tells of pauses that last longer.
JOURNAL_SYNC_S = 0.5
CLOCK_CHECK_S = 0.5
TIMER_S = 0.001  # At most, by which a timer is late.
LOOKED_AT_TWICE = 8  # In one of so many worlds each turn is taken twice: nothing may be left for the second.
TICKS_MAX = 200  # Without that time goes on: then a deadline stays in the past, and a real daemon would spin.


class Host:
    """A machine by its place in the world; what it runs has a boot number of its own with each start."""

    def __init__(
        self, world: World, index: int, node_id: int, roles: tuple[msg.Role, ...],
        settings: SchedulerSettings, offer: msg.Offer,
    ) -> None:  # fmt: skip
        random = world.engine.random
        self.world = world
        self.index = index
        self.node_id = node_id
        self.roles = roles
        self.settings = settings
        self.offer = offer
        self.is_scheduler = "scheduler" in roles
        self.is_worker = "worker" in roles
        self.name = f"{'s' if self.is_scheduler else 'w'}{node_id}"
        # What survives the process.
        self.database = world.new_database()
        self.journal = JournalFile()
        self.lost_ids: dict[bytes, None] = {}  # that were on disks of this machine which were lost
        self.stopped_for_s = 0.0  # by an operator, when it stops in good order
        self.is_retired = False  # never to be started again
        self.base_s = random.uniform(0.0, 1e6)  # of the monotonic clock
        self.skew_s = 0.0
        self.commit_s = 0.002  # how long a commit takes
        self.read_s = 0.0  # how much longer than a moment a reading takes
        self.is_full = False
        # What runs.
        self.boot = 0
        self.starts = 0
        self.is_up = False
        self.is_off = False  # the machine, not only the daemon
        self.is_starting = False
        self.paused_since: float | None = None
        self.pauses = 0
        self.node: Node
        self.info: msg.NodeInfo
        self.peers: Peers
        self.relay: Relay
        self.processes: Processes
        self.leader: int | None = None
        self.term: msg.Term | None = None
        self.commit: fx.Commit | None = None  # on its way to the disk
        # Faults that wait for their moment.
        self.effects_left: int | None = None  # until a crash in the middle of a turn
        self.dies_at_commit = ""  # "before" or "after" the next one
        self.fails_commit = False
        self.fails_read = False
        self._backlog: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._turn_is_due = False
        self._timer_at = self._due_at = float("inf")
        self._ticked = (-1.0, 0)
        self._do: dict[type[fx.Effect], Callable[[Any], None]] = {
            fx.Send: self._send, fx.Disconnect: self._disconnect, fx.Commit: self._commit,
            fx.ReadBacklog: self._read, fx.ReadLacking: self._read, fx.ReadRows: self._read,
            fx.ReadIds: self._read, fx.ReadOld: self._read,
            fx.Reply: self._reply, fx.Announce: self._announce, fx.AnnounceNode: self._ignore,
            fx.AnnounceRows: self._announce_rows, fx.Superseded: self._superseded,
            fx.Start: self._start, fx.Terminate: self._terminate, fx.Kill: self._kill, fx.Journal: self._journal,
            fx.Log: self._log, fx.Follow: self._follow, fx.Exit: self._exit,
        }  # fmt: skip

    def watch(self, kind: type[fx.Effect], then: Callable[[Any], None]) -> None:
        """Have a script told of each effect of a kind, once that is under way."""
        do = self._do[kind]

        def watched(effect: Any) -> None:
            do(effect)
            then(effect)

        self._do[kind] = watched

    # -- Clocks ------------------------------------------------------------------------------------------------------

    def monotonic(self) -> float:
        return self.world.engine.now + self.base_s

    def utc(self) -> float:
        return self.world.engine.now + UTC_S + self.skew_s

    @property
    def silent_since(self) -> float | None:
        """Since when no heartbeat leaves this machine."""
        return self.paused_since

    def set_clock(self, skew_s: float) -> None:
        """Somebody sets the clock; the daemon finds out a moment later."""
        self.skew_s = skew_s
        self.world.engine.after(CLOCK_CHECK_S * self.world.engine.random.random(), self.hear, self._read_clock)

    def _read_clock(self) -> None:
        self.tell(ev.ClockRead(self.utc() - self.monotonic()))

    # -- Life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the daemon on what is on the disk."""
        if self.is_up:
            return
        world, random = self.world, self.world.engine.random
        self.is_up, self.is_off, self.is_starting = True, False, False
        self.starts += 1
        self.boot = random.getrandbits(62)
        self.info = msg.NodeInfo(self.node_id, self.name, self.roles, self.database.store_id, self.boot, "sim")
        self.leader = self.term = None
        self.paused_since = None
        self._backlog.clear()
        self._turn_is_due = False
        self._timer_at = self._due_at = float("inf")
        self.peers, self.relay, self.processes = Peers(world, self), Relay(world, self), Processes(world, self)
        self.node = Node(
            self.info, Random(random.getrandbits(64)), self.settings if self.is_scheduler else None,
            self.offer if self.is_worker else None, is_founder=self._is_founder(),
        )  # fmt: skip
        world.note(self, "starts")
        world.referee.on_started(self)
        self._read_clock()
        if self.is_scheduler:
            self.tell(self.database.loaded())
        if self.is_worker:
            self.tell(self.journal.loaded())
        self.peers.start()

    def _is_founder(self) -> bool:
        """Whether this daemon has just made the cluster's key: then nobody else can have tasks."""
        return self.index == 0 and self.starts == 1

    def stop(self, grace_s: float, stopped_for_s: float) -> None:
        """As systemctl stop does; and start, so long after it has stopped."""
        self.stopped_for_s = stopped_for_s
        self.world.note(self, "is stopped")
        self.tell(ev.StopWanted(grace_s))

    def kill(self) -> None:
        """kill -9: what is in memory is gone, the system closes the connections."""
        if self.is_up:
            self.world.note(self, "is killed")
            self._end(is_silent=False)
            self.peers.die(is_silent=False)

    def lose_power(self) -> None:
        """The whole machine is gone at once, and with it what was written and not synced."""
        if self.is_up:
            self.world.note(self, "loses power")
            self._end(is_silent=True)
            self.peers.die(is_silent=True)
            self.is_off = True
            self.journal.keep(self.world.engine.random.randint(self.journal.synced, len(self.journal.entries)))
            self.world.referee.on_journal_cut(self)

    def _end(self, *, is_silent: bool) -> None:
        self.is_up = False
        self.paused_since = None
        self.effects_left, self.dies_at_commit = None, ""
        self._backlog.clear()
        commit, self.commit = self.commit, None
        if commit is not None and self.world.engine.random.random() < 0.5:
            self._write(commit)  # It was durable, and nobody heard of it.
        self.processes.die()
        self.relay.die()
        self.world.referee.on_ended(self)

    def _exit(self, effect: fx.Exit) -> None:
        self.world.note(self, f"exits with {effect.status}: {effect.reason}")
        for end in list(self.peers.ends):
            end.flush()
        self._end(is_silent=False)
        self.peers.stop()
        self.world.on_exit(self, effect.status)

    def pause(self, duration_s: float) -> None:
        """SIGSTOP, and SIGCONT when the time is over. What its processes and its store are doing goes on."""
        if not self.is_up or self.paused_since is not None:
            return
        self.world.note(self, f"is paused for {duration_s:.2f} s")
        self.paused_since = self.world.engine.now
        self.pauses += 1
        for end in self.peers.ends:
            end.other.expect_silence(self._is_paused, self.boot, self.pauses)
        self.world.engine.after(duration_s, self.resume, self.boot, self.pauses)

    def _is_paused(self, boot: int, pauses: int) -> bool:
        return self.boot == boot and self.paused_since is not None and self.pauses == pauses

    def resume(self, boot: int, pauses: int) -> None:
        """Go on, with everything that has come meanwhile."""
        if not self._is_paused(boot, pauses):
            return
        assert self.paused_since is not None
        duration_s = self.world.engine.now - self.paused_since
        self.paused_since = None
        self.world.note(self, "goes on")
        if duration_s > STALL_S:
            if not self._turn_is_due:  # Else it may have become the leader already, and not said so.
                self.world.referee.on_stood_still(self)
            self.tell(ev.Stalled(duration_s))
        while self._backlog and self.is_up and self.paused_since is None:
            action, arguments = self._backlog.popleft()
            action(*arguments)

    # -- In ----------------------------------------------------------------------------------------------------------

    def hear(self, action: Callable[..., None], *arguments: Any) -> None:
        """Something comes to the daemon: at once, when it goes on, or never."""
        if self.paused_since is not None:
            self._backlog.append((action, arguments))
        elif self.is_up:
            action(*arguments)

    def hear_as(self, boot: int, action: Callable[..., None], *arguments: Any) -> None:
        """The same for what is meant for one process only."""
        if self.boot == boot:
            self.hear(action, *arguments)

    def tell(self, event: ev.Event) -> None:
        """Tell the node what happened; what follows is done a moment later, with everything else of that moment."""
        if not self.is_up:
            return
        world = self.world
        if world.is_traced:
            world.note(self, "hears", event)
        self.node.handle(event, self.monotonic())
        if not self._turn_is_due:
            self._turn_is_due = True
            world.engine.after(world.turn_s * world.engine.random.random(), self.hear_as, self.boot, self._turn)

    # -- Out ---------------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        self._turn_is_due = False
        do, world = self._do, self.world
        effects = self.node.take_effects(self.monotonic())
        if world.seed % LOOKED_AT_TWICE == 0:
            left = self.node.take_effects(self.monotonic())
            assert not left, f"a turn left something for the next one: {left}"
        for effect in effects:
            if type(effect) is fx.Commit:
                # Decided, whether or not it comes to be written: others may hear of it first.
                world.referee.on_commit_asked(self, effect)
        for effect in effects:
            if self.effects_left is not None:
                self.effects_left -= 1
                if self.effects_left < 0:
                    self._die_amid()
                    return
            if world.is_traced:
                world.note(self, "does", effect)
            do[type(effect)](effect)
            if not self.is_up:
                return
        for end in self.peers.open.values():
            end.flush()
        self._set_timer()

    def _die_amid(self) -> None:
        """Some of what was to be sent has left, some has not."""
        random = self.world.engine.random
        for end in self.peers.open.values():
            if random.random() < 0.5:
                end.flush()
        self.kill()
        self.world.restart_later(self)

    def _set_timer(self) -> None:
        """Tick when the node's next deadline has come. An earlier timer looks again instead of being moved."""
        due = self.node.next_deadline(self.monotonic())
        engine = self.world.engine
        self._due_at = float("inf")
        if due is not None:
            self._due_at = max(due - self.base_s, engine.now) + TIMER_S * engine.random.random()
            self._sleep_until(self._due_at)

    def _sleep_until(self, time: float) -> None:
        if time < self._timer_at:
            self._timer_at = time
            self.world.engine.at(time, self.hear_as, self.boot, self._on_timer, time)

    def _on_timer(self, at: float) -> None:
        if at != self._timer_at:
            return
        self._timer_at = float("inf")
        if self._due_at <= self.world.engine.now:
            self._due_at = float("inf")
            self._count_tick()
            self.tell(ev.Ticked())
        elif self._due_at < float("inf"):
            self._sleep_until(self._due_at)

    def _count_tick(self) -> None:
        moment = round(self.world.engine.now, 1)
        count = self._ticked[1] + 1 if self._ticked[0] == moment else 1
        self._ticked = (moment, count)
        if count > TICKS_MAX:
            raise Violation("11", f"{self.name} ticks {count} times in 0.1 s: a deadline stays in the past")

    def _ignore(self, effect: fx.Effect) -> None:
        """Nothing that matters here."""

    def _send(self, effect: fx.Send) -> None:
        end = self.peers.open.get(effect.node_id)
        self.world.referee.on_sent(self, effect.node_id, effect.message, end is not None)
        if end is not None:
            end.send(effect.message)

    def send_call(self, node_id: int, message: msg.Message) -> bool:
        """The shell's own messages leave when the loop has turned."""
        end = self.peers.open.get(node_id)
        if end is None:
            return False
        if end.send(message) and not self._turn_is_due:
            self.world.engine.after(0.0, self.hear_as, self.boot, end.flush)
        return True

    def _disconnect(self, effect: fx.Disconnect) -> None:
        end = self.peers.open.get(effect.node_id)
        if end is not None:
            end.flush()
            end.close(effect.reason)

    # -- The disk ----------------------------------------------------------------------------------------------------

    def _commit(self, effect: fx.Commit) -> None:
        if self.commit is not None:
            raise Violation("11", f"{self.name} asks for two commits at once")
        self.commit = effect
        random = self.world.engine.random
        delay_s = self.commit_s * random.uniform(0.5, 2.0)
        # The store is a process of its own: it goes on where the daemon is paused.
        self.world.engine.after(delay_s, self._end_commit, self.boot, effect)

    def _end_commit(self, boot: int, commit: fx.Commit) -> None:
        if boot != self.boot or self.commit is not commit or not self.is_up:
            return
        if self.dies_at_commit:
            if self.dies_at_commit == "after":
                self._write(commit)
            self.commit = None
            self.kill()
            self.world.restart_later(self)
            return
        self.commit = None
        if self.is_full or self.fails_commit:
            if self.fails_commit and self.world.engine.random.random() < 0.5:
                self._write(commit)  # What failed can be there all the same.
            self.fails_commit = False
            self.world.note(self, "cannot commit")
            self.world.referee.on_commit_failed(self)
            self.hear_as(boot, self.tell, ev.CommitFailed(commit.seq, "no space left on device"))
            return
        self._write(commit)
        self.hear_as(boot, self.tell, ev.Committed(commit.seq))

    def _write(self, commit: fx.Commit) -> None:
        before = self.world.referee.before_write(self, commit)
        self.database.write(commit)
        self.world.referee.after_write(self, commit, before)

    def _read(self, effect: Any) -> None:
        """Answered later, with what was durable at some moment between."""
        random = self.world.engine.random
        self.world.engine.after(0.002 * random.random(), self._read_now, self.boot, effect, self.read_s)

    def _read_now(self, boot: int, effect: Any, longer_s: float) -> None:
        if boot != self.boot or not self.is_up:
            return
        answer: ev.Event = self.database.read(effect)
        if self.fails_read:
            self.fails_read = False
            answer = ev.ReadFailed(effect.call, "database disk image is malformed")
        delay_s = longer_s + 0.002 * self.world.engine.random.random()
        self.world.engine.after(delay_s, self.hear_as, boot, self.tell, answer)

    # -- Everything else ---------------------------------------------------------------------------------------------

    def _reply(self, effect: fx.Reply) -> None:
        self.relay.on_reply(effect)

    def _announce(self, effect: fx.Announce) -> None:
        self.world.referee.on_announced(self, effect.changes)

    def _announce_rows(self, effect: fx.AnnounceRows) -> None:
        self.world.referee.on_rows_announced(self, effect.rows)

    def _superseded(self, effect: fx.Superseded) -> None:
        self.world.referee.on_superseded(self, effect)

    def _start(self, effect: fx.Start) -> None:
        for begin in effect.attempts:
            self.world.referee.on_begun(self, begin)
            self.processes.start(begin)

    def _terminate(self, effect: fx.Terminate) -> None:
        self.processes.terminate(effect.key)

    def _kill(self, effect: fx.Kill) -> None:
        self.processes.kill(effect.key)

    def _journal(self, effect: fx.Journal) -> None:
        self.world.referee.on_journal(self, effect)
        self.journal.entries.append(effect)
        if effect.ended and self.journal.unsynced_since is None:
            self.journal.unsynced_since = self.world.engine.now
            delay_s = JOURNAL_SYNC_S * (1 + self.world.engine.random.random())
            self.world.engine.after(delay_s, self.hear_as, self.boot, self._sync_journal)

    def _sync_journal(self) -> None:
        self.journal.unsynced_since = None
        if self.node.worker is not None and self.node.worker.unacknowledged_count:
            self.journal.synced = len(self.journal.entries)

    def _log(self, effect: fx.Log) -> None:
        if self.world.on_log is not None:
            self.world.on_log(self, effect)

    def _follow(self, effect: fx.Follow) -> None:
        self.leader, self.term = effect.leader, effect.term
        self.world.referee.on_follow(self, effect)
        self.relay.on_follow()
