"""The output of tasks between nodes: the leader asks the worker that has the files, with one internal request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import msgspec

from taskd.api.service import ApiRequest, ApiResponse, Caller
from taskd.api.types import ErrorAnswer
from taskd.errors import InvalidRequest, NotFound, TaskdError, Unavailable

PREFIX = "/internal/output/"
ReadOutput = Callable[[bytes, int, str, int, bool], AsyncIterator[bytes]]
_NOBODY = Caller("", False)


def output_request(task_id: bytes, attempt: int, stream: str, offset: int, follow: bool) -> ApiRequest:
    """What the leader asks a worker."""
    query = {"offset": str(offset), "follow": "1" if follow else "0"}
    return ApiRequest("GET", f"{PREFIX}{task_id.hex()}/{attempt}/{stream}", query, _NOBODY)


def answer_output(request: ApiRequest, read_output: ReadOutput | None) -> ApiResponse:
    """What the worker answers. Raises NotFound, InvalidRequest."""
    if read_output is None:
        raise NotFound("this node is no worker")
    try:
        task, attempt, stream = request.path.removeprefix(PREFIX).split("/")
        task_id, number, offset = bytes.fromhex(task), int(attempt), int(request.query.get("offset", "0"))
    except ValueError:
        raise InvalidRequest("not a request for output") from None
    if len(task_id) != 16 or stream not in ("stdout", "stderr") or number < 1 or offset < 0:
        raise InvalidRequest("not a request for output")
    follow = request.query.get("follow") == "1"
    return ApiResponse(content_type="text/plain", stream=read_output(task_id, number, stream, offset, follow))


def error_of(response: ApiResponse) -> TaskdError:
    """The error that another node answered with."""
    try:
        body = msgspec.json.decode(response.body, type=ErrorAnswer).error
    except msgspec.DecodeError:
        return Unavailable(f"another node answered with status {response.status}")
    return NotFound(body.message) if response.status == 404 else Unavailable(body.message)
