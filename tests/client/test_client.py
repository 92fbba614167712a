"""The blocking client, against a daemon that is small but real: sockets, HTTP, restarts."""

from __future__ import annotations

import math
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from taskd.client import (
    ApiError,
    Client,
    ConnectionLost,
    Handle,
    NoDaemon,
    TaskCancelled,
    TaskExpired,
    TaskFailed,
    TaskTimedOut,
)
from tests.client.fake_daemon import FakeDaemon, no_descriptors, silent_daemon


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[Client]:
    with Client(daemon.path) as client:
        yield client


def submitted(daemon: FakeDaemon) -> list[dict[str, object]]:
    return [task["asked"] for task in daemon.tasks.values()]


# -- One task ----------------------------------------------------------------------------------------------------------


def test_a_handler_gets_its_parameters_and_returns(client: Client, daemon: FakeDaemon) -> None:
    handle = client.submit("echo", value={"a": [1, None, "ü"]}, self=1, task=2)
    assert handle.result(timeout=10) == {"a": [1, None, "ü"]}
    assert handle.state == "succeeded"
    assert submitted(daemon)[0]["params"] == {"value": {"a": [1, None, "ü"]}, "self": 1, "task": 2}
    assert submitted(daemon)[0]["id"] == handle.id


def test_a_declared_function_stands_for_its_type(client: Client, daemon: FakeDaemon) -> None:
    def resize() -> None: ...

    resize.task_type = "echo"  # type: ignore[attr-defined]

    class Shout:
        type = "echo"

    assert client.submit(resize, value=1).result() == 1
    assert client.submit(Shout, value=2).result() == 2
    with pytest.raises(TypeError, match="is no task"):
        client.submit(test_a_declared_function_stands_for_its_type)


def test_what_json_knows_in_another_form_may_be_a_parameter(client: Client) -> None:
    @dataclass
    class Size:
        width: int

    moment = datetime(2026, 1, 1, tzinfo=UTC)
    assert client.submit("echo", value=[Size(3), moment]).result() == [{"width": 3}, "2026-01-01T00:00:00Z"]
    with pytest.raises(TypeError):
        client.submit("echo", value=object())


def test_a_failure_says_what_was_raised_and_where(client: Client) -> None:
    handle = client.submit("fail")
    with pytest.raises(TaskFailed, match="ValueError: no luck") as caught:
        handle.result()
    error = caught.value
    assert (error.task_id, error.error_type, error.error_message) == (handle.id, "ValueError", "no luck")
    assert "Traceback" in error.__notes__[0]
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.args, copy.__dict__) == (error.args, error.__dict__)
    assert isinstance(handle.exception(), TaskFailed)
    assert handle.outcome().error is not None


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (["exit", "7"], TaskFailed),
        (["signal", "9"], TaskFailed),
        (["timeout"], TaskTimedOut),
        (["expire"], TaskExpired),
    ],
)
def test_every_end_has_its_error(client: Client, command: list[str], kind: type[Exception]) -> None:
    error = client.submit_command(command).exception()
    assert type(error) is kind
    if isinstance(error, TaskFailed):
        assert (error.exit_code, error.signal) == ((7, None) if command[0] == "exit" else (None, 9))


def test_cancel_wins_over_a_task_that_runs(client: Client, daemon: FakeDaemon) -> None:
    handle = client.submit("hold")
    assert not handle.done()
    assert handle.cancel()
    with pytest.raises(TaskCancelled):
        handle.result()
    assert not handle.cancel()
    assert client.cancel([handle, client.submit("hold"), client.submit("hold").id]) == 2


def test_a_wait_has_an_end(client: Client, daemon: FakeDaemon) -> None:
    handle = client.submit("hold")
    with pytest.raises(TimeoutError):
        handle.result(timeout=0.01)
    assert not handle.wait(timeout=0)
    daemon.release("late")
    assert handle.wait()
    assert handle.result() == "late"


@pytest.mark.parametrize("timeout", [0, 1e-6, -1])
def test_a_poll_finds_what_has_ended(client: Client, daemon: FakeDaemon, timeout: float) -> None:
    assert client.submit("echo", value=1).result(timeout=timeout) == 1
    assert client.submit("echo").wait(timeout)
    ended, held = client.submit("echo"), client.submit("hold")
    assert client.wait([held, ended], timeout) == ([ended], [held])
    with pytest.raises(TimeoutError):
        held.result(timeout)
    sent = len(daemon.tasks)
    with pytest.raises(TimeoutError):
        list(client.map("echo", [{}], timeout=timeout))
    assert len(daemon.tasks) == sent, "nobody has time for a task that is still to be submitted"


