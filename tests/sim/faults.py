"""Everything that goes wrong: one function a kind, which strikes once and sees to the repair.

A run draws how often each kind strikes; when, whom and for how long is drawn when it does. All from the one seed.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from taskd.core import events as ev
from taskd.core.task import units
from taskd.protocol import messages as msg
from tests.sim.disk import JournalFile
from tests.sim.host import Host
from tests.sim.network import Way
from tests.sim.world import World

Fault = Callable[[World, Random], bool]
FAULTS: dict[str, tuple[Fault, float]] = {}
"""By name: what it does, and how often it strikes compared with others. It says whether it found somebody to strike."""

LATER = ("poison", "skew")
"""Faults that are not struck from here: tasks that take their worker down, and clocks wrong from the start."""


def fault(weight: float) -> Callable[[Fault], Fault]:
    """Enter a kind of fault."""

    def enter(function: Fault) -> Fault:
        FAULTS[function.__name__] = (function, weight)
        return function

    return enter


def strike(world: World, kind: str) -> None:
    """Let it happen, unless nobody is there to suffer it."""
    if not world.is_calm and FAULTS[kind][0](world, world.engine.random):
        world.count_fault(kind)


def _running(world: World, is_scheduler: bool | None = None) -> list[Host]:
    return [
        host for host in world.members
        if host.is_up and host.paused_since is None and (is_scheduler is None or host.is_scheduler == is_scheduler)
    ]  # fmt: skip


def _any_running(world: World, random: Random, is_scheduler: bool | None = None) -> Host | None:
    """Leaders and standbys more often than workers: they have more to lose."""
    hosts = _running(world, is_scheduler)
    if is_scheduler is None and random.random() < 0.5:
        hosts = [host for host in hosts if host.is_scheduler] or hosts
    return random.choice(hosts) if hosts else None


def _leader(world: World, random: Random) -> Host | None:
    leaders = [host for host in world.leaders() if host.paused_since is None]
    return random.choice(leaders) if leaders else None


# -- Processes and machines --------------------------------------------------------------------------------------------


def _down(world: World, host: Host | None, random: Random, act: Callable[[Host], None]) -> bool:
    if host is None:
        return False
    act(host)
    world.restart_later(host, random.choice((random.uniform(0.05, 0.5), random.uniform(0.5, 4.0), 8.0)))
    return True


@fault(2.0)
def kill(world: World, random: Random) -> bool:
    """kill -9 of any daemon."""
    return _down(world, _any_running(world, random), random, Host.kill)


@fault(2.0)
def kill_leader(world: World, random: Random) -> bool:
    """kill -9 of whoever leads."""
    return _down(world, _leader(world, random), random, Host.kill)


@fault(1.0)
def power(world: World, random: Random) -> bool:
    """A machine is gone at once: nobody tells its peers."""
    return _down(world, _any_running(world, random), random, Host.lose_power)


@fault(0.3)
def blackout(world: World, random: Random) -> bool:
    """All machines at once."""
    hosts = _running(world)
    for host in hosts:
        _down(world, host, random, Host.lose_power)
    return bool(hosts)


@fault(2.0)
def crash_amid(world: World, random: Random) -> bool:
    """A daemon dies between two effects of one turn."""
    host = _any_running(world, random)
    if host is not None:
        host.effects_left = random.choice((random.randint(0, 5), random.randint(0, 60)))
    return host is not None


@fault(1.0)
def die_before_commit(world: World, random: Random) -> bool:
    """A scheduler dies, and its next commit does not reach the disk."""
    host = _any_running(world, random, True)
    if host is not None:
        host.dies_at_commit = "before"
    return host is not None


@fault(1.0)
def die_after_commit(world: World, random: Random) -> bool:
    """A scheduler dies when its next commit is durable, and hears nothing of that."""
    host = _any_running(world, random, True)
    if host is not None:
        host.dies_at_commit = "after"
    return host is not None


@fault(1.5)
def pause(world: World, random: Random) -> bool:
    """A daemon stands still for a moment that nobody should notice much."""
    host = _any_running(world, random)
    if host is not None:
        host.pause(random.uniform(0.1, 1.2))
    return host is not None


@fault(2.0)
def long_pause(world: World, random: Random) -> bool:
    """SIGSTOP for so long that others go on without it."""
    host = _leader(world, random) if random.random() < 0.5 else _any_running(world, random)
    if host is not None:
        host.pause(random.choice((random.uniform(1.2, 4.0), random.uniform(2.0, 20.0))))
    return host is not None


@fault(1.5)
def stop(world: World, random: Random) -> bool:
    """An orderly stop and a later start."""
    host = _any_running(world, random)
    if host is not None:
        host.stop(random.choice((0.1, 1.0)), random.choice((0.1, 2.0, 6.0)))
    return host is not None


# -- Clocks ------------------------------------------------------------------------------------------------------------


@fault(1.0)
def clock_jump(world: World, random: Random) -> bool:
    """Somebody sets a clock."""
    host = random.choice(world.members)
    jump_s = random.choice((-5.0, -0.5, 0.5, 5.0, 30.0))
    # A jump of less than the skew leaves a small one, and what was timed before it is off by the whole jump.
    world.clock_error_s = max(world.clock_error_s, abs(host.skew_s + jump_s), abs(jump_s))
    host.set_clock(host.skew_s + jump_s)
    return True


# -- The network -------------------------------------------------------------------------------------------------------


def _cut(world: World, random: Random, ways: list[Way], longest_s: float = 10.0) -> bool:
    for way in ways:
        way.cut()
    duration_s = random.choice((random.uniform(0.1, 2.4), random.uniform(2.4, longest_s)))
    world.engine.after(duration_s, _mend, ways)
    return bool(ways)


def _mend(ways: list[Way]) -> None:
    for way in ways:
        way.mend()


def _pair(world: World, random: Random) -> tuple[Host, Host] | None:
    """Two machines that may talk to each other."""
    one = random.choice(world.schedulers)
    others = [host for host in world.members if host is not one]
    return (one, random.choice(others)) if others else None


def _between(world: World, ones: list[Host], others: list[Host]) -> list[Way]:
    pairs = [(one, other) for one in ones for other in others]
    return [way for one, other in pairs for way in (world.way(one, other), world.way(other, one))]


@fault(1.5)
def cut_one_way(world: World, random: Random) -> bool:
    """Nothing passes from one machine to another; the other direction is good."""
    pair = _pair(world, random)
    if pair is None:
        return False
    one, other = pair if random.random() < 0.5 else pair[::-1]
    return _cut(world, random, [world.way(one, other)])


@fault(1.5)
def cut(world: World, random: Random) -> bool:
    """Nothing passes between two machines."""
    pair = _pair(world, random)
    return pair is not None and _cut(world, random, _between(world, [pair[0]], [pair[1]]))


@fault(1.5)
def isolate_leader(world: World, random: Random) -> bool:
    """The leader's cable is pulled."""
    host = _leader(world, random)
    return host is not None and _cut(
        world, random, _between(world, [host], [it for it in world.hosts if it is not host]), 15.0
    )


