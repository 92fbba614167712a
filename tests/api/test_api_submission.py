"""Submitting: what a request becomes, and what is refused with which field."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from taskd.api.ids import KEY_WINDOW_MS, KEY_WINDOWS
from taskd.api.service import HandlerDefaults
from taskd.api.submission import ARGUMENT_BYTES_MAX, ARGUMENTS_BYTES_MAX, TASKS_MAX
from taskd.core.task import PARAMS_BYTES_MAX, Backoff, HttpCall, TaskSpec, decode_spec
from taskd.errors import Overloaded
from taskd.protocol.messages import id_text
from tests.api.fakes import ALICE, BOB, NOW_S, FakeService, raw_id

HOUR = 3600.0


async def spec_of(service: FakeService, **task: Any) -> TaskSpec:
    task_id = await service.add(task)
    (new,) = service.submissions[-1]
    assert id_text(new.id) == task_id
    assert decode_spec(new.spec_bytes) == new.spec
    return new.spec


async def refused(service: FakeService, *tasks: dict[str, Any]) -> tuple[int, str | None, str]:
    """The status, the field and the message of a submission's refusal; of one task as itself, of more as a list."""
    status, answer = await service.ask("POST", "/v1/tasks", tasks[0] if len(tasks) == 1 else list(tasks))
    assert service.submissions == [], "nothing may be taken"
    return status, answer["error"].get("field"), answer["error"]["message"]


# -- Good ones ---------------------------------------------------------------------------------------------------------


async def test_a_plain_command(service: FakeService) -> None:
    status, answer = await service.ask("POST", "/v1/tasks", {"argv": ["echo", "hi"]})
    task = id_text(service.submissions[0][0].id)
    assert (status, answer) == (200, {"ids": [task], "durability": "local", "existing": 0})
    spec = service.submissions[0][0].spec
    assert spec == TaskSpec(type="command", owner="alice", submitted_s=NOW_S, argv=("echo", "hi"))


@pytest.mark.parametrize(
    ("given", "retries", "timeout_s"),
    [
        ({}, 3, 60.0),
        ({"retries": 1}, 1, 60.0),
        ({"timeout": "5m"}, 3, 300.0),
        ({"retries": 0, "timeout": 0}, 0, 0.0),
        ({"timeout": ""}, 3, 0.0),
    ],
)
async def test_what_is_left_out_is_as_the_handler_wants_and_zero_means_zero(
    service: FakeService, given: dict[str, Any], retries: int, timeout_s: float
) -> None:
    service.defaults["resize"] = HandlerDefaults(3, 60.0)
    spec = await spec_of(service, type="resize", **given)
    assert (spec.retries, spec.timeout_s) == (retries, timeout_s)
    spec = await spec_of(service, type="unknown", **given)
    assert (spec.retries, spec.timeout_s) == (given.get("retries", 0), 300.0 if given.get("timeout") else 0.0)


async def test_handlers_say_nothing_about_commands(service: FakeService) -> None:
    service.defaults["command"] = service.defaults["http"] = HandlerDefaults(3, 60.0)
    assert (await spec_of(service, argv=["true"])).retries == 0
    assert (await spec_of(service, type="http", http={"url": "http://x/"})).timeout_s == 0.0


async def test_every_field_of_a_command(service: FakeService) -> None:
    spec = await spec_of(
        service, type="command", shell="make all", name="build", queue="ci", priority=-5, cpus=1.5, memory="2GiB",
        gpus=1, resources={"licence": 0.25}, constraints=["zone = a", "gpu", "disk in ssd, nvme"], delay="1h",
        deadline="2h", timeout="1m30s", grace=0, retries=3, backoff={"initial": "2s", "factor": 3, "max": 60},
        on_lost="fail", env={"CC": "gcc", "EMPTY": ""}, cwd="/src", labels={"team": "core"},
    )  # fmt: skip
    assert spec == TaskSpec(
        type="command", shell="make all", name="build", queue="ci", priority=-5, owner="alice", submitted_s=NOW_S,
        env={"CC": "gcc", "EMPTY": ""}, cwd="/src",
        resources={"cpus": 1500, "memory": (2 << 30) * 1000, "gpus": 1000, "licence": 250},
        constraints=("zone=a", "gpu", "disk in nvme,ssd"), not_before_s=NOW_S + HOUR, deadline_s=NOW_S + 2 * HOUR,
        timeout_s=90, grace_s=0, retries=3, backoff=Backoff(2.0, 3.0, 60.0, 0.1), on_lost="fail",
        labels={"team": "core"},
    )  # fmt: skip


