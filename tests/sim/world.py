"""One world: machines, the network between them and clients, all drawn from one seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from taskd.core import effects as fx
from taskd.core.settings import SchedulerSettings
from taskd.core.task import units
from taskd.protocol import messages as msg
from tests.sim.brief import brief
from tests.sim.clients import Clients
from tests.sim.disk import Database
from tests.sim.engine import Engine
from tests.sim.host import UTC_S, Host
from tests.sim.network import Way
from tests.sim.referee import Referee
from tests.sim.work import Plan

RESTART_S = (0.1, 1.0)  # How soon the service manager starts a daemon again.
TURN_S = 0.0003  # At most, from an event to what follows from it.
LINE_CHARS_MAX = 400


class World:
    """Everything there is. Build hosts with add; faults and scripts do the rest."""

    def __init__(self, seed: int, *, is_traced: bool = False) -> None:
        self.seed = seed
        self.engine = Engine(seed)
        self.hosts: list[Host] = []
        self.referee = Referee(self)
        self.clients = Clients(self)
        self.plans: dict[bytes, Plan] = {}
        self.faults: Counter[str] = Counter()
        self.is_calm = False  # no more faults
        self.is_traced = is_traced
        self.lines: list[str] = []
        self.on_log: Callable[[Host, fx.Log], None] | None = None
        # What kind of world it is.
        self.plays_bytes = False
        self.page = 500  # rows that a database gives at a time
        self.turn_s = TURN_S
        self.work_s = 0.5  # how long an attempt takes, in the mean
        self.poison = 0.0  # how many tasks take their workers down
        self.calm_from_s = 0.0  # when the faults end
        self.clock_error_s = 0.0  # how far clocks have been set
        self.way_s = (0.0005, 0.0005)  # delay and jitter
        self._ways: dict[tuple[int, int], Way] = {}
        self._ids = 0

    # -- Building ------------------------------------------------------------------------------------------------------

    def add(self, node_id: int, *roles: msg.Role, settings: SchedulerSettings | None = None, slots: int = 2) -> Host:
        """A machine, not started yet."""
        offer = msg.Offer(slots, {"cpus": units(slots)}, {}, ("command", "http"))
        host = Host(self, len(self.hosts), node_id, roles, settings or SchedulerSettings(), offer)
        for other in self.hosts:
            for pair in ((host.index, other.index), (other.index, host.index)):
                self._ways[pair] = Way(self.engine, *self.way_s)
        self.hosts.append(host)
        return host

    def new_database(self) -> Database:
        """An empty disk."""
        return Database(self.engine.random.getrandbits(128).to_bytes(16, "big"), self.page)

    def new_id(self) -> bytes:
        """A task id: later ones are greater."""
        self._ids += 1
        return self._ids.to_bytes(8, "big") + self.engine.random.getrandbits(64).to_bytes(8, "big")

    def plan_of(self, task_id: bytes) -> Plan:
        """What becomes of a task's attempts."""
        return self.plans.get(task_id) or Plan()

    # -- Asking --------------------------------------------------------------------------------------------------------

    @property
    def utc_s(self) -> float:
        """True UTC."""
        return self.engine.now + UTC_S

    def way(self, one: Host, other: Host) -> Way:
        """From one machine to another."""
        return self._ways[one.index, other.index]

    def ways(self) -> list[Way]:
        """All of them."""
        return list(self._ways.values())

    @property
    def members(self) -> list[Host]:
        """Machines that belong to the cluster for good."""
        return [host for host in self.hosts if not host.is_retired]

    @property
    def schedulers(self) -> list[Host]:
        return [host for host in self.members if host.is_scheduler]

    def is_id_shared(self, node_id: int) -> bool:
        """Whether two machines have this node id, by mistake."""
        return sum(host.node_id == node_id for host in self.hosts) > 1

    def leaders(self) -> list[Host]:
        """Schedulers that lead and say so."""
        return [host for host in self.schedulers if host.is_up and host.leader == host.node_id]

    # -- What happens --------------------------------------------------------------------------------------------------

    def restart_later(self, host: Host, delay_s: float | None = None) -> None:
        """The service manager starts a daemon again."""
        if delay_s is None:
            delay_s = self.engine.random.uniform(*RESTART_S)
        self.engine.after(delay_s, self._restart, host)

    def _restart(self, host: Host) -> None:
        if not host.is_retired:
            host.start()

    def on_exit(self, host: Host, status: int) -> None:
        """A daemon has ended by itself: the service manager starts it again, or whoever stopped it."""
        self.restart_later(host, host.stopped_for_s if status == 0 else None)

    def lose_database(self, host: Host, new: Database) -> None:
        """The disk of a machine that does not run is replaced."""
        self.referee.on_database_lost(host, new)
        host.lost_ids.update(dict.fromkeys(host.database.rows))
        host.database = new

    def heal(self) -> None:
        """No more faults: all ways are good, all daemons run, all disks work."""
        self.is_calm = True
        for way in self._ways.values():
            way.cuts = 1
            way.mend()
            way.cuts = 0
            way.delay_s, way.jitter_s = self.way_s
        for host in self.members:
            host.is_full = host.fails_commit = host.fails_read = False
            host.effects_left, host.dies_at_commit = None, ""
            host.commit_s, host.read_s = 0.002, 0.0
            if host.paused_since is not None:
                host.resume(host.boot, host.pauses)
            if not host.is_up:
                self.restart_later(host, 0.1 * self.engine.random.random())
        for node_id in self.clients.drained:
            for delay_s in (0.0, 12.0, 25.0):  # Somebody's wish to drain may still be on its way.
                self.engine.after(delay_s, self.clients.drain, node_id, None)

    def count_fault(self, kind: str) -> None:
        """A fault has struck."""
        self.faults[kind] += 1

    def note(self, host: Host, text: str, what: Any = None) -> None:
        """A line of the trace."""
        if self.is_traced:
            detail = "" if what is None else f" {brief(what)}"
            self.lines.append(f"{self.engine.now:10.5f} {host.name} {text}{detail}")

    def story(self) -> str:
        """The trace."""
        return "\n".join(line[:LINE_CHARS_MAX] for line in self.lines)
