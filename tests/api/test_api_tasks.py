"""Listing, showing, explaining, cancelling and retrying tasks; who may, and which tasks are meant."""

from __future__ import annotations

from typing import Any

import pytest

from taskd.api import selection, tasks
from taskd.api.views import COMMAND_CHARS_MAX, command_text
from taskd.core.task import (
    ErrorInfo,
    HttpCall,
    Outcome,
    Report,
    TaskSpec,
    TaskState,
    decode_spec,
    encode,
)
from taskd.errors import Unavailable
from tests.api.fakes import ALICE, BOB, NOW_S, ROOT, FakeService, raw_id


def error(answer: Any) -> tuple[str, str | None]:
    return answer["error"]["code"], answer["error"].get("field")


# -- Lists -------------------------------------------------------------------------------------------------------------


async def test_a_list_is_newest_first_and_shows_what_matters(service: FakeService) -> None:
    first = await service.add({"argv": ["echo", "a b"], "name": "one", "labels": {"team": "x"}, "priority": 4})
    second = await service.add({"type": "resize", "params": {"width": 5}})
    service.end(first, Report(exit_code=3), Outcome.EXIT_NONZERO, TaskState.FAILED, reason="it broke")
    status, answer = await service.ask("GET", "/v1/tasks")
    assert status == 200
    assert [task["id"] for task in answer["tasks"]] == [second, first]
    assert answer["cursor"] is None
    assert answer["tasks"][1] == {
        "id": first, "type": "command", "name": "one", "state": "failed", "queue": "default", "priority": 4,
        "owner": "alice", "submitted": NOW_S, "changed": NOW_S, "finished": NOW_S, "attempt": 1, "worker": 8,
        "worker_name": "worker-a", "started": NOW_S, "exit_code": 3, "reason": "it broke", "labels": {"team": "x"},
        "command": "echo 'a b'", "provisional": False,
    }  # fmt: skip
    waiting = answer["tasks"][0]
    assert (waiting["state"], waiting["attempt"], waiting["worker"], waiting["finished"]) == ("queued", 0, None, None)


async def test_pages_meet_each_task_once(service: FakeService) -> None:
    ids = [await service.add() for _ in range(5)]
    seen, cursor, pages = [], "", 0
    while cursor is not None:
        _, answer = await service.ask("GET", "/v1/tasks?limit=2" + (f"&cursor={cursor}" if cursor else ""))
        seen += [task["id"] for task in answer["tasks"]]
        cursor, pages = answer["cursor"], pages + 1
    assert seen == ids[::-1]
    assert pages == 3


async def test_a_full_last_page_has_no_cursor(service: FakeService) -> None:
    for _ in range(4):
        await service.add()
    _, answer = await service.ask("GET", "/v1/tasks?limit=2")
    _, answer = await service.ask("GET", f"/v1/tasks?limit=2&cursor={answer['cursor']}")
    assert (len(answer["tasks"]), answer["cursor"]) == (2, None)


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ("state=queued", 2),
        ("state=succeeded", 1),
        ("state=queued,succeeded", 3),
        ("state=unfinished", 2),
        ("state=finished", 1),
        ("queue=ci", 1),
        ("type=resize", 1),
        ("type=resize,command", 3),
        ("owner=bob", 1),
        ("owner=me", 2),
        ("name=build", 1),
        ("label=team=x", 2),
        ("label=team=x,stage=dev", 1),
        ("label=team=y", 0),
        ("queue=ci&owner=bob", 0),
    ],
)
async def test_filters(service: FakeService, query: str, count: int) -> None:
    done = await service.add({"argv": ["a"], "queue": "ci", "labels": {"team": "x", "stage": "dev"}})
    await service.add({"type": "resize", "name": "build"})
    await service.add({"argv": ["a"], "labels": {"team": "x"}}, BOB)
    service.end(done)
    status, answer = await service.ask("GET", f"/v1/tasks?{query}")
    assert (status, len(answer["tasks"])) == (200, count)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("state=done", "state"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=ten", "limit"),
        ("limit=+5", "limit"),
        ("limit=", "limit"),
        ("cursor=xyz", "cursor"),
        ("label=team", "label"),
        ("label==x", "label"),
        ("stat=queued", "stat"),
    ],
)
async def test_what_a_list_does_not_take(service: FakeService, query: str, field: str) -> None:
    status, answer = await service.ask("GET", f"/v1/tasks?{query}")
    assert (status, error(answer)) == (400, ("invalid", field))


