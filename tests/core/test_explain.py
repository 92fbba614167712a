"""Why a task stands where it stands: one word, and what each worker lacks."""

from __future__ import annotations

import pytest

from taskd.core import events as ev
from taskd.core.explain import Fit, Why, explain
from taskd.core.task import Backoff, Outcome, TaskState
from taskd.protocol import messages as msg
from tests.core.world import World, offer


@pytest.fixture
def world() -> World:
    return World()


def why(world: World, task: bytes) -> Why:
    return explain(world.scheduler, world.scheduler.ledger.tasks[task])


def fit(world: World, task: bytes, node_id: int = 11) -> Fit:
    (found,) = (fit for fit in why(world, task).fits if fit.node_id == node_id)
    return found


def test_before_its_time(world: World) -> None:
    world.cluster()
    (task,) = world.submit(not_before_s=world.utc + 50)
    assert (why(world, task).reason, why(world, task).until_s) == ("BeginTime", world.utc + 50)


def test_between_two_attempts(world: World) -> None:
    world.cluster().work = lambda begin: Outcome.OOM
    (task,) = world.submit(retries=1, backoff=Backoff(initial_s=40.0, jitter=0.0))
    assert (why(world, task).reason, why(world, task).until_s) == ("Backoff", world.utc + 40)
    assert "attempt 1 ended with oom" in why(world, task).text


def test_on_its_way(world: World) -> None:
    world.cluster(offer=offer(1))
    world.work = lambda begin: Outcome.OK
    world.submit()
    world.work = lambda begin: None
    running, waiting = world.submit(2)
    assert why(world, running) == Why("Running", "it runs on node11")
    assert why(world, waiting).reason == "Assigned"
    world.cancel(running)
    assert why(world, running) == Why("Cancelling", "it is being ended on node11")


def test_a_worker_that_is_away_and_until_when_it_is_waited_for(world: World) -> None:
    world.cluster()
    (task,) = world.submit()
    lost_at = world.utc
    world.cut(1, 11)
    world.run(2)
    found = why(world, task)
    assert (found.reason, found.until_s) == ("WorkerAway", lost_at + world.scheduler.settings.worker_grace_s)
    assert "node11 is not connected" in found.text


def test_nobody_there(world: World) -> None:
    world.cluster(0)
    (task,) = world.submit()
    assert why(world, task) == Why("NoMatchingNode", "no worker is connected", position=0)


def test_a_type_that_nobody_runs(world: World) -> None:
    world.cluster()
    (task,) = world.submit(type="resize")
    assert why(world, task).reason == "NoHandler"
    assert fit(world, task) == Fit(11, "node11", False, False, "does not run type 'resize'")


def test_more_than_anybody_has(world: World) -> None:
    world.cluster(offer=offer(2, memory=4 << 30))
    (task,) = world.submit(resources={"memory": (8 << 30) * 1000, "gpus": 1500})
    assert why(world, task).reason == "NoMatchingNode"
    assert not fit(world, task).ever
    assert fit(world, task).why == "has 0 of gpus, 1.5 asked, has 4,096 MiB of memory, 8,192 MiB asked"


def test_labels_that_nobody_has(world: World) -> None:
    world.cluster()
    (task,) = world.submit(constraints=("zone=a", "!gpu"))
    assert why(world, task).reason == "NoMatchingNode"
    assert fit(world, task).why == "does not meet: zone=a"


def test_all_slots_busy(world: World) -> None:
    world.cluster(offer=offer(1))
    _, first, second = world.submit(3)
    assert why(world, first).reason == "Resources"
    assert why(world, first).position == 0
    assert why(world, second).position == 1
    assert "1 task comes first" in why(world, second).text
    assert fit(world, second) == Fit(11, "node11", False, True, "its only slot is busy")


def test_tasks_that_can_never_run_come_before_nobody(world: World) -> None:
    world.cluster(offer=offer(1))
    world.submit()
    world.submit(resources={"gpus": 1000})
    (task,) = world.submit()
    assert why(world, task).position == 0
    assert "come" not in why(world, task).text


