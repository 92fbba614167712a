"""Many workers in one process, for benchmarks: real connections, real protocol, real core; the tasks only take time.

    python -m bench.workers --key FILE --join HOST:PORT --count 1000 --slots 1 --task-s 0.01

They keep no journal, so that what is measured is the scheduler and not a thousand files.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path
from random import Random

import uvloop

from taskd.config import Config
from taskd.core import effects as fx
from taskd.core import events as ev
from taskd.core.node import Node
from taskd.core.task import Outcome, units
from taskd.daemon.hub import Hub
from taskd.daemon.shell import Shell
from taskd.net.mesh import Mesh
from taskd.net.security import Key, load_key
from taskd.protocol.messages import AttemptEnded, AttemptKey, NodeInfo, Offer
from taskd.runner.base import Progress

FIRST_ID = 1 << 40
DIALS_AT_ONCE = 16  # A TLS handshake costs both ends a millisecond or two.


class Forgetful:
    """A journal that keeps nothing."""

    def append(self, records: fx.Journal) -> None:
        """Forget it."""

    async def sync(self) -> None:
        """Nothing is there to be synced."""


class Sleeper:
    """A runner whose tasks end well after `task_s` seconds; with 0, all that came together end together at once."""

    def __init__(self, shell: Shell, task_s: float) -> None:
        self._shell = shell
        self._task_s = task_s
        self._loop = asyncio.get_running_loop()
        self._progress = Progress(shell.progressed)

    def start(self, begins: list[fx.Begin]) -> None:
        """Begin attempts."""
        now_s = self._shell.utc()
        if self._task_s:
            for begin in begins:
                self._progress.began(begin.key, now_s)
            self._loop.call_later(self._task_s, self._end, begins, now_s)
        else:
            self._loop.call_soon(self._end, begins, now_s)

    def _end(self, begins: list[fx.Begin], started_s: float) -> None:
        now_s = self._shell.utc()
        for begin in begins:
            self._progress.ended(AttemptEnded(begin.key, Outcome.OK, started_s, now_s, b""))
        self._progress.flush()

    def terminate(self, key: AttemptKey) -> None:
        """It ends soon anyway."""

    def kill(self, key: AttemptKey) -> None:
        """It ends soon anyway."""


async def work(key: Key, number: int, join: str, slots: int, task_s: float, running: list[asyncio.Task[None]]) -> None:
    """One worker, until the process ends."""
    node_id = FIRST_ID + number
    info = NodeInfo(node_id, f"worker{number}", ("worker",), node_id.to_bytes(16, "big"), os.getpid(), "bench")
    offer = Offer(slots, {"cpus": units(slots)}, {}, ("command", "http"))
    random = Random(number)  # jitter, no secret
    shell = Shell(Node(info, random, None, offer), Hub(), None, Forgetful())
    shell.runner = Sleeper(shell, task_s)
    connected = asyncio.get_running_loop().create_future()

    def on_event(event: ev.PeerUp | ev.PeerDown | ev.Received | ev.Collided) -> None:
        if isinstance(event, ev.PeerUp) and not connected.done():
            connected.set_result(None)
        shell.tell(event)

    defaults = Config()
    network = defaults.network
    mesh = Mesh(
        node=info, cluster=defaults.node.cluster, key=key, listen=(), join=(join,), heartbeat_s=network.heartbeat_s,
        peer_timeout_s=network.peer_timeout_s, redial_max_s=network.redial_max_s, random=random, on_event=on_event,
        on_call=lambda node_id, message: None, log=lambda level, event, **fields: None,
    )  # fmt: skip
    shell.mesh = mesh
    shell.tell(ev.JournalLoaded(None, [], []))
    running.append(asyncio.create_task(shell.run()))
    await mesh.start()
    await connected


async def run(arguments: argparse.Namespace) -> None:
    key = load_key(arguments.key)
    assert key is not None
    running: list[asyncio.Task[None]] = []
    gate = asyncio.Semaphore(DIALS_AT_ONCE)

    async def enter(number: int) -> None:
        async with gate:
            await work(key, number, arguments.join, arguments.slots, arguments.task_s, running)

    async with asyncio.TaskGroup() as group:
        for number in range(arguments.first, arguments.first + arguments.count):
            group.create_task(enter(number))
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
