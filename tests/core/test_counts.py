"""What the leader counts while it works is what one would find by counting."""

from __future__ import annotations

from collections import Counter

from taskd.core.task import Backoff, Outcome, TaskState
from tests.core.world import World, offer


def check(world: World) -> dict[str, int]:
    """The counts by state, once they are known to be right."""
    ledger = world.scheduler.ledger
    unfinished = [row for row in world.hosts[1].rows.values() if not TaskState(row.state).is_final]
    found = Counter((TaskState(row.state), row.queue) for row in unfinished)
    assert len(ledger) == len(unfinished)
    assert ledger.counts.as_dict() == dict(found), "nothing forgotten, nothing twice, no zeros"
    by_state: Counter[str] = Counter()
    for (state, _queue), count in found.items():
        by_state[state.word] += count
    return dict(by_state)


def test_counts_follow_every_way_that_a_task_can_go() -> None:
    world = World()
    world.cluster()
    slots = offer().slots
    first = world.submit(slots)
    assert check(world) == {"running": slots}
    waiting = world.submit(3, queue="later")
    early = world.submit(2, not_before_s=world.utc + 100)
    world.submit(1, deadline_s=world.utc + 50)
    assert check(world)["scheduled"] == 2
    world.cancel(waiting[0], early[0], first[0])
    assert check(world)["cancelling"] == 1
    world.end(first[0], Outcome.SIGNAL)
    check(world)
    (again,) = world.submit(1, retries=1, backoff=Backoff(1000.0, 1.0, 1000.0, 0.0), priority=9)
    for task in first[1:]:
        world.end(task)
        check(world)
    world.end(again, Outcome.EXIT_NONZERO)
    assert check(world)["retrying"] == 1
    world.crash(1)
    world.restart(1)
    world.run(1)
    check(world)
    world.connect(1, 11)
    world.run(60)
    check(world)
    world.cancel(*world.hosts[1].rows)
    for host in world.hosts.values():
        for key in list(host.running):
            world.end(key.task_id, Outcome.SIGNAL)
    assert check(world) == {}