# -- One task ----------------------------------------------------------------------------------------------------------


async def test_a_task_in_full(service: FakeService) -> None:
    task = await service.add({
        "argv": ["make"], "env": {"A": "b"}, "cwd": "/src", "cpus": 2, "memory": "1MiB", "constraints": ["gpu"],
        "timeout": 60, "retries": 2, "deadline": 60, "on_lost": "fail", "secrets": {"TOKEN": "api"},
    })  # fmt: skip
    report = Report(
        exit_code=2, result=b'{"a": 1.0}', error=ErrorInfo("ExitStatus", "2"), stdout_tail=b"caf\xc3\xa9 \xff",
        stdout_bytes=7, stderr_bytes=0, memory_peak_bytes=1 << 20, cpu_s=0.5,
    )  # fmt: skip
    service.end(task, report, Outcome.EXIT_NONZERO, TaskState.RETRYING)
    status, answer = await service.ask("GET", f"/v1/tasks/{task}")
    assert status == 200
    assert answer["resources"] == {"cpus": 2.0, "memory": 1 << 20}
    assert (answer["argv"], answer["env"], answer["cwd"], answer["params"]) == (["make"], {"A": "b"}, "/src", None)
    assert answer["secrets"] == {"TOKEN": "api"}
    assert (answer["deadline"], answer["timeout"], answer["retries"]) == (NOW_S + 60, 60, 2)
    assert answer["backoff"] == {"initial": 1, "factor": 2, "max": 300, "jitter": 0.1}
    assert (answer["result"], answer["error"]) == ({"a": 1.0}, {"type": "ExitStatus", "message": "2"})
    (attempt,) = answer["attempts"]
    assert attempt == {
        "number": 1, "worker": 8, "worker_name": "worker-a", "dispatched": NOW_S, "started": NOW_S, "ended": NOW_S,
        "outcome": "exit_nonzero", "fence": f"3.7.99.5.1.{task.replace('-', '')}", "exit_code": 2, "signal": None,
        "error": {"type": "ExitStatus", "message": "2"}, "reason": "", "stdout_tail": "café \ufffd", "stderr_tail": "",
        "stdout_bytes": 7, "stderr_bytes": 0, "memory_peak_bytes": 1 << 20, "cpu_s": 0.5,
    }  # fmt: skip
    assert await service.ask("GET", f"/v1/tasks/{task}/attempts") == (200, {"attempts": [attempt]})


async def test_results_are_passed_on_as_they_were_written(service: FakeService) -> None:
    task = await service.add({"type": "resize"})
    service.end(task, Report(result=b'{"price": 1.10, "big": 12345678901234567890123}'))
    response = await service.response("GET", f"/v1/tasks/{task}")
    assert b'"result":{"price": 1.10, "big": 12345678901234567890123}' in response.body


@pytest.mark.parametrize(
    ("report", "key", "value"),
    [
        (encode(Report(result=b"{not json")), "result", "{not json"),
        (encode(Report(result=b'"\xff"')), "result", '"\ufffd"'),
        (b"\xc1garbage", "error", {"type": "UnreadableReport"}),
    ],
)
async def test_a_damaged_report_does_not_break_the_answer(
    service: FakeService, report: bytes, key: str, value: Any
) -> None:
    task = await service.add({"type": "resize"})
    service.end(task, report)
    status, answer = await service.ask("GET", f"/v1/tasks/{task}/result")
    found = answer[key]
    assert status == 200
    assert found == value or found["type"] == value["type"]


async def test_an_unreadable_report_in_lists(service: FakeService) -> None:
    service.end(await service.add(), b"\xc1garbage")
    status, answer = await service.ask("GET", "/v1/tasks")
    assert (status, answer["tasks"][0]["exit_code"]) == (200, None)


