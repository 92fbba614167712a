"""Finding the route, rights, relaying, and the one form of errors."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from taskd.api.dispatch import TARGET_CHARS_MAX
from taskd.api.routes import ROUTES, allowed_methods, find_route
from taskd.api.service import Caller
from taskd.errors import MethodNotAllowed, NotFound, TaskdError
from tests.api.fakes import ALICE, BOB, ROOT, FakeService

READER = Caller("alice", False, may_change=False)

# -- Routes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_every_route_is_found(route: Any) -> None:
    found, argument = find_route(route.method, route.path.replace("{id}", "a%20b"))
    assert found is route
    assert argument == ("a b" if "{id}" in route.path else "")


@pytest.mark.parametrize(
    "path",
    ["", "/v1", "/v1/", "/v1/tasks/", "/v2/tasks", "//v1/tasks", "/v1/tasks//cancel", "/v1/tasks/x/y",
     "/v1/tasks/x/cancel/z", "/v1/nodes/{id}/{id}", "/../v1/tasks", "/V1/tasks"],
)  # fmt: skip
def test_paths_that_lead_nowhere(path: str) -> None:
    with pytest.raises(NotFound, match=r"GET /openapi\.json tells"):
        find_route("GET", path)
    assert allowed_methods(path) == ()


def test_methods() -> None:
    with pytest.raises(MethodNotAllowed, match="/v1/tasks takes POST and GET, not PUT"):
        find_route("PUT", "/v1/tasks")
    assert allowed_methods("/v1/tasks") == ("POST", "GET")
    assert allowed_methods("/v1/tasks/cancel") == ("POST",), "a fixed word goes before an id"


async def test_errors_have_one_form(service: FakeService) -> None:
    for method, target, status, code in [
        ("GET", "/nothing", 404, "not_found"),
        ("DELETE", "/v1/tasks", 405, "method_not_allowed"),
        ("GET", "/v1/tasks?colour=red", 400, "invalid"),
        ("GET", "/healthz?verbose=1", 400, "invalid"),
    ]:
        answered, answer = await service.ask(method, target)
        assert (answered, answer["error"]["code"]) == (status, code)
        assert answer.keys() == {"error"}


# -- Relaying ----------------------------------------------------------------------------------------------------------

LEADERS = [route for route in ROUTES if route.by_leader]
OWN = [route for route in ROUTES if not route.by_leader]


@pytest.mark.parametrize("route", LEADERS, ids=lambda route: f"{route.method} {route.path}")
async def test_what_only_the_leader_can_answer_is_relayed_as_it_came(route: Any) -> None:
    follower = FakeService(leads=False)
    path = route.path.replace("{id}", "last")
    status, answer = await follower.ask(route.method, path, b"{}", ROOT)
    assert (status, answer["error"]["code"]) == (503, "no_leader")
    (request,) = follower.relayed
    assert (request.method, request.path, request.body, request.caller) == (route.method, path, b"{}", ROOT)
    assert request.argument == ""


@pytest.mark.parametrize("route", OWN, ids=lambda route: f"{route.method} {route.path}")
async def test_what_any_node_answers_is_not_relayed(route: Any) -> None:
    follower = FakeService(leads=False)
    target = route.path + ("?own=1" if any(parameter.name == "own" for parameter in route.parameters) else "")
    status, _ = await follower.ask(route.method, target, caller=ROOT if route.needs_admin else ALICE)
    assert status == 200
    assert follower.relayed == []


@pytest.mark.parametrize("route", OWN, ids=lambda route: f"{route.method} {route.path}")
async def test_another_node_gets_nothing_of_what_each_answers_for_itself(service: FakeService, route: Any) -> None:
    status, _ = await service.ask(route.method, route.path, caller=ROOT, is_relayed=True)
    assert status == (200 if route.path == "/v1/cluster" else 403)


async def test_a_follower_answers_what_the_leader_answers(service: FakeService) -> None:
    follower = FakeService(leads=False)
    follower.leader = service
    _, accepted = await follower.ask("POST", "/v1/tasks", {"argv": ["true"]}, BOB)
    (task,) = accepted["ids"]
    _, detail = await follower.ask("GET", f"/v1/tasks/{task}", caller=ALICE)
    assert detail["owner"] == "bob"
    status, answer = await follower.ask("POST", f"/v1/tasks/{task}/cancel", caller=ALICE)
    assert (status, answer["error"]["code"]) == (403, "forbidden")
    service.end(task)
    status, lines = await follower.ask("POST", "/v1/tasks/wait", {"ids": [task], "stream": True})
    assert (status, lines[0]["state"]) == (200, "succeeded")


async def test_what_is_wrong_in_any_case_is_not_relayed() -> None:
    follower = FakeService(leads=False)
    assert (await follower.ask("GET", "/nothing"))[0] == 404
    assert (await follower.ask("GET", "/v1/tasks?colour=red"))[0] == 400
    assert (await follower.ask("POST", "/v1/nodes/8/drain"))[0] == 403
    assert (await follower.ask("GET", f"/v1/tasks?name={'ä' * (TARGET_CHARS_MAX // 6)}"))[0] == 413
    assert follower.relayed == []


async def test_nobody_relays_twice() -> None:
    one, other = FakeService(leads=False), FakeService(leads=False)
    one.leader, other.leader = other, one
    status, answer = await one.ask("GET", "/v1/tasks")
    assert (status, answer["error"]["code"]) == (503, "no_leader")
    assert (len(one.relayed), len(other.relayed)) == (1, 0)


# -- What nobody expects -----------------------------------------------------------------------------------------------


async def test_an_unexpected_error_is_logged_and_only_its_reference_is_told(
    service: FakeService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def boom() -> None:
        raise ZeroDivisionError("the secret")

    monkeypatch.setattr(service, "nodes", boom)
    with caplog.at_level(logging.ERROR, "taskd.api"):
        status, answer = await service.ask("GET", "/v1/nodes")
    assert (status, answer["error"]["code"]) == (500, "internal")
    reference = answer["error"]["message"].split()[-1]
    assert "secret" not in answer["error"]["message"]
    assert f"reference={reference}" in caplog.text
    assert "ZeroDivisionError: the secret" in caplog.text


async def test_an_unexpected_error_in_a_stream(service: FakeService, caplog: pytest.LogCaptureFixture) -> None:
    async def breaking(offset: int, follow: bool) -> AsyncIterator[bytes]:
        yield b"one"
        raise ZeroDivisionError("the secret")

    task = await service.add()
    service.start(task)
    service.outputs[1, "stdout"] = breaking
    response = await service.response("GET", f"/v1/tasks/{task}/output")
    assert response.stream is not None
    assert await anext(response.stream) == b"one"
    with caplog.at_level(logging.ERROR, "taskd.api"), pytest.raises(TaskdError, match="under the reference"):
        await anext(response.stream)
    assert "ZeroDivisionError: the secret" in caplog.text
    assert service.open_streams == 0


async def test_whoever_has_or_wants_a_backup_is_audited(service: FakeService) -> None:
    await service.ask("GET", "/v1/backup", caller=ROOT)
    await service.ask("GET", "/v1/backup", caller=ALICE)
    await service.ask("GET", "/v1/backup", caller=ROOT, is_relayed=True)
    assert [(asked.caller, answered.status, answered.did) for asked, answered in service.audited] == [
        (ROOT, 200, "gave a backup"), (ALICE, 403, ""), (ROOT, 403, ""),
    ]  # fmt: skip


async def test_what_was_to_change_something_is_audited_and_nothing_else(service: FakeService) -> None:
    await service.ask("POST", "/v1/tasks", {"argv": ["a"]})
    await service.ask("POST", "/v1/nodes/8/drain")
    await service.ask("POST", "/v1/tasks/cancel", {"states": ["unfinished"]})
    await service.ask("POST", "/v1/tasks/plan", {"argv": ["a"]})
    await service.ask("GET", "/v1/tasks")
    assert [(asked.path, answered.status) for asked, answered in service.audited] == [
        ("/v1/tasks", 200), ("/v1/nodes/8/drain", 403), ("/v1/tasks/cancel", 200),
    ]  # fmt: skip
    task = json.loads(service.audited[0][1].body)["ids"][0]
    assert service.audited[0][1].did == f"submitted {task}"
    assert service.audited[2][1].did == f"cancelled {task}"


@pytest.mark.parametrize(
    ("path", "caller", "words"),
    [
        ("/v1/nodes/8/drain", READER, "this token may only read; `taskd token create --role admin` makes one that may"),
        ("/v1/tasks/cancel", READER, "this token may only read; `taskd token create --role user` makes one that may"),
        ("/v1/nodes/8/drain", ALICE, "a member of the group taskd-admin, or a token with the role admin"),
    ],
)
async def test_who_may_not_is_told_what_it_takes(service: FakeService, path: str, caller: Caller, words: str) -> None:
    status, answer = await service.ask("POST", path, caller=caller)
    assert (status, words in answer["error"]["message"]) == (403, True)
