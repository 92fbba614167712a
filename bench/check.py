"""`make bench-check`: whether the hot path costs what it did when the figures in bench/recorded.json were taken.

Each part is a fixed piece of work in this process, without disk or network. Its cost is counted in units of a loop that
is run beside it, in turns, and is the same for every version of taskd: so a slow or busy machine does not matter much.
The median of many turns counts. `--record` writes the figures anew.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import median
from typing import cast

import msgspec

from taskd.api.service import Service
from taskd.api.submission import new_tasks, read_submissions
from taskd.core import effects as fx
from taskd.core import events as ev
from taskd.core.backlog import sort_out
from taskd.core.node import Node
from taskd.core.settings import SchedulerSettings
from taskd.core.task import TaskSpec, encode, units
from taskd.daemon.ids import IdSource
from taskd.protocol import messages as msg
from taskd.protocol.frames import FrameReader
from taskd.protocol.frames import encode as encode_frame

RECORDED = Path(__file__).parent / "recorded.json"
TURNS = 25
TASKS = 4000
BATCH = 500
WORSE_MAX = 1.10
UTC_OFFSET_S = 1.7e9


def unit() -> int:
    """What costs are counted in: things that any such program does, some 10,000 of them. Returns how many."""
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder()
    heap: list[tuple[int, bytes]] = []
    known: dict[bytes, int] = {}
    for number in range(10_000):
        key = number.to_bytes(16, "big")
        known[key] = number
        heapq.heappush(heap, (number * 7919 % 10_007, key))
        decoder.decode(encoder.encode((number, key, "default", 1.5)))
    while heap:
        known.pop(heapq.heappop(heap)[1])
    return 10_000


def info(node_id: int, role: msg.Role) -> msg.NodeInfo:
    return msg.NodeInfo(node_id, f"node{node_id}", (role,), node_id.to_bytes(16, "big"), 1, "bench")


def deciding() -> int:
    """A leader that accepts tasks, hands them to two workers and records their ends; the disk is there at once."""
    leader = Leader()
    begun = ended = 0
    while ended < TASKS:
        if begun < TASKS:
            leader.submit(BATCH)
            begun += BATCH
        ended += leader.end_all()
    return TASKS


class Leader:
    """A scheduler's node, and everything around it answering at once."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.node = Node(info(1, "scheduler"), Random(1), SchedulerSettings())
        self.ids = IdSource()
        self.runs: list[fx.Send] = []
        self.commits: list[fx.Commit] = []
        self.calls = 0
        self.spec = TaskSpec("command", argv=("true",), submitted_s=self.now + UTC_OFFSET_S)
        self.spec_bytes = encode(self.spec)
        self.node.handle(ev.ClockRead(UTC_OFFSET_S), self.now)
        self.node.handle(ev.Loaded(None, [], []), self.now)
        self.turn()
        self.now += 1.0
        self.node.handle(ev.Ticked(), self.now)
        self.turn()
        for worker in (11, 12):
            offer = msg.Offer(4, {"cpus": units(4)}, {}, ("command",))
            self.node.handle(ev.PeerUp(info(worker, "worker")), self.now)
            self.node.handle(ev.Received(worker, [msg.Register(offer, (), (), None)]), self.now)
        self.turn()

    def turn(self) -> None:
        while effects := self.node.take_effects(self.now):
            for effect in effects:
                match effect:
                    case fx.Commit():
                        self.commits.append(effect)
                        self.node.handle(ev.Committed(effect.seq), self.now)
                    case fx.ReadBacklog(call):
                        self.node.handle(ev.BacklogRead(call, sort_out([])), self.now)
                    case fx.Send(_, msg.Run()):
                        self.runs.append(effect)

    def submit(self, count: int) -> None:
        self.calls += 1
        tasks = [ev.NewTask(self.ids.next(self.now), self.spec, self.spec_bytes) for _ in range(count)]
        self.node.handle(ev.Submitted(self.calls, tasks), self.now)
        self.turn()

    def end_all(self) -> int:
        """Have everything end that was handed out; returns how many."""
        runs, self.runs = self.runs, []
        count = 0
        for run in runs:
            assert isinstance(run.message, msg.Run)
            keys = [assignment.key for assignment in run.message.assignments]
            count += len(keys)
            ended = tuple(msg.AttemptEnded(key, 0, self.now, self.now, b"\x80") for key in keys)
            self.node.handle(ev.Received(run.node_id, [msg.Finished(ended)]), self.now)
        self.turn()
        return count


def framing() -> int:
    """Outcomes as frames, and back."""
    term = msg.Term(1, 2, 3)
    ended = [msg.AttemptEnded(msg.AttemptKey(bytes(16), 1, term, lsn), 0, 1.0, 2.0, b"\x80") for lsn in range(BATCH)]
    reader = FrameReader()
    for start in range(0, TASKS, 50):
        message = msg.Finished(tuple(ended[start % BATCH : start % BATCH + 50]))
        for decoded in reader.feed(encode_frame(message)):
            assert decoded == message
    return TASKS


class Clock:
    """All that commands need of a daemon before they are tasks."""

    def now_s(self) -> float:
        return 1000.0 + UTC_OFFSET_S


def reading() -> int:
    """A client's submission as JSON, until it is tasks."""
    body = json.dumps([{"argv": ["true"]}] * BATCH).encode()
    ids, now_s = IdSource(), 1000.0 + UTC_OFFSET_S
    for _ in range(TASKS // BATCH):
        submissions, is_list = read_submissions(body)
        new_tasks(submissions, is_list, "somebody", cast(Service, Clock()), lambda place: ids.next(now_s))
    return TASKS


PARTS: dict[str, Callable[[], int]] = {"deciding": deciding, "framing": framing, "reading": reading}


def cost_s(work: Callable[[], int]) -> float:
    """CPU seconds of one piece of this work."""
    begun = time.process_time()
    count = work()
    return (time.process_time() - begun) / count


def measure() -> dict[str, float]:
    """Of each part the cost of one task, in units: the median of what it was beside the unit of the same turn."""
    costs: dict[str, list[float]] = {name: [] for name in PARTS}
    for _ in range(TURNS):
        for name, work in PARTS.items():
            before = cost_s(unit)
            cost = cost_s(work)
            costs[name].append(2 * cost / (before + cost_s(unit)))
    return {name: round(median(ratios), 2) for name, ratios in costs.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.check", description=__doc__)
    parser.add_argument("--record", action="store_true", help="write the figures down as what is expected")
    arguments = parser.parse_args()
    figures = measure()
    if arguments.record:
        RECORDED.write_text(json.dumps(figures, indent=2) + "\n")
    recorded = json.loads(RECORDED.read_text())
    is_worse = False
    for name, figure in figures.items():
        ratio = figure / recorded[name]
        is_worse |= ratio > WORSE_MAX
        print(f"{name:10} {figure:7.2f} units a task, recorded {recorded[name]:7.2f}: {100 * (ratio - 1):+.1f} %")
    if is_worse:
        print(f"more than {100 * (WORSE_MAX - 1):.0f} % above what is recorded")
    return 1 if is_worse else 0


if __name__ == "__main__":
    sys.exit(main())