@fault(1.5)
def isolate(world: World, random: Random) -> bool:
    """A machine's cable is pulled."""
    host = random.choice(world.members)
    return _cut(world, random, _between(world, [host], [it for it in world.hosts if it is not host]), 15.0)


@fault(2.0)
def partition(world: World, random: Random) -> bool:
    """Two groups of machines that do not reach each other."""
    side = [random.random() < 0.5 for _ in world.hosts]
    ones = [host for host, is_one in zip(world.hosts, side, strict=True) if is_one]
    others = [host for host, is_one in zip(world.hosts, side, strict=True) if not is_one]
    return _cut(world, random, _between(world, ones, others), 20.0)


@fault(0.8)
def flap(world: World, random: Random) -> bool:
    """A link that comes and goes."""
    pair = _pair(world, random)
    if pair is None:
        return False
    ways = _between(world, [pair[0]], [pair[1]])
    period_s = random.choice((0.3, 1.0, 3.5))
    for number in range(random.randint(3, 6)):
        world.engine.after(2 * number * period_s, _flap_once, world, ways, period_s)
    return True


def _flap_once(world: World, ways: list[Way], period_s: float) -> None:
    if not world.is_calm:
        for way in ways:
            way.cut()
        world.engine.after(period_s, _mend, ways)


@fault(1.5)
def reset(world: World, random: Random) -> bool:
    """A connection breaks at both ends, and the end of what was on its way is lost."""
    host = _any_running(world, random)
    if host is None or not host.peers.open:
        return False
    end = random.choice(list(host.peers.open.values()))
    for side in (end, end.other):
        side.pipe.end(is_cut_short=True)
    return True


@fault(1.0)
def half_open(world: World, random: Random) -> bool:
    """One end forgets a connection; the other end learns of it only when it sends the next heartbeat."""
    host = _any_running(world, random)
    if host is None or not host.peers.open:
        return False
    end = random.choice(list(host.peers.open.values()))
    end.pipe.discard()
    end.close("forgotten", tells_other=False)
    world.engine.after(0.5 * random.random(), _find_out, end.other)
    return True


def _find_out(end: object) -> None:
    from tests.sim.network import End

    assert isinstance(end, End)
    if end.is_open:
        end.peers.host.hear(end.close, "reset by peer")


