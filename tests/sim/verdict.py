"""What must hold when everything has been healed: one leader, all work ended, all stores equal, nothing left over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taskd.core.task import TaskState
from tests.sim.referee import Violation
from tests.sim.rows import is_final, rank

if TYPE_CHECKING:
    from tests.sim.host import Host
    from tests.sim.world import World


def unfinished(world: World) -> str:
    """What is still to come, in words with the number of the invariant before them; empty where all is done."""
    for check in (_processes, _leadership, _clients, _work, _leftovers, _stores):
        if problem := check(world):
            return problem
    return ""


def _processes(world: World) -> str:
    for host in world.members:
        if not host.is_up:
            return f"9 {host.name} does not run"
    return ""


def _leadership(world: World) -> str:
    lowest = min(world.schedulers, key=lambda host: host.node_id)
    leaders = world.leaders()
    if leaders != [lowest]:
        names = ", ".join(host.name for host in leaders) or "nobody"
        return f"9 {names} leads, and not {lowest.name}"
    for host in world.members:
        if (host.leader, host.term) != (lowest.leader, lowest.term):
            return f"9 {host.name} follows {host.leader} under {host.term}, and {lowest.name} leads under {lowest.term}"
    return ""


def _clients(world: World) -> str:
    return f"9 {world.clients.open_count} clients wait" if world.clients.open_count else ""


def _work(world: World) -> str:
    for host in world.schedulers:
        for row in host.database.rows.values():
            if not is_final(row):
                return f"2 {row.id.hex()[-4:]} is {TaskState(row.state).name} at {host.name}"
    for host in world.members:
        if host.processes.running:
            return f"2 {len(host.processes.running)} attempts run at {host.name}"
    return ""


def _leftovers(world: World) -> str:
    for host in world.members:
        if count := host.relay.unanswered_count:
            return f"9 {host.name} never answers {count} calls"
        scheduler, worker = host.node.scheduler, host.node.worker
        if scheduler is not None and not scheduler.outbox.is_idle:
            return f"11 the outbox of {host.name} is not empty"
        if worker is not None and (worker.unacknowledged_count or worker.waiting_count or worker.running_count):
            return (
                f"6 {host.name} has {worker.unacknowledged_count} outcomes to report, {worker.waiting_count} attempts "
                f"waiting, {worker.running_count} running"
            )
        if host.commit is not None:
            return f"11 {host.name} still writes"
    return ""


def _stores(world: World) -> str:
    first, *others = world.schedulers
    for other in others:
        if text := _difference(first, other):
            return "2 " + text
    return ""


def _difference(one: Host, other: Host) -> str:
    ours, theirs = one.database.rows, other.database.rows
    for task_id in sorted(ours.keys() | theirs.keys()):
        mine, its = ours.get(task_id), theirs.get(task_id)
        if mine != its:
            what = " and ".join(
                f"{host.name} has {row and TaskState(row.state).name}" for host, row in ((one, mine), (other, its))
            )
            return f"of {task_id.hex()[-4:]} {what}"
    return ""


def check_end(world: World) -> None:
    """All is quiet: judge what has become of everything that was promised."""
    referee = world.referee
    rows = world.schedulers[0].database.rows
    for task_id, durability in referee.accepted.items():
        if task_id not in rows and task_id not in referee.purged and task_id not in referee.excused:
            raise Violation("1", f"{task_id.hex()[-4:]} was accepted ({durability}) and is lost")
    for task_id, (told, _) in referee.told.items():
        row = rows.get(task_id)
        if row is not None and rank(row.state) < rank(told) and task_id not in referee.excused:
            raise Violation(
                "5", f"{task_id.hex()[-4:]} was {TaskState(told).name}, and ends as {TaskState(row.state).name}"
            )
    for host in world.schedulers:
        due = referee.sight(host).to_announce
        if due and host.leader == host.node_id:
            raise Violation("5", f"{host.name} has changed decisions that were told, and tells nobody: {list(due)}")
    _check_memory(world)


def _check_memory(world: World) -> None:
    """Nothing is kept of work that has ended."""
    for host in world.members:
        scheduler, worker = host.node.scheduler, host.node.worker
        if scheduler is not None:
            leader = getattr(scheduler, "leader", scheduler)
            if leader is not None:
                if leader.ledger.tasks or len(leader.ledger.queue):
                    raise Violation("11", f"{host.name} keeps tasks in memory")
                for known in leader.roster:
                    if known.assigned or any(known.used.values()):
                        raise Violation("11", f"{host.name} thinks that {known.node_id} has work")
        if worker is not None:
            lists = (worker._room, worker._running, worker._unacknowledged, worker._unreported)
            if any(lists) or any(worker._room._used.values()) or len(worker._limits):
                raise Violation("11", f"worker {host.name} keeps attempts in memory")
