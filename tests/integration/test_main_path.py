"""The main path with real daemons: commands, handlers and HTTP calls from submission to recorded result."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections.abc import Iterator

import pytest

from tests.integration.cluster import Cluster, Daemon, eventually


@pytest.fixture(params=["head", "worker"])
def node(request: pytest.FixtureRequest, shared: Cluster) -> Daemon:
    """Any node answers: the leader itself, and a worker that relays to it."""
    return shared.daemons[0 if request.param == "head" else 1]


def result_of(node: Daemon, **task: object) -> dict[str, object]:
    (result,) = node.ok("POST", "/v1/tasks?wait=30", task)["results"]
    return result


def test_a_command_leaves_its_exit_code_and_output(node: Daemon) -> None:
    (task,) = node.submit({"argv": ["sh", "-c", "echo hi; echo oh >&2; exit 7"]})
    assert node.wait([task])[task]["exit_code"] == 7
    detail = node.ok("GET", f"/v1/tasks/{task}")
    assert detail["state"] == "failed"
    (attempt,) = detail["attempts"]
    assert (attempt["outcome"], attempt["stdout_tail"], attempt["stderr_tail"]) == ("exit_nonzero", "hi\n", "oh\n")
    assert node.ask("GET", f"/v1/tasks/{task}/output")[1] == "hi\n"


def test_a_signal_is_recorded(node: Daemon) -> None:
    result = result_of(node, shell="kill -SEGV $$")
    assert (result["state"], result["signal"]) == ("failed", 11)


def test_a_missing_program_fails_with_words(node: Daemon) -> None:
    result = result_of(node, argv=["/no/such/program"])
    assert result["state"] == "failed"
    assert "/no/such/program" in result["error"]["message"]


def test_handlers_run_sync_async_and_as_classes(node: Daemon) -> None:
    assert result_of(node, type="add", params={"left": 2})["result"] == 3
    assert result_of(node, type="add_async", params={"left": 2, "right": 5})["result"] == 7
    assert result_of(node, type="shout", params={"text": "hey"})["result"] == "HEY"


def test_wrong_params_are_refused_at_submission(node: Daemon) -> None:
    status, answer = node.ask("POST", "/v1/tasks", {"type": "add", "params": {"left": "two"}})
    assert status == 400
    assert "left" in answer["error"]["message"]


def test_a_handler_that_raises_reports_what_and_where(node: Daemon) -> None:
    result = result_of(node, type="boom", params={"message": "no luck"})
    assert result["state"] == "failed"
    assert (result["error"]["type"], result["error"]["message"]) == ("ValueError", "no luck")
    assert "boom" in result["error"]["traceback"]


def test_a_handler_that_takes_its_process_down_costs_one_attempt(node: Daemon) -> None:
    assert result_of(node, type="vanish", params={"status": 3})["state"] == "failed"
    assert result_of(node, type="unserialisable")["state"] == "failed"
    assert result_of(node, type="spin", timeout=0.2, grace=0.2)["state"] == "timed_out"
    assert result_of(node, type="add", params={"left": 1})["result"] == 2


def test_a_handlers_retries_and_timeout_hold_unless_the_client_says_otherwise(
    node: Daemon, tmp_path_factory: pytest.TempPathFactory
) -> None:
    marks = tmp_path_factory.mktemp("patient")
    task: dict[str, object] = {"type": "patient", "backoff": {"initial": 0.01}}
    result = result_of(node, **task, params={"mark": str(marks / "one")})
    assert (result["state"], result["attempts"], result["result"]) == ("succeeded", 3, 3)
    result = result_of(node, **task, params={"mark": str(marks / "two")}, retries=0)
    assert (result["state"], result["attempts"]) == ("failed", 1)
    assert result_of(node, type="hasty", grace=0.2)["state"] == "timed_out"
    handlers = {handler["type"]: handler for handler in node.ok("GET", "/v1/handlers")["handlers"]}
    assert (handlers["patient"]["retries"], handlers["patient"]["timeout"]) == (2, 3600.0)


def test_a_timeout_ends_the_whole_group(node: Daemon, tmp_path_factory: pytest.TempPathFactory) -> None:
    pid_file = tmp_path_factory.mktemp("timeout") / "pid"
    result = result_of(node, shell=f"trap '' TERM; sleep 1000 & echo $! > {pid_file}; wait", timeout=0.3, grace=0.2)
    assert result["state"] == "timed_out"
    pid = int(pid_file.read_text())
    eventually(lambda: not os.path.exists(f"/proc/{pid}"))


def test_cancel_of_a_running_task(node: Daemon) -> None:
    (task,) = node.submit({"argv": ["sleep", "1000"]})
    eventually(lambda: node.ok("GET", f"/v1/tasks/{task}")["state"] == "running")
    node.ok("POST", f"/v1/tasks/{task}/cancel")
    assert node.wait([task])[task]["state"] == "cancelled"


def test_retries_until_it_works(node: Daemon, tmp_path_factory: pytest.TempPathFactory) -> None:
    mark = tmp_path_factory.mktemp("retries") / "mark"
    command = f'echo x >> {mark}; [ "$TASKD_ATTEMPT" = 3 ]'
    result = result_of(node, shell=command, retries=5, backoff={"initial": 0.01})
    assert (result["state"], result["attempts"]) == ("succeeded", 3)
    assert mark.read_text() == "x\n" * 3


def test_the_environment_of_a_task(node: Daemon) -> None:
    (task,) = node.submit({"argv": ["env"], "env": {"COLOUR": "red"}})
    node.wait([task])
    lines = dict(line.split("=", 1) for line in node.ask("GET", f"/v1/tasks/{task}/output")[1].splitlines())
    assert lines["TASKD_TASK_ID"] == task
    assert lines["TASKD_ATTEMPT"] == "1"
    assert lines["COLOUR"] == "red"
    assert "TASKD_WORKER_HANDLERS" not in lines, "the daemon's own settings are not a task's business"


def test_explain_tells_the_truth(node: Daemon) -> None:
    (never,) = node.submit({"argv": ["true"], "gpus": 64})
    (unknown,) = node.submit({"type": "no_such_handler"})
    (later,) = node.submit({"argv": ["true"], "delay": "1h"})
    (elsewhere,) = node.submit({"argv": ["true"], "constraints": ["planet=mars"]})
    try:
        why = node.ok("GET", f"/v1/tasks/{never}/explain")
        assert why["reason"] == "NoMatchingNode"
        assert not any(fit["ever"] for fit in why["nodes"])
        assert node.ok("GET", f"/v1/tasks/{unknown}/explain")["reason"] == "NoHandler"
        assert node.ok("GET", f"/v1/tasks/{later}/explain")["reason"] == "BeginTime"
        assert "planet=mars" in node.ok("GET", f"/v1/tasks/{elsewhere}/explain")["nodes"][0]["why"]
    finally:
        assert len(node.ok("POST", "/v1/tasks/cancel", {"ids": [never, unknown, later, elsewhere]})["ids"]) == 4


def test_thousands_in_one_request(node: Daemon) -> None:
    tasks = [{"type": "add", "params": {"left": number}} for number in range(3000)]
    ids = node.submit(*tasks)
    assert len(set(ids)) == 3000
    results = node.wait(ids)
    assert [results[task]["result"] for task in ids] == [number + 1 for number in range(3000)]


def test_output_can_be_followed_while_it_is_written(node: Daemon) -> None:
    (task,) = node.submit({"shell": "for i in 1 2 3; do echo line $i; sleep 0.05; done"})
    assert node.ask("GET", f"/v1/tasks/{task}/output?follow=1")[1] == "line 1\nline 2\nline 3\n"


def test_large_output_is_all_there(node: Daemon) -> None:
    (task,) = node.submit({"shell": "seq 1 400000"})
    node.wait([task])
    text = node.ask("GET", f"/v1/tasks/{task}/output")[1]
    assert text == "".join(f"{number}\n" for number in range(1, 400_001))


class _Service(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = json.dumps({"sum": sum(body["numbers"])}).encode()
        self.send_response(200 if self.path == "/sum" else 500)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: object) -> None:
        """Keep the tests' output clean."""