async def test_a_handler_task_keeps_its_params_as_they_were_written(service: FakeService) -> None:
    body = b'{"type":"resize","params": {"a" : 1.10, "b":[null,"\xc3\xa4"]} }'
    status, _ = await service.ask("POST", "/v1/tasks", body)
    assert status == 200
    assert service.submissions[0][0].spec.params == b'{"a" : 1.10, "b":[null,"\xc3\xa4"]}'


async def test_params_may_be_any_json_and_are_an_empty_object_by_default(service: FakeService) -> None:
    for value in (None, 0, "text", [1], {}, False):
        assert json.loads((await spec_of(service, type="resize", params=value)).params) == value
    assert (await spec_of(service, type="resize")).params == b"{}"


async def test_an_http_call(service: FakeService) -> None:
    http = {"url": "http://php.lan/resize", "headers": {"X-Key": "a b"}, "expect_status": [200, 202]}
    spec = await spec_of(service, type="http", http=http, params={"width": 5})
    assert spec.http == HttpCall("http://php.lan/resize", "POST", {"X-Key": "a b"}, (200, 202))
    assert json.loads(spec.params) == {"width": 5}
    spec = await spec_of(service, type="http", http={"url": "https://[::1]:8443/x?y=z", "method": "GET"})
    assert spec.params == b""


@pytest.mark.parametrize(
    ("at", "not_before_s"),
    [
        (NOW_S + 60, NOW_S + 60),
        ("2027-01-15T08:30:00Z", 1_800_001_800.0),
        ("2027-01-15T09:30:00+01:00", 1_800_001_800.0),
        ("2027-01-15 08:30", 1_800_001_800.0),  # UTC where no zone is named, whichever machine answers.
        ("+10m", NOW_S + 600),
        (0, 0.0),
    ],
)
async def test_at(service: FakeService, at: Any, not_before_s: float) -> None:
    assert (await spec_of(service, argv=["true"], at=at)).not_before_s == not_before_s


async def test_nothing_that_is_zero_is_kept(service: FakeService) -> None:
    spec = await spec_of(
        service,
        argv=["true"],
        cpus=0,
        memory="0B",
        gpus=0.0,
        resources={"tape": 0},
        delay="0s",
        deadline=0,
        timeout="0",
    )
    assert spec == TaskSpec(type="command", owner="alice", submitted_s=NOW_S, argv=("true",))


async def test_thousands_in_one_request_keep_their_order(service: FakeService) -> None:
    tasks = [{"type": "count", "params": {"number": number}} for number in range(3000)]
    status, answer = await service.ask("POST", "/v1/tasks", tasks)
    assert status == 200
    assert len(set(answer["ids"])) == 3000
    assert [task["number"] for task in map(json.loads, (new.spec.params for new in service.submissions[0]))] == [
        *range(3000)
    ]
    assert len(service.submissions) == 1, "all are taken in one step"


# -- Sent again --------------------------------------------------------------------------------------------------------


async def test_an_id_of_the_clients_own_makes_no_second_task(service: FakeService) -> None:
    own = id_text(service.new_task_id())
    for existing in (0, 1):
        status, answer = await service.ask("POST", "/v1/tasks", {"argv": ["true"], "id": own})
        assert (status, answer["ids"], answer["existing"]) == (200, [own], existing)
    assert len(service.tasks) == 1


