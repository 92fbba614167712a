"""Task processes: how long each attempt runs and how it ends is written in the task's plan, drawn when it was made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from taskd.core import effects as fx
from taskd.core import events as ev
from taskd.core.task import Outcome
from taskd.protocol import messages as msg

if TYPE_CHECKING:
    from tests.sim.host import Host
    from tests.sim.world import World

SHORT_S = 0.02  # Runners do not tell of the beginning of what ends sooner.


class Plan(Struct):
    """What becomes of a task's attempts, as they begin one after the other; the last entry counts for all further."""

    durations_s: tuple[float, ...] = (0.1,)
    outcomes: tuple[Outcome, ...] = (Outcome.OK,)
    obeys_term: bool = True  # else only KILL ends it
    kills_worker: int = 0  # so many of its first attempts take the worker's daemon down


class _Process:
    __slots__ = ("begin", "ends_at", "outcome", "started_s")

    def __init__(self, begin: fx.Begin, outcome: Outcome, started_s: float) -> None:
        self.begin = begin
        self.outcome = outcome
        self.started_s = started_s


class Processes:
    """What one daemon runs; it all ends with the daemon."""

    def __init__(self, world: World, host: Host) -> None:
        self.running: dict[msg.AttemptKey, _Process] = {}
        self._world = world
        self._host = host
        self._boot = host.boot

    def start(self, begin: fx.Begin) -> None:
        """Start one attempt."""
        world, host, key = self._world, self._host, begin.key
        number = world.referee.begun_count(key.task_id) - 1
        plan = world.plan_of(key.task_id)
        duration_s = plan.durations_s[min(number, len(plan.durations_s) - 1)]
        outcome = plan.outcomes[min(number, len(plan.outcomes) - 1)]
        self.running[key] = _Process(begin, outcome, host.utc())
        later = world.engine.after
        if number < plan.kills_worker:
            world.count_fault("poison")
            later(duration_s, self._take_down)
        if duration_s > SHORT_S and outcome is not Outcome.SPAWN_FAILED:
            later(SHORT_S / 2, self._tell_started, key)
        later(duration_s, self._end, key)

    def _take_down(self) -> None:
        if self._host.boot == self._boot and self._host.is_up:
            self._host.kill()
            self._world.restart_later(self._host)

    def _tell_started(self, key: msg.AttemptKey) -> None:
        process = self.running.get(key)
        if process is not None:
            self._progressed([msg.AttemptStarted(key, process.started_s)], [])

    def _progressed(self, started: list[msg.AttemptStarted], ended: list[msg.AttemptEnded]) -> None:
        self._host.hear_as(self._boot, self._host.tell, ev.Progressed(started, ended))

    def _end(self, key: msg.AttemptKey, outcome: Outcome | None = None) -> None:
        process = self.running.pop(key, None)
        if process is None:
            return
        outcome = process.outcome if outcome is None else outcome
        self._world.referee.on_process_ended(self._host, key, outcome)
        started_s = 0.0 if outcome is Outcome.SPAWN_FAILED else process.started_s
        self._progressed([], [msg.AttemptEnded(key, outcome, started_s, self._host.utc(), b"")])

    def terminate(self, key: msg.AttemptKey) -> None:
        """TERM: it ends a moment later, unless it does not listen."""
        if key in self.running and self._world.plan_of(key.task_id).obeys_term:
            self._world.engine.after(0.01, self._end, key, Outcome.SIGNAL)

    def kill(self, key: msg.AttemptKey) -> None:
        """KILL: it ends."""
        if key in self.running:
            self._world.engine.after(0.002, self._end, key, Outcome.SIGNAL)

    def die(self) -> None:
        """The daemon is gone, and all its processes with it."""
        self.running.clear()
