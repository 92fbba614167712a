"""Three schedulers and three workers on a LAN whose hosts die, freeze and lose their links, wholly or in one direction.

After each trouble nothing that was answered is lost, and all stores agree on every task. One LAN and one cluster serve
all stories: each begins and ends with scheduler 1 leading and the others in sync.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from tests.integration.cluster import eventually
from tests.integration.lan import Lan, lan, why_not
from tests.integration.load import Load
from tests.integration.replicas import Replicas, leader_at, replicas, wipe

REASON = why_not()
pytestmark = [
    pytest.mark.namespaces,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
SCHEDULERS, WORKERS = 3, 3
HOSTS = SCHEDULERS + WORKERS


@pytest.fixture(scope="module")
def network() -> Iterator[Lan]:
    with lan(HOSTS + 1) as made:
        yield made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, network: Lan) -> Iterator[Replicas]:
    with replicas(tmp_path_factory.mktemp("lan"), SCHEDULERS, WORKERS, network) as made:
        yield made


@pytest.fixture
def made(whole: Replicas, network: Lan) -> Iterator[Replicas]:
    """The cluster, whole; and after the story whole again, with everything checked, even where the story failed."""
    whole.wait_until_whole()
    yield whole
    network.heal()
    for daemon in whole.daemons:
        if daemon.process is None:
            daemon.start(wait=False)
        else:
            daemon.signal(signal.SIGCONT)
    whole.wait_until_whole()
    whole.settle()


def two_workers(made: Replicas) -> tuple[Load, Load]:
    """Clients of the last two workers; the first worker's host is cut off together with a scheduler's at times."""
    return Load(made.history, made.workers[1]), Load(made.history, made.workers[2], made.history.command)


def last_for(seconds: float) -> None:
    """How long a trouble lasts is part of its story."""
    time.sleep(seconds)


def test_the_leader_is_killed(made: Replicas) -> None:
    begin = len(made.history.submissions)
    one, other = two_workers(made)
    with one, other:
        one.wait_for(20)
        made.schedulers[0].kill()
        made.wait_leader(2)
        one.wait_for(20)
        other.wait_for(20)
        made.schedulers[0].start()
        made.wait_until_whole()
        one.wait_for(20)
    assert made.history.errors_since(begin) == []


def test_the_leader_freezes_for_ten_seconds(made: Replicas) -> None:
    """Awake again it must not decide anything before it has heard that another one leads."""
    first = made.schedulers[0]
    one, other = two_workers(made)
    with one, other:
        one.wait_for(20)
        first.signal(signal.SIGSTOP)
        made.wait_leader(2, *made.schedulers[1:], *made.workers)
        last_for(10)
        first.signal(signal.SIGCONT)
        made.wait_until_whole()
        one.wait_for(20)


def test_the_leaders_link_is_cut(made: Replicas, network: Lan) -> None:
    first, rest = made.schedulers[0], [*made.schedulers[1:], *made.workers]
    one, other = two_workers(made)
    with one, other, Load(made.history, first) as alone:
        one.wait_for(20)
        network.cut(1)
        made.wait_leader(2, *rest)
        one.wait_for(20)
        alone.wait_for(20)
        network.mend(1)
        made.wait_until_whole()
        one.wait_for(20)
        alone.wait_for(20)


@pytest.mark.parametrize(("sender", "receiver"), [(1, 2), (2, 1), (1, 5), (5, 1)])
def test_one_direction_is_cut(made: Replicas, network: Lan, sender: int, receiver: int) -> None:
    """Between leader and standby, or leader and worker. Scheduler 3 sees everybody all the time."""
    one, other = two_workers(made)
    with one, other, Load(made.history, made.schedulers[2]) as third:
        third.wait_for(20)
        network.cut_one_way(sender, receiver)
        last_for(5)  # Twice what it takes to notice.
        third.wait_for(50)
        network.heal()
        made.wait_until_whole()
        one.wait_for(20)
        other.wait_for(20)
        third.wait_for(20)


def test_the_leaders_link_flaps(made: Replicas, network: Lan) -> None:
    one, other = two_workers(made)
    with one, other, Load(made.history, made.schedulers[1]) as standby:
        with network.flapping(1, period_s=1.0):
            last_for(10)
        made.wait_until_whole()
        for load in (one, other, standby):
            load.wait_for(20)


def test_a_standbys_link_flaps(made: Replicas, network: Lan) -> None:
    begin = len(made.history.submissions)
    one, other = two_workers(made)
    with one, other:
        with network.flapping(2, period_s=1.0):
            last_for(5)
        made.wait_until_whole()
    assert made.history.errors_since(begin) == [], "who is not cut off does not notice"


def test_both_sides_of_a_division_take_work(made: Replicas, network: Lan) -> None:
    """Two against one: after healing there is one result of every task, equal everywhere."""
    first, second, _ = made.schedulers
    alone, *others = made.workers
    before = made.history.submit(first, *[made.history.handler(0.2)] * 30)
    begin = len(made.history.submissions)
    network.divide([2, 3, 5, 6], [1, 4])
    made.wait_leader(2, *made.schedulers[1:], *others)
    with Load(made.history, first) as here, Load(made.history, second) as there, Load(made.history, alone) as worker:
        for load in (here, there, worker):
            load.wait_for(50)
    assert leader_at(first) == 1
    said = {(one.node, one.durability) for one in made.history.submissions[begin:] if one.id}
    assert said == {("scheduler1", "local"), ("worker1", "local"), ("scheduler2", "replicated")}
    first.wait(before)
    second.wait(before)
    network.heal()
    made.wait_until_whole()
    assert made.settle().second_runs > 0, "both sides ran what they had been given before"


def test_a_division_of_standbys_changes_nothing(made: Replicas, network: Lan) -> None:
    begin = len(made.history.submissions)
    with Load(made.history, made.schedulers[0]) as load:
        load.wait_for(20)
        network.divide([1, 2, 4, 5, 6], [3])
        eventually(lambda: made.schedulers[0].ok("GET", "/v1/cluster")["schedulers"] == 2)
        load.wait_for(50)
        healed = len(made.history.submissions)
        # The one that was alone has led, by a later term: it leads them all for a moment, at first without a copy.
        network.heal()
        made.wait_until_whole()
    assert made.history.errors_since(begin) == []
    assert {one.durability for one in made.history.submissions[begin:healed]} == {"replicated"}


def test_a_standbys_disk_is_wiped(made: Replicas) -> None:
    third = made.schedulers[2]
    with Load(made.history, made.workers[0]) as load:
        third.kill()
        wipe(third)
        load.wait_for(20)
        third.start()
        made.wait_in_sync(3)
    made.settle()


def test_a_lower_id_returns_after_an_orderly_stop(made: Replicas) -> None:
    begin = len(made.history.submissions)
    first = made.schedulers[0]
    one, other = two_workers(made)
    with one, other:
        one.wait_for(20)
        assert first.stop() == 0
        made.wait_leader(2)
        one.wait_for(20)
        first.start()
        made.wait_until_whole()
        one.wait_for(20)
        other.wait_for(20)
    assert made.history.errors_since(begin) == []


@pytest.mark.parametrize("number", [1, 3])
def test_of_two_nodes_with_one_id_the_younger_is_refused(made: Replicas, number: int) -> None:
    begin = len(made.history.submissions)
    twin = made.add_scheduler(number, name=f"twin{number}", host=HOSTS + 1)
    try:
        with Load(made.history, made.schedulers[1]) as load:
            load.wait_for(5)
            twin.start(wait=False)
            assert twin.wait_exit() != 0
            load.wait_for(5)
    finally:
        made.drop(twin)
    assert "Traceback" not in twin.log.read_text()
    assert [leader_at(node) for node in made.daemons] == [1] * HOSTS
    assert made.history.errors_since(begin) == []
