"""The output of tasks: from the record or the worker, of one attempt or all that follow, of one stream or both."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest

from taskd.core.task import OUTPUT_TAIL_BYTES, Outcome, Report, TaskState
from taskd.errors import NotFound, Unavailable
from tests.api.fakes import AsyncBytes, FakeService, written

LONG = bytes(range(256)) * (OUTPUT_TAIL_BYTES // 128)  # Twice as long as what is recorded.


def report_of(stdout: bytes = b"", stderr: bytes = b"") -> Report:
    return Report(
        exit_code=0, stdout_tail=stdout[-OUTPUT_TAIL_BYTES:], stdout_bytes=len(stdout),
        stderr_tail=stderr[-OUTPUT_TAIL_BYTES:], stderr_bytes=len(stderr),
    )  # fmt: skip


class Growing:
    """Output that an attempt is writing: whoever follows gets it part by part."""

    def __init__(self) -> None:
        self._parts: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self.read_from: list[int] = []

    async def __call__(self, offset: int, follow: bool) -> AsyncIterator[bytes]:
        assert follow
        self.read_from.append(offset)
        while (part := await self._parts.get()) is not None:
            if isinstance(part, Exception):
                raise part
            yield part

    def write(self, part: bytes | Exception) -> None:
        self._parts.put_nowait(part)

    def end(self) -> None:
        self._parts.put_nowait(None)


def failing(error: Exception) -> AsyncBytes:
    async def read(offset: int, follow: bool) -> AsyncIterator[bytes]:
        raise error
        yield b""

    return read


async def raw(service: FakeService, target: str) -> tuple[int, bytes]:
    response = await service.response("GET", target)
    assert response.stream is not None
    return response.status, b"".join([part async for part in response.stream])


async def following(service: FakeService, target: str) -> AsyncIterator[bytes]:
    response = await service.response("GET", target)
    assert (response.status, response.content_type.split(";")[0]) in {
        (200, "text/plain"), (200, "application/x-ndjson"),
    }  # fmt: skip
    assert response.stream is not None
    return response.stream


# -- What has been written ---------------------------------------------------------------------------------------------


async def test_a_short_output_comes_from_the_record(service: FakeService) -> None:
    task = await service.add()
    service.end(task, report_of(b"hello\n", b"oh\n"))
    for target, data in [
        ("output", b"hello\n"),
        ("output?stream=stdout", b"hello\n"),
        ("output?stream=stderr", b"oh\n"),
        ("output?offset=4", b"o\n"),
        ("output?offset=100", b""),
        ("output?follow=1", b"hello\n"),
        ("output?attempt=1", b"hello\n"),
    ]:
        assert await raw(service, f"/v1/tasks/{task}/{target}") == (200, data), target
    assert service.output_calls == [], "no worker is asked"


async def test_a_long_output_comes_from_the_worker(service: FakeService) -> None:
    task = await service.add()
    service.outputs[1, "stdout"] = written(LONG)
    service.end(task, report_of(LONG))
    assert await raw(service, f"/v1/tasks/{task}/output") == (200, LONG)
    assert await raw(service, f"/v1/tasks/{task}/output?offset=1000") == (200, LONG[1000:])
    assert service.output_calls == [(1, "stdout", 0, False), (1, "stdout", 1000, False)]
    assert await raw(service, f"/v1/tasks/{task}/output?offset={len(LONG) - 10}") == (200, LONG[-10:])
    assert len(service.output_calls) == 2, "the end is in the record"


@pytest.mark.parametrize("worker", [None, failing(Unavailable()), failing(NotFound())])
async def test_the_recorded_end_stands_in_for_what_is_gone(service: FakeService, worker: AsyncBytes | None) -> None:
    task = await service.add()
    if worker is not None:
        service.outputs[1, "stdout"] = worker
    service.end(task, report_of(LONG))
    status, data = await raw(service, f"/v1/tasks/{task}/output")
    note, tail = data.split(b"\n", 1)
    assert status == 200
    assert note == b"[taskd: %d bytes are missing here: the worker no longer has them]" % (
        len(LONG) - OUTPUT_TAIL_BYTES
    )
    assert tail == LONG[-OUTPUT_TAIL_BYTES:]


async def test_output_of_a_running_task_up_to_now(service: FakeService) -> None:
    task = await service.add()
    assert await service.ask("GET", f"/v1/tasks/{task}/output") == (200, "")
    service.start(task)
    service.outputs[1, "stdout"] = written(b"so far")
    assert await service.ask("GET", f"/v1/tasks/{task}/output?offset=3") == (200, "far")


async def test_a_worker_that_does_not_answer(service: FakeService) -> None:
    task = await service.add()
    service.start(task)
    service.outputs[1, "stdout"] = failing(Unavailable("the connection to node 8 is gone"))
    status, answer = await service.ask("GET", f"/v1/tasks/{task}/output")
    assert (status, answer["error"]["code"]) == (503, "unavailable")


async def test_each_attempt_has_its_own(service: FakeService) -> None:
    task = await service.add()
    service.end(task, report_of(b"first"), Outcome.EXIT_NONZERO, TaskState.RETRYING)
    service.end(task, report_of(b"second"))
    assert await raw(service, f"/v1/tasks/{task}/output") == (200, b"second")
    assert await raw(service, f"/v1/tasks/{task}/output?attempt=1") == (200, b"first")
    for number in (3, 0, "x"):
        status, answer = await service.ask("GET", f"/v1/tasks/{task}/output?attempt={number}")
        assert (status, answer["error"]["field"]) == (404 if number == 3 else 400, "attempt")


async def test_both_streams(service: FakeService) -> None:
    task = await service.add()
    service.end(task, report_of(b"out\xff", b"err"))
    lines = [
        {"stream": "stdout", "data": base64.b64encode(b"out\xff").decode(), "attempt": 1},
        {"stream": "stderr", "data": base64.b64encode(b"err").decode(), "attempt": 1},
    ]
    assert await service.ask("GET", f"/v1/tasks/{task}/output?stream=both") == (200, lines)
    assert (await service.ask("GET", f"/v1/tasks/{task}/output?stream=both&follow=1"))[0] == 200


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("stream=stdin", "stream"),
        ("follow=maybe", "follow"),
        ("offset=-1", "offset"),
        ("stream=both&offset=5", "offset"),
    ],
)
async def test_what_output_does_not_take(service: FakeService, query: str, field: str) -> None:
    task = await service.add()
    status, answer = await service.ask("GET", f"/v1/tasks/{task}/output?{query}")
    assert (status, answer["error"]["field"]) == (400, field)


async def test_an_unreadable_report_leaves_the_worker(service: FakeService) -> None:
    task = await service.add()
    service.end(task, b"\xc1")
    service.outputs[1, "stdout"] = written(b"hello")
    assert await service.ask("GET", f"/v1/tasks/{task}/output") == (200, "hello")


# -- Following ---------------------------------------------------------------------------------------------------------


async def test_follow_waits_until_the_task_begins_and_ends_with_it(service: FakeService) -> None:
    task = await service.add()
    output = service.outputs[1, "stdout"] = Growing()
    stream = await following(service, f"/v1/tasks/{task}/output?follow=1")
    part = asyncio.ensure_future(anext(stream))
    await service.looked.wait()
    service.start(task)
    output.write(b"one")
    assert await part == b"one"
    output.write(b"two")
    assert await anext(stream) == b"two"
    output.end()
    service.end(task, report_of(b"onetwo"))
    assert await anext(stream, None) is None
    assert (service.watches, service.open_streams) == ([], 0)


async def test_follow_of_a_task_that_ends_at_once(service: FakeService) -> None:
    task = await service.add()
    stream = await following(service, f"/v1/tasks/{task}/output?follow=1")
    part = asyncio.ensure_future(anext(stream))
    await service.looked.wait()
    service.end(task, report_of(b"quick"))
    assert await part == b"quick"
    assert await anext(stream, None) is None
    assert service.output_calls == []


async def test_follow_passes_on_to_the_next_attempt(service: FakeService) -> None:
    task = await service.add()
    first = service.outputs[1, "stdout"] = Growing()
    second = service.outputs[2, "stdout"] = Growing()
    service.start(task)
    stream = await following(service, f"/v1/tasks/{task}/output?follow=1&offset=2")
    first.write(b"one")
    assert await anext(stream) == b"one"
    part = asyncio.ensure_future(anext(stream))
    first.end()
    service.end(task, report_of(b"..one"), Outcome.EXIT_NONZERO, TaskState.RETRYING)
    service.start(task)
    second.write(b"two")
    assert await part == b"two"
    second.end()
    service.end(task, report_of(b"two"))
    assert await anext(stream, None) is None
    assert (first.read_from, second.read_from) == ([2], [0])


async def test_follow_of_one_attempt_ends_with_it(service: FakeService) -> None:
    task = await service.add()
    service.end(task, report_of(b"one"), Outcome.EXIT_NONZERO, TaskState.RETRYING)
    service.start(task)
    assert await raw(service, f"/v1/tasks/{task}/output?follow=1&attempt=1") == (200, b"one")


async def test_follow_survives_a_worker_that_is_away_for_a_moment(service: FakeService) -> None:
    task = await service.add()
    output = service.outputs[1, "stdout"] = Growing()
    service.start(task)
    stream = await following(service, f"/v1/tasks/{task}/output?follow=1")
    output.write(b"one")
    assert await anext(stream) == b"one"
    output.write(Unavailable())
    output.write(b"two")
    assert await anext(stream) == b"two"
    output.end()
    service.end(task, report_of(b"onetwo"))
    assert await anext(stream, None) is None
    assert output.read_from == [0, 3]


async def test_follow_passes_over_an_attempt_that_was_lost(service: FakeService) -> None:
    task = await service.add()
    service.start(task)
    service.outputs[1, "stdout"] = failing(Unavailable())
    stream = await following(service, f"/v1/tasks/{task}/output?follow=1")
    part = asyncio.ensure_future(anext(stream))
    await service.looked.wait()
    service.end(task, b"", Outcome.LOST, TaskState.QUEUED, "its worker is gone")
    service.end(task, report_of(b"again"))
    assert await part == b"again"
    assert await anext(stream, None) is None


async def test_follow_of_an_attempt_that_has_not_begun_at_its_worker(service: FakeService) -> None:
    task = await service.add()
    service.start(task)  # As far as the leader knows: the worker has nothing yet.
    stream = await following(service, f"/v1/tasks/{task}/output?follow=1")
    part = asyncio.ensure_future(anext(stream))
    await service.looked.wait()
    output = service.outputs[1, "stdout"] = Growing()
    output.write(b"now")
    assert await part == b"now"
    output.end()
    service.end(task, report_of(b"now"))
    assert await anext(stream, None) is None


async def test_an_end_that_is_not_recorded_yet_repeats_nothing(service: FakeService) -> None:
    task = await service.add()
    service.start(task)
    output = service.outputs[1, "stdout"] = Growing()
    stream = await following(service, f"/v1/tasks/{task}/output?follow=1")
    output.write(b"[taskd: 99 bytes were dropped here]")
    output.end()
    assert await anext(stream) == b"[taskd: 99 bytes were dropped here]"
    part = asyncio.ensure_future(anext(stream, None))  # type: ignore[arg-type]
    await service.looked.wait()
    # What was dropped makes the counted bytes differ from those that were written.
    service.end(task, Report(stdout_tail=b"tail" * 1000, stdout_bytes=50_000))
    assert await part is None


async def test_follow_both(service: FakeService) -> None:
    task = await service.add()
    out = service.outputs[1, "stdout"] = Growing()
    err = service.outputs[1, "stderr"] = Growing()
    service.start(task)
    stream = await following(service, f"/v1/tasks/{task}/output?stream=both&follow=1")
    for output, name in ((err, b"stderr"), (out, b"stdout"), (err, b"stderr")):
        output.write(b"x")
        assert await anext(stream) == b'{"stream":"%b","data":"eA==","attempt":1}\n' % name
    out.end()
    err.end()
    service.end(task, report_of(b"x", b"xx"))
    assert await anext(stream, None) is None
    assert (service.watches, service.open_streams) == ([], 0)


@pytest.mark.parametrize("stream_name", ["stdout", "both"])
async def test_who_leaves_leaves_nothing_behind(service: FakeService, stream_name: str) -> None:
    task = await service.add()
    for name in ("stdout", "stderr"):
        service.outputs[1, name] = Growing()
    service.start(task)
    stream: Any = await following(service, f"/v1/tasks/{task}/output?follow=1&stream={stream_name}")
    reader = asyncio.create_task(anext(stream))
    while not service.open_streams:  # noqa: ASYNC110 (a turn of the loop, not a time)
        await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await stream.aclose()
    assert (service.watches, service.open_streams) == ([], 0)


async def test_a_daemon_that_stops_breaks_the_stream_off(service: FakeService) -> None:
    task = await service.add()
    response = await service.response("GET", f"/v1/tasks/{task}/output?follow=1")
    assert response.stream is not None
    part = asyncio.ensure_future(anext(response.stream))
    await service.looked.wait()
    service.watches[0].stop()
    with pytest.raises(Unavailable, match="is stopping"):
        await part


async def test_a_daemon_that_stops_ends_the_lines_with_an_error(service: FakeService) -> None:
    task = await service.add()
    request = asyncio.create_task(service.ask("GET", f"/v1/tasks/{task}/output?follow=1&stream=both"))
    await service.looked.wait()
    for watch in service.watches:
        watch.stop()
    status, lines = await request
    assert (status, [line["error"]["code"] for line in lines]) == (200, ["unavailable"])


async def test_a_task_that_is_purged_while_it_is_followed(service: FakeService) -> None:
    task = await service.add()
    response = await service.response("GET", f"/v1/tasks/{task}/output?follow=1")
    assert response.stream is not None
    service.tasks.clear()
    with pytest.raises(NotFound, match="no longer there"):
        await anext(response.stream)
