"""HTTP calls against a real server."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from taskd.core.effects import Begin
from taskd.core.task import RESULT_BYTES_MAX, HttpCall, Outcome, TaskSpec
from taskd.protocol.messages import AttemptKey
from taskd.runner.http import HttpKind
from tests.runner.stage import Audience, End, new_key


class Service:
    """A service with one path for each way to answer."""

    def __init__(self) -> None:
        self.requests: list[web.Request] = []
        self.bodies: list[bytes] = []
        self.is_called = asyncio.Event()
        self.elsewhere = ""
        app = web.Application(client_max_size=1 << 22)
        app.router.add_route("*", "/{name}", self.answer)
        self.server = TestServer(app)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        self.bodies.append(await request.read())
        self.is_called.set()
        response: web.StreamResponse = await getattr(self, request.match_info["name"])(request)
        return response

    async def echo(self, request: web.Request) -> web.Response:
        return web.json_response({"method": request.method, "params": json.loads(self.bodies[-1] or "null")})

    async def text(self, _: web.Request) -> web.Response:
        return web.Response(text="grüße\n", content_type="text/html", charset="latin-1")

    async def json_as_html(self, _: web.Request) -> web.Response:
        return web.Response(body=b'\xef\xbb\xbf{"a": 1}\n', content_type="text/html")

    async def empty(self, _: web.Request) -> web.Response:
        return web.Response(status=204)

    async def broken_json(self, _: web.Request) -> web.Response:
        return web.Response(body=b'{"a": ', content_type="application/json")

    async def deep_json(self, _: web.Request) -> web.Response:
        return web.Response(body=b"[" * 100_000, content_type="application/json")

    async def binary(self, _: web.Request) -> web.Response:
        return web.Response(body=b"\xff\xfe\x00", content_type="image/png")

    async def huge(self, _: web.Request) -> web.Response:
        return web.Response(body=b'"' + b"x" * RESULT_BYTES_MAX + b'"')

    async def just_fits(self, _: web.Request) -> web.Response:
        return web.Response(body=b'"' + b"x" * (RESULT_BYTES_MAX - 2) + b'"')

    async def long_text(self, _: web.Request) -> web.Response:
        return web.Response(body=b"\n." * (RESULT_BYTES_MAX // 2))

    async def fails(self, _: web.Request) -> web.Response:
        return web.Response(status=500, text="oh no " * 1000)

    async def fault(self, _: web.Request) -> web.Response:
        error = {"type": "OutOfPaper", "message": "tray 2 is empty", "traceback": "printer.php:7", "code": 11}
        return web.json_response({"error": error}, status=422)

    async def teapot(self, _: web.Request) -> web.Response:
        return web.json_response("short and stout", status=418)

    async def hangs(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"[1,")
        await asyncio.Event().wait()
        return response

    async def breaks(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b"[1,")
        assert request.transport is not None
        request.transport.abort()
        return response

    async def moved(self, _: web.Request) -> web.Response:
        return web.Response(status=307, headers={"Location": "/echo"})

    async def found(self, _: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": "/echo"})

    async def away(self, _: web.Request) -> web.Response:
        return web.Response(status=307, headers={"Location": self.elsewhere})

    async def circle(self, _: web.Request) -> web.Response:
        return web.Response(status=308, headers={"Location": "/circle"})


class Calls(Audience):
    """HTTP calls on the stage."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = HttpKind(self.on_progress)
        self.service = Service()

    def start(self, name: str, params: bytes = b"", **call: Any) -> AttemptKey:
        url = name if ":" in name else str(self.service.server.make_url(f"/{name}"))
        return self.start_spec(TaskSpec("http", http=HttpCall(url, **call), params=params))

    def start_spec(self, spec: TaskSpec) -> AttemptKey:
        key = new_key()
        self.kind.start([Begin(key, spec)])
        return key

    async def run(self, name: str, params: bytes = b"", **call: Any) -> End:
        return await self.end_of(self.start(name, params, **call))


@pytest.fixture
async def calls() -> AsyncIterator[Calls]:
    calls = Calls()
    await calls.service.server.start_server()
    await calls.kind.open()
    yield calls
    await calls.kind.close()
    await calls.service.server.close()


async def test_params_go_out_and_the_result_comes_back(calls: Calls) -> None:
    key = calls.start("echo", b'{"width": 640}', headers={"X-Api-Key": "k", "X-Taskd-Fence": "forged"})
    end = await calls.end_of(key)
    assert end.outcome is Outcome.OK
    assert json.loads(end.report.result) == {"method": "POST", "params": {"width": 640}}
    assert 0 < end.told.started_s <= end.told.ended_s
    headers = calls.service.requests[0].headers
    assert headers["Content-Type"] == "application/json"
    assert headers["X-Taskd-Task-Id"] == key.task_text
    assert headers["X-Taskd-Attempt"] == "1"
    assert headers.getall("X-Taskd-Fence") == [key.fence]
    assert headers["X-Api-Key"] == "k"


async def test_call_without_params(calls: Calls) -> None:
    posted = await calls.run("echo", headers={"content-type": "application/problem+json"})
    fetched = await calls.run("echo", method="GET")
    assert json.loads(posted.report.result)["params"] == {}
    assert json.loads(fetched.report.result) == {"method": "GET", "params": None}
    assert calls.service.requests[0].headers.getall("Content-Type") == ["application/problem+json"]


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("text", '"grüße"'.encode()),
        ("json_as_html", b'{"a": 1}'),
        ("empty", b""),
        ("just_fits", b'"' + b"x" * (RESULT_BYTES_MAX - 2) + b'"'),
    ],
)
async def test_answers_become_json(calls: Calls, name: str, result: bytes) -> None:
    end = await calls.run(name)
    assert (end.outcome, end.report.result) == (Outcome.OK, result)


