"""Which tasks a request means: one by its id or the end of it, several by ids or by what they have in common."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterable

from msgspec.structs import replace

from taskd.api.ids import parse_id
from taskd.api.service import ApiRequest, Service
from taskd.api.types import Selection
from taskd.core.task import TaskState, decode_spec
from taskd.errors import Ambiguous, Forbidden, InvalidRequest, NotFound, TooLarge
from taskd.protocol.messages import TaskRow, id_text
from taskd.store.base import Query

IDS_MAX = 100_000  # Of one request.
ENDINGS_MAX = 100  # Of ids given by their end: each is a search of its own.
ROWS_AT_ONCE = 1000

_ENDING = re.compile(r"[0-9a-f-]{4,36}")
_FORMS = "give a task's id, at least the last 4 characters of it, or `last` for your newest"
_STATE_WORDS = {state.word: (int(state),) for state in TaskState} | {
    "unfinished": tuple(int(state) for state in TaskState if not state.is_final),
    "finished": tuple(int(state) for state in TaskState if state.is_final),
}


# -- One task ----------------------------------------------------------------------------------------------------------


def named_ids(request: ApiRequest) -> list[bytes] | None:
    """The task that the path names; None where that is not a whole id."""
    task_id = parse_id(request.argument.lower())
    return None if task_id is None else [task_id]


def unnamed(request: ApiRequest) -> list[bytes] | None:
    """For requests that may mean any task: None."""
    return None


async def find_row(request: ApiRequest, service: Service) -> TaskRow:
    """The task that the path names. Raises NotFound, Ambiguous, InvalidRequest."""
    task_id = await find_id(request.argument, request, service)
    rows = service.rows([task_id])
    if not rows:
        raise NotFound(f"there is no task {request.argument}", field="id")
    return rows[0]


async def find_own_row(request: ApiRequest, service: Service) -> TaskRow:
    """The task that the path names, where the caller may act on it. Raises Forbidden besides."""
    row = await find_row(request, service)
    check_owner(row, request)
    return row


def check_owner(row: TaskRow, request: ApiRequest) -> None:
    """Raise Forbidden where the caller may not act on this task."""
    if row.owner != request.caller.user and not request.caller.is_admin:
        raise Forbidden(f"the task belongs to {row.owner}; ask them or a member of the group taskd-admin")


async def find_id(text: str, request: ApiRequest, service: Service, field: str = "id") -> bytes:
    """The id that a text stands for; whole ids are not looked up. Raises NotFound, Ambiguous, InvalidRequest."""
    if text == "last":
        newest = await service.newest(request.caller.user)
        if newest is None:
            raise NotFound("you have no tasks yet", field=field)
        return newest
    lowered = text.lower()
    task_id = parse_id(lowered)
    if task_id is not None:
        return task_id
    digits = lowered.replace("-", "")
    if _ENDING.fullmatch(lowered) is None or not 4 <= len(digits) < 32:
        raise InvalidRequest(f"{text!r} names no task: {_FORMS}", field=field)
    found = await service.ending_in(digits, 2)
    if not found:
        raise NotFound(f"no task's id ends in {text}", field=field)
    if len(found) > 1:
        raise Ambiguous(f"the ids of several tasks end in {text}; give more of it", field=field)
    return found[0]


# -- Several tasks -----------------------------------------------------------------------------------------------------


async def find_ids(texts: Iterable[str], request: ApiRequest, service: Service) -> list[bytes]:
    """The ids that texts stand for, each once, in order. Raises what find_id raises, TooLarge."""
    ids: dict[bytes, None] = {}
    endings = 0
    for place, text in enumerate(texts):
        if place >= IDS_MAX:
            raise TooLarge(f"one request takes at most {IDS_MAX} ids", field="ids")
        task_id = parse_id(text.lower())
        if task_id is None:
            endings += 1
            if endings > ENDINGS_MAX:
                raise TooLarge(f"at most {ENDINGS_MAX} ids may be given by their end", field=f"ids[{place}]")
            task_id = await find_id(text, request, service, f"ids[{place}]")
        ids[task_id] = None
    return list(ids)


def find_states(words: Iterable[str], field: str) -> tuple[int, ...]:
    """The states that words name. Raises InvalidRequest."""
    states: set[int] = set()
    for word in words:
        named = _STATE_WORDS.get(word)
        if named is None:
            raise InvalidRequest(f"{word!r} is not a state: {', '.join(_STATE_WORDS)} are", field=field)
        states.update(named)
    return tuple(sorted(states))


def find_cursor(text: str) -> bytes:
    """Where a page begins. Raises InvalidRequest."""
    before = parse_id(text) if text else b""
    if before is None:
        raise InvalidRequest("this is not a cursor from an earlier answer", field="cursor")
    return before


async def selected(
    selection: Selection, states: Iterable[TaskState], request: ApiRequest, service: Service
) -> AsyncGenerator[list[TaskRow], None]:
    """The tasks of a selection that are in one of `states` and that the caller may act on, newest first, up to
    ROWS_AT_ONCE in one step. Raises what find_ids raises, and Forbidden for an id of somebody else's task."""
    wanted = set(find_states(selection.states, "states")) or {int(state) for state in TaskState}
    wanted &= {int(state) for state in states}
    if selection.ids:
        async for rows in _by_ids(selection, wanted, request, service):
            yield rows
        return
    if not any((selection.states, selection.queues, selection.types, selection.names, selection.labels,
                selection.owners)):  # fmt: skip
        raise InvalidRequest("nothing is selected: give ids, states, queues, types, names, labels or owners")
    owners = selection.owners
    if not request.caller.is_admin:
        owners = (request.caller.user,)
        if selection.owners and selection.owners != owners:
            raise Forbidden("only members of the group taskd-admin may act on the tasks of others")
    if not wanted:
        return
    query = Query(
        states=tuple(sorted(wanted)), queues=selection.queues, types=selection.types, owners=owners,
        names=selection.names, labels=tuple(sorted(selection.labels.items())), before=find_cursor(selection.cursor),
        limit=ROWS_AT_ONCE,
    )  # fmt: skip
    async for rows in pages(query, service):
        yield rows


