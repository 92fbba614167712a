"""Scripted worlds: each leads to one rare coincidence, and breaks a promise where the plant of its name is in the core.

Drawn worlds meet these once in hundreds or thousands of seeds. Here each step waits for the one before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from taskd.core import effects as fx
from taskd.core.task import Outcome, TaskState
from taskd.protocol import messages as msg
from tests.sim.disk import covers
from tests.sim.run import Result, play_out
from tests.sim.script import (
    LONG_S,
    cut,
    is_in_memory,
    lead_and_follow,
    mend,
    readings,
    settings,
    submit,
    until,
    wait,
    wait_for_attempts,
    wait_for_copies,
    wait_for_lead,
    wait_for_state,
)
from tests.sim.work import Plan
from tests.sim.world import World

Script = Callable[[World], None]


@dataclass(frozen=True)
class Coincidence:
    """A script, the plant that it is for, and by which invariant that is noticed."""

    script: Script
    invariant: str
    plant: str


COINCIDENCES: dict[str, Coincidence] = {}


def coincidence(invariant: str, plant: str = "") -> Callable[[Script], Script]:
    """Enter a script; it has the name of its plant, unless that has another one already."""

    def enter(script: Script) -> Script:
        COINCIDENCES[script.__name__] = Coincidence(script, invariant, plant or script.__name__)
        return script

    return enter


def play_script(name: str, seed: int = 0, *, is_traced: bool = False) -> Result:
    """Play a scripted world; the seed draws no more than delays within a way's jitter and a disk's."""
    world = World(seed, is_traced=is_traced)
    return play_out(world, lambda: COINCIDENCES[name].script(world))


# -- Promises ----------------------------------------------------------------------------------------------------------


@coincidence("1")
def accepts_alone_against_the_settings(world: World) -> None:
    """A task is submitted while no standby is there, and min_replicas asks for one."""
    s1, s2 = (world.add(node_id, "scheduler", settings=settings(min_replicas=1)) for node_id in (1, 2))
    world.add(11, "worker").start()
    s1.start()
    wait_for_lead(world, s1)
    world.clients.submit(1, 60.0, s1)
    wait(world, 2.0)
    s2.start()
    wait_for_copies(world, s1, s2)


# -- Joining -----------------------------------------------------------------------------------------------------------


@coincidence("8")
def the_lesser_decision_wins(world: World) -> None:
    """On one side of a cut a task succeeds, on the other it is cancelled."""
    s1, s2 = (world.add(node_id, "scheduler", settings=settings()) for node_id in (1, 2))
    worker = world.add(11, "worker")
    lead_and_follow(world, s1, s2)
    ids = submit(world, [s1, s2], [Plan()])
    cut(world, s2, s1, worker)
    wait_for_lead(world, s2)
    worker.start()
    wait_for_state(world, s1, ids, TaskState.SUCCEEDED)
    world.clients.cancel(ids, host=s2)
    wait_for_state(world, s2, ids, TaskState.CANCELLED)


@coincidence("7")
def forgets_the_wish_to_cancel(world: World) -> None:
    """On one side of a cut somebody wants a task cancelled, on the other an attempt of it ends and the next begins."""
    s1, s2 = (world.add(node_id, "scheduler", settings=settings()) for node_id in (1, 2))
    worker = world.add(11, "worker")
    lead_and_follow(world, s1, s2)
    worker.start()
    plan = Plan((10.0, LONG_S), (Outcome.EXIT_NONZERO, Outcome.OK))
    (task_id,) = ids = submit(world, [s1, s2], [plan], retries=3)
    wait_for_state(world, s2, ids, TaskState.RUNNING)
    cut(world, s2, s1, worker)
    wait_for_lead(world, s2)
    world.clients.cancel(ids, host=s2)
    wait_for_state(world, s2, ids, TaskState.CANCELLING)
    wait_for_attempts(world, s1, task_id, 2)
    wait_for_state(world, s1, ids, TaskState.RUNNING)


@coincidence("8")
def takes_purged_rows_back(world: World) -> None:
    """On one side of a cut a task ends and is purged, on the other it is cancelled after that."""
    s1 = world.add(1, "scheduler", settings=settings())
    s2 = world.add(2, "scheduler", settings=settings(finished_age_max_s=3.0))
    worker = world.add(12, "worker")
    lead_and_follow(world, s1, s2)
    ids = submit(world, [s1, s2], [Plan()])
    cut(world, s1, s2, worker)
    wait_for_lead(world, s2)
    worker.start()
    wait_for_state(world, s2, ids, TaskState.SUCCEEDED)
    until(world, lambda: ids[0] not in s2.database.rows, "the task is purged")
    world.clients.cancel(ids, host=s1)
    wait_for_state(world, s1, ids, TaskState.CANCELLED)


@coincidence("2", plant="passes_on_no_purge_that_it_had_nothing_of")
def purges_on_one_side_alone(world: World) -> None:
    """On one side of a cut a task ends and is purged, on the other an attempt of it is lost. That one leads then, sees
    the purge, keeps what it changed itself, and dies before it gives that to the first."""
    s1 = world.add(1, "scheduler", settings=settings(finished_age_max_s=3.0))
    s2 = world.add(2, "scheduler", settings=settings(worker_grace_s=1.0))
    w11, w12 = (world.add(node_id, "worker") for node_id in (11, 12))
    lead_and_follow(world, s1, s2)
    ids = submit(world, [s1, s2], [Plan((0.1, LONG_S, 0.1))])
    cut(world, s1, s2, w12)
    cut(world, s2, w11)
    wait_for_lead(world, s2)
    w11.start()
    wait_for_state(world, s1, ids, TaskState.SUCCEEDED)
    until(world, lambda: ids[0] not in s1.database.rows, "the task is purged")
    w12.start()
    wait_for_state(world, s2, ids, TaskState.RUNNING)
    w12.kill()
    wait_for_state(world, s2, ids, TaskState.QUEUED)
    mend(world, s1, s2)
    purge = s1.database.last_purge
    assert purge is not None
    until(world, lambda: covers(s2.database.seen, purge), "the leader sees the purge")
    s2.kill()
    wait_for_lead(world, s1)


@coincidence("2")
def passes_on_no_purge_that_it_had_nothing_of(world: World) -> None:
    """A task is purged while a standby is away. One that leads and never had it is told of that, and then the standby
    comes to this one."""
    s2 = world.add(2, "scheduler", settings=settings(finished_age_max_s=3.0))
    s1, s3 = (world.add(node_id, "scheduler", settings=settings()) for node_id in (1, 3))
    worker = world.add(11, "worker")
    worker.start()
    cut(world, s1, s2)
    lead_and_follow(world, s2, s3)
    ids = submit(world, [s2, s3], [Plan()])
    wait_for_state(world, s3, ids, TaskState.SUCCEEDED)
    s3.kill()
    until(world, lambda: ids[0] not in s2.database.rows, "the task is purged")
    worker.kill()  # No worker tells of the other leader.
    s1.start()
    wait_for_lead(world, s1)
    mend(world, s1, s2)
    purge = s2.database.last_purge
    assert purge is not None
    until(world, lambda: covers(s1.database.seen, purge), "the other leader sees the purge")


@coincidence("2")
def takes_up_an_attempt_that_was_given_up(world: World) -> None:
    """Both sides of a cut run a task; the join gives one attempt up, the other one is lost, and the worker of the first
    comes while the history of its leader is here in part only."""
    s1, s2 = (world.add(node_id, "scheduler", settings=settings(worker_grace_s=1.0)) for node_id in (1, 2))
    w11, w12 = (world.add(node_id, "worker") for node_id in (11, 12))
    lead_and_follow(world, s1, s2)
    (task_id,) = ids = submit(world, [s1, s2], [Plan((LONG_S, LONG_S, 0.1))])
    cut(world, s1, s2, w12)
    cut(world, s2, w11)
    wait_for_lead(world, s2)
    w11.start()
    wait_for_state(world, s1, ids, TaskState.RUNNING)
    w12.start()
    wait_for_state(world, s2, ids, TaskState.RUNNING)
    mend(world, s1, s2)
    wait_for_attempts(world, s2, task_id, 2)
    s1.kill()
    w12.kill()
    wait_for_state(world, s2, ids, TaskState.QUEUED)
    mend(world, s2, w11)
    until(world, lambda: 2 in w11.peers.open, "the worker of the other attempt comes")
    wait(world, 1.0)


@coincidence("2")
def forgets_rows_that_came_alone(world: World) -> None:
    """A leader dies for good when its new standby has the rows of its tasks, and not yet the last page."""
    s1, s2 = (world.add(node_id, "scheduler", settings=settings()) for node_id in (1, 2))
    world.add(11, "worker").start()
    s1.start()
    wait_for_lead(world, s1)
    ids = submit(world, [s1], [Plan()] * 3)
    wait_for_state(world, s1, ids, TaskState.SUCCEEDED)
    s2.start()
    until(world, lambda: all(task_id in s2.database.rows for task_id in ids), "the first page is durable")
    s1.kill()
    world.lose_database(s1, world.new_database())
    wait_for_lead(world, s2)


@coincidence("8")
def compares_with_what_it_did_not_read(world: World) -> None:
    """A standby gives two cancelled tasks to a leader that has one of them in memory; while the other is read from the
    disk, the first leaves the memory, for a more urgent task has come."""
    s1, s2 = (world.add(node_id, "scheduler", settings=settings(window=1)) for node_id in (1, 2))
    world.add(11, "worker")  # It starts when all is healed.
    lead_and_follow(world, s1, s2)
    one, other = ids = submit(world, [s1, s2], [Plan()] * 2)
    cut(world, s1, s2)
    s2.kill()  # Of the tasks' last changes the next process knows nothing.
    s2.start()
    wait_for_lead(world, s2)
    until(world, lambda: is_in_memory(s2, one) and not is_in_memory(s2, other), "one task is on the disk alone")
    wish = world.clients.cancel(ids, host=s1)
    until(world, lambda: wish.is_done, "both are cancelled on the other side")
    read = readings(s2)
    s2.read_s = 1.0
    mend(world, s1, s2)
    until(world, lambda: any(effect.ids == [other] for effect in read), "the leader compares what it was given")
    s2.read_s = 0.0
    submit(world, [s2], [Plan()], priority=1)
    until(world, lambda: not is_in_memory(s2, one), "the task is on the disk alone")
    wait(world, 2.0)


# -- Tasks on the disk alone -------------------------------------------------------------------------------------------


@coincidence("2")
def loses_the_page_after_a_late_one(world: World) -> None:
    """A task whose page is being read is cancelled, which has the next page read; then the first one comes."""
    s1 = world.add(1, "scheduler", settings=settings(window=1))
    world.add(11, "worker", slots=1).start()
    s1.start()
    wait_for_lead(world, s1)
    submit(world, [s1], [Plan((5.0,))] * 6)
    until(world, lambda: world.referee.begun, "the first task begins")
    wait(world, 1.0)
    read = readings(s1)
    s1.read_s = 1.0
    until(world, lambda: len(read) == 1, "a page is read")
    s1.read_s = 0.0
    world.clients.cancel(list(read[0].ids), host=s1)
    until(world, lambda: len(read) == 2, "a task of that page is read for a client")
    s1.read_s = 2.0
    until(world, lambda: len(read) == 3, "the next page is read")
    s1.read_s = 0.0
    wait(world, 2.5)


@coincidence("9")
def answers_no_call_about_tasks_that_were_being_read(world: World) -> None:
    """A leader reads a task that a client wants cancelled, and hears of a leader with a greater term."""
    s1, s2 = (world.add(node_id, "scheduler", settings=settings(window=1)) for node_id in (1, 2))
    world.add(11, "worker")  # It starts when all is healed.
    lead_and_follow(world, s1, s2)
    ids = submit(world, [s1, s2], [Plan()] * 6)
    cut(world, s1, s2)
    wait_for_lead(world, s2)
    until(world, lambda: not all(is_in_memory(s1, task_id) for task_id in ids), "some are on the disk alone")
    cold = next(task_id for task_id in ids if not is_in_memory(s1, task_id))
    read = readings(s1)
    s1.read_s = 20.0
    world.clients.cancel([cold], host=s1)
    until(world, lambda: any(cold in effect.ids for effect in read), "the task is read")
    s1.read_s = 0.0
    mend(world, s1, s2)
    until(world, lambda: s1.leader != s1.node_id, "the first leader steps down")


# -- Nodes -------------------------------------------------------------------------------------------------------------


@coincidence("6")
def takes_a_drained_scheduler_for_a_worker(world: World) -> None:
    """A node of both roles took a task alone and went away; then the worker in it is drained, and the worker that ran
    the task brings the outcome."""
    s1 = world.add(1, "scheduler", settings=settings())
    s2 = world.add(2, "scheduler", "worker", settings=settings(), slots=1)
    w11 = world.add(11, "worker", slots=4)
    lead_and_follow(world, s1, s2)
    until(world, lambda: 2 in s1.database.nodes and "worker" in s1.database.nodes[2].roles, "both roles are known")
    cut(world, s1, s2, w11)
    wait_for_lead(world, s2)
    w11.start()
    submit(world, [s2], [Plan((6.0,))] * 4)
    until(world, lambda: w11.processes.running, "the worker runs some of them")
    wait(world, 1.0)
    s2.kill()
    s1.kill()  # The next process has not met the other one.
    s1.start()
    wait_for_lead(world, s1)
    world.clients.drain(2, "upkeep", host=s1)
    until(world, lambda: s1.database.nodes[2].drain_reason, "the worker that is away is drained")
    mend(world, s1, w11)
    until(world, lambda: not w11.processes.running and 1 in w11.peers.open, "the worker has outcomes to report")
    wait(world, 5.0)


@coincidence("9")
def keeps_the_claim_of_a_process_that_stood_still(world: World) -> None:
    """A claimer stands still when it has asked another for its rows, which come meanwhile;
    and then nobody hears it any more."""
    s1, s2, s3 = (world.add(node_id, "scheduler", settings=settings()) for node_id in (1, 2, 3))
    lead_and_follow(world, s1, s2, s3)
    s1.kill()
    until(world, lambda: s3.node.scheduler is not None and s3.node.scheduler.election.granted, "the other is asked")
    s2.pause(1.5)
    wait(world, 1.0)
    world.way(s2, s3).cut()
    wait(world, 2.0)


@coincidence("9")
def looks_around_no_more_when_it_hands_over(world: World) -> None:
    """A leader stands still when it has told another to lead, and has not heard how that went when it goes on."""
    s1, s2 = (world.add(node_id, "scheduler", settings=settings()) for node_id in (1, 2))
    worker = world.add(11, "worker")
    s2.start()
    wait_for_lead(world, s2)
    s1.start()
    worker.start()
    wait_for_copies(world, s2, s1)
    handed: list[fx.Send] = []
    s2.watch(fx.Send, lambda effect: handed.append(effect) if isinstance(effect.message, msg.HandOver) else None)
    until(world, lambda: handed, "the leader hands over")
    world.way(s1, s2).cut()
    s2.pause(6.0)
    wait_for_lead(world, s1)
    until(world, lambda: worker.leader == 1 and s2.paused_since is None, "the worker follows the heir")
    wait(world, 2.0)


@coincidence("10")
def takes_pages_of_who_is_gone(world: World) -> None:
    """A claimer compares a page of another that knows how a task ended; that one dies, and the claimer goes on."""
    s1, s2 = (world.add(node_id, "scheduler", settings=settings()) for node_id in (1, 2))
    worker, other = (world.add(node_id, "worker") for node_id in (11, 12))
    lead_and_follow(world, s1, s2)
    ids = submit(world, [s1, s2], [Plan()])
    cut(world, s1, s2, worker)
    wait_for_lead(world, s2)
    worker.start()
    wait_for_state(world, s2, ids, TaskState.SUCCEEDED)
    reports = worker.node.worker
    assert reports is not None
    until(world, lambda: not reports.unacknowledged_count, "the outcome is acknowledged")
    for host in (s1, s2, worker):
        host.kill()
    mend(world, s1, s2)
    read = readings(s1)
    s1.read_s = 1.0
    s1.start()
    wait(world, 0.3)  # It is the first to have looked around.
    s2.start()
    until(world, lambda: any(effect.ids == ids for effect in read), "the claimer compares what it was given")
    s1.read_s = 0.0
    s2.kill()
    wait_for_lead(world, s1)
    wait(world, 1.5)
    other.start()
    wait(world, 5.0)
