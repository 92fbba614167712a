"""Submitting from the command line, and looking at what became of it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from taskd.cli import submission
from tests.cli.conftest import Taskd
from tests.client.fake_daemon import FakeDaemon, silent_daemon

Start = Callable[..., "subprocess.Popen[bytes]"]


def asked(daemon: FakeDaemon) -> list[dict[str, Any]]:
    """What was submitted, without the ids."""
    return [{key: value for key, value in task["asked"].items() if key != "id"} for task in daemon.tasks.values()]


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda text: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


# -- Submitting --------------------------------------------------------------------------------------------------------


def test_submit_prints_the_id_alone(taskd: Taskd, daemon: FakeDaemon) -> None:
    ran = taskd("submit", "--", "print", "--hi")
    (task_id,) = daemon.tasks
    assert ran == (0, task_id + "\n", "")
    assert asked(daemon) == [{"argv": ["print", "--hi"]}]


@pytest.mark.parametrize("reason", ["NoMatchingNode", "NoHandler"])
def test_a_task_that_nobody_can_run_is_told_of_once(taskd: Taskd, daemon: FakeDaemon, reason: str) -> None:
    daemon.is_busy = True
    text = "no connected worker could ever run it"
    daemon.explanations = [{"reason": reason, "text": text, "position": 0, "until": None, "nodes": []}]
    ran = taskd("submit", "--cpus", "400", "--", "true")
    (task_id,) = daemon.tasks
    end = task_id[-8:]
    assert ran == (0, task_id + "\n", f"taskd: task {end} waits: {text}; see `taskd explain {end}`\n")
    assert taskd("submit", "-q", "--", "true").err == ""
    assert taskd("submit", "--json", "--", "true").err == ""
    daemon.explanations = []
    daemon.refuse(f"/v1/tasks/{task_id}/explain", 503, "no_leader")
    assert taskd("submit", "--", "true").err == ""


def test_everything_that_can_be_said_of_a_task(
    taskd: Taskd, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HERE", "mine")
    monkeypatch.chdir("/")
    ran = taskd(
        "submit", "--name", "n", "--queue", "q", "--priority", "-3", "--cpus", "1.5", "--memory", "2GiB", "--gpus", "1",
        "--resource", "licence=2", "--constraint", "os=debian", "--constraint", "arch!=arm64", "--delay", "1h30m",
        "--at", "@2000000000", "--timeout", "90", "--deadline", "2d", "--retries", "0", "--backoff",
        "initial=5s,factor=3,max=1h,jitter=0", "--on-lost", "fail", "--env", "A=b=c", "-e", "HERE", "--cwd", "tmp",
        "--secret", "TOKEN=api-token", "--secret", "key", "--label", "k=v", "-l", "x=", "make", "-j4", "--cpus",
    )  # fmt: skip
    assert ran.code == 0
    assert asked(daemon) == [{
        "argv": ["make", "-j4", "--cpus"], "name": "n", "queue": "q", "priority": -3, "cpus": 1.5, "memory": 2 << 30,
        "gpus": 1.0, "resources": {"licence": 2.0}, "constraints": ["os=debian", "arch!=arm64"], "delay": 5400.0,
        "at": 2e9, "timeout": 90.0, "deadline": 172800.0, "retries": 0,
        "backoff": {"initial": 5.0, "factor": 3.0, "max": 3600.0, "jitter": 0.0}, "on_lost": "fail",
        "secrets": {"TOKEN": "api-token", "key": "key"},
        "env": {"A": "b=c", "HERE": "mine"}, "cwd": "/tmp", "labels": {"k": "v", "x": ""},
    }]  # fmt: skip


def test_handlers_services_and_shell_lines(taskd: Taskd, daemon: FakeDaemon, tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text('{"value": [1]}')
    assert taskd("submit", "--type", "echo", "--params", '{"value": "ü"}').code == 0
    assert taskd("submit", "--type", "echo", "--params", f"@{tmp_path}/params.json").code == 0
    assert taskd("submit", "--shell", "echo hi | wc").code == 0
    assert taskd("submit", "--http", "http://h/x", "--http-method", "get", "--http-header", "A=b").code == 0
    assert asked(daemon) == [
        {"type": "echo", "params": {"value": "ü"}},
        {"type": "echo", "params": {"value": [1]}},
        {"shell": "echo hi | wc"},
        {"type": "http", "http": {"url": "http://h/x", "method": "GET", "headers": {"A": "b"}}},
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "say what to run"),
        (("--shell", "x", "--", "y"), "a command and --shell do not go together"),
        (("--params", "{}", "--", "x"), "--params goes with --type or --http"),
        (("--http-method", "GET", "--", "x"), "go with --http"),
        (("--http", "http://x", "--http-method", "SHOUT"), "Error: --http-method: 'SHOUT' is not"),
        (("--http", "http://x", "--http-header", "a b=c"), "Error: --http-header: "),
        (("--type", "x", "--params", "{"), "it is not JSON"),
        (("--type", "x", "--params", "@/nowhere"), "cannot be read"),
        (("--memory", "lots", "--", "x"), "'--memory': 'lots' is not a size"),
        (("--timeout", "soon", "--", "x"), "is not a duration"),
        (("--at", "whenever", "--", "x"), "is not an instant"),
        (("--resource", "x", "--", "x"), "not of the form key=value"),
        (("--resource", "x=y", "--", "x"), "is not a number"),
        (("--resource", "x=inf", "--", "x"), "'inf' is not a number of 0 or more"),
        (("--cpus", "nan", "--", "x"), "'nan' is not a number of 0 or more"),
        (("--gpus", "-1", "--", "x"), "'-1' is not a number of 0 or more"),
        (("--env", "NOT_THERE_AT_ALL", "--", "x"), "there is no variable NOT_THERE_AT_ALL"),
        (("--backoff", "start=1", "--", "x"), "none of initial, factor, max and jitter"),
        (("--retries", "-1", "--", "x"), "-1 is not in the range"),
        (("--nonsense", "--", "x"), "No such option"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(taskd: Taskd, daemon: FakeDaemon, args: tuple[str, ...], message: str) -> None:
    ran = taskd("submit", *args)
    assert ran.code == 2
    assert message in ran.err
    assert not daemon.tasks


def test_what_the_daemon_finds_wrong_is_said_in_the_words_of_the_command_line(
    taskd: Taskd, daemon: FakeDaemon, stdin: Callable[[str], None]
) -> None:
    stdin('{"argv": ["true"]}\n{"argv": ["true"], "memory": "lots"}\n')
    ran = taskd("submit", "--from-json", "-")
    assert ran.code == 2
    assert "task 2: --memory: 'lots' is not a size" in ran.err
    ran = taskd("submit", "--constraint", "~", "--", "true")
    assert (ran.code, "Error: --constraint: '~' is not a constraint" in ran.err) == (2, True)


def test_many_tasks_from_lines_or_a_list(taskd: Taskd, daemon: FakeDaemon, stdin: Callable[[str], None]) -> None:
    stdin('\n{"argv": ["true"]}\n\n{"type": "echo", "queue": "own"}')
    ran = taskd("submit", "--from-json", "-", "--queue", "bulk", "-q")
    assert ran.out.split() == list(daemon.tasks)
    stdin(' [{"argv": ["true"], "id": "01a20724-f837-733b-a4d3-051cfaf5b087"}]')
    ran = taskd("submit", "--from-json", "-", "--json")
    assert json.loads(ran.out)["ids"] == ["01a20724-f837-733b-a4d3-051cfaf5b087"]
    assert [task.get("queue") for task in asked(daemon)] == ["bulk", "own", None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there are no tasks in it"),
        ("{\n", "line 1 is not JSON"),
        ("[1]", "task 1 is no task"),
        ("3\n", "line 1 is no"),
    ],
)
def test_a_file_that_holds_no_tasks(
    taskd: Taskd, daemon: FakeDaemon, stdin: Callable[[str], None], text: str, message: str
) -> None:
    stdin(text)
    ran = taskd("submit", "--from-json", "-")
    assert ran.code == 2
    assert message in ran.err


def test_thousands_go_in_few_requests_and_a_refusal_says_how_far_it_came(
    taskd: Taskd, daemon: FakeDaemon, stdin: Callable[[str], None]
) -> None:
    stdin('{"argv": ["true"]}\n' * 4000 + '{"argv": ["true"], "memory": "lots"}\n')
    ran = taskd("submit", "--from-json", "-")
    assert ran.code == 2
    assert "the first 4,000 tasks were submitted, the others not" in ran.err
    assert "task 4001: --memory" in ran.err
    assert [len(body) for body in daemon.bodies] == [2000, 2000, 1]


def test_a_dry_run_submits_nothing(taskd: Taskd, daemon: FakeDaemon) -> None:
    ran = taskd("submit", "--dry-run", "--cpus", "2", "--", "true")
    assert json.loads(ran.out)["argv"] == ["true"]
    assert not daemon.tasks
    assert daemon.requests == ["POST /v1/tasks/plan"]


def test_submit_and_wait(taskd: Taskd, daemon: FakeDaemon, stdin: Callable[[str], None]) -> None:
    ran = taskd("submit", "--wait", "--", "exit", "7")
    assert ran.code == 7
    assert ran.out.strip() in daemon.tasks
    assert "exit code 7" in ran.err
    ran = taskd("submit", "--wait", "--json", "--type", "echo", "--params", '{"value": 5}')
    assert (ran.code, json.loads(ran.out)["result"]) == (0, 5)
    ran = taskd("submit", "--wait", "--type", "echo", "--params", '{"value": {"\\u009b2J": "\\u001b"}}')
    task_id, result = ran.out.splitlines()
    assert (ran.code, ran.err, task_id in daemon.tasks) == (0, "", True)
    assert result == '{"\\u009b2J": "\\u001b"}'
    ran = taskd("submit", "--wait", "--type", "fail")
    assert (ran.code, len(ran.out.split()), "ValueError: no luck" in ran.err) == (1, 1, True)
    assert len(taskd("submit", "--wait", "-q", "--type", "echo").out.split()) == 1
    assert len(taskd("submit", "--wait", "--", "true").out.split()) == 1
    stdin('{"argv": ["true"]}\n{"type": "fail"}\n')
    ran = taskd("submit", "--wait", "-q", "--from-json", "-")
    assert (ran.code, ran.err) == (1, "")


def test_a_submission_is_sent_again_with_the_same_id(taskd: Taskd, daemon: FakeDaemon) -> None:
    daemon.refuse("/v1/tasks", 503, "no_leader", "nobody leads just now; try again.", times=2)
    ran = taskd("submit", "--", "true")
    assert ran.code == 0
    assert ran.err == "taskd: nobody leads just now; trying again for 10 s\n"
    assert len({body["id"] for body in daemon.bodies if body}) == 1


def test_that_no_standby_has_a_copy_is_said(
    taskd: Taskd, daemon: FakeDaemon, stdin: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, standby = daemon.cluster["replicas"], {**daemon.cluster["replicas"][0], "replication": "away"}
    assert taskd("submit", "--", "true").err == ""
    assert "GET /v1/cluster" not in daemon.requests
    daemon.durability = ["local"]
    assert taskd("submit", "--", "true").err == "", "there is no other scheduler"
    daemon.cluster["replicas"] = [*alone, standby]
    warning = "taskd: accepted on one disk alone, as no standby is in sync: see `taskd cluster status`\n"
    for options in ((), ("--wait",)):
        assert taskd("submit", *options, "--", "true").err == warning
    for options in (("-q",), ("--json",), ("-q", "--wait")):
        assert taskd("submit", *options, "--", "true").err == ""
    daemon.refuse("/v1/cluster", 500, "internal")
    assert taskd("submit", "--", "true")[::2] == (0, "")

    monkeypatch.setattr(submission, "CHUNK_TASKS_MAX", 1)
    daemon.durability = ["local", "replicated"]
    stdin('[{"argv": ["true"]}, {"argv": ["true"]}]')
    assert taskd("submit", "--from-json", "-").err == warning
    stdin('[{"argv": ["true"]}, {"argv": ["true"]}]')
    assert json.loads(taskd("submit", "--json", "--from-json", "-").out)["durability"] == "replicated"


# -- Looking -----------------------------------------------------------------------------------------------------------


def test_list_is_a_table_for_people_and_lines_for_programs(taskd: Taskd, daemon: FakeDaemon) -> None:
    taskd("submit", "--name", "greet", "--", "print", "hi")
    taskd("submit", "--queue", "q", "--label", "a=b", "--", "exit", "7")
    table = taskd("list").out.splitlines()
    assert table[0].split() == ["ID", "STATE", "TASK", "NODE", "AGE", "TOOK", "NOTE"]
    newest, oldest = reversed(daemon.tasks)
    assert table[1].startswith(f"{newest[-8:]}  failed     exit 7  arm")
    assert table[1].endswith("exit 7")
    assert table[2].startswith(f"{oldest[-8:]}  succeeded  greet   arm")
    assert [json.loads(line)["id"] for line in taskd("list", "--json").out.splitlines()] == [newest, oldest]
    for filters in (("--state", "failed"), ("-s", "running,failed"), ("--queue", "q"), ("--label", "a=b")):
        assert [json.loads(line)["id"] for line in taskd("list", "--json", *filters).out.splitlines()] == [newest]
    assert taskd("list", "--state", "running").out == ""


def test_what_others_wrote_cannot_repaint_the_terminal(taskd: Taskd, daemon: FakeDaemon) -> None:
    taskd("submit", "--name", "a\x1b[2Jb\nc", "--", "print", "x\x1b[2Jy")
    assert "a\\x1b[2Jb\\nc" in taskd("list").out
    page = taskd("show", "last").out
    assert "\x1b" not in page
    assert "stdout:\n  x\\x1b[2Jy\n" in page
    assert taskd("logs", "last").out == "x\x1b[2Jy\n", "the output itself is passed on as it is"


def test_list_is_short_unless_told(taskd: Taskd, daemon: FakeDaemon) -> None:
    body = [{"argv": ["true"]}] * 1500
    file = daemon.path.with_name("tasks.json")
    file.write_text(json.dumps(body))
    taskd("submit", "--from-json", str(file), "-q")
    assert len(taskd("list").out.splitlines()) == 31
    assert len(taskd("list", "-n", "3", "--json").out.splitlines()) == 3
    assert len(taskd("list", "--all", "--json").out.splitlines()) == 1500


def test_show_has_everything_on_a_page(taskd: Taskd, daemon: FakeDaemon) -> None:
    taskd("submit", "--name", "greet", "--label", "a=b", "--env", "X=y", "--", "print", "hi there", "oh")
    page = taskd("show", "last").out
    for text in (
        "succeeded", "name       greet", "command    print 'hi there' oh", "labels     a=b", "variables  X=y",
        "attempt 1 on arm: ok", "exit code    0", "peak memory  12MiB", "stdout:\n  hi there\n", "stderr:\n  oh\n",
    ):  # fmt: skip
        assert text in page
    taskd("submit", "--type", "fail", "--params", '{"a": 1}')
    page = taskd("show", "last").out
    for text in ("handler    fail", 'params     {"a": 1}', "ValueError: no luck", "Traceback …"):
        assert text in page
    taskd("submit", "--type", "echo", "--params", '{"value": {"b": [1]}}')
    assert "result:\n  {" in taskd("show", "last").out
    assert json.loads(taskd("show", "last", "--json").out)["result"] == {"b": [1]}


def test_show_of_what_leaders_of_a_divided_cluster_made_of_a_task(taskd: Taskd, daemon: FakeDaemon) -> None:
    taskd("submit", "--", "true")
    page = taskd("show", "last").out
    for text in ("provisional", "history", "given out"):
        assert text not in page
    (task,) = daemon.tasks.values()
    (attempt,) = json.loads(taskd("show", "last", "--json").out)["attempts"]
    failed = {**attempt, "outcome": "exit_nonzero", "exit_code": 7, "reason": ""}
    second = {**attempt, "number": 2, "fence": "5.1.1.1.2"}
    task["shown"] = {"provisional": True, "retries": 1, "attempts": [failed, second]}
    page = taskd("show", "last").out
    assert "provisional  it ended while a scheduler was away" in page
    for text in ("history", "given out"):
        assert text not in page, "one attempt after the other"
    task["shown"] = {"attempts": [{**failed, "outcome": "lost"}, second]}
    assert "history" not in taskd("show", "last").out, "its worker was lost"
    task["shown"] = {"attempts": [failed, second]}
    page = taskd("show", "last").out
    for text in (
        "history    it ran more often than its retries allow",
        "attempt 1 on arm, given out by node 1 in term 1: exit nonzero",
        "attempt 2 on arm, given out by node 1 in term 5: ok",
    ):
        assert text in page
    task["shown"] = {"attempts": [{**failed, "fence": "4.2.1.1.1"}, attempt]}
    page = taskd("show", "last").out
    for text in (
        "history    it was given out by leaders that did not know of each other",
        "attempt 1 on arm, given out by node 2 in term 4: exit nonzero",
        "attempt 1 on arm, given out by node 1 in term 1: ok",
    ):
        assert text in page


def test_show_of_a_task_that_waits(taskd: Taskd, daemon: FakeDaemon) -> None:
    daemon.is_busy = True
    taskd("submit", "--", "true")
    page = taskd("show", "last").out
    assert "queued" in page
    assert "attempt" not in page


def test_ids_may_be_given_by_their_end(taskd: Taskd, daemon: FakeDaemon) -> None:
    taskd("submit", "--", "print", "hi")
    (task_id,) = daemon.tasks
    assert json.loads(taskd("show", task_id[-6:], "--json").out)["id"] == task_id
    ran = taskd("show", "ffffffff")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "taskd: there is no task ffffffff\n"


def test_logs_keep_the_streams_apart(taskd: Taskd, daemon: FakeDaemon) -> None:
    taskd("submit", "--", "print", "hi", "oh")
    assert taskd("logs", "last") == (0, "hi\n", "oh\n")
    assert taskd("logs", "--stdout", "last") == (0, "hi\n", "")
    assert taskd("logs", "--stderr", "--attempt", "1", "last") == (0, "", "oh\n")
    assert taskd("logs", "-f", "last") == (0, "hi\n", "oh\n")
    assert taskd("logs", "-f", "--stderr", "last") == (0, "", "oh\n")
    assert taskd("logs", "ffffffff").code == 1


def test_explain_says_it_for_every_node(taskd: Taskd, daemon: FakeDaemon) -> None:
    daemon.is_busy = True
    taskd("submit", "--", "true")
    ran = taskd("explain", "last")
    assert "is queued: every worker that could run it is busy (Resources)" in ran.out
    assert "3 tasks come first" in ran.out.splitlines()
    assert "arm   when free     all 4 slots are busy" in ran.out
    assert json.loads(taskd("explain", "last", "--json").out)["reason"] == "Resources"
    never = {"node_id": 2, "name": "arm", "fits": False, "ever": False, "why": "has 0 of gpus, 64 asked"}
    daemon.explanations = [{"reason": "NoMatchingNode", "text": "x", "position": 0, "until": 2e9, "nodes": [never]}]
    ran = taskd("explain", "last")
    assert "No node could ever run it" in ran.out
    assert "until 2033-05-18" in ran.out
    away = [{**never, "ever": ever, "connected": False, "why": "is not connected"} for ever in (True, None)]
    daemon.explanations[0].update(nodes=[*away, never])
    ran = taskd("explain", "last")
    assert "No node" not in ran.out
    assert "when back" in ran.out
    assert "not known" in ran.out
    daemon.explanations[0].update(position=1)
    assert "1 task comes first" in taskd("explain", "last").out.splitlines()


def test_explain_of_a_task_that_has_ended_gives_the_cause(taskd: Taskd, daemon: FakeDaemon) -> None:
    taskd("submit", "--", "exit", "7")
    text = "it has ended: failed (exit code 7\x1b)"
    daemon.explanations = [{"reason": "Ended", "text": text, "position": None, "until": None, "nodes": []}]
    ran = taskd("explain", "last")
    assert ran.out == f"task {next(iter(daemon.tasks))[-8:]} has ended: failed (exit code 7\\x1b)\n"


def test_events_are_lines(taskd: Taskd, daemon: FakeDaemon) -> None:
    task = "01a20724-f837-733b-a4d3-051cfaf5b087"
    daemon.event_lines = [
        {"kind": kind, "at": 1.767e9, "id": task_id, "node_id": node_id, "detail": detail}
        for kind, task_id, node_id, detail in (
            ("task.failed", task, 2, "x\x1b[2J"), ("leader.changed", "", 1, "term 5"), ("leader.changed", "", 1, ""),
            ("durability.local", "", 1, "…"), ("durability.replicated", "", 1, "…"),
            ("standby.in_sync", "", 7, "spare"), ("standby.gone", "", 7, "spare"),
            ("standby.behind", "", 8, "slow"), ("node.up", "", 9, "new"),
            ("node.lost", "", 9, "closed"), ("task.queued", task, None, ""), ("task.superseded", task, None, "so"),
        )
    ]  # fmt: skip
    ran = taskd("events")
    assert [line.split(maxsplit=1)[1] for line in ran.out.splitlines()] == [
        "task        failed      faf5b087 on arm (id 2)  x\\x1b[2J",
        "leader      changed     head (id 1) leads from now on, term 5",
        "leader      changed     head (id 1) leads from now on",
        "durability  local       no standby is in sync any more: there is one copy of what comes now",
        "durability  replicated  a standby keeps a copy of everything from now on",
        "standby     in sync     spare (id 7) has a copy of everything",
        "standby     gone        spare (id 7) keeps no copy any more",
        "standby     behind      slow (id 8) does not keep up: its copy does not count for now",
        "node        up          new (id 9)",
        "node        lost        new (id 9)  closed",
        "task        queued      faf5b087",
        "task        superseded  faf5b087  so",
    ]
    assert daemon.requests == ["GET /v1/events", "GET /v1/nodes"]
    lines = taskd("events", "--json", "--count", "1", "--kind", "task").out.splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["task.failed"]
    assert daemon.requests[-1] == "GET /v1/events?kind=task"


def test_events_need_no_names(taskd: Taskd, daemon: FakeDaemon) -> None:
    daemon.event_lines = [{"kind": "node.lost", "at": 1.767e9, "node_id": 2}] * 2
    daemon.refuse("/v1/nodes", 503, "no_leader", times=2)
    out = taskd("events").out.splitlines()
    assert [line.split(maxsplit=1)[1] for line in out] == ["node        lost        node 2"] * 2
    assert daemon.requests == ["GET /v1/events", "GET /v1/nodes"]


def test_events_go_on_when_the_daemon_is_back(start: Start, daemon: FakeDaemon) -> None:
    daemon.event_lines = [{"kind": "node.up", "at": 1.767e9, "node_id": 2, "detail": "arm"}]
    daemon.events_end = False
    process = start("events", "-f", "-n", "3", "--socket", str(daemon.path))
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().endswith(b"arm (id 2)\n")
    for _ in range(2):
        daemon.stop()
        assert process.stderr.readline().endswith(b"; trying again until it works\n")
        daemon.start()
        assert process.stderr.readline() == b"taskd: events go on here, some may be missing; head leads, term 3\n"
        assert process.stdout.readline().endswith(b"arm (id 2)\n")
    assert process.wait(20) == 0


# -- Acting ------------------------------------------------------------------------------------------------------------


def test_wait_has_the_exit_code_of_the_task(taskd: Taskd, daemon: FakeDaemon) -> None:
    for words, code in (
        (("true",), 0), (("exit", "7"), 7), (("signal", "9"), 137), (("timeout",), 124), (("expire",), 1)
    ):  # fmt: skip
        taskd("submit", "--", *words)
        ran = taskd("wait", "last")
        assert (ran.code, ran.out) == (code, "")
    taskd("submit", "--type", "fail")
    ran = taskd("wait", "last")
    assert ran.code == 1
    assert "ValueError: no luck" in ran.err


def test_wait_keeps_its_time_without_a_leader_and_without_an_answer(
    taskd: Taskd, daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskd.client.call.ANSWER_S", 0.01)
    taskd("submit", "--", "hold")
    daemon.refuse("/v1/tasks/wait", 503, "no_leader", times=1000)
    assert taskd("wait", "last", "--timeout", "0.1s").code == 124
    with silent_daemon(tmp_path / "silent.sock"):
        silent = ("--socket", str(tmp_path / "silent.sock"), "--timeout", "0.05s")
        told = "taskd: the daemon has not said in time which tasks these are\n"
        assert taskd("wait", "last", *silent) == (124, "", told)
        assert taskd("wait", "--queue", "bulk", "-q", *silent) == (124, "", "")
        assert taskd("wait", "0" * 36, *silent) == (124, "", "taskd: 1 task of 1 had not ended in time\n")


def test_wait_for_many(taskd: Taskd, daemon: FakeDaemon) -> None:
    ids = [taskd("submit", "--", *words).out.strip() for words in (("true",), ("true",), ("exit", "7"))]
    assert taskd("wait", *ids[:2]) == (0, "", "")
    ran = taskd("wait", *ids, ids[0])
    assert ran == (1, "", f"taskd: task {ids[2][-8:]}: exit code 7\n")
    results = [json.loads(line) for line in taskd("wait", "--json", "--state", "finished").out.splitlines()]
    assert {result["id"] for result in results} == set(ids)
    assert taskd("wait", "-q", *ids) == (1, "", "")


def test_wait_has_an_end(taskd: Taskd, daemon: FakeDaemon) -> None:
    taskd("submit", "--", "hold")
    ran = taskd("wait", "--timeout", "50ms", "last")
    assert ran == (124, "", "taskd: 1 task of 1 had not ended in time\n")
    ran = taskd("wait", "--timeout", "50ms", "--queue", "default")
    assert ran.code == 124
    assert taskd("wait", "--queue", "other").code == 0


def test_cancel_by_id_and_by_filter(taskd: Taskd, daemon: FakeDaemon) -> None:
    taskd("submit", "--", "true")
    taskd("submit", "--queue", "q", "--", "hold")
    assert taskd("cancel", "last").out == "cancelled 1 task\n"
    assert taskd("cancel", "last").out == "cancelled 0 tasks, 1 had ended already\n"
    taskd("submit", "--queue", "q", "--", "hold")
    ran = taskd("cancel", "--queue", "q", "--owner", "me", "--name", "n", "--json")
    assert len(json.loads(ran.out)["ids"]) == 1
    assert daemon.bodies[-1] == {"queues": ["q"], "names": ["n"], "owners": ["me"]}
    assert taskd("cancel").code == 2
    assert "not both" in taskd("cancel", "last", "--queue", "q").err


def test_retry_makes_new_tasks(taskd: Taskd, daemon: FakeDaemon) -> None:
    taskd("submit", "--", "exit", "7")
    ran = taskd("retry", "last")
    assert ran.out.strip() == list(daemon.tasks)[1]
    ran = taskd("retry", "--queue", "default", "--json")
    assert len(json.loads(ran.out)["ids"]) == 2
    assert daemon.bodies[-1]["states"] == ["failed", "timed_out", "expired"]
    taskd("submit", "--", "hold")
    assert taskd("retry", "last") == (1, "", "taskd: it has not ended\n")
    assert taskd("retry", "--json", "last") == (1, '{"ids": []}\n', "taskd: it has not ended\n")
    first, *_, last = daemon.tasks
    ran = taskd("retry", first, last)
    assert (ran.code, len(ran.out.split()), ran.err) == (0, 1, "taskd: 1 task of 2 had not ended\n")
    assert taskd("retry", "--queue", "none") == (0, "", "")