async def pages(query: Query, service: Service) -> AsyncGenerator[list[TaskRow], None]:
    """All pages of a query, none of them empty."""
    while True:
        rows = await service.list(query)
        if rows:
            yield rows
        if len(rows) < query.limit:
            return
        query = replace(query, before=rows[-1].id)


async def _by_ids(
    selection: Selection, states: set[int], request: ApiRequest, service: Service
) -> AsyncGenerator[list[TaskRow], None]:
    before = find_cursor(selection.cursor)
    ids = await find_ids(selection.ids, request, service)
    ids = sorted((task_id for task_id in ids if not before or task_id < before), reverse=True)
    batches = [ids[start : start + ROWS_AT_ONCE] for start in range(0, len(ids), ROWS_AT_ONCE)]
    for batch in batches:  # All are looked at before the first one is acted on.
        _check_all(batch, service.rows(batch), request)
    for batch in batches:
        yield [row for row in service.rows(batch) if row.state in states and _fits(row, selection)]


def _check_all(ids: list[bytes], rows: list[TaskRow], request: ApiRequest) -> None:
    if len(rows) < len(ids):
        found = {row.id for row in rows}
        missing = next(task_id for task_id in ids if task_id not in found)
        raise NotFound(f"there is no task {id_text(missing)}", field="ids")
    for row in rows:
        check_owner(row, request)


def _fits(row: TaskRow, selection: Selection) -> bool:
    if selection.queues and row.queue not in selection.queues:
        return False
    if selection.types and row.type not in selection.types:
        return False
    if selection.owners and row.owner not in selection.owners:
        return False
    if selection.names and row.name not in selection.names:
        return False
    if selection.labels:
        labels = decode_spec(row.spec).labels
        return all(labels.get(name) == value for name, value in selection.labels.items())
    return True
