"""Waiting for tasks: in one answer, as lines, and what happens when the time is up or the daemon stops."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from taskd.api import waiting
from taskd.core.task import ErrorInfo, Outcome, Report, TaskState
from tests.api.fakes import ALICE, FakeService


async def when_waiting(service: FakeService, request: asyncio.Task[Any]) -> None:
    """Until the request waits for a task."""
    await asyncio.wait({asyncio.ensure_future(service.looked.wait()), request}, return_when=asyncio.FIRST_COMPLETED)
    assert not request.done(), request.result()


def ended(task: str, **fields: Any) -> dict[str, Any]:
    return {
        "id": task, "state": "succeeded", "result": None, "exit_code": None, "signal": None, "error": None,
        "reason": "", "attempts": 1, **fields,
    }  # fmt: skip


# -- One result --------------------------------------------------------------------------------------------------------


async def test_the_result_of_an_ended_task(service: FakeService) -> None:
    task = await service.add({"type": "resize"})
    service.end(task, Report(result=b"[1,2]"))
    for target in ("result", "result?wait=30"):
        assert await service.ask("GET", f"/v1/tasks/{task}/{target}") == (200, ended(task, result=[1, 2]))


async def test_the_result_of_a_failed_task(service: FakeService) -> None:
    task = await service.add({"type": "resize"})
    error = ErrorInfo("ValueError", "no such file", "Traceback …")
    service.end(task, Report(error=error), Outcome.EXCEPTION, TaskState.FAILED, "it failed 1 time")
    _, answer = await service.ask("GET", f"/v1/tasks/{task}/result")
    shown = {"type": "ValueError", "message": "no such file", "traceback": "Traceback …"}
    assert answer == ended(task, state="failed", error=shown, reason="it failed 1 time")


async def test_a_task_that_has_not_ended_answers_how_it_stands(service: FakeService) -> None:
    task = await service.add()
    assert await service.ask("GET", f"/v1/tasks/{task}/result") == (200, ended(task, state="queued", attempts=0))
    service.start(task)
    status, answer = await service.ask("GET", f"/v1/tasks/{task}/result?wait=0.01")
    assert (status, answer) == (200, ended(task, state="running"))
    assert service.watches == []


@pytest.mark.parametrize("wait", ["30", "1h"])
async def test_the_result_comes_when_the_task_ends(service: FakeService, wait: str) -> None:
    task = await service.add()
    request = asyncio.create_task(service.ask("GET", f"/v1/tasks/{task}/result?wait={wait}"))
    await when_waiting(service, request)
    service.end(task, Report(exit_code=0))
    assert await request == (200, ended(task, exit_code=0))
    assert service.watches == []


async def test_a_long_wait_begins_its_answer_at_once(service: FakeService) -> None:
    task = await service.add()
    response = await service.response("GET", f"/v1/tasks/{task}/result?wait=1h")
    assert response.status == 200
    assert response.stream is not None
    assert len(service.watches) == 1
    await response.stream.aclose()  # type: ignore[attr-defined]


@pytest.mark.parametrize("wait", ["soon", "-1", "2d"])
async def test_waits_that_are_refused(service: FakeService, wait: str) -> None:
    task = await service.add()
    for method, target in (("GET", f"/v1/tasks/{task}/result"), ("POST", "/v1/tasks")):
        status, answer = await service.ask(method, f"{target}?wait={wait}", {"argv": ["a"]})
        assert (status, answer["error"]["field"]) == (400, "wait")
    assert len(service.tasks) == 1


# -- Several -----------------------------------------------------------------------------------------------------------


async def test_wait_answers_when_all_have_ended_in_the_order_asked(service: FakeService) -> None:
    one, two, three = [await service.add() for _ in range(3)]
    service.end(two)
    body = {"ids": [one, two, three, two], "timeout": 30}
    request = asyncio.create_task(service.ask("POST", "/v1/tasks/wait", body))
    await when_waiting(service, request)
    service.end(three)
    service.end(one, Report(exit_code=1), Outcome.EXIT_NONZERO, TaskState.FAILED)
    status, answer = await request
    assert (status, answer["pending"]) == (200, 0)
    assert [(result["id"], result["state"]) for result in answer["results"]] == [
        (one, "failed"), (two, "succeeded"), (three, "succeeded"),
    ]  # fmt: skip
    assert service.watches == []


async def test_wait_answers_with_what_there_is_when_the_time_is_up(service: FakeService) -> None:
    one, two = await service.add(), await service.add()
    service.end(one)
    for timeout in (0, 0.01):
        status, answer = await service.ask("POST", "/v1/tasks/wait", {"ids": [one, two], "timeout": timeout})
        assert (status, answer) == (200, {"results": [ended(one, exit_code=0)], "pending": 1})


async def test_wait_takes_ends_of_ids_and_last(service: FakeService) -> None:
    one = await service.add()
    service.end(one)
    status, answer = await service.ask("POST", "/v1/tasks/wait", {"ids": [one[-6:], "last"]})
    assert (status, len(answer["results"])) == (200, 1)


async def test_lines_come_as_tasks_end(service: FakeService) -> None:
    one, two, three = [await service.add() for _ in range(3)]
    service.end(one)
    response = await service.response("POST", "/v1/tasks/wait", {"ids": [one, two, three], "stream": True})
    assert (response.status, response.content_type) == (200, "application/x-ndjson")
    assert response.stream is not None
    assert msgspec.json.decode(await anext(response.stream))["id"] == one
    for task in (three, two):
        line = asyncio.ensure_future(anext(response.stream))
        await asyncio.sleep(0)
        service.end(task)
        assert msgspec.json.decode(await line)["id"] == task
    assert await anext(response.stream, None) is None
    assert service.watches == []


async def test_tasks_that_end_while_a_line_is_on_its_way_are_not_missed(service: FakeService) -> None:
    one, two = await service.add(), await service.add()
    response = await service.response("POST", "/v1/tasks/wait", {"ids": [one, two], "stream": True})
    assert response.stream is not None
    line = asyncio.ensure_future(anext(response.stream))
    await asyncio.sleep(0)
    service.end(one)
    assert msgspec.json.decode(await line)["id"] == one
    service.end(two)  # Nobody waits at this moment: the client is reading the first line.
    assert msgspec.json.decode(await anext(response.stream))["id"] == two
    assert await anext(response.stream, None) is None


async def test_lines_end_when_the_time_is_up(service: FakeService) -> None:
    one, two = await service.add(), await service.add()
    service.end(one)
    body = {"ids": [one, two], "stream": True, "timeout": 0.01}
    status, lines = await service.ask("POST", "/v1/tasks/wait", body)
    assert (status, [line["id"] for line in lines]) == (200, [one])


async def test_a_stream_is_left(service: FakeService) -> None:
    one = await service.add()
    response = await service.response("POST", "/v1/tasks/wait", {"ids": [one], "stream": True})
    assert response.stream is not None
    reader = asyncio.create_task(anext(response.stream))  # type: ignore[arg-type]
    await when_waiting(service, reader)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert service.watches == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_daemon_that_stops_says_so(service: FakeService, stream: bool) -> None:
    one, two = await service.add(), await service.add()
    service.end(one)
    request = asyncio.create_task(service.ask("POST", "/v1/tasks/wait", {"ids": [one, two], "stream": stream}))
    await when_waiting(service, request)
    service.is_stopping = True
    service.watches[0].stop()
    status, answer = await request
    if stream:
        assert (status, answer[0]["id"], answer[1]["error"]["code"]) == (200, one, "unavailable")
    else:
        assert (status, answer["error"]["code"]) == (503, "unavailable")


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({}, 400, "ids"),
        ({"ids": []}, 400, "ids"),
        ({"ids": ["last"]}, 404, "ids[0]"),
        ({"ids": ["xyz"]}, 400, "ids[0]"),
        ({"ids": ["0198f000-0000-7000-8000-000000000000"]}, 404, "ids[0]"),
        ({"ids": ["a"], "timeout": -1}, 400, "timeout"),
        ({"ids": ["a"], "timeout": 1e6}, 400, "timeout"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_waits_for_nothing(
    service: FakeService, body: dict[str, Any], status: int, field: str, stream: bool
) -> None:
    answered, answer = await service.ask("POST", "/v1/tasks/wait", {**body, "stream": stream})
    assert (answered, answer["error"]["field"]) == (status, field)
    assert service.watches == []


async def test_results_too_large_for_one_answer(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "RESULTS_BYTES_MAX", 100)
    task = await service.add()
    request = asyncio.create_task(service.ask("POST", "/v1/tasks/wait", {"ids": [task]}))
    await when_waiting(service, request)
    service.end(task, Report(result=b"[" + b"1," * 100 + b"1]"))
    status, answer = await request
    assert (status, answer["error"]["code"]) == (413, "too_large")
    status, lines = await service.ask("POST", "/v1/tasks/wait", {"ids": [task], "stream": True})
    assert (status, len(lines)) == (200, 1)


# -- With the submission -----------------------------------------------------------------------------------------------


async def test_a_submission_that_waits(service: FakeService) -> None:
    request = asyncio.create_task(service.ask("POST", "/v1/tasks?wait=30", [{"type": "a"}, {"type": "b"}]))
    await when_waiting(service, request)
    one, two = [task_id.hex() for task_id in service.tasks]
    service.end(two, Report(result=b'"b"'))
    service.end(one, Report(result=b'"a"'))
    status, answer = await request
    assert (status, answer["pending"]) == (200, 0)
    assert [result["result"] for result in answer["results"]] == ["a", "b"]
    assert [result["id"] for result in answer["results"]] == answer["ids"]


async def test_a_submission_that_waits_in_vain(service: FakeService) -> None:
    status, answer = await service.ask("POST", "/v1/tasks?wait=10ms", {"type": "a"})
    assert (status, len(answer["ids"]), answer["pending"]) == (200, 1, 1)
    assert answer["results"] == []


async def test_a_submission_that_streams(service: FakeService) -> None:
    response = await service.response("POST", "/v1/tasks?stream=1", [{"type": "a"}, {"type": "b"}])
    assert response.content_type == "application/x-ndjson"
    assert response.stream is not None
    accepted = msgspec.json.decode(await anext(response.stream))
    assert len(accepted["ids"]) == 2
    for task in reversed(accepted["ids"]):
        line = asyncio.ensure_future(anext(response.stream))
        await asyncio.sleep(0)
        service.end(task)
        assert msgspec.json.decode(await line)["id"] == task
    assert await anext(response.stream, None) is None


async def test_many_results_come_in_order_of_their_end(service: FakeService) -> None:
    ids = [await service.add({"type": "a"}) for _ in range(3 * waiting.RESULTS_AT_ONCE + 1)]
    for number, task in enumerate(ids):
        service.end(task, Report(result=b"%d" % number))
    status, lines = await service.ask("POST", "/v1/tasks/wait", {"ids": ids, "stream": True}, ALICE)
    assert status == 200
    assert [line["result"] for line in lines] == [*range(len(ids))]
