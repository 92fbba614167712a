"""What a task wrote: from the record where that holds all of it, else from the worker where it ran.

`follow` follows the task, not the attempt: it waits until one begins, and passes on to the next until the task has
ended; with `attempt` it stays with that one. Plain bytes for one stream; for `both`, lines of JSON that say which.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, closing, suppress
from typing import Literal

import msgspec
from msgspec import Struct

from taskd.api.bodies import LINES, encode, error_line
from taskd.api.parameters import Choice, Flag, Whole
from taskd.api.selection import find_row
from taskd.api.service import ApiRequest, ApiResponse, Service
from taskd.api.streams import close_stream
from taskd.api.types import OutputPart
from taskd.core.task import Attempt, Outcome, TaskState, deciding_attempt, decode_record, decode_report
from taskd.errors import InvalidRequest, NotFound, TaskdError, Unavailable
from taskd.protocol.messages import id_text

StreamName = Literal["stdout", "stderr"]

# A task says when it ends, not when it begins: its row is looked at again, soon at first, then more rarely.
LOOK_AGAIN_S_MIN, LOOK_AGAIN_S_MAX = 0.02, 0.5
_MAY_LEAVE_NOTHING = frozenset({Outcome.LOST, Outcome.PREEMPTED})
PARTS_WAITING_MAX = 8  # Of both streams together, for a reader who is slower than the task.

STREAM = Choice("stream", "Which stream; `both` answers lines of JSON", ("stdout", "stderr", "both"), "stdout")
FOLLOW = Flag("follow", "Go on until the task has ended, over all its attempts; wait for it to begin")
OFFSET = Whole("offset", "Bytes of the stream to pass over", 0, 1 << 62, 0)
ATTEMPT = Whole("attempt", "Of this attempt, not of the newest", 1, 1 << 31)


class _Wanted(Struct, frozen=True):
    """What a caller wants of a task's output. `number` is None for the newest attempt, or all that follow."""

    task_id: bytes
    stream: StreamName
    number: int | None
    offset: int


async def output(request: ApiRequest, service: Service) -> ApiResponse:
    """What a task wrote to stdout, stderr or both."""
    query = request.query
    stream, follow = STREAM.read(query), FOLLOW.read(query)
    offset, number = OFFSET.read(query) or 0, ATTEMPT.read(query)
    if stream == "both" and offset:
        raise InvalidRequest(
            "an offset counts the bytes of one stream: give `stream=stdout` or `stderr`", field="offset"
        )
    row = await find_row(request, service)
    attempts = decode_record(row.record).attempts
    if number is not None and number not in {attempt.number for attempt in attempts}:
        raise NotFound(f"the task has no attempt {number}; it has had {len(attempts)}", field="attempt")
    if stream == "both":
        out, err = (_Wanted(row.id, name, number, 0) for name in _STREAMS)
        if follow:
            merged = _merged(_followed(out, service), _followed(err, service))
        else:
            merged = _joined(_written(out, service), _written(err, service))
        return ApiResponse(content_type=LINES, stream=_lines(merged))
    wanted = _Wanted(row.id, "stdout" if stream == "stdout" else "stderr", number, offset)
    parts = _followed(wanted, service) if follow else _written(wanted, service)
    return ApiResponse(content_type="text/plain; charset=utf-8", stream=_bytes(parts))


_STREAMS: tuple[StreamName, StreamName] = ("stdout", "stderr")
_Parts = AsyncGenerator[OutputPart, None]


async def _bytes(parts: _Parts) -> AsyncIterator[bytes]:
    async with aclosing(parts):
        async for part in parts:
            yield part.data


async def _lines(parts: _Parts) -> AsyncIterator[bytes]:
    """As lines. What goes wrong after the first part is a line too, the last one."""
    has_begun = False
    async with aclosing(parts):
        try:
            async for part in parts:
                has_begun = True
                yield encode(part) + b"\n" if part.data else b""
        except TaskdError as error:
            if not has_begun:
                raise
            yield error_line(error)


# -- What is there -----------------------------------------------------------------------------------------------------


async def _written(wanted: _Wanted, service: Service) -> _Parts:
    """What one attempt has written until now."""
    _, attempt = _look(wanted, wanted.number, service)
    if attempt is None:
        return
    async with aclosing(_rest(wanted, attempt, wanted.offset, service)) as parts:
        async for part in parts:
            yield part


async def _rest(wanted: _Wanted, attempt: Attempt, offset: int, service: Service) -> _Parts:
    """What an attempt has written from `offset` on: from its report where that has it all, else from its worker. Where
    the worker has nothing or does not answer, the recorded end, after a line that says what is missing."""
    tail, begins = _recorded(attempt, wanted.stream)
    if tail is not None and begins <= offset:
        yield OutputPart(wanted.stream, tail[offset - begins :], attempt.number)
        return
    has_come = False
    try:
        async with aclosing(_from_worker(wanted, attempt, offset, False, service)) as parts:
            async for part in parts:
                has_come = True
                yield part
    except (Unavailable, NotFound):
        if has_come or tail is None:
            raise
    if not has_come and tail is not None:
        missing = b"[taskd: %d bytes are missing here: the worker no longer has them]\n" % (begins - offset)
        yield OutputPart(wanted.stream, missing + tail, attempt.number)


