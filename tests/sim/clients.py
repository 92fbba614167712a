"""People and programs that want things: they submit, cancel and drain at any node, and ask again until it is done.

The node where a request arrives relays it to the leader that it follows, as taskd.daemon does: again when there is a
new leader, always with the same ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from taskd.core import effects as fx
from taskd.core import events as ev
from taskd.core.task import Backoff, Outcome, TaskSpec, encode
from taskd.errors import NoLeader, TaskdError, Unavailable
from taskd.protocol import messages as msg
from tests.sim.work import Plan

if TYPE_CHECKING:
    from tests.sim.host import Host
    from tests.sim.world import World

LEADER_WAIT_S = 5.0  # A node keeps a request so long when nobody leads.
AGAIN_S = 0.2
PATIENCE_S = 8.0  # A client that hears nothing for so long asks another node.
OUTCOMES = (Outcome.EXIT_NONZERO, Outcome.EXCEPTION, Outcome.SIGNAL, Outcome.OOM, Outcome.SPAWN_FAILED)


class Wish(Struct, eq=False):
    """What a client wants; the same through all its attempts to have it."""

    number: int
    kind: str  # submit, cancel, drain
    gives_up_at: float
    tasks: list[ev.NewTask] = []
    ids: list[bytes] = []
    node_id: int = 0
    reason: str | None = None
    tries: int = 0
    is_done: bool = False
    answer: object = None


class Answer(Struct, eq=False):
    """What a leader said."""

    value: object
    durability: str


class Relay:
    """The calls of one running daemon: its own clients' and those that other nodes relay to it."""

    def __init__(self, world: World, host: Host) -> None:
        self.world = world
        self.host = host
        self._last_call = 0
        self._serving: dict[int, tuple[Wish, tuple[int, int] | None]] = {}
        self._asked: dict[int, tuple[int, Wish]] = {}
        self._waiting: dict[Wish, None] = {}

    @property
    def unanswered_count(self) -> int:
        """Calls that the node was asked and has not answered."""
        return len(self._serving)

    # -- For clients of this node ------------------------------------------------------------------------------------

    def take(self, wish: Wish) -> None:
        """A client asks here."""
        leader = self.host.leader
        if leader is None:
            self._wait(wish)
        elif leader == self.host.node_id:
            self._serve(wish, None)
        else:
            self._last_call += 1
            call = self._last_call
            request = msg.Request(call, "user", True, "POST", str(wish.number), b"", True)
            if self.host.send_call(leader, request):
                self._asked[call] = (leader, wish)
            else:
                self._wait(wish)

    def _wait(self, wish: Wish) -> None:
        self._waiting[wish] = None
        self._later(LEADER_WAIT_S, self._refuse, wish)

    def _later(self, delay_s: float, action, wish: Wish) -> None:  # type: ignore[no-untyped-def]
        self.world.engine.after(delay_s, self.host.hear_as, self.host.boot, action, wish)

    def _refuse(self, wish: Wish) -> None:
        if self._waiting.pop(wish, self) is None:
            self.world.clients.on_answer(wish, Answer(NoLeader(), ""))

    def _again(self, wish: Wish) -> None:
        if self._waiting.pop(wish, self) is None:
            self.take(wish)

    def on_follow(self) -> None:
        """There is another leader, or none."""
        if self.host.leader is not None:
            for wish in list(self._waiting):
                self._again(wish)

    def on_peer_lost(self, node_id: int) -> None:
        """Whoever was asked there asks again."""
        for call, (asked, wish) in list(self._asked.items()):
            if asked == node_id:
                del self._asked[call]
                self._wait(wish)
                self._later(AGAIN_S, self._again, wish)
        for call, (_, origin) in list(self._serving.items()):
            if origin is not None and origin[0] == node_id:
                self._serving[call] = (self._serving[call][0], (0, 0))

    def die(self) -> None:
        """The daemon is gone: its clients see their connections break."""
        for wish in [*self._waiting, *(wish for _, wish in self._asked.values())]:
            self.world.clients.on_broken(wish)
        for wish, origin in self._serving.values():
            if origin is None:
                self.world.clients.on_broken(wish)

    def _hear_answer(self, wish: Wish, answer: Answer) -> None:
        if isinstance(answer.value, NoLeader):
            self._wait(wish)
            self._later(AGAIN_S, self._again, wish)
        else:
            self.world.clients.on_answer(wish, answer)

    # -- For everybody, while this node leads --------------------------------------------------------------------------

    def _serve(self, wish: Wish, origin: tuple[int, int] | None) -> None:
        if self.host.leader != self.host.node_id:
            return self._give(wish, origin, Answer(NoLeader(), ""))
        self._last_call += 1
        call = self._last_call
        self._serving[call] = (wish, origin)
        if wish.kind == "cancel":
            return self.host.tell(ev.CancelWanted(call, wish.ids))
        if wish.kind == "drain":
            return self.host.tell(ev.DrainWanted(call, wish.node_id, wish.reason))
        # The store is asked first which of them are there already: sent again, they were accepted before.
        rows = self.host.database.rows
        new = [task for task in wish.tasks if task.id not in rows]
        if new:
            return self.host.tell(ev.Submitted(call, new))
        del self._serving[call]
        return self._give(wish, origin, Answer([task.id for task in wish.tasks], "local"))

    def on_reply(self, effect: fx.Reply) -> None:
        """The node has answered."""
        found = self._serving.pop(effect.call, None)
        if found is None:
            self.world.referee.on_second_reply(self.host, effect)
            return
        wish, origin = found
        self.world.referee.on_reply(self.host, wish, effect)
        self._give(wish, origin, Answer(effect.answer, effect.durability))

    def _give(self, wish: Wish, origin: tuple[int, int] | None, answer: Answer) -> None:
        if origin is None:
            self._hear_answer(wish, answer)
        elif origin[0]:
            number = self.world.clients.put_answer(answer)
            self.host.send_call(origin[0], msg.Response(origin[1], 200, "", str(number).encode(), True))

    def on_message(self, node_id: int, message: msg.Request | msg.Response) -> None:
        """A relayed call, or the answer to one of ours."""
        if isinstance(message, msg.Request):
            self._serve(self.world.clients.wishes[int(message.target)], (node_id, message.call))
            return
        asked = self._asked.pop(message.call, None)
        if asked is not None:
            self._hear_answer(asked[1], self.world.clients.answers[int(message.body)])