async def test_a_key_names_the_same_tasks_for_a_day(service: FakeService) -> None:
    tasks = [{"argv": ["true"]}] * 3
    _, first = await service.ask("POST", "/v1/tasks?idempotency_key=nightly", tasks)
    service.now += (KEY_WINDOWS - 2) * KEY_WINDOW_MS / 1000
    _, again = await service.ask("POST", "/v1/tasks?idempotency_key=nightly", tasks)
    assert again["ids"] == first["ids"] == sorted(first["ids"])
    assert again["existing"] == 3
    service.now += 2 * KEY_WINDOW_MS / 1000
    _, later = await service.ask("POST", "/v1/tasks?idempotency_key=nightly", tasks)
    assert not set(later["ids"]) & set(first["ids"])


async def test_keys_are_apart_by_text_and_user(service: FakeService) -> None:
    answers = [
        await service.ask("POST", "/v1/tasks?idempotency_key=a", {"argv": ["true"]}, ALICE),
        await service.ask("POST", "/v1/tasks?idempotency_key=a", {"argv": ["true"]}, BOB),
        await service.ask("POST", "/v1/tasks?idempotency_key=b", {"argv": ["true"]}, ALICE),
    ]
    assert len({answer["ids"][0] for _, answer in answers}) == 3


async def test_keyed_ids_are_uuids_of_version_7_and_of_about_now(service: FakeService) -> None:
    _, answer = await service.ask("POST", "/v1/tasks?idempotency_key=x", {"argv": ["true"]})
    task_id = raw_id(answer["ids"][0])
    assert task_id[6] >> 4 == 7
    assert task_id[8] >> 6 == 2
    made_s = int.from_bytes(task_id[:6]) / 1000
    assert NOW_S - KEY_WINDOW_MS / 1000 < made_s <= NOW_S