def _recorded(attempt: Attempt, stream: StreamName) -> tuple[bytes | None, int]:
    """The end of a stream as the report has it, and at which byte that begins; None where there is no report that can
    be read."""
    if attempt.is_open or not attempt.report:
        return None, 0
    try:
        report = decode_report(attempt.report)
    except msgspec.DecodeError:
        return None, 0
    if stream == "stdout":
        return report.stdout_tail, report.stdout_bytes - len(report.stdout_tail)
    return report.stderr_tail, report.stderr_bytes - len(report.stderr_tail)


async def _from_worker(wanted: _Wanted, attempt: Attempt, offset: int, follow: bool, service: Service) -> _Parts:
    stream = service.output(wanted.task_id, attempt.number, attempt.worker, wanted.stream, offset, follow)
    try:
        async for data in stream:
            if data:
                yield OutputPart(wanted.stream, data, attempt.number)
    finally:
        await close_stream(stream)


# -- What is still to come ---------------------------------------------------------------------------------------------


async def _followed(wanted: _Wanted, service: Service) -> _Parts:
    """What attempts write, until the task (or the attempt that is wanted) has ended. Begins with an empty part."""
    number, offset = wanted.number, wanted.offset
    is_whole = False  # all that the attempt wrote has been passed on
    pause_s = LOOK_AGAIN_S_MIN
    with closing(service.watch([wanted.task_id])) as watch:
        yield OutputPart(wanted.stream, b"", 0)
        while True:
            was_open = watch.open > 0  # Read before the row: what has ended by then is in it.
            state, attempt = _look(wanted, number, service)
            if attempt is not None and not attempt.is_open:
                if not is_whole:
                    async with aclosing(_rest_if_any(wanted, attempt, offset, service)) as parts:
                        async for part in parts:
                            yield part
                if wanted.number is not None:
                    return
                number, offset, is_whole, pause_s = attempt.number + 1, 0, False, LOOK_AGAIN_S_MIN
                continue
            if state.is_final:
                return
            if not was_open:
                raise Unavailable("this daemon is stopping; ask again")
            if attempt is not None and not is_whole:
                number, has_come = attempt.number, False
                # A worker that does not answer is back before long, or lost: the row will tell.
                with suppress(Unavailable, NotFound):
                    async with aclosing(_from_worker(wanted, attempt, offset, True, service)) as parts:
                        async for part in parts:
                            has_come, pause_s = True, LOOK_AGAIN_S_MIN
                            offset += len(part.data)
                            yield part
                    # The end of the stream is that of the attempt, unless it has not begun there yet.
                    is_whole = has_come
            await watch.next(pause_s)
            pause_s = min(pause_s * 2, LOOK_AGAIN_S_MAX)


def _look(wanted: _Wanted, number: int | None, service: Service) -> tuple[TaskState, Attempt | None]:
    """How the task stands, and its attempt of that number (the newest where it is None), if there is one yet."""
    rows = service.rows([wanted.task_id])
    if not rows:
        raise NotFound(f"the task {id_text(wanted.task_id)} is no longer there")
    record = decode_record(rows[0].record)
    if number is None:
        attempt = deciding_attempt(record)
    else:
        # A number can be missing: an attempt that was given back unbegun need not be kept.
        attempt = next((attempt for attempt in record.attempts if attempt.number >= number), None)
    return TaskState(rows[0].state), attempt


async def _rest_if_any(wanted: _Wanted, attempt: Attempt, offset: int, service: Service) -> _Parts:
    """The rest of an attempt, which is nothing where it was lost with its worker."""
    try:
        async with aclosing(_rest(wanted, attempt, offset, service)) as parts:
            async for part in parts:
                yield part
    except (Unavailable, NotFound):
        if attempt.outcome not in _MAY_LEAVE_NOTHING:
            raise


# -- Both streams ------------------------------------------------------------------------------------------------------


async def _joined(first: _Parts, second: _Parts) -> _Parts:
    """One after the other."""
    for parts in (first, second):
        async with aclosing(parts):
            async for part in parts:
                yield part


async def _merged(*sources: _Parts) -> _Parts:
    """All at the same time, until each has ended or one breaks."""
    queue: asyncio.Queue[OutputPart | Exception | None] = asyncio.Queue(PARTS_WAITING_MAX)

    async def pump(source: _Parts) -> None:
        last: Exception | None = None
        try:
            async with aclosing(source):
                async for part in source:
                    await queue.put(part)
        except Exception as error:
            last = error
        await queue.put(last)

    pumps = [asyncio.create_task(pump(source)) for source in sources]
    running = len(pumps)
    try:
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