async def test_a_waiting_task_says_until_when(service: FakeService) -> None:
    task = await service.add({"argv": ["a"], "delay": 60})
    _, answer = await service.ask("GET", f"/v1/tasks/{task}")
    assert (answer["state"], answer["due"], answer["not_before"]) == ("scheduled", NOW_S + 60, NOW_S + 60)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (TaskSpec("command", argv=("echo", "it's", "")), """echo 'it'"'"'s' ''"""),
        (TaskSpec("command", shell="a |\n  b"), "a | b"),
        (TaskSpec("http", http=HttpCall("http://a/b", "GET")), "GET http://a/b"),
        (TaskSpec("resize", params=b"{}"), "resize"),
        (TaskSpec("resize", params=b'{"a": 1}'), 'resize {"a": 1}'),
        (TaskSpec("resize", params='{"ä": 1}'.encode() * 1000), None),
        (TaskSpec("command", argv=("x" * 100_000,) * 3), None),
    ],
)
def test_commands_for_people(spec: TaskSpec, text: str | None) -> None:
    shown = command_text(spec)
    if text is None:
        assert len(shown) == COMMAND_CHARS_MAX
        assert shown.endswith("…")
    else:
        assert shown == text


# -- Which task --------------------------------------------------------------------------------------------------------


async def test_ways_to_name_a_task(service: FakeService) -> None:
    task = await service.add()
    await service.add(caller=BOB)
    for name in (task, task.upper(), task.replace("-", ""), task[-4:], task[-15:], task[-4:].upper(), "last"):
        status, answer = await service.ask("GET", f"/v1/tasks/{name}")
        assert (status, answer["id"]) == (200, task), name


async def test_an_end_that_fits_two_tasks(service: FakeService) -> None:
    task = await service.add()
    other = raw_id(task)[:8] + b"\x81" + raw_id(task)[9:]
    service.tasks[other] = service.tasks[raw_id(task)]
    status, answer = await service.ask("GET", f"/v1/tasks/{task[-6:]}")
    assert (status, error(answer)) == (409, ("ambiguous", "id"))
    assert (await service.ask("GET", f"/v1/tasks/{task}"))[0] == 200


@pytest.mark.parametrize("name", ["abc", "xyzw", "----", "a b c d", "%2e%2e", "1" * 33, "{id}"])
async def test_what_names_no_task(service: FakeService, name: str) -> None:
    status, answer = await service.ask("GET", f"/v1/tasks/{name}")
    assert (status, error(answer)) == (400, ("invalid", "id"))


@pytest.mark.parametrize("name", ["ffff", "0198f000-0000-7000-8000-000000000000", "last"])
async def test_tasks_that_are_not_there(service: FakeService, name: str) -> None:
    for what in ("", "/attempts", "/output", "/result", "/explain"):
        status, answer = await service.ask("GET", f"/v1/tasks/{name}{what}")
        assert (status, error(answer)) == (404, ("not_found", "id"))
    for what in ("/cancel", "/retry"):
        assert (await service.ask("POST", f"/v1/tasks/{name}{what}"))[0] == 404


# -- Why ---------------------------------------------------------------------------------------------------------------


async def test_explanations(service: FakeService) -> None:
    task = await service.add()
    status, answer = await service.ask("GET", f"/v1/tasks/{task}/explain")
    assert (status, answer["reason"], answer["nodes"][0]["ever"]) == (200, "Resources", True)
    service.end(task, outcome=Outcome.TIMEOUT, state=TaskState.TIMED_OUT)
    status, answer = await service.ask("GET", f"/v1/tasks/{task}/explain")
    assert (status, answer["reason"], answer["text"]) == (200, "Ended", "it has ended: timed out")


@pytest.mark.parametrize(
    ("report", "cause"),
    [
        (Report(exit_code=7), " (exit code 7)"),
        (Report(signal=9), " (signal 9)"),
        (Report(error=ErrorInfo("ValueError", "no luck")), " (ValueError: no luck)"),
        (Report(error=ErrorInfo("ValueError", "")), " (ValueError)"),
        (Report(), ""),
    ],
)
async def test_explanations_of_what_has_ended_give_the_cause(service: FakeService, report: Report, cause: str) -> None:
    task = await service.add()
    service.end(task, report, outcome=Outcome.EXCEPTION, state=TaskState.FAILED)
    _, answer = await service.ask("GET", f"/v1/tasks/{task}/explain")
    assert answer["text"] == f"it has ended: failed{cause}"


