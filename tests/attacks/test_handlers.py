"""What a Python handler may do to the pool that runs it: each row is a handler of hostile_handlers.py, and the states
that its task may end in. Whatever it does, calls are answered well soon after, and the daemon is the same process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cluster import Cluster, Daemon, eventually

ROOT = Path(__file__).parent.parent.parent
RSS_KIB_MAX = 512 << 10
GOOD, BAD, EITHER = {"succeeded"}, {"failed"}, {"succeeded", "failed"}
ATTACKS: dict[str, set[str]] = {
    "nothing": GOOD,
    "raises_words_it_has_not": BAD,
    "raises_words_without_end": BAD,
    "raises_control_characters": BAD,
    "raises_surrogates": BAD,
    "raises_system_exit": BAD,
    "raises_keyboard_interrupt": BAD,
    "raises_generator_exit": BAD,
    "raises_memory_error": BAD,
    "raises_a_group": BAD,
    "raises_in_a_circle": BAD,
    "recurses": BAD,
    "returns_itself": BAD,
    "returns_deep": BAD,
    "returns_no_json": BAD,
    "returns_a_set": EITHER,
    "returns_bytes": EITHER,
    "returns_not_a_number": EITHER,
    "returns_a_huge_number": EITHER,
    "returns_surrogates": BAD,
    "returns_keys_of_numbers": EITHER,
    "returns_8_mib": BAD,
    "exits": BAD,
    "kills_itself": BAD,
    "breaks_its_memory": BAD,
    "aborts": BAD,
    "closes_everything": EITHER,
    "writes_into_every_descriptor": EITHER,
    "prints_16_mib": GOOD,
    "prints_control_characters": GOOD,
    "leaves_a_thread": GOOD,
    "forks_and_both_return": EITHER,
    "ignores_signals": GOOD,
    "stops_the_collector": EITHER,
    "takes_imports_away": EITHER,
    "has_no_descriptors": EITHER,
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    cluster = Cluster(tmp_path_factory.mktemp("handlers"))
    env = {
        "TASKD_NETWORK_MDNS": "false", "TASKD_WORKER_HANDLERS": "tests.attacks.hostile_handlers",
        "TASKD_WORKER_HANDLER_PATH": str(ROOT), "TASKD_WORKER_SLOTS": "2", "TASKD_WORKER_HANDLER_PROCESSES": "2",
    }  # fmt: skip
    made = cluster.add("both", "scheduler,worker", env=env).start()
    try:
        yield made
    finally:
        cluster.close()


def run(daemon: Daemon, name: str, on_lost: str = "fail") -> dict[str, object]:
    task = {"type": "attack", "params": {"name": name}, "timeout": 20, "on_lost": on_lost}
    (task_id,) = daemon.submit(task)
    found: dict[str, object] = daemon.wait([task_id])[task_id]
    return found


@pytest.mark.parametrize(("name", "states"), ATTACKS.items(), ids=ATTACKS)
def test_a_handler_that_does_its_worst_costs_its_own_call(daemon: Daemon, name: str, states: set[str]) -> None:
    eventually(lambda: run(daemon, "nothing", "retry")["state"] == "succeeded")
    end = run(daemon, name)
    assert end["state"] in states, end
    status, answer = daemon.ask("GET", f"/v1/tasks/{end['id']}")
    assert status == 200, answer
    # One that wrote into all its descriptors may take the next process with it, and calls that were given to that.
    for _ in range(2):  # For each process.
        eventually(lambda: run(daemon, "nothing", "retry")["state"] == "succeeded")


def test_the_handlers_have_done_no_harm(daemon: Daemon) -> None:
    assert daemon.process is not None
    assert daemon.process.poll() is None
    log = daemon.log.read_text()
    assert "a bug" not in log
    assert "\x1b" not in log
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    peak = next(line for line in status.splitlines() if "VmHWM" in line)
    assert int(peak.split()[1]) < RSS_KIB_MAX
    assert len(ATTACKS) >= 25