@pytest.mark.parametrize(
    ("name", "error_type", "words"),
    [
        ("broken_json", "InvalidJson", "the answer is no valid JSON"),
        ("deep_json", "InvalidJson", "the answer is no valid JSON"),
        ("binary", "NotText", "neither JSON nor text"),
        ("huge", "ResultTooLarge", "longer than 1048576 bytes"),
        ("long_text", "ResultTooLarge", "too long as a JSON string"),
        ("fault", "OutOfPaper", "tray 2 is empty"),
        ("teapot", "HttpStatus", '418 I\'m a Teapot: "short and stout"'),
        ("breaks", "ClientPayloadError", "failed"),
        ("found", "HttpStatus", "302 Found, to /echo, which is not followed"),
        ("circle", "TooManyRedirects", "more than 5 times"),
    ],
)
async def test_failures_say_why(calls: Calls, name: str, error_type: str, words: str) -> None:
    end = await calls.run(name, b'{"secret": 1}')
    assert end.outcome is Outcome.EXCEPTION
    assert end.error.type == error_type
    assert words in end.error.message
    assert end.told.started_s > 0


async def test_failing_answer_is_shown_in_part(calls: Calls) -> None:
    end = await calls.run("fails")
    prefix = f"POST {calls.service.server.make_url('/fails')}: 500 Internal Server Error: "
    assert end.error.message.startswith(prefix + "oh no oh no")
    assert len(end.error.message) <= len(prefix) + 1024


async def test_fault_keeps_its_traceback(calls: Calls) -> None:
    assert (await calls.run("fault")).error.traceback == "printer.php:7"


async def test_expected_status_decides(calls: Calls) -> None:
    teapot = await calls.run("teapot", expect_status=(200, 418))
    assert (teapot.outcome, teapot.report.result) == (Outcome.OK, b'"short and stout"')
    assert (await calls.run("echo", expect_status=(201,))).error.type == "HttpStatus"
    assert (await calls.run("found", expect_status=(302,))).outcome is Outcome.OK


async def test_redirect_within_the_origin_repeats_the_request(calls: Calls) -> None:
    end = await calls.run("moved", b"[1]")
    assert json.loads(end.report.result) == {"method": "POST", "params": [1]}
    end = await calls.run("found", method="GET")
    assert json.loads(end.report.result)["method"] == "GET"


async def test_redirect_to_another_host_is_not_followed(calls: Calls) -> None:
    other = Service()
    await other.server.start_server()
    calls.service.elsewhere = str(other.server.make_url("/echo"))
    end = await calls.run("away")
    assert (end.outcome, other.requests) == (Outcome.EXCEPTION, [])
    assert "which is not followed" in end.error.message
    await other.server.close()


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert (await calls.run("echo")).outcome is Outcome.OK


async def test_nobody_listens(calls: Calls) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        end = await calls.run(f"http://user:secret@127.0.0.1:{port}/path?token=secret")
    assert end.outcome is Outcome.EXCEPTION
    assert end.error.type == "ClientConnectorError"
    assert end.error.message.startswith(f"POST http://127.0.0.1:{port}/path failed: ")
    assert "secret" not in end.error.message


@pytest.mark.parametrize("url", ["ftp://host/", "http://", "/path", "http://host:port/", "http://[::1"])
async def test_url_that_is_none(calls: Calls, url: str) -> None:
    end = await calls.end_of(calls.start_spec(TaskSpec("http", http=HttpCall(url))))
    assert (end.outcome, end.error.type, end.told.started_s) == (Outcome.SPAWN_FAILED, "InvalidUrl", 0)


async def test_task_without_a_call(calls: Calls) -> None:
    end = await calls.end_of(calls.start_spec(TaskSpec("http")))
    assert (end.outcome, end.error.type) == (Outcome.SPAWN_FAILED, "InvalidTask")


async def test_header_that_cannot_be_sent(calls: Calls) -> None:
    end = await calls.run("echo", headers={"X-Note": "a\r\nX-Admin: 1"})
    assert (end.outcome, calls.service.requests) == (Outcome.EXCEPTION, [])


async def test_breaking_off(calls: Calls) -> None:
    key = calls.start("hangs")
    await calls.start_of(key)
    await calls.service.is_called.wait()
    calls.kind.terminate(key)
    end = await calls.end_of(key)
    assert (end.outcome, end.report.signal) == (Outcome.SIGNAL, signal.SIGTERM)
    calls.kind.terminate(key)
    calls.kind.kill(new_key())


async def test_breaking_off_before_the_first_step(calls: Calls) -> None:
    key = calls.start("hangs")
    calls.kind.kill(key)
    end = await calls.end_of(key)
    assert (end.outcome, end.report.signal) == (Outcome.SIGNAL, signal.SIGKILL)
    assert calls.service.requests == []


async def test_close_breaks_off_all(calls: Calls) -> None:
    kind = HttpKind(calls.on_progress)
    await kind.open()
    keys = [new_key() for _ in range(20)]
    call = HttpCall(str(calls.service.server.make_url("/hangs")))
    kind.start([Begin(key, TaskSpec("http", http=call)) for key in keys])
    await calls.service.is_called.wait()
    await kind.close()
    assert {calls.ended[key].outcome for key in keys} == {Outcome.SIGNAL}
