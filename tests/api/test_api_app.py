"""The API over a real Unix socket: what HTTP adds to dispatching."""

from __future__ import annotations

import asyncio
import os
import pwd
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from taskd.api import app, incoming
from taskd.api.app import ApiServer, serve
from taskd.api.cluster_types import EventView
from taskd.core.task import Report
from taskd.errors import AlreadyRunning, Unavailable
from tests.api.fakes import ALICE, BOB, NOW_S, ROOT, FakeService, written
from tests.api.loops import on_both_loops
from tests.api.test_api_output import Growing


@asynccontextmanager
async def serving(service: FakeService, path: Path, **options: Any) -> AsyncIterator[ApiServer]:
    server = await serve(service, path, **options)
    try:
        yield server
    finally:
        await server.close(0.0)


class Http:
    """A client that speaks plain HTTP/1.1, on one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, path: Path) -> Http:
        return cls(*await asyncio.open_unix_connection(os.fspath(path)))

    def send(self, method: str, target: str, body: Any = None, **headers: str) -> None:
        raw = b"" if body is None else body if isinstance(body, bytes) else msgspec.json.encode(body)
        if body is not None:
            headers.setdefault("Content_Length", str(len(raw)))
        lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
        self.writer.write(f"{method} {target} HTTP/1.1\r\nHost: taskd\r\n{''.join(lines)}\r\n".encode() + raw)

    async def head(self) -> tuple[int, dict[str, str]]:
        """The status and the headers of an answer, their names in lower case."""
        status = int((await self.reader.readline()).split()[1])
        headers = {}
        while line := (await self.reader.readline()).strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        return status, headers

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        status, headers = await self.head()
        if headers.get("transfer-encoding") == "chunked":
            return status, headers, b"".join([chunk async for chunk in self.chunks()])
        return status, headers, await self.reader.readexactly(int(headers["content-length"]))

    async def chunks(self) -> AsyncIterator[bytes]:
        """The parts of a streamed answer. Raises IncompleteReadError where it breaks off."""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)

    async def ask(self, method: str, target: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        self.send(method, target, body, **headers)
        status, found, raw = await self.answer()
        is_json = found["content-type"] == "application/json"
        return status, msgspec.json.decode(raw) if is_json else raw.decode()

    async def is_closed(self) -> bool:
        """Whether the other side has closed, once it has sent all it had to say."""
        return not await self.reader.read(1)

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


@asynccontextmanager
async def connected(service: FakeService, path: Path, **options: Any) -> AsyncIterator[Http]:
    async with serving(service, path, **options):
        http = await Http.open(path)
        try:
            yield http
        finally:
            await http.close()


# -- Requests ----------------------------------------------------------------------------------------------------------


@on_both_loops
async def test_requests_follow_each_other_on_one_connection(service: FakeService, path: Path) -> None:
    async with connected(service, path) as http:
        status, accepted = await http.ask("POST", "/v1/tasks", {"argv": ["true"]})
        assert status == 200
        (task,) = accepted["ids"]
        status, detail = await http.ask("GET", f"/v1/tasks/{task[-6:]}")
        assert (status, detail["id"]) == (200, task)
        assert detail["owner"] == pwd.getpwuid(os.geteuid()).pw_name
        assert (await http.ask("GET", "/v1/tasks?state=queued&state=running&label=a=%C3%A4"))[0] == 200
        assert service.queries[-1].states == (3, 6)
        assert service.queries[-1].labels == (("a", "ä"),)
        assert await http.ask("GET", "/metrics") == (200, "taskd_is_leader 1\n")
        assert (await http.ask("GET", "http://taskd/healthz"))[0] == 200, "the absolute form"


@on_both_loops
async def test_requests_may_be_sent_ahead(service: FakeService, path: Path) -> None:
    async with connected(service, path) as http:
        for number in range(20):
            http.send("POST", "/v1/tasks", {"type": "count", "params": number})
        for _ in range(20):
            assert (await http.answer())[0] == 200
    assert [new.spec.params for (new,) in service.submissions] == [b"%d" % number for number in range(20)]


@on_both_loops
async def test_a_large_body(service: FakeService, path: Path) -> None:
    async with connected(service, path) as http:
        tasks = [{"type": "blob", "params": "x" * 500_000} for _ in range(20)]
        status, accepted = await http.ask("POST", "/v1/tasks", tasks)
        assert (status, len(accepted["ids"])) == (200, 20)
        http.send("POST", "/v1/tasks", None, Transfer_Encoding="chunked")
        for part in (b'{"argv":', b'["true"]}', b""):
            http.writer.write(b"%x\r\n%b\r\n" % (len(part), part))
        assert (await http.answer())[0] == 200


@on_both_loops
async def test_a_client_that_asks_first_is_told_to_go_on(service: FakeService, path: Path) -> None:
    async with connected(service, path) as http:
        body = msgspec.json.encode({"argv": ["true"]})
        http.send("POST", "/v1/tasks", None, Content_Length=str(len(body)), Expect="100-continue")
        assert (await http.head())[0] == 100
        http.writer.write(body)
        assert (await http.answer())[0] == 200


@on_both_loops
async def test_the_header_for_sending_again(service: FakeService, path: Path) -> None:
    async with connected(service, path) as http:
        answers = [
            await http.ask("POST", "/v1/tasks", {"argv": ["true"]}, Idempotency_Key="nightly, 1") for _ in range(2)
        ]
        assert answers[0][1]["ids"] == answers[1][1]["ids"]
        # Where there is nothing to repeat it is passed over, as headers are.
        assert (await http.ask("POST", "/v1/tasks/plan", {"argv": ["true"]}, Idempotency_Key="nightly"))[0] == 200
        status, answer = await http.ask("POST", "/v1/tasks", {"argv": ["true"]}, Idempotency_Key="x" * 300)
        assert (status, answer["error"]["field"]) == (400, "idempotency_key")


# -- Bounds and bad input ----------------------------------------------------------------------------------------------


@on_both_loops
@pytest.mark.parametrize("expect", [False, True])
async def test_a_body_beyond_the_bound_is_refused_before_it_is_sent(
    service: FakeService, path: Path, expect: bool
) -> None:
    async with connected(service, path) as http:
        headers = {"Expect": "100-continue"} if expect else {}
        http.send("POST", "/v1/tasks", None, Content_Length=str(app.BODY_BYTES_MAX + 1), **headers)
        status, headers, raw = await http.answer()
        assert (status, headers["connection"]) == (413, "close")
        assert b"a body takes at most 16777216 bytes" in raw


@on_both_loops
async def test_a_body_of_unknown_length_beyond_the_bound(service: FakeService, path: Path) -> None:
    async with connected(service, path, body_bytes_max=1000) as http:
        http.send("POST", "/v1/tasks", None, Transfer_Encoding="chunked")
        http.writer.write(b"400\r\n" + b" " * 1024 + b"\r\n")
        assert (await http.answer())[0] == 413


@on_both_loops
async def test_a_body_that_does_not_come(service: FakeService, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "BODY_TIMEOUT_S", 0.01)
    async with connected(service, path) as http:
        http.send("POST", "/v1/tasks", b'{"argv"', Content_Length="100")
        status, headers, raw = await http.answer()
        assert (status, headers["connection"]) == (408, "close")
        assert b"too_slow" in raw


@on_both_loops
async def test_a_head_that_does_not_come(service: FakeService, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "IDLE_TIMEOUT_S", 0.01)
    async with connected(service, path) as http:
        http.writer.write(b"GET /healthz HTTP/1.1\r\nHost:")
        assert await http.is_closed()


@on_both_loops
@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"hello\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: taskd\r\nBad Header\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: taskd\r\nX: " + b"y" * 10_000 + b"\r\n\r\n", 400),
        (b"GET /" + b"y" * 10_000 + b" HTTP/1.1\r\nHost: taskd\r\n\r\n", 400),
        (b"GET /?" + b"a&" * 100 + b" HTTP/1.1\r\nHost: taskd\r\n\r\n", 400),
        (b"GET /?a=%ff HTTP/1.1\r\nHost: taskd\r\n\r\n", 400),
        (b"POST /v1/tasks HTTP/1.1\r\nHost: taskd\r\nContent-Length: x\r\n\r\n", 400),
        (b"POST /v1/tasks HTTP/1.1\r\nHost: taskd\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST /v1/tasks HTTP/1.1\r\nHost: taskd\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}", 400),
        (b"GET /nothing HTTP/1.1\r\nHost: taskd\r\n\r\n", 404),
        (b"PUT /v1/tasks HTTP/1.1\r\nHost: taskd\r\n\r\n", 405),
    ],
)
async def test_bad_requests_get_the_form_of_all_errors(
    service: FakeService, path: Path, sent: bytes, status: int
) -> None:
    async with connected(service, path) as http:
        http.writer.write(sent)
        answered, headers, raw = await http.answer()
        assert (answered, headers["content-type"]) == (status, "application/json")
        assert msgspec.json.decode(raw)["error"]["message"]
        if status == 405:
            assert headers["allow"] == "POST, GET"
        # Nothing else is disturbed.
        other = await Http.open(path)
        assert (await other.ask("GET", "/healthz"))[0] == 200
        await other.close()


@on_both_loops
async def test_too_many_connections(service: FakeService, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "CONNECTIONS_MAX", 2)
    async with connected(service, path) as first:
        assert (await first.ask("GET", "/healthz"))[0] == 200
        second, third = await Http.open(path), await Http.open(path)
        assert (await second.ask("GET", "/healthz"))[0] == 200
        status, headers, raw = await third.answer()
        assert (status, headers["connection"]) == (429, "close")
        assert b"overloaded" in raw
        assert await third.is_closed()
        await second.close()
        # A place is free again as soon as the other is gone.
        while True:
            fourth = await Http.open(path)
            fourth.send("GET", "/healthz")
            status, _, _ = await fourth.answer()
            await fourth.close()
            if status == 200:
                break
        await third.close()


@on_both_loops
async def test_one_user_does_not_keep_all_others_out(
    service: FakeService, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "USER_CONNECTIONS_MAX", 1)
    callers = iter([BOB, BOB, ALICE, ROOT, ROOT, BOB])
    monkeypatch.setattr(app.Door, "admit", lambda door, peer: next(callers))
    async with connected(service, path) as bob:
        assert (await bob.ask("GET", "/healthz"))[0] == 200
        again = await Http.open(path)
        assert (await again.answer())[0] == 429
        others = [await Http.open(path) for _ in range(3)]
        assert [(await other.ask("GET", "/healthz"))[0] for other in others] == [200] * 3
        for http in (again, *others):
            await http.close()


@on_both_loops
async def test_answers_that_ask_to_come_back_later_say_when(service: FakeService, path: Path) -> None:
    service.submit_error = Unavailable()
    async with connected(service, path) as http:
        http.send("POST", "/v1/tasks", {"argv": ["true"]})
        status, headers, _ = await http.answer()
        assert (status, headers["retry-after"]) == (503, "2")


# -- Streams -----------------------------------------------------------------------------------------------------------


@on_both_loops
async def test_a_submission_whose_results_stream(service: FakeService, path: Path) -> None:
    async with connected(service, path) as http:
        http.send("POST", "/v1/tasks?stream=1", [{"type": "a"}, {"type": "b"}])
        status, headers = await http.head()
        assert (status, headers["content-type"]) == (200, "application/x-ndjson")
        chunks = http.chunks()
        accepted = msgspec.json.decode(await anext(chunks))
        for task in accepted["ids"]:
            service.end(task, Report(result=b"1"))
            assert msgspec.json.decode(await anext(chunks))["id"] == task
        assert await anext(chunks, None) is None
        assert (await http.ask("GET", "/healthz"))[0] == 200, "the connection can be used again"


@on_both_loops
async def test_a_client_that_goes_away_ends_its_stream(service: FakeService, path: Path) -> None:
    async with serving(service, path):
        http = await Http.open(path)
        http.send("GET", "/v1/events")
        chunks = await _first_chunk(http)
        service.event_queue.put_nowait(EventView("node.up", NOW_S))
        assert b"node.up" in await anext(chunks)
        assert service.open_streams == 1
        await http.close()
        await _until(lambda: not service.open_streams)


@on_both_loops
async def test_a_client_that_goes_away_ends_its_wait(service: FakeService, path: Path) -> None:
    task = await service.add()
    async with serving(service, path):
        http = await Http.open(path)
        http.send("GET", f"/v1/tasks/{task}/result?wait=30")
        await service.looked.wait()
        await http.close()
        await _until(lambda: not service.watches)


@on_both_loops
async def test_a_stream_that_breaks_does_not_look_whole(service: FakeService, path: Path) -> None:
    task = await service.add()
    service.start(task)
    output = service.outputs[1, "stdout"] = Growing()

    async def read(offset: int, follow: bool) -> AsyncIterator[bytes]:
        async for part in output(offset, True):
            yield part

    service.outputs[1, "stdout"] = read
    async with connected(service, path) as http:
        output.write(b"half")
        http.send("GET", f"/v1/tasks/{task}/output")
        assert (await http.head())[0] == 200
        chunks = http.chunks()
        assert await anext(chunks) == b"half"
        output.write(Unavailable())
        with pytest.raises(asyncio.IncompleteReadError):
            await anext(chunks)
        assert await http.is_closed()


@on_both_loops
async def test_a_slow_reader_holds_the_stream_back(service: FakeService, path: Path) -> None:
    task = await service.add()
    service.start(task)
    given = 0

    async def endless(offset: int, follow: bool) -> AsyncIterator[bytes]:
        nonlocal given
        while True:
            given += 1
            yield bytes(1 << 16)
            await asyncio.sleep(0)

    service.outputs[1, "stdout"] = endless
    async with connected(service, path) as http:
        http.send("GET", f"/v1/tasks/{task}/output")
        assert (await http.head())[0] == 200
        seen = -1
        while given != seen:  # Until it does not go on by itself.
            seen = given
            for _ in range(100):
                await asyncio.sleep(0)
        assert given < 1000, "no more than the buffers on the way hold"
        await http.close()
        await _until(lambda: not service.open_streams)


@on_both_loops
async def test_output_is_passed_on_byte_by_byte(service: FakeService, path: Path) -> None:
    task = await service.add()
    service.start(task)
    data = os.urandom(1_000_000)
    service.outputs[1, "stdout"] = written(data)
    async with connected(service, path) as http:
        http.send("GET", f"/v1/tasks/{task}/output")
        status, _, raw = await http.answer()
        assert (status, raw) == (200, data)


@on_both_loops
async def test_http_1_0_gets_streams_to_the_end_of_the_connection(service: FakeService, path: Path) -> None:
    task = await service.add()
    service.end(task, Report(stdout_tail=b"hello", stdout_bytes=5))
    async with connected(service, path) as http:
        http.writer.write(f"GET /v1/tasks/{task}/output HTTP/1.0\r\n\r\n".encode())
        status, _ = await http.head()
        assert (status, await http.reader.read()) == (200, b"hello")


# -- Stopping ----------------------------------------------------------------------------------------------------------


@on_both_loops
async def test_stopping_in_good_order(service: FakeService, path: Path) -> None:
    task = await service.add()
    server = await serve(service, path)
    idle, streaming, waiting, submitting = [await Http.open(path) for _ in range(4)]
    assert (await idle.ask("GET", "/healthz"))[0] == 200
    streaming.send("GET", "/v1/events")
    await _first_chunk(streaming)
    waiting.send("GET", f"/v1/tasks/{task}/result?wait=30")
    await service.looked.wait()
    is_durable = asyncio.Event()
    submit = service.submit

    async def slow_submit(tasks: Any) -> set[bytes]:
        service.looked.clear()
        service.looked.set()
        await is_durable.wait()
        return await submit(tasks)

    service.looked.clear()
    service.submit = slow_submit  # type: ignore[method-assign]
    submitting.send("POST", "/v1/tasks", {"argv": ["true"]})
    await service.looked.wait()

    closing = asyncio.create_task(server.close(0.2))
    assert await idle.is_closed()
    with pytest.raises(asyncio.IncompleteReadError):
        await anext(streaming.chunks())
    assert not os.path.exists(path)  # noqa: ASYNC240 (a look at a local file)
    is_durable.set()
    status, _, _ = await submitting.answer()
    assert status == 200, "what is being done is done"
    status, headers, raw = await waiting.answer()
    assert (status, headers["connection"]) == (503, "close")
    assert b"is stopping" in raw
    await closing
    assert (service.open_streams, service.watches) == (0, [])
    for http in (idle, streaming, waiting, submitting):
        assert await http.is_closed()
        await http.close()
    with pytest.raises(FileNotFoundError):
        await Http.open(path)


@on_both_loops
async def test_a_second_daemon_is_refused_and_a_later_one_is_not(service: FakeService, path: Path) -> None:
    server = await serve(service, path)
    with pytest.raises(AlreadyRunning, match="another process listens"):
        await serve(FakeService(), path)
    http = await Http.open(path)
    assert (await http.ask("GET", "/healthz"))[0] == 200, "the first one goes on"
    await http.close()
    await server.close()
    async with connected(service, path) as again:
        assert (await again.ask("GET", "/healthz"))[0] == 200


@on_both_loops
async def test_who_may_not_come_in_is_told_so(
    service: FakeService, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, peer: object) -> None:
        raise app.Forbidden("the user eve may not use this socket")

    monkeypatch.setattr(app.Door, "admit", refuse)
    async with serving(service, path):
        for target in ("/healthz", "/v1/tasks"):
            http = await Http.open(path)
            http.send("GET", target)
            status, headers, raw = await http.answer()
            assert (status, headers["connection"]) == (403, "close")
            assert b"eve may not" in raw
            await http.close()


async def _first_chunk(http: Http) -> AsyncIterator[bytes]:
    """Read the head and the first chunk of a stream; returns the rest."""
    status, _ = await http.head()
    assert status == 200
    chunks = http.chunks()
    assert await anext(chunks)
    return chunks


async def _until(is_so: Any) -> None:
    """Let the loop turn until something is so: the test's own time limit is the bound."""
    while not is_so():  # noqa: ASYNC110 (what is waited for tells nobody)
        await asyncio.sleep(0)