@pytest.fixture
def service() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Service)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_microservice_implements_a_task(node: Daemon, service: str) -> None:
    call = {"type": "http", "http": {"url": f"{service}/sum"}, "params": {"numbers": [1, 2, 3]}}
    assert result_of(node, **call)["result"] == {"sum": 6}
    call["http"] = {"url": f"{service}/broken"}
    assert result_of(node, **call)["state"] == "failed"


def test_every_node_describes_the_cluster(node: Daemon, shared: Cluster) -> None:
    cluster = node.ok("GET", "/v1/cluster")
    assert cluster["health"] == "ok"
    assert cluster["leader_name"] == "head"
    nodes = node.ok("GET", "/v1/nodes")["nodes"]
    assert [view["name"] for view in nodes] == ["head", "worker1", "worker2"]
    types = {handler["type"] for handler in node.ok("GET", "/v1/handlers")["handlers"]}
    assert {"noop", "add", "shout"} <= types
    assert "taskd_is_leader" in node.ask("GET", "/metrics")[1]


def test_errors_have_one_form(node: Daemon) -> None:
    status, answer = node.ask("POST", "/v1/tasks", [{"argv": ["true"]}, {"argv": ["true"], "memory": "lots"}])
    assert status == 400
    assert answer["error"]["field"] == "[1].memory"
    assert node.ask("GET", "/v1/tasks/ffffffffffff")[0] == 404
    assert node.ask("GET", "/nothing/here")[0] == 404
