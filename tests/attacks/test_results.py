"""What somebody with a worker key can answer for a task that it was really given. Each row: the outcome and the report
that it sends, and the state that the task is to have afterwards. Whoever asks for the task is always answered."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from taskd.core.task import ErrorInfo, Outcome, Report
from taskd.protocol import messages as msg
from tests.attacks.intruder import Intruder
from tests.attacks.test_peer_port import Target, somebody

_node_ids = itertools.count(7000)  # Another worker for each row: the last one may not be known to be gone yet.
NAN, INF = float("nan"), float("inf")
OFFER = msg.Offer(8, {"cpus": 8000}, {"kind": "hostile"}, ("command",))
OK, EXIT, SIGNAL, OOM, LOST = Outcome.OK, Outcome.EXIT_NONZERO, Outcome.SIGNAL, Outcome.OOM, Outcome.LOST
ENDED, OPEN = {"succeeded", "failed", "cancelled", "timed_out"}, {"queued", "assigned", "running", "retrying"}


def report(**fields: Any) -> bytes:
    return msgspec.msgpack.encode(msgspec.structs.replace(Report(), **fields))


def error(*words: str) -> bytes:
    return report(error=ErrorInfo(*words))


# How it ends, when it began, when it ended (None: now), what it says, and the states that are right for the task.
ATTACKS: dict[str, tuple[int, float | None, float | None, bytes, set[str]]] = {
    "well, to compare": (OK, None, None, report(), {"succeeded"}),
    "badly, to compare": (EXIT, None, None, report(), {"failed"}),
    "no report": (OK, None, None, b"", {"succeeded"}),
    "no msgpack": (OK, None, None, b"\xc1", ENDED),
    "half a report": (OK, None, None, report()[:-1], ENDED),
    "two reports": (OK, None, None, report() * 2, ENDED),
    "a report of another kind": (OK, None, None, msgspec.msgpack.encode({"a": 1}), ENDED),
    "a report with a field too many": (OK, None, None, msgspec.msgpack.encode([None] * 50), ENDED),
    "nested a hundred thousand deep": (OK, None, None, b"\x91" * 100_000, ENDED),
    "an array of 4 G": (OK, None, None, b"\xdd\xff\xff\xff\xff", ENDED),
    "a report of 8 MiB": (OK, None, None, b"\xc6\x00\x80\x00\x00" + bytes(8 << 20), ENDED),
    "an error of a megabyte": (EXIT, None, None, error("E", "x" * (1 << 20), ""), ENDED),
    "an error that repaints the screen": (EXIT, None, None, error("\x1b[2J", "\x1b]0;x\x07\r\n\x00", ""), ENDED),
    "an error that forges a line of the log": (EXIT, None, None, error("E", "x\n2026-01-01 info leading", ""), ENDED),
    "an error of markup": (EXIT, None, None, error("<script>alert(1)</script>", "[red]x[/red]", ""), ENDED),
    "an error in no direction": (EXIT, None, None, error("\u202e", "\ufeff\u2028\U0010ffff", ""), ENDED),
    "no UTF-8": (EXIT, None, None, error("E", "AAAA", "").replace(b"AAAA", b"\xff\xfe\xfd\xfc"), ENDED),
    "an outcome that does not exist": (255, None, None, report(), ENDED | OPEN),
    "ended before it began": (OK, 2e9, 1e9, report(), {"succeeded"}),
    "began at no time": (OK, NAN, None, report(), OPEN),
    "ended at no time": (OK, None, NAN, report(), ENDED | OPEN),
    "ended at the end of time": (OK, None, INF, report(), ENDED | OPEN),
    "ended in the year 10^300": (OK, None, 1e300, report(), ENDED | OPEN),
    "ended before there was time": (OK, -1e300, -1e300, report(), ENDED | OPEN),
    "by a signal that does not exist": (SIGNAL, None, None, report(), {"failed"}),
    "by a lack of memory": (OOM, None, None, b"", {"failed"}),
    "lost": (LOST, None, None, b"", ENDED | OPEN),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    made = Target(Path(tmp_path_factory.mktemp("attacked")))
    try:
        yield made
    finally:
        made.cluster.close()


@pytest.fixture
def hostile(target: Target) -> Iterator[Intruder]:
    """A worker that is taken in."""
    made = Intruder.greeted(target.port, target.key.worker_key, somebody(node_id=next(_node_ids)))
    made.say(msg.Leading(None), msg.Register(OFFER, (), (), None))
    made.hear(msg.Registered)
    yield made
    made.close()


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_whatever_a_worker_answers_the_task_can_be_asked_for(target: Target, hostile: Intruder, attack: Any) -> None:
    outcome, began_s, ended_s, said, states = attack
    (task_id,) = target.head.submit({"argv": ["true"], "constraints": ["kind=hostile"], "on_lost": "fail"})
    (assignment,) = hostile.hear(msg.Run).assignments
    now_s = time.time()
    times = (now_s if began_s is None else began_s, now_s if ended_s is None else ended_s)
    hostile.say(msg.Finished((msg.AttemptEnded(assignment.key, int(outcome), *times, said),)))
    hostile.say(msg.Ping(1, 0.0))
    hostile.until_pong(1)
    for path in (f"/v1/tasks/{task_id}", f"/v1/tasks/{task_id}/attempts", "/v1/tasks", f"/v1/tasks/{task_id}/explain"):
        status, answer = target.head.ask("GET", path)
        assert status < 500, (path, answer)
    target.head.ask("POST", f"/v1/tasks/{task_id}/cancel")
    view = target.head.ok("GET", f"/v1/tasks/{task_id}")
    assert view["state"] in states | ({"cancelled", "cancelling"} if states & OPEN else set()), view["state"]


def test_the_answers_have_done_no_harm(target: Target) -> None:
    target.check()
    assert "\x1b" not in target.head.log.read_text()


def test_the_table_is_long_enough() -> None:
    assert len(ATTACKS) >= 25
