"""What users do with tasks: submit, list, show, cancel, retry, explain. Waiting for them is in waiting.py, what they
wrote in output.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing

import msgspec
from msgspec.structs import replace

from taskd.api.bodies import LINES, answer, decode
from taskd.api.ids import KeyedIds, RequestIds
from taskd.api.parameters import Flag, Line, Span, Whole, Words
from taskd.api.selection import (
    ROWS_AT_ONCE,
    find_cursor,
    find_own_row,
    find_row,
    find_states,
    selected,
)
from taskd.api.service import ApiRequest, ApiResponse, Service
from taskd.api.submission import NO_TIME_S, new_tasks, read_submissions
from taskd.api.types import Accepted, Acted, Attempts, Explanation, Plan, Selection, TaskPage
from taskd.api.views import attempt_views, cause_of, planned, result_of_row, task_detail, task_view
from taskd.api.waiting import WAIT_S_MAX, accepted_lines, accepted_with_results
from taskd.core.events import NewTask
from taskd.core.task import FINAL, TaskState, decode_record, decode_spec, encode
from taskd.errors import Conflict, InvalidRequest, TaskdError, TooLarge
from taskd.protocol.messages import TaskRow, id_text
from taskd.store.base import Query

PLAN_MAX = 1000  # Tasks of one dry run: its answer is many times its request.
SELECTED_MAX = 100_000  # Tasks that one call acts on; the answer says where the next one goes on.
PAGE_MAX = 1000
KEY_CHARS_MAX = 255

WAIT = Span("wait", "Answer when all tasks have ended, or after this time, with the results", WAIT_S_MAX)
STREAM = Flag("stream", "Answer lines of JSON: what was accepted, then each result as it comes")
KEY = Line("idempotency_key", "Stands for the header Idempotency-Key", KEY_CHARS_MAX)

STATE = Words("state", "States, or `unfinished`, or `finished`")
QUEUE = Words("queue", "Names of queues")
TYPE = Words("type", "Types of tasks")
LABEL = Words("label", "Labels that all must fit, each as key=value")
OWNER = Words("owner", "Users; `me` stands for the caller")
NAME = Words("name", "Names of tasks")
CURSOR = Line("cursor", "Where the last page ended", 36)
LIMIT = Whole("limit", "Tasks on a page", 1, PAGE_MAX, 100)

CANCELLABLE = tuple(state for state in TaskState if not state.is_final)
RETRYABLE = tuple(sorted(FINAL))

_selection = msgspec.json.Decoder(Selection)


# -- Submitting --------------------------------------------------------------------------------------------------------


async def submit(request: ApiRequest, service: Service) -> ApiResponse:
    """Take one task or thousands, durably: all or none."""
    wait_s, is_stream = WAIT.read(request.query), STREAM.read(request.query)
    submissions, is_list = read_submissions(request.body)
    id_of = _id_source(request, service)
    tasks = new_tasks(submissions, is_list, request.caller.user, service, id_of)
    del submissions
    receipt = await service.submit(tasks)
    # Those of the request's own ids are known where a leader took them and could not say so any more: to the client
    # they are new.
    made = RequestIds(request.first_id, service.now_s())
    existing = sum(1 for task_id in receipt.known if not made.has_made(task_id, len(tasks)))
    accepted = Accepted([id_text(task.id) for task in tasks], receipt.durability, existing)
    ids = [task.id for task in tasks]
    did = f"submitted {_some(accepted.ids)}"
    if is_stream:
        return ApiResponse(content_type=LINES, stream=accepted_lines(accepted, ids, wait_s, service), did=did)
    if wait_s is not None:
        return replace(await accepted_with_results(accepted, ids, wait_s, service), did=did)
    return answer(accepted, did=did)


def _some(ids: list[str]) -> str:
    """Tasks in a few words, for the audit."""
    return f"{len(ids)} tasks, {ids[0]} to {ids[-1]}" if len(ids) > 1 else (ids or ["nothing"])[0]


def _id_source(request: ApiRequest, service: Service) -> Callable[[int], bytes]:
    """Names the tasks of a submission by their place: from the request's own id on, or as the caller's key says."""
    key = KEY.read(request.query)
    if not key:
        return RequestIds(request.first_id, service.now_s()).id
    ids = KeyedIds(request.caller.user, key, service.now_s())
    earlier = service.rows(ids.candidates())
    if earlier:
        ids.adopt(earlier[0].id)
    return ids.id


async def plan(request: ApiRequest, service: Service) -> ApiResponse:
    """Check a submission and say what it would become, without taking it."""
    submissions, is_list = read_submissions(request.body)
    if len(submissions) > PLAN_MAX:
        raise TooLarge(f"a plan takes at most {PLAN_MAX} tasks")
    tasks = new_tasks(submissions, is_list, request.caller.user, service, lambda place: bytes(16))
    return answer(Plan([planned(task, service) for task in tasks]))


# -- Reading -----------------------------------------------------------------------------------------------------------


async def list_tasks(request: ApiRequest, service: Service) -> ApiResponse:
    """One page of tasks, newest first."""
    limit = LIMIT.read(request.query)
    assert limit is not None
    query = Query(
        states=find_states(STATE.read(request.query), STATE.name),
        queues=QUEUE.read(request.query),
        types=TYPE.read(request.query),
        owners=tuple(request.caller.user if owner == "me" else owner for owner in OWNER.read(request.query)),
        names=NAME.read(request.query),
        labels=tuple(_label(text) for text in LABEL.read(request.query)),
        before=find_cursor(CURSOR.read(request.query)),
        limit=limit + 1,  # One more tells whether another page follows.
    )
    rows = await service.list(query)
    cursor = id_text(rows[limit - 1].id) if len(rows) > limit else None
    return answer(TaskPage([task_view(row, service) for row in rows[:limit]], cursor))


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InvalidRequest(f"{text!r} is not a label: write key=value", field=LABEL.name)
    return name, value


async def show(request: ApiRequest, service: Service) -> ApiResponse:
    """One task in full."""
    return answer(task_detail(await find_row(request, service), service))


async def attempts(request: ApiRequest, service: Service) -> ApiResponse:
    """All attempts of a task."""
    row = await find_row(request, service)
    return answer(Attempts(attempt_views(row.id, decode_record(row.record), service)))


async def explain(request: ApiRequest, service: Service) -> ApiResponse:
    """Why a task stands where it stands."""
    row = await find_row(request, service)
    why = service.explain(row.id)
    if why is None:
        # It has ended; read again, for it may have done so just now.
        row = (service.rows([row.id]) or [row])[0]
        result = result_of_row(row)
        cause = cause_of(result)
        text = f"it has ended: {result.state.replace('_', ' ')}" + (f" ({cause})" if cause else "")
        why = Explanation(id_text(row.id), result.state, "Ended", text, None, None, [])
    return answer(why)


# -- Cancelling --------------------------------------------------------------------------------------------------------


async def cancel(request: ApiRequest, service: Service) -> ApiResponse:
    """Cancel one task: at once where it waits, by TERM, grace and KILL where it runs."""
    row = await find_own_row(request, service)
    cancelled = await service.cancel([row.id])
    if not cancelled:
        state = TaskState((service.rows([row.id]) or [row])[0].state)
        if state is not TaskState.CANCELLED:
            raise Conflict(f"the task has ended already: {state.word.replace('_', ' ')}")
    return _acted("cancelled", cancelled)


async def cancel_selected(request: ApiRequest, service: Service) -> ApiResponse:
    """Cancel the unfinished ones of a selection."""

    async def act(rows: list[TaskRow]) -> list[bytes]:
        return await service.cancel([row.id for row in rows])

    return await _act(request, service, CANCELLABLE, act, "cancelled")


async def _act(
    request: ApiRequest,
    service: Service,
    states: tuple[TaskState, ...],
    act: Callable[[list[TaskRow]], Awaitable[list[bytes]]],
    word: str,
) -> ApiResponse:
    """Do something to the tasks of a selection, batch by batch."""
    selection = decode(_selection, request.body)
    done: list[bytes] = []
    seen = 0
    cursor = None
    async with aclosing(selected(selection, states, request, service)) as batches:
        async for rows in batches:
            if not rows:
                continue
            try:
                done += await act(rows)
            except TaskdError:
                if not done:
                    raise
                break  # What is done is done: the caller hears of it, and of the error when going on from the cursor.
            seen += len(rows)
            cursor = rows[-1].id
            if seen >= SELECTED_MAX:
                break
        else:
            cursor = None
    return _acted(word, done, cursor)


def _acted(word: str, done: list[bytes], cursor: bytes | None = None) -> ApiResponse:
    ids = [id_text(task_id) for task_id in done]
    return answer(Acted(ids, id_text(cursor) if cursor is not None else None), did=f"{word} {_some(ids)}")


# -- Again -------------------------------------------------------------------------------------------------------------


async def retry(request: ApiRequest, service: Service) -> ApiResponse:
    """Submit a finished task again, as a new one: what was decided never changes."""
    row = await find_own_row(request, service)
    if row.state not in FINAL:
        raise Conflict(f"the task has not ended: it is {TaskState(row.state).word}")
    task = _Repeats(request, service).of(row)
    await service.submit([task])
    return _acted("made", [task.id])


async def retry_selected(request: ApiRequest, service: Service) -> ApiResponse:
    """Submit the finished ones of a selection again, each as a new task."""

    repeats = _Repeats(request, service)

    async def act(rows: list[TaskRow]) -> list[bytes]:
        tasks = [repeats.of(row) for row in reversed(rows)]  # The oldest first, as they were submitted.
        await service.submit(tasks)
        return [task.id for task in tasks]

    return await _act(request, service, RETRYABLE, act, "made")


class _Repeats:
    """The new tasks of one request, each of which repeats an old one. Where the request is answered again, what is
    selected may be more by now: those that were made keep their ids, others get the next ones."""

    def __init__(self, request: ApiRequest, service: Service) -> None:
        self._service = service
        self._ids = RequestIds(request.first_id, service.now_s())
        self._made: dict[bytes, bytes] = {}  # by the old one's id
        self._count = 0
        rows = service.rows([self._ids.id(0)])
        while rows:
            self._made.update((decode_spec(row.spec).retry_of, row.id) for row in rows)
            self._count += len(rows)
            rows = service.rows([self._ids.id(self._count + place) for place in range(ROWS_AT_ONCE)])

    def of(self, row: TaskRow) -> NewTask:
        """The task that repeats this one."""
        task_id = self._made.get(row.id)
        if task_id is None:
            task_id = self._ids.id(self._count)
            self._count += 1
        spec = decode_spec(row.spec)
        now_s = self._service.now_s()
        deadline_s = now_s + (spec.deadline_s - spec.submitted_s) if spec.deadline_s else NO_TIME_S
        spec = replace(spec, submitted_s=now_s, not_before_s=NO_TIME_S, deadline_s=deadline_s, retry_of=row.id)
        return NewTask(task_id, spec, encode(spec))