def test_a_resource_that_is_in_use(world: World) -> None:
    world.cluster(offer=offer(4, gpus=2))
    world.submit(resources={"gpus": 1500})
    (task,) = world.submit(resources={"gpus": 1000})
    assert why(world, task).reason == "Resources"
    assert fit(world, task).why == "0.5 of gpus is free"


def test_a_resource_in_use_is_not_room_because_tasks_are_short(world: World) -> None:
    world.cluster(offer=offer(4, gpus=1))
    world.work = lambda begin: Outcome.OK
    world.submit(resources={"gpus": 1000})
    world.work = lambda begin: None
    world.submit(5000, resources={"gpus": 1000})
    last = next(reversed(world.scheduler.ledger.tasks))
    assert why(world, last).reason == "Resources"


def test_a_share_of_cpus_that_is_in_use(world: World) -> None:
    world.cluster(offer=offer(2))
    world.submit(resources={"cpus": 1500})
    (task,) = world.submit()
    assert why(world, task).reason == "Resources"
    assert fit(world, task).why == "0.5 of cpus is free"


def test_drained_and_gone(world: World) -> None:
    world.cluster(2)
    world.ask(lambda call: ev.DrainWanted(call, 11, "new disk"))
    world.ask(lambda call: ev.DrainWanted(call, 12, ""))
    (task,) = world.submit()
    assert (why(world, task).reason, why(world, task).text) == (
        "NoMatchingNode",
        "every worker that could run it is drained",
    )
    assert fit(world, task, 11) == Fit(11, "node11", False, True, "is drained: new disk")
    assert fit(world, task, 12).why == "is drained"
    world.cut(1, 12)
    assert fit(world, task, 12) == Fit(12, "node12", False, True, "is not connected", is_here=False)


def test_who_is_away_could_run_it_when_back(world: World) -> None:
    world.cluster(2)
    world.crash(11)
    world.crash(12)
    world.run(10)
    (task,) = world.submit()
    assert why(world, task).text == "no worker is connected; node11, node12 could run it"
    (greedy,) = world.submit(resources={"gpus": 1000})
    assert why(world, greedy).text == "no worker is connected"
    assert fit(world, greedy) == Fit(
        11, "node11", False, False, "is not connected, and has 0 of gpus, 1 asked", is_here=False
    )
    world.crash(1)
    world.restart(1)
    world.run(1)
    assert fit(world, task).ever is None, "a new leader knows its name alone"


def test_about_to_be_handed_out(world: World) -> None:
    """Between two turns: what is queued has not been placed yet."""
    world.cluster()
    node = world.hosts[1].node
    world.submit()
    (key,) = world.hosts[11].running
    spec = world.scheduler.ledger.tasks[key.task_id].spec
    tasks = [ev.NewTask(bytes([number] * 16), spec, b"") for number in (1, 2)]
    node.handle(ev.Submitted(99, tasks), world.now)
    assert why(world, tasks[0].id).reason == "Starting"
    assert why(world, tasks[1].id).reason == "Priority"
    assert fit(world, tasks[0].id) == Fit(11, "node11", True, True, "has room")


def test_asking_changes_nothing(world: World) -> None:
    world.cluster()
    (task,) = world.submit()
    world.crash(1)
    world.hosts[1].node_rows.clear()
    del world.hosts[11]
    world.restart(1)
    world.run(1)
    before = len(world.scheduler.roster)
    assert why(world, task).reason == "WorkerAway"
    assert len(world.scheduler.roster) == before
    assert world.state(task) is TaskState.RUNNING


def test_a_worker_without_slots_is_busy_and_could_never(world: World) -> None:
    world.cluster(offer=msg.Offer(0, {}, {}, ("command",)))
    (task,) = world.submit()
    assert why(world, task).reason == "NoMatchingNode"
