"""Whatever a client sends, it gets an answer: never a 500, never a task that was not checked."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskd.api.bodies import encode
from taskd.api.routes import ROUTES
from taskd.api.service import Caller
from taskd.api.types import Submission
from taskd.core.constraints import parse
from taskd.core.task import decode_spec
from tests.api.fakes import ALICE, BOB, ROOT, FakeService

FINE = {200, 400, 404, 405, 409, 413}

texts = st.text(max_size=12)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
plausible = {
    "type": st.sampled_from(["command", "http", "resize"]),
    "argv": st.lists(texts, max_size=3),
    "shell": texts,
    "params": values,
    "env": st.dictionaries(texts, texts, max_size=2),
    "secrets": st.dictionaries(texts, texts, max_size=2),
    "constraints": st.lists(texts, max_size=2),
    "labels": st.dictionaries(texts, texts, max_size=2),
    "at": texts | st.floats(0, 1e12),
    **dict.fromkeys(("delay", "timeout", "deadline", "grace"), texts | st.floats(0, 1e6)),
    "memory": texts | st.integers(0, 1 << 60),
    "http": st.fixed_dictionaries({"url": st.just("http://") | texts.map("http://{}".format)}),
}
fields = st.sampled_from(sorted({*Submission.__struct_fields__, "unknown"}))
tasks = st.dictionaries(fields, values, max_size=4) | st.fixed_dictionaries({}, optional=plausible)
quickly = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])


def ask(service: FakeService, method: str, path: str, query: dict[str, str], body: bytes, caller: Caller = ROOT) -> int:
    async def story() -> int:
        target = path + ("?" if query else "") + "&".join(f"{name}={value}" for name, value in query.items())
        response = await service.response(method, target, body, caller)
        if response.stream is not None:
            await response.stream.aclose()  # type: ignore[attr-defined]
        return response.status

    return asyncio.run(story())


@quickly
@given(st.lists(tasks, min_size=1, max_size=3), st.booleans())
def test_any_submission(submissions: list[dict[str, Any]], is_list: bool) -> None:
    service = FakeService()
    body = encode(submissions if is_list else submissions[0])
    status = ask(service, "POST", "/v1/tasks", {}, body)
    assert status in FINE
    assert (status == 200) == bool(service.tasks)
    for row in service.tasks.values():
        spec = decode_spec(row.spec)
        assert (spec.type == "command") == bool(spec.argv or spec.shell)
        assert not (spec.argv and spec.shell)
        assert "\0" not in "".join((*spec.argv, spec.shell, spec.cwd, *spec.env, *spec.env.values()))
        assert all(amount > 0 for amount in spec.resources.values())
        assert all(parse(text).text == text for text in spec.constraints)
        if spec.params:
            msgspec.json.decode(spec.params)


@quickly
@given(st.binary(max_size=60))
def test_any_bytes(body: bytes) -> None:
    assert ask(FakeService(), "POST", "/v1/tasks", {}, body) in FINE


queries = st.dictionaries(
    st.sampled_from(
        sorted({parameter.name for route in ROUTES for parameter in route.parameters} - {"wait", "follow"})
    ),
    st.text("0123456789abcdef,=last-", max_size=8),
    max_size=2,
)


@quickly
@given(st.sampled_from(ROUTES), st.text("0123456789abcdef-lst", max_size=36), queries, values)
def test_any_request(route: Any, name: str, query: dict[str, str], body: Any) -> None:
    service = FakeService()
    if isinstance(body, dict):
        body.pop("timeout", None)
    assert ask(service, route.method, route.path.replace("{id}", name), query, encode(body)) in FINE


READER = Caller("alice", False, may_change=False)
bodies = st.one_of(
    tasks,
    st.lists(tasks, max_size=2),
    values,
    st.fixed_dictionaries({"ids": st.just(["@TASK@"])}),
    st.fixed_dictionaries({"states": st.just(["queued"])}),
    st.fixed_dictionaries({"reason": texts}),
)


@quickly
@given(st.sampled_from(ROUTES), st.sampled_from(["@TASK@", "last", "7", "head"]), queries, bodies,
       st.sampled_from([ALICE, BOB, READER, ROOT]))  # fmt: skip
def test_any_request_of_any_role_does_no_more_than_that_role_may(
    route: Any, name: str, query: dict[str, str], body: Any, caller: Caller
) -> None:
    service = FakeService()
    if isinstance(body, dict):
        body.pop("timeout", None)
    task_id = asyncio.run(service.add({"argv": ["true"]}, ALICE))
    service.audited.clear()
    before, nodes = dict(service.tasks), dict(service.nodes_by_id)
    path = route.path.replace("{id}", name.replace("@TASK@", task_id))
    status = ask(service, route.method, path, query, encode(body).replace(b"@TASK@", task_id.encode()), caller)
    assert status in {*FINE, 403}
    if not route.changes or not caller.may_change:
        assert service.tasks == before
        assert status == 403 or not route.changes
    if not caller.is_admin:
        assert service.nodes_by_id == nodes
        assert status == 403 or not route.needs_admin
        assert all(decode_spec(row.spec).owner == caller.user for row in service.tasks.values() if row.id not in before)
    if caller == BOB:
        assert all(service.tasks[known] == row for known, row in before.items())
    assert bool(service.audited) == (route.changes or route.gives_all)