class Clients:
    """All clients of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.wishes: list[Wish] = []
        self.answers: list[Answer] = []
        self.ids: list[bytes] = []
        self.drained: dict[int, None] = {}
        self.given_up = 0
        self._open: dict[Wish, None] = {}

    @property
    def open_count(self) -> int:
        """Wishes that are neither granted nor given up."""
        return len(self._open)

    def put_answer(self, answer: Answer) -> int:
        """Where an answer is kept while its number travels."""
        self.answers.append(answer)
        return len(self.answers) - 1

    # -- Wishes ------------------------------------------------------------------------------------------------------

    def submit(self, count: int, patience_s: float, host: Host | None = None) -> Wish:
        """Submit so many tasks of one kind, each with a plan of its own."""
        world = self.world
        spec = self._draw_spec()
        spec_bytes = encode(spec)
        tasks = []
        for _ in range(count):
            task_id = world.new_id()
            self.ids.append(task_id)
            world.plans[task_id] = self._draw_plan(spec)
            tasks.append(ev.NewTask(task_id, spec, spec_bytes))
        return self._want(Wish(len(self.wishes), "submit", world.engine.now + patience_s, tasks=tasks), host)

    def submit_as(self, tasks: list[ev.NewTask], host: Host | None = None) -> Wish:
        """Submit exactly these."""
        self.ids += [task.id for task in tasks]
        return self._want(Wish(len(self.wishes), "submit", self.world.engine.now + 60.0, tasks=tasks), host)

    def cancel(self, ids: list[bytes], patience_s: float = 20.0, host: Host | None = None) -> Wish:
        """Cancel tasks."""
        return self._want(Wish(len(self.wishes), "cancel", self.world.engine.now + patience_s, ids=ids), host)

    def drain(self, node_id: int, reason: str | None, patience_s: float = 20.0, host: Host | None = None) -> Wish:
        """Drain a worker, or use it again."""
        if reason is not None:
            self.drained[node_id] = None
        gives_up_at = self.world.engine.now + patience_s
        return self._want(Wish(len(self.wishes), "drain", gives_up_at, node_id=node_id, reason=reason), host)

    def _want(self, wish: Wish, host: Host | None) -> Wish:
        self.wishes.append(wish)
        self._open[wish] = None
        self._try(wish, 0, host)
        return wish

    def _try(self, wish: Wish, tries: int, host: Host | None = None) -> None:
        if wish.is_done or wish.tries != tries:
            return
        world = self.world
        if world.engine.now > wish.gives_up_at:
            self.given_up += 1
            self._close(wish)
            return
        wish.tries += 1
        if host is None:
            host = world.engine.random.choice(world.hosts)
        if host.is_up:
            host.hear(host.relay.take, wish)
            world.engine.after(PATIENCE_S, self._try, wish, wish.tries)
        else:
            world.engine.after(AGAIN_S, self._try, wish, wish.tries)

    def _close(self, wish: Wish) -> None:
        wish.is_done = True
        self._open.pop(wish, None)

    def on_answer(self, wish: Wish, answer: Answer) -> None:
        """A node has answered."""
        if wish.is_done:
            return
        error = answer.value if isinstance(answer.value, TaskdError) else None
        if error is not None and (isinstance(error, Unavailable | NoLeader) or error.status in (429, 503, 507)):
            self.world.engine.after(AGAIN_S, self._try, wish, wish.tries)
            return
        wish.answer = answer
        self._close(wish)

    def on_broken(self, wish: Wish) -> None:
        """The connection to the node broke: nobody knows whether it was done."""
        self.world.engine.after(AGAIN_S, self._try, wish, wish.tries)

    # -- What is submitted ---------------------------------------------------------------------------------------------

    def _draw_spec(self) -> TaskSpec:
        random = self.world.engine.random
        utc = self.world.utc_s
        kind = random.random()
        return TaskSpec(
            "command",
            priority=random.randint(-1, 1),
            submitted_s=utc,
            argv=("true",),
            not_before_s=utc + random.uniform(0.0, 6.0) if kind < 0.12 else 0.0,
            deadline_s=utc + random.uniform(0.5, 8.0) if 0.12 <= kind < 0.2 else 0.0,
            timeout_s=random.choice((0.3, 1.0)) if 0.2 <= kind < 0.28 else 0.0,
            grace_s=random.choice((0.2, 1.0)),
            retries=random.choice((0, 0, 1, 3)),
            backoff=Backoff(initial_s=0.2, max_s=2.0),
            on_lost="fail" if random.random() < 0.15 else "retry",
        )

    def _draw_plan(self, spec: TaskSpec) -> Plan:
        random = self.world.engine.random
        scale = self.world.work_s
        durations = tuple(min(random.expovariate(1.0), 3.0) * scale for _ in range(3))
        if random.random() < 0.7:
            return Plan(durations)
        outcomes = tuple(random.choice((Outcome.OK, *OUTCOMES)) for _ in range(3))
        # A poisonous task kills fewer times than the crash limit, or for ever.
        kills = random.choice((1, 2, 9)) if random.random() < self.world.poison else 0
        return Plan(durations, outcomes, random.random() < 0.8, kills)