# -- Cancel ------------------------------------------------------------------------------------------------------------


async def test_cancel_one(service: FakeService) -> None:
    task = await service.add()
    assert await service.ask("POST", f"/v1/tasks/{task}/cancel") == (200, {"ids": [task], "cursor": None})
    # A second time there is nothing left to do, and nothing wrong.
    assert await service.ask("POST", f"/v1/tasks/{task}/cancel") == (200, {"ids": [], "cursor": None})


async def test_cancel_of_what_has_ended_otherwise(service: FakeService) -> None:
    task = await service.add()
    service.end(task)
    status, answer = await service.ask("POST", f"/v1/tasks/{task}/cancel")
    assert (status, error(answer)) == (409, ("conflict", None))
    assert "succeeded" in answer["error"]["message"]


async def test_only_the_owner_and_admins_may_cancel_and_retry(service: FakeService) -> None:
    task = await service.add(caller=ALICE)
    for what in ("cancel", "retry"):
        status, answer = await service.ask("POST", f"/v1/tasks/{task}/{what}", caller=BOB)
        assert (status, error(answer)) == (403, ("forbidden", None))
        status, answer = await service.ask("POST", f"/v1/tasks/{what}", {"ids": [task]}, BOB)
        assert (status, error(answer)) == (403, ("forbidden", None))
    assert (await service.ask("GET", f"/v1/tasks/{task}", caller=BOB))[0] == 200, "everybody may read"
    assert (await service.ask("POST", f"/v1/tasks/{task}/cancel", caller=ROOT))[0] == 200
    assert (await service.ask("POST", f"/v1/tasks/{task}/retry", caller=ROOT))[0] == 200


async def test_cancel_a_selection(service: FakeService) -> None:
    mine = [await service.add({"argv": ["a"], "queue": "ci"}) for _ in range(3)]
    service.end(mine[0])
    await service.add({"argv": ["a"], "queue": "other"})
    theirs = await service.add({"argv": ["a"], "queue": "ci"}, BOB)
    status, answer = await service.ask("POST", "/v1/tasks/cancel", {"queues": ["ci"]})
    assert (status, sorted(answer["ids"]), answer["cursor"]) == (200, mine[1:], None)
    status, answer = await service.ask("POST", "/v1/tasks/cancel", {"queues": ["ci"]}, ROOT)
    assert (status, answer["ids"]) == (200, [theirs])


async def test_cancel_by_ids_and_more_conditions(service: FakeService) -> None:
    one = await service.add({"argv": ["a"], "labels": {"k": "v"}})
    two = await service.add({"argv": ["a"]})
    for narrower in ({"labels": {"k": "v"}}, {"queues": ["x"]}, {"types": ["x"]}, {"names": ["x"]}, {"owners": ["x"]}):
        wanted = [one] if "labels" in narrower else []
        status, answer = await service.ask("POST", "/v1/tasks/cancel", {"ids": [one[-6:], two], **narrower})
        assert (status, answer["ids"]) == (200, wanted)
    status, answer = await service.ask("POST", "/v1/tasks/cancel", {"ids": [one, two, "last"], "states": ["running"]})
    assert (status, answer["ids"]) == (200, [])


async def test_an_unknown_id_stops_all(service: FakeService) -> None:
    task = await service.add()
    gone = "0198f000-0000-7000-8000-000000000000"
    status, answer = await service.ask("POST", "/v1/tasks/cancel", {"ids": [task, gone]})
    assert (status, error(answer)) == (404, ("not_found", "ids"))
    assert gone in answer["error"]["message"]
    assert service.tasks[raw_id(task)].state == TaskState.QUEUED


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({}, 400, None),
        ({"states": ["done"]}, 400, "states"),
        ({"ids": ["last"]}, 404, "ids[0]"),
        ({"ids": ["ffff"]}, 404, "ids[0]"),
        ({"ids": [5]}, 400, "ids[0]"),
        ({"queue": "ci"}, 400, "queue"),
        ({"queues": ["ci"], "cursor": "x"}, 400, "cursor"),
        ({"owners": ["bob"]}, 403, None),
        (None, 400, None),
    ],
)
@pytest.mark.parametrize("what", ["cancel", "retry"])
async def test_selections_that_are_refused(
    service: FakeService, what: str, body: Any, status: int, field: str | None
) -> None:
    answered, answer = await service.ask("POST", f"/v1/tasks/{what}", body)
    assert (answered, error(answer)[1]) == (status, field)