# -- Bad ones ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "field", "words"),
    [
        ({}, "argv", "needs `argv` or `shell`"),
        ({"argv": []}, "argv", "needs `argv` or `shell`"),
        ({"argv": ["a"], "shell": "a"}, "shell", "not both"),
        ({"argv": ["", "a"]}, "argv[0]", "empty"),
        ({"argv": ["a\0b"]}, "argv", "NUL"),
        ({"shell": "a\0b"}, "shell", "NUL"),
        ({"argv": ["a"], "params": {}}, "params", "takes no params"),
        ({"argv": ["a"], "http": {"url": "http://a"}}, "http", "only a task of type `http`"),
        ({"argv": ["a", 1]}, "argv[1]", "must be text, not a whole number"),
        ({"argv": "ls"}, "argv", "must be a list, not text"),
        ({"argv": ["a"], "colour": "red"}, "colour", "there is no field colour"),
        ({"type": ""}, "type", "must not be empty"),
        ({"type": "a,b"}, "type", "without commas"),
        ({"type": "resize\n"}, "type", "without commas"),
        ({"type": "resize", "argv": ["a"]}, "argv", "has no command"),
        ({"type": "resize", "shell": "a"}, "shell", "has no command"),
        ({"type": "resize", "http": {"url": "http://a"}}, "http", "only a task of type `http`"),
        ({"type": "http"}, "http", "needs the call"),
        ({"type": "http", "http": {}}, "http.url", "the field url is missing"),
        ({"type": "http", "http": {"url": "ftp://a"}}, "http.url", "must begin with http:// or https://"),
        ({"type": "http", "http": {"url": "http://"}}, "http.url", "not the URL"),
        ({"type": "http", "http": {"url": "http://a b/"}}, "http.url", "not the URL"),
        ({"type": "http", "http": {"url": "http://a:99999/"}}, "http.url", "not the URL"),
        ({"type": "http", "http": {"url": "http://[::1/"}}, "http.url", "not the URL"),
        (
            {"type": "http", "http": {"url": "http://a", "method": "HEAD"}},
            "http.method",
            "'HEAD' is not one of the values",
        ),
        ({"type": "http", "http": {"url": "http://a", "method": "GET"}, "params": 1}, "params", "no body"),
        ({"type": "http", "http": {"url": "http://a", "headers": {"A B": "c"}}}, "http.headers", "name of a header"),
        ({"type": "http", "http": {"url": "http://a", "headers": {"Host": "c"}}}, "http.headers.Host", "itself"),
        ({"type": "http", "http": {"url": "http://a", "headers": {"X": "a\r\nY: b"}}}, "http.headers.X", "one line"),
        (
            {"type": "http", "http": {"url": "http://a", "expect_status": [99]}},
            "http.expect_status[0]",
            "must be a whole number of at least 100",
        ),
        ({"type": "http", "http": {"url": "http://a"}, "env": {"A": "b"}}, "env", "runs no program"),
        ({"argv": ["a"], "env": {"": "b"}}, "env", "environment variable"),
        ({"argv": ["a"], "env": {"A=B": "c"}}, "env", "environment variable"),
        ({"argv": ["a"], "env": {"A": "b\0"}}, "env.A", "NUL"),
        ({"argv": ["a"], "secrets": {"A=B": "key"}}, "secrets", "cannot be the variable"),
        ({"argv": ["a"], "secrets": {"TASKD_FENCE": "key"}}, "secrets", "cannot be the variable"),
        ({"argv": ["a"], "env": {"A": "b"}, "secrets": {"A": "key"}}, "secrets", "is set in `env` too"),
        ({"argv": ["a"], "secrets": {"A": "../key"}}, "secrets.A", "cannot be the name of a secret"),
        ({"argv": ["a"], "secrets": {"A": ""}}, "secrets.A", "cannot be the name of a secret"),
        (
            {"argv": ["a"], "secrets": {f"A{number}": "key" for number in range(33)}},
            "secrets",
            "must have at most 32 entries",
        ),
        ({"argv": ["a"], "cwd": "src"}, "cwd", "absolute"),
        ({"argv": ["a"], "cwd": "/\0"}, "cwd", "NUL"),
        ({"argv": ["a"], "queue": ""}, "queue", "must not be empty"),
        ({"argv": ["a"], "queue": " q"}, "queue", "printable"),
        ({"argv": ["a"], "name": "a\nb"}, "name", "one line"),
        ({"argv": ["a"], "name": "a" * 256}, "name", "must have at most 255 characters"),
        ({"argv": ["a"], "priority": 1_000_001}, "priority", "must be a whole number of at most 1,000,000"),
        ({"argv": ["a"], "priority": 1.5}, "priority", "must be a whole number, not a fraction"),
        ({"argv": ["a"], "cpus": -1}, "cpus", "must be a number of at least 0"),
        ({"argv": ["a"], "cpus": "2"}, "cpus", "must be a number, not text"),
        ({"argv": ["a"], "cpus": 0.0001}, "cpus", "thousandth"),
        ({"argv": ["a"], "memory": "lots"}, "memory", "is not a size"),
        ({"argv": ["a"], "memory": 1.5}, "memory", "must be a whole number or text, not a fraction"),
        ({"argv": ["a"], "resources": {"memory": 5}}, "resources.memory", "a field of its own"),
        ({"argv": ["a"], "resources": {"a b": 5}}, "resources", "name of a resource"),
        ({"argv": ["a"], "resources": {"a": -5}}, "resources[...]", "must be a number of at least 0"),
        ({"argv": ["a"], "constraints": ["zone=a", "zone>a"]}, "constraints[1]", "is not a constraint"),
        ({"argv": ["a"], "constraints": ["a"] * 33}, "constraints", "must have at most 32 items"),
        ({"argv": ["a"], "delay": "soon"}, "delay", "is not a duration"),
        ({"argv": ["a"], "delay": 1, "at": 5}, "at", "not both"),
        ({"argv": ["a"], "at": "soon"}, "at", "is not an instant"),
        ({"argv": ["a"], "at": 1e12}, "at", "must be a number of at most 100,000,000,000"),
        ({"argv": ["a"], "delay": "2h", "deadline": "1h"}, "deadline", "before the task may begin"),
        ({"argv": ["a"], "timeout": -1}, "timeout", "must be a number of at least 0"),
        ({"argv": ["a"], "timeout": "20y"}, "timeout", "is not a duration"),
        ({"argv": ["a"], "grace": "x"}, "grace", "is not a duration"),
        ({"argv": ["a"], "retries": -1}, "retries", "must be a whole number of at least 0"),
        ({"argv": ["a"], "backoff": {"factor": 0.5}}, "backoff.factor", "must be a number of at least 1"),
        ({"argv": ["a"], "backoff": {"initial": "x"}}, "backoff.initial", "is not a duration"),
        ({"argv": ["a"], "backoff": {"max": "x"}}, "backoff.max", "is not a duration"),
        ({"argv": ["a"], "on_lost": "shrug"}, "on_lost", "'shrug' is not one of the values"),
        ({"argv": ["a"], "labels": {"a b": "c"}}, "labels", "cannot be a label"),
        ({"argv": ["a"], "labels": {"a": "\n"}}, "labels.a", "one line"),
        ({"argv": ["a"], "labels": {"a": 1}}, "labels[...]", "must be text, not a whole number"),
        ({"argv": ["a"], "labels": {"a" * 256: "b"}}, "labels", "must have at most 255 characters (of its keys)"),
        ({"argv": ["a"], "id": "123"}, "id", "UUID of version 7"),
        ({"argv": ["a"], "id": "6c6c2f5e-1f0a-4a3e-9d3c-0123456789ab"}, "id", "UUID of version 7"),
        ({"argv": ["a"], "id": "0f000000-0000-7000-8000-000000000001"}, "id", "more than an hour ahead"),
    ],
)
async def test_what_is_refused_and_where(service: FakeService, task: dict[str, Any], field: str, words: str) -> None:
    status, where, message = await refused(service, task)
    assert (status, where) == (400, field)
    assert words in message
    # In a list the place comes first, and nothing of the list is taken.
    status, where, _ = await refused(service, {"argv": ["true"]}, task)
    assert (status, where) == (400, f"[1].{field}")


