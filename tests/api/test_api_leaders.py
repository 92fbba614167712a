"""Requests while leadership changes: the same tasks whoever answers, and what a node that does not lead may tell."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from msgspec.structs import replace

from taskd.api import cluster
from taskd.api.dispatch import dispatch, error_response, says_no_leader
from taskd.api.service import ApiRequest, ApiResponse, Caller, OwnReads
from taskd.core.task import decode_spec
from taskd.errors import Forbidden, NoLeader, Stopping, TaskdError, Unavailable
from tests.api.fakes import ALICE, FakeService, raw_id

REQUEST = ApiRequest("POST", "/v1/tasks", {}, ALICE, b'[{"argv": ["a"]}, {"argv": ["b"]}]')


@pytest.fixture
def standby(service: FakeService) -> FakeService:
    """A scheduler that has what the leader has."""
    standby = FakeService(leads=False)
    standby.leader, standby.tasks = service, service.tasks
    standby.now += 1  # Its ids are others.
    return standby


# -- Sending again -----------------------------------------------------------------------------------------------------


async def test_a_request_is_named_once_and_makes_the_same_tasks_wherever_it_comes(
    service: FakeService, standby: FakeService
) -> None:
    await dispatch(REQUEST, standby)
    (sent,) = standby.relayed
    assert len(sent.first_id) == 16
    again = await dispatch(sent, service, is_relayed=True)
    assert len(service.tasks) == 2
    assert sorted(service.tasks)[0] == sent.first_id
    assert b'"existing":0' in again.body, "to the client they are new"
    assert (await dispatch(REQUEST, standby)).status == 200
    assert len(service.tasks) == 4, "another request makes others"


@pytest.mark.parametrize("error", [NoLeader(), Stopping()])
async def test_who_ceases_to_lead_has_the_next_leader_answer(service: FakeService, error: TaskdError) -> None:
    former = FakeService()
    former.submit_error = error
    relayed: list[ApiRequest] = []

    async def relay(request: ApiRequest) -> ApiResponse:
        relayed.append(request)
        return await dispatch(request, service, is_relayed=True)

    former.relay = relay  # type: ignore[method-assign]
    assert (await dispatch(REQUEST, former)).status == 200
    assert len(service.tasks) == 2
    assert sorted(service.tasks)[0] == relayed[0].first_id


@pytest.mark.parametrize("error", [NoLeader(), Stopping()])
async def test_to_another_node_who_stops_leading_says_so(service: FakeService, error: Unavailable) -> None:
    service.submit_error = error
    first_id = service.new_task_id()
    response = await dispatch(replace(REQUEST, first_id=first_id), service, is_relayed=True)
    assert says_no_leader(response)


@pytest.mark.parametrize(
    ("response", "says"),
    [
        (error_response(NoLeader()), True),
        (error_response(Unavailable()), False),
        (error_response(Forbidden()), False),
        (ApiResponse(503, body=b"nonsense"), False),
        (ApiResponse(body=error_response(NoLeader()).body), False),
    ],
)
def test_what_means_that_nobody_leads_there(response: ApiResponse, says: bool) -> None:
    assert says_no_leader(response) is says


async def test_a_retry_that_is_answered_twice_retries_once(service: FakeService, standby: FakeService) -> None:
    one, two = await service.add(), await service.add()
    service.end(one)
    selection = b'{"states": ["finished"]}'
    await dispatch(ApiRequest("POST", "/v1/tasks/retry", {}, ALICE, selection), standby)
    (sent,) = standby.relayed
    service.end(two)  # More is selected by now: its place is not that of the first.
    status, answer = await _ask(sent, service)
    assert status == 200
    again = [decode_spec(service.tasks[raw_id(task)].spec).retry_of for task in answer["ids"]]
    assert sorted(again) == [raw_id(one), raw_id(two)]
    assert sum(1 for row in service.tasks.values() if decode_spec(row.spec).retry_of == raw_id(one)) == 1

    standby.relayed.clear()
    await standby.ask("POST", f"/v1/tasks/{one}/retry")
    count = len(service.tasks)
    await _ask(standby.relayed[0], service)
    assert len(service.tasks) == count


async def _ask(request: ApiRequest, service: FakeService) -> tuple[int, Any]:
    import msgspec

    response = await dispatch(request, service, is_relayed=True)
    return response.status, msgspec.json.decode(response.body)


@pytest.mark.parametrize("durability", ["local", "replicated"])
async def test_the_answer_tells_how_it_is_kept(service: FakeService, durability: Any) -> None:
    service.durability = durability
    _, answer = await service.ask("POST", "/v1/tasks", {"argv": ["true"]})
    assert answer["durability"] == durability
    task = answer["ids"][0]
    service.end(task)
    _, answer = await service.ask("POST", "/v1/tasks?wait=1", {"argv": ["true"], "id": task})
    assert (answer["durability"], answer["existing"]) == (durability, 1)


async def test_results_that_may_be_superseded_are_marked(service: FakeService) -> None:
    task = await service.add()
    service.provisional.add(raw_id(task))
    assert (await service.ask("GET", f"/v1/tasks/{task}"))[1]["provisional"] is False, "it has not ended"
    service.end(task)
    assert (await service.ask("GET", f"/v1/tasks/{task}"))[1]["provisional"] is True
    assert (await service.ask("GET", "/v1/tasks"))[1]["tasks"][0]["provisional"] is True


# -- Reading elsewhere -------------------------------------------------------------------------------------------------

READS = ["/v1/tasks/{}", "/v1/tasks/{}/attempts", "/v1/tasks/{}/result", "/v1/tasks/{}/result?wait=5"]


@pytest.mark.parametrize("target", READS)
async def test_a_standby_in_sync_answers_for_what_has_ended(
    service: FakeService, standby: FakeService, target: str
) -> None:
    standby.allowed_reads = OwnReads.SETTLED
    done, waiting = await service.add(), await service.add()
    service.end(done)
    assert (await standby.ask("GET", target.format(done)))[0] == 200
    assert standby.relayed == []
    for name in (waiting, done[-6:], "last", "00000000-0000-7000-8000-000000000000"):
        asking = asyncio.ensure_future(standby.ask("GET", target.format(name)))
        if name == waiting and "wait" in target:
            await service.looked.wait()
            service.end(waiting)
        await asking
        assert len(standby.relayed) == 1, name
        standby.relayed.clear()


async def test_a_standby_in_sync_answers_waits_for_what_has_ended(service: FakeService, standby: FakeService) -> None:
    standby.allowed_reads = OwnReads.SETTLED
    one, two = await service.add(), await service.add()
    service.end(one)
    for is_stream in (False, True):
        assert (await standby.ask("POST", "/v1/tasks/wait", {"ids": [one, one], "stream": is_stream}))[0] == 200
    assert standby.relayed == []
    await standby.ask("POST", "/v1/tasks/wait", {"ids": [one, two], "timeout": 0})
    await standby.ask("POST", "/v1/tasks/wait", {"ids": [one, two[-6:]], "timeout": 0})
    await standby.ask("POST", "/v1/tasks/wait", b"nonsense")
    await standby.ask("GET", "/v1/tasks")
    await standby.ask("GET", f"/v1/tasks/{one}/explain")
    assert len(standby.relayed) == 5


async def test_without_a_leader_a_scheduler_tells_what_it_has(service: FakeService, standby: FakeService) -> None:
    standby.allowed_reads, standby.leader = OwnReads.ALL, None
    task = await service.add()
    assert (await standby.ask("GET", "/v1/tasks/last"))[1]["id"] == task
    assert (await standby.ask("GET", f"/v1/tasks/{task[-6:]}/result"))[1]["state"] == "queued"
    assert [found["id"] for found in (await standby.ask("GET", "/v1/tasks"))[1]["tasks"]] == [task]
    asking = asyncio.ensure_future(standby.ask("POST", "/v1/tasks/wait", {"ids": [task]}))
    await asyncio.wait({asyncio.ensure_future(standby.looked.wait()), asking}, return_when=asyncio.FIRST_COMPLETED)
    standby.end(task)
    assert (await asking)[1]["results"][0]["state"] == "succeeded"
    assert standby.relayed == []


async def test_what_a_scheduler_without_a_leader_lacks_another_may_have(
    service: FakeService, standby: FakeService
) -> None:
    standby.allowed_reads, standby.tasks = OwnReads.ALL, {}
    task = await service.add()
    assert (await standby.ask("GET", f"/v1/tasks/{task}"))[1]["id"] == task
    assert len(standby.relayed) == 1


async def test_writes_are_the_leaders_alone(service: FakeService, standby: FakeService) -> None:
    standby.allowed_reads, standby.leader = OwnReads.ALL, None
    task = await service.add()
    for target in ("/v1/tasks", f"/v1/tasks/{task}/cancel", "/v1/tasks/cancel"):
        status, answer = await standby.ask("POST", target, {"argv": ["true"]})
        assert (status, answer["error"]["code"]) == (503, "no_leader")


# -- The cluster -------------------------------------------------------------------------------------------------------


async def test_the_cluster_is_shown_as_the_leader_sees_it(service: FakeService, standby: FakeService) -> None:
    service.durability = "replicated"
    _, answer = await standby.ask("GET", "/v1/cluster")
    assert (answer["name"], answer["node_id"], answer["durability"]) == ("second", 9, "replicated")
    assert answer["replicas"][0]["replication"] == "leading"
    _, own = await standby.ask("GET", "/v1/cluster?own=1")
    assert own["durability"] == "local"


async def test_where_the_leader_does_not_answer_a_node_tells_what_it_knows(
    standby: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    standby.leader = None
    silent = (False, "down", "the leader, head, does not answer")
    _, answer = await standby.ask("GET", "/v1/cluster")
    assert answer["name"] == "second"
    assert (answer["by_leader"], answer["health"], answer["why"]) == silent
    assert await standby.ask("GET", "/readyz") == (503, {"ready": False, "why": silent[2]})

    async def never(request: ApiRequest) -> ApiResponse:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(cluster, "LEADER_TIMEOUT_S", 0.001)
    standby.relay = never  # type: ignore[method-assign]
    _, answer = await standby.ask("GET", "/v1/cluster", caller=Caller("x", False))
    assert (answer["by_leader"], answer["health"], answer["why"]) == silent
    assert (await standby.ask("GET", "/readyz"))[0] == 503


async def test_a_former_leader_is_not_taken_at_its_word(service: FakeService, standby: FakeService) -> None:
    service.is_leader = False
    assert (await standby.ask("GET", "/v1/cluster"))[1]["name"] == "second"
    assert (await standby.ask("GET", "/readyz"))[0] == 503


async def test_a_newer_leader_may_say_more(standby: FakeService) -> None:
    ask_leader = standby.relay

    async def relay(request: ApiRequest) -> ApiResponse:
        response = await ask_leader(request)
        document = {**json.loads(response.body), "new": 1}
        document["replicas"][0]["new"] = 2
        return ApiResponse(body=json.dumps(document).encode())

    standby.relay = relay  # type: ignore[method-assign]
    _, answer = await standby.ask("GET", "/v1/cluster")
    assert (answer["by_leader"], answer["name"], "new" in answer) == (True, "second", False)


async def test_whoever_has_become_the_leader_meanwhile_needs_no_other(standby: FakeService) -> None:
    async def lose(request: ApiRequest) -> ApiResponse:
        standby.is_leader = True
        raise NoLeader()

    standby.relay = lose  # type: ignore[method-assign]
    _, answer = await standby.ask("GET", "/v1/cluster")
    assert (answer["by_leader"], answer["health"]) == (True, "ok")


async def test_a_node_is_ready_where_its_leader_takes_tasks(service: FakeService, standby: FakeService) -> None:
    assert await standby.ask("GET", "/readyz") == (200, {"ready": True, "why": ""})
    service.refuses = "the disk is full"
    for node in (service, standby):
        assert await node.ask("GET", "/readyz") == (503, {"ready": False, "why": "the disk is full"})
    standby.is_ready = False
    assert (await standby.ask("GET", "/readyz"))[1]["why"] == "no leader is known"