@fault(0.8)
def second_connection(world: World, random: Random) -> bool:
    """A node dials although it is connected: one of the two connections has to go."""
    host = _any_running(world, random)
    if host is None:
        return False
    targets = [
        end.other.peers.host for end in host.peers.open.values()
        if end.is_dialled and end.is_open and end.other.peers.host.is_up and end.other.is_open
    ]  # fmt: skip
    if not targets:
        return False
    host.peers.connect_to(random.choice(targets))
    return True


@fault(1.0)
def slow_link(world: World, random: Random) -> bool:
    """Everything between two machines takes long."""
    pair = _pair(world, random)
    if pair is None:
        return False
    delay_s = random.choice((0.05, 0.3, 1.0))
    for way in _between(world, [pair[0]], [pair[1]]):
        way.delay_s, way.jitter_s = delay_s, delay_s / 2
        world.engine.after(random.uniform(1.0, 8.0), _speed_up, world, way)
    return True


def _speed_up(world: World, way: Way) -> None:
    way.delay_s, way.jitter_s = world.way_s


@fault(0.8)
def jitter(world: World, random: Random) -> bool:
    """A bad hour for the whole network: every packet takes its own time."""
    for way in world.ways():
        way.jitter_s = random.choice((0.01, 0.1, 0.4))
        world.engine.after(random.uniform(1.0, 6.0), _speed_up, world, way)
    return True


# -- Disks -------------------------------------------------------------------------------------------------------------


@fault(1.0)
def failed_commit(world: World, random: Random) -> bool:
    """A commit fails; what it wrote may be there all the same."""
    host = _any_running(world, random, True)
    if host is not None:
        host.fails_commit = True
    return host is not None


@fault(0.7)
def failed_read(world: World, random: Random) -> bool:
    """A reading fails."""
    host = _any_running(world, random, True)
    if host is not None:
        host.fails_read = True
    return host is not None


@fault(0.7)
def full_disk(world: World, random: Random) -> bool:
    """Nothing can be written for a while."""
    host = _any_running(world, random, True)
    if host is None:
        return False
    host.is_full = True
    world.engine.after(random.uniform(0.5, 6.0), _make_room, host)
    return True


def _make_room(host: Host) -> None:
    host.is_full = False


@fault(1.0)
def slow_disk(world: World, random: Random) -> bool:
    """Commits take long."""
    host = _any_running(world, random, True)
    if host is None:
        return False
    host.commit_s = random.choice((0.02, 0.2, 1.5))
    world.engine.after(random.uniform(1.0, 8.0), _speed_up_disk, host)
    return True


def _speed_up_disk(host: Host) -> None:
    host.commit_s = 0.002


@fault(0.8)
def wiped_disk(world: World, random: Random) -> bool:
    """A scheduler comes back with an empty disk."""
    host = _any_running(world, random, True)
    if host is None:
        return False
    host.kill()
    world.lose_database(host, world.new_database())
    world.restart_later(host, random.choice((0.2, 3.0)))
    return True


@fault(0.8)
def old_copy(world: World, random: Random) -> bool:
    """A scheduler's disk is restored from an old copy."""
    host = _any_running(world, random, True)
    if host is None:
        return False
    world.engine.after(random.uniform(0.5, 10.0), _restore, world, host, host.database.copy())
    return True


def _restore(world: World, host: Host, copy: object) -> None:
    from tests.sim.disk import Database

    assert isinstance(copy, Database)
    if not world.is_calm and host.database.store_id == copy.store_id:
        host.kill()
        world.lose_database(host, copy)
        world.restart_later(host)


@fault(0.6)
def lost_journal(world: World, random: Random) -> bool:
    """A worker comes back without its journal."""
    hosts = [host for host in _running(world) if host.is_worker]
    if not hosts:
        return False
    host = random.choice(hosts)
    host.kill()
    host.journal = JournalFile()
    world.restart_later(host)
    return True


# -- Operators ---------------------------------------------------------------------------------------------------------


@fault(0.6)
def changed_offer(world: World, random: Random) -> bool:
    """A worker gets more slots, or fewer."""
    hosts = [host for host in _running(world) if host.is_worker]
    if not hosts:
        return False
    host = random.choice(hosts)
    slots = random.randint(1, 3)
    host.offer = msg.Offer(slots, {"cpus": units(slots)}, {}, host.offer.types)
    host.hear(host.tell, ev.OfferChanged(host.offer))
    return True


@fault(0.4)
def impostor(world: World, random: Random) -> bool:
    """Another machine is started with the node id of a scheduler, by mistake, and stopped again."""
    if len(world.hosts) > len(world.members):
        return False
    twin = random.choice(world.schedulers)
    host = world.add(twin.node_id, "scheduler", settings=twin.settings)
    host.is_retired = True
    host.name += "x"
    host.start()
    world.engine.after(random.uniform(1.0, 6.0), _retire, world, host)
    return True


def _retire(world: World, host: Host) -> None:
    host.kill()
    world.lose_database(host, world.new_database())