async def test_bounds_of_ids(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "IDS_MAX", 3)
    ids = [await service.add() for _ in range(4)]
    assert (await service.ask("POST", "/v1/tasks/cancel", {"ids": ids}))[0] == 413
    monkeypatch.setattr(selection, "ENDINGS_MAX", 1)
    status, answer = await service.ask("POST", "/v1/tasks/cancel", {"ids": [ids[0][-6:], ids[1][-6:]]})
    assert (status, error(answer)) == (413, ("too_large", "ids[1]"))


async def test_a_selection_of_many_goes_on_from_its_cursor(
    service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(tasks, "SELECTED_MAX", 4)
    ids = [await service.add() for _ in range(7)]
    for task in ids:
        service.end(task)
    new: list[str] = []
    body: dict[str, Any] = {"states": ["succeeded"]}
    calls = 0
    while True:
        status, answer = await service.ask("POST", "/v1/tasks/retry", body)
        assert status == 200
        new += answer["ids"]
        calls += 1
        if answer["cursor"] is None:
            break
        body["cursor"] = answer["cursor"]
    assert (len(set(new)), calls) == (7, 2)
    assert {decode_spec(service.tasks[raw_id(task)].spec).retry_of for task in new} == set(map(raw_id, ids))


async def test_an_error_after_the_first_batch_leaves_a_cursor(
    service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "ROWS_AT_ONCE", 2)
    ids = [await service.add() for _ in range(3)]
    cancel = service.cancel

    async def cancel_once(batch: list[bytes]) -> list[bytes]:
        done = await cancel(batch)
        service.cancel_error = Unavailable("the disk is gone")
        return done

    monkeypatch.setattr(service, "cancel", cancel_once)
    status, answer = await service.ask("POST", "/v1/tasks/cancel", {"states": ["queued"]})
    assert (status, answer) == (200, {"ids": [ids[2], ids[1]], "cursor": ids[1]})
    status, answer = await service.ask("POST", "/v1/tasks/cancel", {"states": ["queued"], "cursor": ids[1]})
    assert (status, error(answer)) == (503, ("unavailable", None))


# -- Retry -------------------------------------------------------------------------------------------------------------


async def test_a_retry_is_a_new_task(service: FakeService) -> None:
    task = await service.add({"argv": ["make"], "delay": 10, "deadline": 60, "labels": {"a": "b"}, "retries": 2})
    service.end(task, Report(exit_code=1), Outcome.EXIT_NONZERO, TaskState.FAILED)
    service.now += 1000
    status, answer = await service.ask("POST", f"/v1/tasks/{task}/retry", caller=ROOT)
    assert status == 200
    (new,) = answer["ids"]
    assert new != task
    _, detail = await service.ask("GET", f"/v1/tasks/{new}")
    assert (detail["retry_of"], detail["state"], detail["attempts"]) == (task, "queued", [])
    assert (detail["owner"], detail["labels"], detail["retries"]) == ("alice", {"a": "b"}, 2)
    assert (detail["submitted"], detail["not_before"], detail["deadline"]) == (NOW_S + 1000, None, NOW_S + 1060)
    assert (await service.ask("GET", f"/v1/tasks/{task}"))[1]["state"] == "failed"


async def test_what_has_not_ended_is_not_retried(service: FakeService) -> None:
    task = await service.add()
    service.start(task)
    status, answer = await service.ask("POST", f"/v1/tasks/{task}/retry")
    assert (status, error(answer)) == (409, ("conflict", None))
    assert await service.ask("POST", "/v1/tasks/retry", {"ids": [task]}) == (200, {"ids": [], "cursor": None})


async def test_retries_keep_the_order_of_submission(service: FakeService) -> None:
    ids = [await service.add() for _ in range(3)]
    for task in ids:
        service.end(task)
    _, answer = await service.ask("POST", "/v1/tasks/retry", {"states": ["finished"]})
    again = [decode_spec(service.tasks[raw_id(task)].spec).retry_of for task in sorted(answer["ids"])]
    assert again == [raw_id(task) for task in ids]
