"""What scripted worlds are written with: machines, cuts, tasks, and waiting for what the simulation does.

A script waits for events and never for a seed: each step says what has to be so before the next thing goes wrong. So a
change of the core does not move what it meets; and where it cannot be met any more, the script says what it waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from taskd.core import effects as fx
from taskd.core import events as ev
from taskd.core.settings import SchedulerSettings
from taskd.core.task import Backoff, TaskSpec, TaskState, encode
from tests.sim.host import Host
from tests.sim.rows import record_of
from tests.sim.run import Unplayable
from tests.sim.work import Plan
from tests.sim.world import World

LONG_S = 100.0  # An attempt that does not end by itself while the script is played.
WAIT_MAX_S = 40.0


def settings(
    *, worker_grace_s: float = 60.0, window: int = 8192, min_replicas: int = 0, finished_age_max_s: float = 7 * 86_400.0
) -> SchedulerSettings:
    """Patient with workers, and one attempt a slot."""
    return SchedulerSettings(
        worker_grace_s=worker_grace_s,
        restart_grace_s=60.0,
        prefetch_s=0.0,
        prefetch_max=0,
        empty_wait_s=1.0,
        window=window,
        min_replicas=min_replicas,
        finished_age_max_s=finished_age_max_s,
    )


def until(world: World, condition: Callable[[], object], what: str) -> None:
    """Let time pass, no longer than it takes. Raises Unplayable where it takes too long."""
    end = world.engine.now + WAIT_MAX_S
    while not condition():
        if world.engine.now > end:
            raise Unplayable(f"waited {WAIT_MAX_S:.0f} s for this: {what}")
        world.engine.step()


def wait(world: World, duration_s: float) -> None:
    """Let time pass."""
    world.engine.run_until(world.engine.now + duration_s)


def cut(world: World, one: Host, *others: Host) -> None:
    """Let nothing through between one machine and others."""
    for other in others:
        world.way(one, other).cut()
        world.way(other, one).cut()


def mend(world: World, one: Host, *others: Host) -> None:
    """Let everything through again."""
    for other in others:
        world.way(one, other).mend()
        world.way(other, one).mend()


def lead_and_follow(world: World, leader: Host, *standbys: Host) -> None:
    """Start schedulers, and wait until the standbys have a copy of everything."""
    leader.start()
    for standby in standbys:
        standby.start()
    wait_for_copies(world, leader, *standbys)


def wait_for_copies(world: World, leader: Host, *standbys: Host) -> None:
    """Wait until these are in sync."""
    ids = [standby.node_id for standby in standbys]

    def are_in_sync() -> bool:
        feed = leader.node.scheduler.feed if leader.node.scheduler is not None else None
        return feed is not None and all(node_id in feed.in_sync for node_id in ids)

    until(world, are_in_sync, f"{leader.name} leads, with {len(ids)} standbys in sync")


def wait_for_lead(world: World, host: Host) -> None:
    """Wait until a scheduler leads."""
    until(world, lambda: host.is_up and host.leader == host.node_id, f"{host.name} leads")


def submit(
    world: World, hosts: Sequence[Host], plans: Sequence[Plan], *, priority: int = 0, retries: int = 0
) -> list[bytes]:
    """Submit tasks at the first of these, and wait until they are on the disks of all."""
    spec = TaskSpec(
        "command", priority=priority, submitted_s=world.utc_s, argv=("true",), retries=retries,
        backoff=Backoff(initial_s=0.2, max_s=2.0),
    )  # fmt: skip
    tasks = []
    for plan in plans:
        task_id = world.new_id()
        world.plans[task_id] = plan
        tasks.append(ev.NewTask(task_id, spec, encode(spec)))
    world.clients.submit_as(tasks, hosts[0])
    ids = [task.id for task in tasks]
    until(world, lambda: all(task_id in host.database.rows for host in hosts for task_id in ids), "tasks are accepted")
    return ids


def wait_for_state(world: World, host: Host, ids: Sequence[bytes], state: TaskState) -> None:
    """Wait until tasks are in this state on a disk."""
    rows = host.database.rows
    until(
        world, lambda: all(task_id in rows and rows[task_id].state == state for task_id in ids),
        f"{len(ids)} tasks are {state.name} at {host.name}",
    )  # fmt: skip


def wait_for_attempts(world: World, host: Host, task_id: bytes, count: int) -> None:
    """Wait until so many attempts of a task are on a disk."""

    def has_them() -> bool:
        row = host.database.rows.get(task_id)
        return row is not None and len(record_of(row.record).attempts) >= count

    until(world, has_them, f"{count} attempts are recorded at {host.name}")


def is_in_memory(host: Host, task_id: bytes) -> bool:
    """Whether a leader has a task in memory, and not on the disk alone."""
    return host.node.scheduler is not None and task_id in host.node.scheduler.ledger.tasks


def readings(host: Host) -> list[fx.ReadRows]:
    """Readings of tasks by their ids, in the order in which they are asked for from now on."""
    asked: list[fx.ReadRows] = []
    host.watch(fx.ReadRows, asked.append)
    return asked
