"""Waiting for tasks to end: one answer when all have or the time is up, or a line of JSON for each as it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import closing

import msgspec
from msgspec.structs import replace

from taskd.api.bodies import LINES, decode, encode, encode_lines, error_line
from taskd.api.ids import parse_id
from taskd.api.parameters import Span
from taskd.api.selection import ROWS_AT_ONCE, find_ids, find_row
from taskd.api.service import ApiRequest, ApiResponse, Service, Watch
from taskd.api.types import Accepted, AcceptedResults, Waited, WaitRequest
from taskd.api.views import result_of_change, result_of_row
from taskd.core.effects import Change
from taskd.core.task import TaskState
from taskd.errors import InvalidRequest, NotFound, Stopping, TooLarge
from taskd.protocol.messages import id_text

WAIT_S_MAX = 86400.0
# A wait longer than this begins its answer at once, so that nobody on the way takes the silence for a dead connection.
SILENCE_S_MAX = 60.0
RESULTS_BYTES_MAX = 64 << 20  # Of results in one answer; as a stream there is no limit.
RESULTS_AT_ONCE = 256  # Lines in one part of a stream.

WAIT_PATH = "/v1/tasks/wait"
WAIT = Span("wait", "Answer when the task has ended, or after this time with how it stands", WAIT_S_MAX)

_wait_request = msgspec.json.Decoder(WaitRequest)


# -- Requests ----------------------------------------------------------------------------------------------------------


async def result(request: ApiRequest, service: Service) -> ApiResponse:
    """How a task ended; with `wait` once it has. Its state tells whether it has ended at all."""
    wait_s = WAIT.read(request.query) or 0.0
    row = await find_row(request, service)
    if TaskState(row.state).is_final or not wait_s:
        return ApiResponse(body=encode(result_of_row(row)))
    return await _now_or_later(_later_result(row.id, wait_s, service), wait_s)


async def _later_result(task_id: bytes, wait_s: float, service: Service) -> AsyncIterator[bytes]:
    with closing(service.watch([task_id])) as watch:
        yield b""
        async for changes in _ended(watch, wait_s):
            yield encode(result_of_change(changes[-1]))
            return
    rows = service.rows([task_id])
    if not rows:
        raise NotFound(f"the task {id_text(task_id)} is no longer there")
    yield encode(result_of_row(rows[0]))


async def wait(request: ApiRequest, service: Service) -> ApiResponse:
    """Wait for tasks to end: for all of them, or a line for each."""
    asked = decode(_wait_request, request.body)
    if not asked.ids:
        raise InvalidRequest("there is nothing to wait for", field="ids")
    ids = await find_ids(asked.ids, request, service)
    if asked.stream:
        return ApiResponse(content_type=LINES, stream=_lines(ids, asked.timeout, service, b""))
    return await _now_or_later(_waited(ids, asked.timeout, service, None), asked.timeout)


def awaited_ids(request: ApiRequest) -> list[bytes] | None:
    """The tasks that a request to wait names; None where it does not give their whole ids, or cannot be read."""
    try:
        asked = decode(_wait_request, request.body)
    except InvalidRequest:
        return None
    ids = {parse_id(text.lower()): None for text in asked.ids}
    return None if None in ids else [task_id for task_id in ids if task_id is not None]


def shortened(request: ApiRequest, elapsed_s: float) -> ApiRequest:
    """A request that waits, to be made again: for the time that is left."""
    text = request.query.get(WAIT.name)
    if text is not None:
        left_s = max(0.0, (WAIT.read(request.query) or 0.0) - elapsed_s)
        return replace(request, query={**request.query, WAIT.name: f"{left_s:.3f}"})
    if request.path != WAIT_PATH:
        return request
    asked = decode(_wait_request, request.body)
    return replace(request, body=encode(replace(asked, timeout=max(0.0, asked.timeout - elapsed_s))))


async def accepted_with_results(accepted: Accepted, ids: list[bytes], wait_s: float, service: Service) -> ApiResponse:
    """The answer to a submission that waits for its tasks."""
    return await _now_or_later(_waited(ids, wait_s, service, accepted), wait_s)


def accepted_lines(
    accepted: Accepted, ids: list[bytes], wait_s: float | None, service: Service
) -> AsyncIterator[bytes]:
    """The answer to a submission that streams: what was accepted, then each result; all of them unless `wait_s`."""
    return _lines(ids, wait_s, service, encode(accepted) + b"\n")


async def _now_or_later(parts: AsyncIterator[bytes], wait_s: float) -> ApiResponse:
    if wait_s > SILENCE_S_MAX:
        return ApiResponse(stream=parts)
    return ApiResponse(body=b"".join([part async for part in parts]))


# -- Answers -----------------------------------------------------------------------------------------------------------


async def _waited(ids: list[bytes], wait_s: float, service: Service, accepted: Accepted | None) -> AsyncIterator[bytes]:
    """One JSON text, after an empty part that says that the tasks exist."""
    changes: dict[bytes, Change] = {}
    size = 0
    with closing(service.watch(ids)) as watch:
        for change in await _first(watch, ids, service):
            changes[change.id] = change
        yield b""
        async for batch in _ended(watch, wait_s):
            for change in batch:
                changes[change.id] = change
                size += len(change.report)
            if size > RESULTS_BYTES_MAX:
                raise TooLarge("the results together are too large for one answer: ask for them as a stream")
        if not watch.open and len(changes) < len(ids):
            raise Stopping()
    results = [result_of_change(changes[task_id]) for task_id in ids if task_id in changes]
    pending = len(ids) - len(results)
    if accepted is None:
        yield encode(Waited(results, pending))
    else:
        yield encode(
            AcceptedResults(accepted.ids, accepted.durability, accepted.existing, results=results, pending=pending)
        )


async def _lines(ids: list[bytes], wait_s: float | None, service: Service, head: bytes) -> AsyncIterator[bytes]:
    """`head`, then a line for each task as it ends. When the time is up the rest is missing; when the daemon stops, a
    last line says so."""
    missing = len(ids)
    with closing(service.watch(ids)) as watch:
        first = await _first(watch, ids, service)
        yield head
        missing -= len(first)
        for part in _parts(first):
            yield part
        async for changes in _ended(watch, wait_s):
            missing -= len(changes)
            for part in _parts(changes):
                yield part
        if missing and not watch.open:
            yield error_line(Stopping("this daemon is stopping; ask again for the tasks that are missing here"))


def _parts(changes: list[Change]) -> list[bytes]:
    return [
        encode_lines([result_of_change(change) for change in changes[start : start + RESULTS_AT_ONCE]])
        for start in range(0, len(changes), RESULTS_AT_ONCE)
    ]


async def _first(watch: Watch, ids: list[bytes], service: Service) -> list[Change]:
    """Those that have ended already. Raises NotFound where one of `ids` is unknown."""
    ended = await watch.next(0)
    if watch.open + len(ended) < len(ids):
        known = {change.id for change in ended}
        for start in range(0, len(ids), ROWS_AT_ONCE):
            known.update(row.id for row in service.rows(ids[start : start + ROWS_AT_ONCE]))
        for place, task_id in enumerate(ids):
            if task_id not in known:
                raise NotFound(f"there is no task {id_text(task_id)}", field=f"ids[{place}]")
    return ended


async def _ended(watch: Watch, wait_s: float | None) -> AsyncIterator[list[Change]]:
    """Tasks as they end, until all have, the time is up (None: never), or the daemon stops."""
    clock = asyncio.get_running_loop().time
    end = clock() + (WAIT_S_MAX if wait_s is None else wait_s)
    while True:
        # Read before asking: what ends from now on is in one of the next batches.
        is_last = not watch.open
        left_s = end - clock()
        if wait_s is None and left_s <= 0:
            end, left_s = clock() + WAIT_S_MAX, WAIT_S_MAX
        changes = await watch.next(0 if is_last else max(0.0, left_s))
        if changes:
            yield changes
        elif is_last or left_s <= 0:
            return