async def test_what_is_too_large(service: FakeService) -> None:
    long = "x" * (ARGUMENT_BYTES_MAX + 1)
    many = ["x" * 1000] * (ARGUMENTS_BYTES_MAX // 1001)
    headers = {f"X-{number}": "v" * 8000 for number in range(600)}
    for task, field in [
        ({"argv": ["echo", long]}, "argv"),
        ({"shell": long}, "shell"),
        ({"argv": many}, None),
        ({"argv": [*many, *many]}, "argv"),
        ({"argv": many[:600], "env": {str(number): "x" * 1000 for number in range(600)}}, "argv"),
        ({"argv": ["a"], "env": {"A": long}}, "env.A"),
        ({"type": "resize", "params": "x" * PARAMS_BYTES_MAX}, "params"),
        ({"type": "http", "http": {"url": "http://a", "headers": headers}}, "[1]"),
    ]:
        if field is None:
            assert (await spec_of(service, **task)).argv
            service.submissions.clear()
            continue
        status, where, _ = await refused(service, {"argv": ["true"]}, task)
        assert (status, where) == (413, field if field == "[1]" else f"[1].{field}")


async def test_the_bound_on_tasks_of_one_request(service: FakeService) -> None:
    task = b'{"type":"a"}'
    status, answer = await service.ask("POST", "/v1/tasks", b"[" + b",".join([task] * (TASKS_MAX + 1)) + b"]")
    assert (status, answer["error"]["code"]) == (413, "too_large")
    assert service.submissions == []


async def test_many_braces_are_not_many_tasks(service: FakeService) -> None:
    status, _ = await service.ask("POST", "/v1/tasks", {"type": "a", "params": [{}] * (TASKS_MAX + 1)})
    assert status == 200
    status, _ = await service.ask("POST", "/v1/tasks", [{"type": "a", "params": [{}] * (TASKS_MAX + 1)}])
    assert status == 200


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        (b"", None, "needs a body"),
        (b"hello", None, "is not JSON"),
        (b"[]", None, "the list of tasks is empty"),
        (b'{"argv": ["a"]', None, "is not JSON"),
        (b'{"argv": ["a"]} x', None, "is not JSON"),
        (b'"argv"', None, "must be an object, not text"),
        (b"[1]", "[0]", "must be an object, not a whole number"),
        (b'{"type": "a", "params": {bad}}', None, "is not JSON"),
        (b'{"type": "a", "params": "\xff"}', None, "is not UTF-8, from byte 25 on"),
        (b'{"type": "a", "params": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "nested too deeply"),
        (b'{"type": "a", "params": "\\ud800"}', None, "is not JSON"),
    ],
)
async def test_bodies_that_are_no_submission(service: FakeService, body: bytes, field: str | None, words: str) -> None:
    status, answer = await service.ask("POST", "/v1/tasks", body)
    assert status == 400
    assert answer["error"].get("field") == field
    assert words in answer["error"]["message"]


