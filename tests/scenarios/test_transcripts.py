"""Small stories, and word for word what nodes hear, say and do in them: the text beside this file.

A change of the protocol shows as a change of a transcript, to be read like one of the code.
TASKD_WRITE_SCENARIOS=1 writes them anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from taskd.core import effects as fx
from taskd.core import events as ev
from tests.core.test_take_over import cluster, submit
from tests.core.world import Host, World
from tests.sim.brief import brief

HERE = Path(__file__).parent


class Scribe(World):
    """A cluster of which every word is written down, but for the passing of time."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._begun_at = self.now

    def hears(self, node_id: int, event: ev.Event) -> None:
        if not isinstance(event, ev.Ticked | ev.Committed):
            self._write(node_id, f"hears {brief(event)}")
        super().hears(node_id, event)

    def does(self, node_id: int, host: Host, effect: fx.Effect) -> None:
        if not isinstance(effect, fx.Log):
            self._write(node_id, f"does {brief(effect)}")
        super().does(node_id, host, effect)

    def headline(self, text: str) -> None:
        """What happens next, in words."""
        self.lines += ["", f"-- {text}", ""]

    def _write(self, node_id: int, text: str) -> None:
        roles = self.hosts[node_id].node.info.roles
        name = f"{'s' if 'scheduler' in roles else 'w'}{node_id}"
        self.lines.append(f"{self.now - self._begun_at:8.3f} {name:>4} {text}")


def a_task_runs(world: Scribe) -> None:
    """One scheduler and one worker find each other; a task is accepted, handed out, and ends."""
    cluster(world, 1, 1)
    world.headline("a client submits a task")
    (task,) = submit(world, 1)
    world.headline("its process ends")
    world.end(task)


def a_worker_is_lost(world: Scribe) -> None:
    """A worker dies with a task; after the grace another attempt begins elsewhere."""
    cluster(world, 1, 2)
    world.headline("a client submits a task")
    (task,) = submit(world, 1)
    world.headline("its worker dies")
    world.crash(world.where(task)[0])
    world.run(60.0)
    world.headline("the second process ends")
    world.end(task)


def the_leader_is_lost(world: Scribe) -> None:
    """The leader dies with a task running; the standby leads, the task goes on, and the lower id returns."""
    cluster(world, 2, 1)
    world.headline("a client submits a task")
    (task,) = submit(world, 1)
    world.headline("the leader dies")
    world.crash(1)
    world.run(1.0)
    world.headline("the process of the task ends")
    world.end(task)
    world.headline("the old leader returns, catches up, and is handed the lead when it has been well for a while")
    world.restart(1)
    world.run(20.0)


def both_sides_of_a_cut_work(world: Scribe) -> None:
    """A cut divides two schedulers, each with a worker: both lead, and what both decided about one task is joined."""
    cluster(world, 2, 2)
    world.headline("a client submits a task")
    (task,) = submit(world, 1)
    world.headline("the network is cut in two")
    worker = world.where(task)[0]
    other = 23 - worker
    for one, end in ((1, 2), (1, worker), (2, other)):
        world.cut(one, end)
    world.run(8.0)
    world.headline("the process ends, where node 2 leads")
    world.end(task)
    world.headline("node 1 gives up the worker that is out of its reach, and has the task run again")
    world.run(30.0)
    world.headline("the cut is healed")
    for one, end in ((1, 2), (1, worker), (2, other)):
        world.connect(one, end)
    world.run(20.0)


def an_empty_disk_joins(world: Scribe) -> None:
    """The scheduler with the lowest id comes with an empty disk: it takes everything before it leads."""
    cluster(world, 2, 0)
    world.headline("a client submits two tasks for later")
    for _ in range(2):
        submit(world, 1, not_before_s=world.utc + 3600.0)
    world.headline("the leader's machine dies, with its disk")
    world.crash(1)
    world.run(1.0)
    world.headline("it comes back with an empty one")
    world.wipe(1)
    world.run(20.0)


STORIES: list[Callable[[Scribe], None]] = [
    a_task_runs, a_worker_is_lost, the_leader_is_lost, both_sides_of_a_cut_work, an_empty_disk_joins,
]  # fmt: skip


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_the_story_goes_as_written(story: Callable[[Scribe], None]) -> None:
    world = Scribe()
    story(world)
    text = f"{story.__doc__}\n" + "\n".join(["", *world.lines]) + "\n"
    path = HERE / f"{story.__name__}.txt"
    if os.environ.get("TASKD_WRITE_SCENARIOS"):
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text


def test_every_transcript_has_its_story() -> None:
    assert {path.stem for path in HERE.glob("*.txt")} == {story.__name__ for story in STORIES}
