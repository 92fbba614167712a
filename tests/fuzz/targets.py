"""What hostile frames are fed to: a session of the protocol, and a whole cluster of real cores."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import msgspec

from taskd.core import effects as fx
from taskd.core import events as ev
from taskd.errors import ProtocolError, Refused
from taskd.protocol import messages as msg
from taskd.protocol.frames import FrameReader, encode
from taskd.protocol.session import Session
from tests.core.world import Host, World, info
from tests.fuzz.mutate import Mutator
from tests.protocol.samples import ONE_OF_EACH

ROLES: tuple[tuple[msg.Role, ...], ...] = (("scheduler",), ("worker",), ("scheduler", "worker"))
WE = msg.NodeInfo(1, "we", ("scheduler",), b"w" * 16, 11, "1.0")
# Of sessions and calls.
NOT_FOR_CORES = (
    msg.Hello, msg.Ping, msg.Pong, msg.Goodbye, msg.Request, msg.RequestPart, msg.Response, msg.ResponsePart, msg.Taken,
    msg.Abandon,
)  # fmt: skip
INTEGER_MAX = (1 << 63) - 1  # Of SQLite.


@dataclass
class Tally:
    """What became of frames."""

    frames: int = 0
    refused: int = 0
    taken: dict[str, int] = field(default_factory=dict)

    def took(self, message: msg.Message) -> None:
        name = type(message).__name__
        self.taken[name] = self.taken.get(name, 0) + 1


def play_session(mutator: Mutator, tally: Tally, frames: int) -> None:
    """One connection: whatever comes, it is taken, or ends the connection in words."""
    random = mutator.random
    roles = random.choice(ROLES)
    now = 0.0
    session = Session(WE, "home", 2, roles, now=now, utc=lambda: 1.7e9)
    if random.random() < 0.9:
        session.receive(
            encode(msg.Hello(msg.PROTOCOL_VERSION, "home", msg.NodeInfo(2, "", roles, bytes(16), 1, ""))), now
        )
    for _ in range(frames):
        tally.frames += 1
        data = mutator.frame()
        cut = random.randrange(len(data) + 1) if random.random() < 0.2 else len(data)
        now += random.choice((0.0, 0.001, 0.3))
        try:
            for part in (data[:cut], data[cut:]):
                for message in session.receive(part, now):
                    assert isinstance(message, msg.Message)
                    tally.took(message)
            session.on_deadline(now)
        except (ProtocolError, Refused):
            tally.refused += 1
            return
        for frame in session.to_send():
            assert FrameReader().feed(frame)


class HostileWorld(World):
    """A cluster of honest nodes: two schedulers, two workers; and peers that are not."""

    WORKER, SCHEDULER = 66, 77

    def __init__(self, random: Random, *, with_scheduler: bool) -> None:
        super().__init__()
        self.mutators = {role: Mutator(random, _samples(role), is_gentle=True) for role in ("scheduler", "worker")}
        self.hostile: dict[int, tuple[msg.Role, ...]] = {}
        self.add(1, "scheduler")
        self.add(2, "scheduler")
        self.add(11, "worker")
        self.add(12, "worker")
        self.run(12.0)
        assert self.scheduler.leads
        self.submit(3)
        for row in self.hosts[1].rows.values():
            # Rows as a scheduler writes them: others are refused at the door.
            self.mutators["scheduler"].words += [msgspec.msgpack.decode(msgspec.msgpack.encode(row))] * 20
        self.hostile[self.WORKER] = ("worker",)
        if with_scheduler:
            self.hostile[self.SCHEDULER] = ("scheduler",)
        for node_id in self.hostile:
            self._come(node_id)
        self.settle()

    def _come(self, node_id: int) -> None:
        for host in (1, 2):
            self.post(host, ev.PeerUp(info(node_id, *self.hostile[node_id])))

    def leave(self) -> None:
        """The hostile ones are gone, for good."""
        for node_id in self.hostile:
            for host in (1, 2):
                self.post(host, ev.PeerDown(node_id, "gone"))
        self.settle()

    def does(self, node_id: int, host: Host, effect: fx.Effect) -> None:
        """As in any world; and what is sent and written must be such as can be."""
        match effect:
            case fx.Send(to, message):
                sent = encode(message)
                assert FrameReader().feed(sent) == [message] or b"\x7f\xf8" in sent, "what we say must be readable"
                if to in self.hostile:
                    self._listen(message)
            case fx.Disconnect(peer, reason):
                assert peer in self.hostile, f"an honest node is sent away: {reason}"
                self.post(node_id, ev.PeerDown(peer, reason))
                self.post(node_id, ev.PeerUp(info(peer, *self.hostile[peer])))
            case fx.Commit():
                for row in (*effect.inserted, *effect.updated, *effect.taken):
                    assert max(row.epoch, row.node_id, row.boot, row.lsn) <= INTEGER_MAX
                for dot in effect.seen:
                    assert dot.lsn <= INTEGER_MAX
        super().does(node_id, host, effect)

    def _listen(self, message: msg.Message) -> None:
        """Hostile peers hear what they are told, and use it."""
        tree = msgspec.msgpack.decode(encode(message)[4:])
        for mutator in self.mutators.values():
            _collect(tree[1:], mutator.words)
            del mutator.words[:-300]


def _samples(role: msg.Role) -> tuple[msg.Message, ...]:
    return tuple(it for it in ONE_OF_EACH if role in msg.MAY_SEND[type(it)] and not isinstance(it, NOT_FOR_CORES))


def _collect(tree: Any, words: list[Any]) -> None:
    for item in tree:
        if isinstance(item, list):
            words.append(item)
            _collect(item, words)
        elif isinstance(item, bytes | int | float):
            words.append(item)


def play_world(random: Random, tally: Tally, messages: int, *, with_scheduler: bool) -> None:
    """A cluster that hostile peers talk to. It survives, and goes on without them; what only workers say changes no
    leader."""
    world = HostileWorld(random, with_scheduler=with_scheduler)
    term = world.hosts[1].term
    for _ in range(messages):
        sender = random.choice(list(world.hostile))
        tally.frames += 1
        for message in _understood(world.mutators[world.hostile[sender][0]], world.hostile[sender], tally):
            world.post(random.choice((1, 1, 2)), ev.Received(sender, [message]))
            world.settle()
        if random.random() < 0.05:
            world.run(random.choice((0.05, 0.5, 3.0)))
        if random.random() < 0.01:
            world.submit(2)
    for node_id in (1, 2, 11, 12):
        assert world.hosts[node_id].exited is None, world.hosts[node_id].exited
    if not with_scheduler:
        assert world.hosts[1].term == term, "a worker has forced a change of leaders"
        assert world.scheduler.leads
    world.leave()
    world.run(120.0)
    assert any(world.hosts[node_id].node.scheduler.leads for node_id in (1, 2)), "nobody leads afterwards"  # type: ignore[union-attr]


def _understood(mutator: Mutator, roles: tuple[msg.Role, ...], tally: Tally) -> list[msg.Message]:
    """What the codec and the table of roles let through of a hostile frame."""
    try:
        found: list[Any] = FrameReader().feed(mutator.frame())
    except ProtocolError:
        tally.refused += 1
        return []
    allowed = [it for it in found if msg.MAY_SEND[type(it)] & set(roles) and not isinstance(it, NOT_FOR_CORES)]
    for message in allowed:
        tally.took(message)
    return allowed
