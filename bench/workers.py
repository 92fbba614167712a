"""Many workers in one process, for benchmarks of the scheduler: real connections, the real protocol, as a worker
speaks it when nothing goes wrong; the tasks only take time.

    python -m bench.workers --key FILE --join HOST:PORT --count 1000 --slots 1 --task-s 0.01

They do no more than what the scheduler sees of a worker: they keep no journal, and look into no task. So they leave the
processors to what is measured, as workers on machines of their own would.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections import deque
from pathlib import Path
from random import Random

import uvloop

from taskd.config import Config
from taskd.core import events as ev
from taskd.core.outcomes import OutcomeBatch
from taskd.core.task import Outcome, units
from taskd.net.mesh import Mesh
from taskd.net.security import Key, load_key
from taskd.protocol import messages as msg

FIRST_ID = 1 << 40
DIALS_AT_ONCE = 16  # A TLS handshake costs both ends a millisecond or two.


class Worker:
    """One worker. With `task_s` 0 all that fits begins and ends together, at once."""

    def __init__(self, number: int, slots: int, task_s: float) -> None:
        node_id = FIRST_ID + number
        store_id = node_id.to_bytes(16, "big")
        self.node = msg.NodeInfo(node_id, f"worker{number}", ("worker",), store_id, os.getpid(), "bench")
        self.mesh: Mesh | None = None
        self.registered = asyncio.get_running_loop().create_future()
        self._offer = msg.Offer(slots, {"cpus": units(slots)}, {}, ("command", "http"))
        self._slots = slots
        self._task_s = task_s
        self._loop = asyncio.get_running_loop()
        self._leader = 0
        self._waiting: deque[msg.AttemptKey] = deque()
        self._running = 0
        self._outcomes = OutcomeBatch()
        self._timer: asyncio.Handle | None = None  # to tell outcomes

    def on_event(self, event: ev.PeerUp | ev.PeerDown | ev.Received | ev.Collided) -> None:
        """What the mesh tells."""
        if isinstance(event, ev.Received):
            for message in event.messages:
                self._on_message(event.node_id, message)

    def _on_message(self, sender: int, message: msg.Message) -> None:
        if isinstance(message, msg.Run):
            self._waiting.extend(assignment.key for assignment in message.assignments)
            self._begin()
        elif isinstance(message, msg.Leading) and message.term is not None and message.term.node_id == sender:
            self._leader = sender
            self._send(msg.Register(self._offer, (), (), message.term, message.proof))
        elif isinstance(message, msg.Registered) and not self.registered.done():
            self.registered.set_result(None)
        elif isinstance(message, msg.Recall):
            self._give_back(message.keys)

    def _begin(self) -> None:
        now_s = time.time()
        while self._waiting and self._running < self._slots:
            key = self._waiting.popleft()
            self._running += 1
            if self._task_s:
                self._loop.call_later(self._task_s, self._end, [key], now_s)
            else:
                keys = [key, *(self._waiting.popleft() for _ in range(min(len(self._waiting), self._slots - 1)))]
                self._loop.call_soon(self._end, keys, now_s)

    def _end(self, keys: list[msg.AttemptKey], started_s: float) -> None:
        self._running -= 1
        now_s = time.time()
        self._outcomes.add([msg.AttemptEnded(key, int(Outcome.OK), started_s, now_s) for key in keys])
        self._begin()
        self._tell()

    def _give_back(self, keys: tuple[msg.AttemptKey, ...]) -> None:
        waiting = set(self._waiting)
        given = [key for key in keys if key in waiting]
        for key in given:
            self._waiting.remove(key)
        self._outcomes.add([msg.AttemptEnded(key, int(Outcome.PREEMPTED), 0.0, time.time()) for key in given])
        self._outcomes.hurry(self._loop.time())
        self._tell()

    def _tell(self) -> None:
        """When a worker would: what has ended, or later, with more of it."""
        now = self._loop.time()
        due = self._outcomes.due(len(self._waiting), self._slots)
        if due is not None and due > now:
            if self._timer is None:
                self._timer = self._loop.call_at(due, self._tell_late)
        elif due is not None:
            self._send(msg.Finished(tuple(self._outcomes.take(now))))

    def _tell_late(self) -> None:
        self._timer = None
        self._tell()

    def _send(self, message: msg.Message) -> None:
        assert self.mesh is not None
        self.mesh.send(self._leader, message)


async def enter(worker: Worker, key: Key, join: str) -> None:
    """Connect a worker; returns when the leader has taken it in."""
    defaults = Config()
    network = defaults.network
    worker.mesh = Mesh(
        node=worker.node, cluster=defaults.node.cluster, key=key, listen=(), join=(join,),
        heartbeat_s=network.heartbeat_s, peer_timeout_s=network.peer_timeout_s, redial_max_s=network.redial_max_s,
        random=Random(worker.node.node_id), on_event=worker.on_event, on_call=lambda node_id, message: None,
        log=lambda level, event, **fields: None,
    )  # fmt: skip
    await worker.mesh.start()
    await worker.registered


async def run(arguments: argparse.Namespace) -> None:
    key = load_key(arguments.key)
    assert key is not None
    gate = asyncio.Semaphore(DIALS_AT_ONCE)
    workers = [
        Worker(number, arguments.slots, arguments.task_s)
        for number in range(arguments.first, arguments.first + arguments.count)
    ]

    async def enter_in_turn(worker: Worker) -> None:
        async with gate:
            await enter(worker, key, arguments.join)

    async with asyncio.TaskGroup() as group:
        for worker in workers:
            group.create_task(enter_in_turn(worker))
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.workers", description=__doc__)
    parser.add_argument("--key", type=Path, required=True, help="the cluster's key file")
    parser.add_argument("--join", required=True, help="HOST:PORT of the scheduler")
    parser.add_argument("--count", type=int, default=10, help="how many workers")
    parser.add_argument("--first", type=int, default=0, help="the number of the first one")
    parser.add_argument("--slots", type=int, default=1, help="of each")
    parser.add_argument("--task-s", type=float, default=0.0, help="how long each task takes")
    uvloop.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
