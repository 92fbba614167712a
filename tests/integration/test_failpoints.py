"""Daemons that die between two steps: before and after each commit, each send, each line of a journal.

Each case begins with a cluster that works, under load. One daemon is started anew so that it dies at the point; the
rest goes on without it; then it comes back. Everything that was answered ends once, alike in all stores.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest

from taskd.failpoints import VARIABLE
from tests.integration.cluster import Daemon
from tests.integration.load import Load
from tests.integration.replicas import Replicas, replicas

Story = Callable[[Replicas, dict[str, str]], Daemon]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    """Two schedulers and two workers for all cases."""
    with replicas(tmp_path_factory.mktemp("points"), 2, 2) as made:
        yield made


# -- Who dies, and in which story --------------------------------------------------------------------------------------


def returning_leader(made: Replicas, point: dict[str, str]) -> Daemon:
    """Scheduler 1 comes back, catches up, leads again, and works."""
    first, second = made.schedulers
    first.kill()
    made.wait_leader(2, second)
    return first.start(wait=False, env=point)


def standby(made: Replicas, point: dict[str, str]) -> Daemon:
    """Scheduler 2 comes back, catches up, and stays in sync."""
    second = made.schedulers[1]
    second.kill()
    return second.start(wait=False, env=point)


def stand_in(made: Replicas, point: dict[str, str]) -> Daemon:
    """Scheduler 2 takes over from a dead leader, and hands over to it when it is back."""
    first, second = made.schedulers
    second.kill()
    second.start(env=point)
    made.wait_in_sync(2)
    first.kill()
    made.wait_leader(2, *made.workers)
    first.start(wait=False)
    return second


def sole_leader(made: Replicas, point: dict[str, str]) -> Daemon:
    """Scheduler 1 comes back where no other one is left."""
    first, second = made.schedulers
    second.kill()
    first.kill()
    return first.start(wait=False, env=point)


def worker(made: Replicas, point: dict[str, str]) -> Daemon:
    """A worker comes back, tells what it left unfinished, and works."""
    victim = made.workers[0]
    victim.kill()
    return victim.start(wait=False, env=point)


def worker_alone(made: Replicas, point: dict[str, str]) -> Daemon:
    """A worker has results, and there is no scheduler to take them."""
    victim = made.workers[0]
    victim.kill()
    victim.start(env=point)
    made.wait_until_whole()
    made.history.submit(victim, *[made.history.handler(1)] * 8)
    for scheduler in made.schedulers:
        scheduler.kill()
    return victim


def both_sides(*messages: str) -> list[str]:
    """The points before and after sending a message."""
    return [f"send.{side}.{message}" for message in messages for side in ("before", "after")]


COMMITS = ["store.before_commit", "store.after_commit", "commit.before", "commit.after"]
CASES: list[tuple[Story, list[str]]] = [
    # The first commit keeps the term, or what was missed; the thirtieth is one of many under load.
    (returning_leader, [f"{point}:{count}" for point in COMMITS for count in (1, 30)]),
    (returning_leader, both_sides("Leading", "Attach", "Replicated", "Claim", "Page", "Registered")),
    (returning_leader, both_sides("Run", "Acknowledged", "Replicate:20")),
    (sole_leader, [f"{point}:2" for point in COMMITS]),
    (standby, [f"{point}:{count}" for point in COMMITS for count in (1, 10)]),
    (standby, both_sides("Attach", "PageTaken", "Replicated:1", "Replicated:10")),
    (stand_in, both_sides("HandOver", "Page")),
    (worker, ["journal.before:1", "journal.after:1", "journal.before:10", "journal.after:10"]),
    (worker, both_sides("Leading", "Register", "Finished", "Started")),
    (worker_alone, ["journal.sync.before", "journal.sync.after"]),
]


@pytest.mark.parametrize(
    ("story", "point"),
    [pytest.param(story, point, id=f"{story.__name__}-{point}") for story, points in CASES for point in points],
)
def test_a_death_between_two_steps(whole: Replicas, story: Story, point: str) -> None:
    history = whole.history
    begin = len(history.submissions)
    whole.wait_until_whole()
    with Load(history, whole.workers[1]) as load, Load(history, whole.workers[1], lambda: history.handler(0.05)):
        load.wait_for(5)
        victim = story(whole, {VARIABLE: point})
        assert victim.wait_exit() == -signal.SIGKILL, f"{victim.home.name} came to {point}, and died of it"
        for daemon in whole.daemons:
            if daemon.process is None:
                daemon.start(wait=False)
        whole.wait_until_whole()
        load.wait_for(5)
    whole.settle()
    if story not in (sole_leader, worker_alone):
        assert history.errors_since(begin) == [], "one scheduler was there all the time"