async def test_params_that_no_handler_takes(service: FakeService) -> None:
    service.wrong_params["resize"] = "width is missing"
    status, field, message = await refused(service, {"argv": ["true"]}, {"type": "resize"})
    assert (status, field, message) == (400, "[1].params.width", "width is missing")


async def test_two_tasks_with_one_id(service: FakeService) -> None:
    own = id_text(service.new_task_id())
    status, field, message = await refused(service, {"argv": ["a"], "id": own}, {"argv": ["b"], "id": own.upper()})
    assert (status, field) == (400, "[1].id")
    assert "[0] has the same id" in message


async def test_a_refusal_by_the_cluster_is_passed_on(service: FakeService) -> None:
    service.submit_error = Overloaded()
    status, answer = await service.ask("POST", "/v1/tasks", {"argv": ["true"]})
    assert (status, answer["error"]["code"]) == (429, "overloaded")


# -- Plans -------------------------------------------------------------------------------------------------------------


async def test_a_plan_tells_each_value_as_it_was_understood(service: FakeService) -> None:
    task = {"shell": "make", "memory": "1GiB", "delay": "1h", "timeout": "90s", "constraints": ["zone == a"]}
    status, answer = await service.ask("POST", "/v1/tasks/plan", [task, {"type": "resize", "params": {"a": 1}}])
    assert status == 200
    first, second = answer["tasks"]
    assert (first["id"], first["state"], first["due"]) == ("", "scheduled", NOW_S + HOUR)
    assert (first["resources"], first["timeout"], first["constraints"]) == ({"memory": 1 << 30}, 90, ["zone=a"])
    assert (second["state"], second["params"], second["command"]) == ("queued", {"a": 1}, 'resize {"a":1}')
    assert service.submissions == []


async def test_a_plan_refuses_what_a_submission_would(service: FakeService) -> None:
    status, answer = await service.ask("POST", "/v1/tasks/plan", [{"argv": ["a"]}, {"memory": "lots", "argv": ["a"]}])
    assert (status, answer["error"]["field"]) == (400, "[1].memory")
    status, _ = await service.ask("POST", "/v1/tasks/plan", [{"argv": ["a"]}] * 1001)
    assert status == 413


async def test_a_plain_submission_is_encoded_without_its_defaults(service: FakeService) -> None:
    await service.add({"type": "resize", "params": {"a": 1}})
    fields = msgspec.msgpack.decode(service.submissions[0][0].spec_bytes)
    assert fields.keys() == {"type", "owner", "submitted_s", "params"}