@pytest.mark.parametrize("timeout", [30 * 86_400, math.inf, 1e10, 1e300])
def test_a_wait_may_be_very_long(client: Client, daemon: FakeDaemon, timeout: float) -> None:
    held = client.submit("hold")
    values = client.map("hold", [{}] * 2001, timeout=timeout)  # Two streams.
    daemon.release("late")
    assert list(values) == ["late"] * 2001
    assert held.result(timeout=timeout) == "late"


def test_a_long_wait_goes_in_steps(client: Client, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskd.client.call.STEP_S_MAX", 0.01)
    found: list[object] = []
    held = client.submit("hold")
    thread = threading.Thread(target=lambda: found.append(held.result(timeout=1e10)))
    thread.start()
    daemon.wait_for(lambda: daemon.requests.count("POST /v1/tasks/wait") >= 3)
    daemon.release("late")
    thread.join()
    assert found == ["late"]


def test_no_number_is_no_timeout(client: Client, daemon: FakeDaemon) -> None:
    held = client.submit("hold")
    for ask in (held.result, held.wait, lambda nan: client.wait([held], nan), lambda nan: client.as_completed([], nan)):
        with pytest.raises(ValueError, match="not a number of seconds"):
            ask(math.nan)
    with pytest.raises(ValueError, match="not a number of seconds"):
        client.map("echo", [{}], timeout=math.nan)
    assert daemon.requests == ["POST /v1/tasks"]


def test_a_wait_ends_in_time_where_nobody_leads(client: Client, daemon: FakeDaemon) -> None:
    handle = client.submit("hold")
    daemon.refuse("/v1/tasks/wait", 503, "no_leader", times=1000)
    with Client(daemon.path, patience=math.inf) as patient, pytest.raises(TimeoutError, match="in time"):
        Handle(patient, handle.id).result(timeout=0.1)


def test_a_wait_ends_in_time_where_the_daemon_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskd.client.call.ANSWER_S", 0.01)
    with silent_daemon(tmp_path / "silent.sock"), Client(tmp_path / "silent.sock") as client:
        with pytest.raises(TimeoutError, match="in time"):
            Handle(client, "1").result(timeout=0.05)
        with pytest.raises(TimeoutError, match="in time"):
            client.map("echo", [{}], timeout=0.05)


def test_retry_is_a_new_task(client: Client) -> None:
    handle = client.submit("fail")
    handle.wait()
    again = handle.retry()
    assert again.id != handle.id
    assert isinstance(again.exception(), TaskFailed)


def test_output_of_both_streams(client: Client, daemon: FakeDaemon) -> None:
    handle = client.submit_command(["print", "hi", "oh"])
    assert handle.output() == b"hi\n"
    assert handle.output("stderr") == b"oh\n"
    assert [(written.stream, written.data) for written in handle.follow()] == [("stdout", b"hi\n"), ("stderr", b"oh\n")]


def test_output_is_followed_while_it_is_written(client: Client, daemon: FakeDaemon) -> None:
    follow = client.submit_command("hold").follow()
    for text in ("one", "two"):
        daemon.write(text)
        assert next(follow).data == text.encode()
    daemon.release()
    assert list(follow) == []


def test_options_of_client_and_task_come_together(client: Client, daemon: FakeDaemon) -> None:
    later = datetime.fromtimestamp(2_000_000_000, UTC)
    busy = client.with_options(queue="bulk", timeout=timedelta(minutes=1), retries=3, backoff="5s")
    busy.submit("echo")
    busy.with_options(retries=0, at=later, backoff={"initial": timedelta(seconds=1), "factor": 3}).submit("echo")
    client.submit_command(["true"], labels={"a": "b"}, memory="2GiB", cwd="/tmp")
    client.submit_command("echo hi")
    client.submit_http("http://localhost/sum", {"a": 1}, headers={"x": "y"}, expect_status=(200,), priority=2)
    first, second, third, fourth, fifth = ({**task, "id": ""} for task in submitted(daemon))
    common = {"type": "echo", "queue": "bulk", "timeout": 60.0, "id": "", "params": {}}
    assert first == {**common, "retries": 3, "backoff": {"initial": "5s"}}
    assert second == {**common, "retries": 0, "at": 2_000_000_000.0, "backoff": {"initial": 1.0, "factor": 3}}
    assert third == {
        "type": "command",
        "argv": ["true"],
        "labels": {"a": "b"},
        "memory": "2GiB",
        "cwd": "/tmp",
        "id": "",
    }
    assert fourth == {"type": "command", "shell": "echo hi", "id": ""}
    target = {"url": "http://localhost/sum", "method": "POST", "headers": {"x": "y"}, "expect_status": [200]}
    assert fifth == {"type": "http", "http": target, "params": {"a": 1}, "priority": 2, "id": ""}


def test_an_unknown_option_is_refused_here(client: Client) -> None:
    with pytest.raises(TypeError, match="no such option: prio; there are at, backoff"):
        client.with_options(prio=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="no such option"):
        Client("/nowhere", prio=1)  # type: ignore[call-arg]


# -- Many tasks --------------------------------------------------------------------------------------------------------


def test_map_is_one_request_and_keeps_the_order(client: Client, daemon: FakeDaemon) -> None:
    values = list(range(500))
    assert list(client.map("echo", [{"value": value} for value in values])) == values
    assert daemon.requests == ["POST /v1/tasks?stream=1"]


def test_map_as_completed_does_not_wait_for_the_slow(client: Client, daemon: FakeDaemon) -> None:
    results = client.map("echo", [{"value": 1}, {"value": 2}], ordered=False)
    held = client.with_options(name="slow").map("hold", [{}], ordered=False)
    assert sorted(results) == [1, 2]
    daemon.release("slow")
    assert list(held) == ["slow"]


def test_map_submits_before_it_is_read(client: Client, daemon: FakeDaemon) -> None:
    client.map("echo", [{"value": 1}])
    assert len(daemon.tasks) == 1


def test_map_of_very_many_is_split_and_bounded(client: Client, daemon: FakeDaemon) -> None:
    taken = 0

    def params() -> Iterator[dict[str, int]]:
        nonlocal taken
        for value in range(30_000):
            taken += 1
            yield {"value": value}

    for place, value in enumerate(client.map("echo", params())):
        assert value == place
        assert taken - place <= 22_001  # The window, one more chunk, and the one being made.
    assert place == 29_999
    assert {len(body) for body in daemon.bodies} == {2000}


def test_map_splits_by_size_too(client: Client, daemon: FakeDaemon) -> None:
    text = "x" * (1 << 20)
    assert list(client.map("echo", [{"value": text}] * 9)) == [text] * 9
    assert [len(body) for body in daemon.bodies] == [3, 3, 3]
    with pytest.raises(ValueError, match="more than a request may hold"):
        list(client.map("echo", [{"value": "x" * (17 << 20)}]))
    with pytest.raises(TypeError, match="dict of names and values"):
        list(client.map("echo", [1]))  # type: ignore[list-item]
    assert list(client.map("echo", [])) == []


def test_map_raises_at_the_task_that_failed_or_hands_it_over(client: Client, daemon: FakeDaemon) -> None:
    results = client.map("fail", [{}, {}])
    with pytest.raises(TaskFailed):
        next(results)
    kept = list(client.map("fail", [{}, {}], return_exceptions=True))
    assert [type(error) for error in kept] == [TaskFailed] * 2


def test_map_has_a_deadline(client: Client, daemon: FakeDaemon) -> None:
    results = client.map("hold", [{}] * 3, timeout=0.05)
    with pytest.raises(TimeoutError):
        next(results)


def test_map_goes_on_where_a_stream_broke(client: Client, daemon: FakeDaemon) -> None:
    daemon.break_stream(0, 3, 0)  # Before it was heard that the tasks were taken, and later.
    assert list(client.map("echo", [{"value": value} for value in range(10)])) == list(range(10))
    assert len(daemon.tasks) == 10
    assert daemon.requests == [
        "POST /v1/tasks?stream=1", "POST /v1/tasks?stream=1", "POST /v1/tasks/wait", "POST /v1/tasks/wait",
    ]  # fmt: skip


def test_map_waits_where_the_daemon_is_full(client: Client, daemon: FakeDaemon) -> None:
    def params() -> Iterator[dict[str, int]]:
        for value in range(5000):
            if value == 3000:
                daemon.refuse("/v1/tasks", 429, "overloaded", times=2)  # The chunk that is being made.
            yield {"value": value}

    assert list(client.map("echo", params())) == list(range(5000))
    assert [len(body) for body in daemon.bodies] == [2000, 2000, 2000, 2000, 1000]
    daemon.refuse("/v1/tasks", 429, "overloaded")
    with Client(daemon.path, patience=0) as impatient, pytest.raises(ApiError):
        impatient.map("echo", [{}])


def test_submit_many_and_wait_for_some(client: Client, daemon: FakeDaemon) -> None:
    handles = client.submit_many("echo", ({"value": value} for value in range(4500)))
    assert [len(body) for body in daemon.bodies] == [2000, 2000, 500]
    held = client.submit("hold")
    assert client.wait(handles) == (handles, [])
    done, pending = client.wait([held, *handles], timeout=0.01)
    assert (done, pending) == (handles, [held])
    assert [handle.result() for handle in handles] == list(range(4500))
    assert daemon.requests[-1] == "POST /v1/tasks/wait", "results that are known are not asked for again"


def test_as_completed_gives_each_handle_once(client: Client, daemon: FakeDaemon) -> None:
    slow, quick = client.submit("hold"), client.submit("echo")
    twin = client.handle(slow.id[-6:])
    order = client.as_completed([slow, quick, twin])
    assert next(order) is quick
    daemon.release()
    assert set(order) == {slow, twin}
    assert set(client.as_completed([slow, quick, twin])) == {slow, quick, twin}


def test_a_task_that_does_not_exist_is_not_waited_for(client: Client, daemon: FakeDaemon) -> None:
    with pytest.raises(ApiError) as caught:
        client.handle("ffffffff")
    assert (caught.value.status, caught.value.code) == (404, "not_found")
    handle = client.submit("hold")
    daemon.tasks.clear()
    with pytest.raises(ApiError, match="there is no task"):
        handle.result()


# -- Looking -----------------------------------------------------------------------------------------------------------


def test_tasks_come_page_by_page(client: Client, daemon: FakeDaemon) -> None:
    client.submit_many("echo", [{}] * 2100)
    client.with_options(queue="other", labels={"a": "b c"}).submit("hold")
    assert len(list(client.tasks())) == 2101
    assert sum(request.startswith("GET /v1/tasks?") for request in daemon.requests) == 3
    (task,) = client.tasks(states=["unfinished"], queues=["other"], types=["hold"], labels={"a": "b c"})
    assert not task.is_finished
    assert client.handle(task.id).info().attempts[0].worker_name == "arm"


def test_the_cluster_and_its_nodes(client: Client, daemon: FakeDaemon) -> None:
    assert client.cluster().health == "ok"
    daemon.cluster.update(by_leader=False, refuses="the disk is nearly full")
    daemon.cluster["replicas"] = [{**daemon.cluster["replicas"][0], "replication": "away", "seen": 5.5, "copied": 7}]
    found = client.cluster()
    assert (found.by_leader, found.refuses) == (False, "the disk is nearly full")
    assert [(one.replication, one.seen, one.copied) for one in found.replicas] == [("away", 5.5, 7)]
    del daemon.cluster["by_leader"], daemon.cluster["refuses"]
    assert (client.cluster().by_leader, client.cluster().refuses) == (True, ""), "an older daemon"
    assert [(node.name, node.is_leader) for node in client.nodes()] == [("head", True), ("arm", False)]
    assert client.handlers()[0].type == "echo"
    assert client.submit("hold").explain().nodes[0].why == "all 4 slots are busy"


def test_errors_carry_code_and_field(client: Client) -> None:
    with pytest.raises(ApiError) as caught:
        client.submit_command(["true"], memory="lots")
    error = caught.value
    assert (error.status, error.code, error.field, str(error)) == (400, "invalid", "memory", "'lots' is not a size")
    assert pickle.loads(pickle.dumps(error)).field == "memory"


# -- Connections -------------------------------------------------------------------------------------------------------


def test_one_connection_serves_calls_one_after_the_other(client: Client, daemon: FakeDaemon) -> None:
    for value in range(20):
        assert client.submit("echo", value=value).result() == value
    assert daemon.connections == 1


def test_threads_share_a_client(client: Client, daemon: FakeDaemon) -> None:
    found: list[int] = []

    def work(start: int) -> None:
        found.extend(client.submit("echo", value=value).result() for value in range(start, start + 20))

    threads = [threading.Thread(target=work, args=(start,)) for start in range(0, 80, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(80))
    assert daemon.connections <= 8


def test_a_restart_of_the_daemon_goes_unnoticed(client: Client, daemon: FakeDaemon) -> None:
    handle = client.submit("hold")
    daemon.stop()
    threading.Timer(0.1, daemon.start).start()
    waiting = client.submit("echo", value=1)  # Sent while nobody listens.
    assert waiting.result() == 1
    daemon.release("kept")
    assert handle.result() == "kept"


def test_a_wait_survives_a_restart(client: Client, daemon: FakeDaemon) -> None:
    handle = client.submit("hold")
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(handle.result()))
    thread.start()
    daemon.wait_for(lambda: "POST /v1/tasks/wait" in daemon.requests)
    daemon.stop()
    daemon.start()
    daemon.wait_for(lambda: daemon.requests.count("POST /v1/tasks/wait") == 2)
    daemon.release("kept")
    thread.join()
    assert found == ["kept"]


def test_a_change_of_leaders_is_waited_out(client: Client, daemon: FakeDaemon) -> None:
    daemon.refuse("/v1/tasks", 503, "no_leader", times=2)
    assert client.submit("echo", value=1).result() == 1
    assert len(daemon.tasks) == 1
    daemon.refuse("/v1/tasks", 429, "overloaded")
    with pytest.raises(ApiError):
        client.submit("echo")


def test_without_patience_trouble_is_told_at_once(daemon: FakeDaemon) -> None:
    with Client(daemon.path, patience=0) as client:
        handle = client.submit("hold")
        daemon.break_stream(0)
        with pytest.raises(ConnectionLost):
            handle.result()
        daemon.refuse("/v1/tasks", 503, "no_leader")
        with pytest.raises(ApiError):
            client.submit("echo")
        daemon.stop()
        with pytest.raises(NoDaemon):
            client.submit("echo")


def test_what_must_not_be_sent_twice_is_not(client: Client, daemon: FakeDaemon) -> None:
    handle = client.submit("fail")
    daemon.refuse("/v1/tasks/retry", 503, "unavailable", times=2)
    with pytest.raises(ApiError):
        handle.retry()
    assert daemon.requests.count("POST /v1/tasks/retry") == 1


def test_no_daemon_is_said_at_once(tmp_path: Path) -> None:
    with Client(tmp_path / "none.sock") as client, pytest.raises(NoDaemon, match="taskd start"):
        client.submit("echo")


def test_a_lack_of_descriptors_is_no_lack_of_a_daemon(client: Client, daemon: FakeDaemon) -> None:
    client.cluster()
    results = client.map("hold", [{}])  # On the connection that was kept.
    with no_descriptors(), pytest.raises(OSError, match="too many files open to connect"):
        client.cluster()
    daemon.release(1)
    assert list(results) == [1]


def test_a_closed_client_says_so(daemon: FakeDaemon) -> None:
    client = Client(daemon.path)
    results = client.map("hold", [{}])
    client.close()
    with pytest.raises(ValueError, match="closed"):
        client.submit("echo")
    with pytest.raises(ValueError, match="closed"):
        next(results)


def test_who_reads_while_the_client_is_closed_is_told(daemon: FakeDaemon) -> None:
    client = Client(daemon.path)
    follow = client.submit_command("hold").follow()
    daemon.write("one")
    assert next(follow).data == b"one"
    waiting = client.submit("hold")
    told: list[str] = []

    def read(work: Callable[[], object]) -> None:
        try:
            work()
        except ValueError as error:
            told.append(str(error))

    threads = [threading.Thread(target=read, args=(work,)) for work in (lambda: list(follow), waiting.result)]
    for thread in threads:
        thread.start()
    daemon.wait_for(lambda: "POST /v1/tasks/wait" in daemon.requests)
    client.close()
    for thread in threads:
        thread.join(20)
    assert told == ["the client is closed"] * 2


def test_output_that_nobody_reads_just_now_is_not_whole_either(daemon: FakeDaemon) -> None:
    client = Client(daemon.path)
    follow = client.submit_command("hold").follow()
    daemon.write("one")
    assert next(follow).data == b"one"
    client.close()
    with pytest.raises(ValueError, match="the client is closed"):
        next(follow)


def test_a_forked_child_does_not_use_its_parents_connection(client: Client, daemon: FakeDaemon) -> None:
    client.submit("echo")
    child = os.fork()
    if child == 0:
        os._exit(0 if client.cluster().health == "ok" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert client.submit("echo", value=6).result() == 6
    assert daemon.connections == 2
