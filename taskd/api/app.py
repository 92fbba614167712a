"""The API on a Unix socket: a thin layer of HTTP around dispatch().

It knows who calls, bounds what comes in, passes streams on at the reader's pace, and stops in good order.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from aiohttp import web

from taskd.api.dispatch import dispatch, error_response
from taskd.api.peers import Door, source_of
from taskd.api.routes import allowed_methods
from taskd.api.service import ApiRequest, ApiResponse, Caller, Service
from taskd.api.streams import close_stream
from taskd.api.unix_socket import BACKLOG, SocketFile, open_socket
from taskd.errors import Forbidden, InvalidRequest, Overloaded, TaskdError, TooLarge, TooSlow, Unavailable

BODY_BYTES_MAX = 16 << 20
BODY_TIMEOUT_S = 60.0  # For the whole body: a local client sends 16 MiB in a fraction of a second.
IDLE_TIMEOUT_S = 75.0  # For a request's head, from the connection's begin or its last answer on.
LINE_BYTES_MAX = 8190  # Of the request's first line, and of one header.
QUERY_FIELDS_MAX = 64
LINGER_S = 2.0  # How long a refused body is read on, so that the client gets to see why.
CONNECTIONS_MAX = 512  # Half of what processes may usually open; the rest is for peers, files and tasks.
USER_CONNECTIONS_MAX = 256  # Of one user who is no administrator: no single one keeps all others out.
GRACE_S = 5.0

_RETRY_AFTER_S = {429: "1", 503: "2"}
_log = logging.getLogger("taskd.api")


async def serve(
    service: Service,
    path: Path,
    mode: int = 0o660,
    group: str = "taskd",
    *,
    admin_group: str = "taskd-admin",
    body_bytes_max: int = BODY_BYTES_MAX,
) -> ApiServer:
    """Answer at a Unix socket until closed. `mode` and `group` are those of its file, and say who is let in (peers.py).
    Raises AlreadyRunning where another process listens there, ConfigError where the path cannot be used."""
    file = open_socket(path, mode, group)
    server = ApiServer(service, file, Door(group, admin_group, file.mode), body_bytes_max)
    try:
        await server.start()
    except BaseException:
        file.remove()
        file.socket.close()
        raise
    return server


class ApiServer:
    """The connections of one socket, made by serve()."""

    def __init__(self, service: Service, file: SocketFile, door: Door, body_bytes_max: int) -> None:
        self.path = file.path
        self._service = service
        self._body_bytes_max = body_bytes_max
        self._file = file
        self._http = _Http(self._handle, door)
        self._listener: asyncio.AbstractServer | None = None
        # What is being answered, by the scopes that can end it.
        self._requests: set[asyncio.Timeout] = set()
        self._streams: set[asyncio.Timeout] = set()

    async def start(self) -> None:
        """Accept connections."""
        # The loop listens once more: with its own backlog of a hundred the kernel would turn a crowd away.
        self._listener = await asyncio.get_running_loop().create_unix_server(
            self._http, sock=self._file.socket, backlog=BACKLOG
        )

    async def close(self, grace_s: float = GRACE_S) -> None:
        """Accept nothing more, break off open streams, give other requests `grace_s` seconds and then answer them with
        503. Returns when all connections are closed."""
        assert self._listener is not None
        self._file.remove()
        self._listener.close()
        now = asyncio.get_running_loop().time()
        for scope in self._streams:
            scope.reschedule(now)
        for scope in self._requests - self._streams:
            scope.reschedule(now + grace_s)
        self._http.pre_shutdown()
        await self._http.shutdown(grace_s + 1.0)
        await self._listener.wait_closed()

    # -- One request ---------------------------------------------------------------------------------------------------

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        scope = asyncio.timeout(None)
        self._requests.add(scope)
        try:
            async with scope:
                response = await self._answer(request)
                if response.stream is None:
                    return _whole(response, request)
                self._streams.add(scope)
                return await _send_stream(request, response, response.stream)
        except TimeoutError:
            if scope in self._streams:
                raise ConnectionResetError("the daemon is stopping") from None
            return _last_words(Unavailable("this daemon is stopping; ask again"), request)
        except _Refused as refused:
            return _last_words(refused.error, request)
        finally:
            self._requests.discard(scope)
            self._streams.discard(scope)

    async def _answer(self, request: web.BaseRequest) -> ApiResponse:
        connection = request.protocol
        assert isinstance(connection, _Connection)
        if connection.caller is None:
            assert connection.refusal is not None
            raise _Refused(connection.refusal)
        try:
            path, query = _target(request)
            body = await _read_body(request, self._body_bytes_max)
        except TaskdError as error:
            raise _Refused(error) from None  # The rest of the body may still come: what follows it cannot be found.
        asked = ApiRequest(request.method, path, query, connection.caller, body, source=connection.source)
        return await dispatch(asked, self._service)


class _Refused(Exception):
    """A request whose connection ends with the answer."""

    def __init__(self, error: TaskdError) -> None:
        super().__init__(error.message)
        self.error = error


def _target(request: web.BaseRequest) -> tuple[str, dict[str, str]]:
    target = request.raw_path
    if not target.startswith("/"):
        target = request.rel_url.raw_path_qs  # The absolute form, as for a proxy.
    path, _, text = target.partition("?")
    query: dict[str, str] = {}
    if text:
        try:
            fields = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=QUERY_FIELDS_MAX)
        except ValueError:
            raise InvalidRequest(f"the query cannot be read: UTF-8, at most {QUERY_FIELDS_MAX} fields") from None
        for name, value in fields:
            query[name] = f"{query[name]},{value}" if name in query else value
    key = request.headers.get("Idempotency-Key")
    if key is not None and path == "/v1/tasks" and request.method == "POST":
        query["idempotency_key"] = key  # Headers do not travel to the leader.
    return path, query


async def _read_body(request: web.BaseRequest, bytes_max: int) -> bytes:
    """The whole body. Raises TooLarge, TooSlow, InvalidRequest."""
    content = request.content
    if not request.body_exists:
        return b""
    if (request.content_length or 0) > bytes_max:
        raise _too_large(bytes_max)
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise InvalidRequest("send the body as it is, without a Content-Encoding")
    if content.is_eof():  # It came with the head, as small ones do.
        body = content.read_nowait()
        if len(body) > bytes_max:
            raise _too_large(bytes_max)
        return body
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while part := await content.readany():
                parts.append(part)
                size += len(part)
                if size > bytes_max:
                    raise _too_large(bytes_max)
    except TimeoutError:
        raise TooSlow() from None
    except web.RequestPayloadError as error:
        raise InvalidRequest(f"the body cannot be read: {error}") from None
    return b"".join(parts)


def _too_large(bytes_max: int) -> TooLarge:
    return TooLarge(f"a body takes at most {bytes_max} bytes")


# -- Answers -----------------------------------------------------------------------------------------------------------


def _whole(response: ApiResponse, request: web.BaseRequest) -> web.Response:
    headers = {"Content-Type": response.content_type}
    if response.status in _RETRY_AFTER_S:
        headers["Retry-After"] = _RETRY_AFTER_S[response.status]
    elif response.status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(allowed_methods(request.raw_path.partition("?")[0]))
    return web.Response(body=response.body, status=response.status, headers=headers)


def _last_words(error: TaskdError, request: web.BaseRequest) -> web.Response:
    """An error after which the connection is closed."""
    response = _whole(error_response(error), request)
    response.force_close()
    return response


async def _send_stream(
    request: web.BaseRequest, response: ApiResponse, stream: AsyncIterator[bytes]
) -> web.StreamResponse:
    """Pass a stream on as it comes, at the reader's pace. Raises ConnectionError where it breaks: the client is to see
    that the end is missing."""
    out = web.StreamResponse(status=response.status, headers={"Content-Type": response.content_type})
    try:
        if request.version >= (1, 1):
            out.enable_chunked_encoding()
        await out.prepare(request)
        async for part in stream:
            await out.write(part)
        await out.write_eof()
    except TaskdError as error:
        _log.info("stream broken off: path=%s reason=%s", request.path, error.message)
        raise ConnectionResetError(error.message) from None
    finally:
        await close_stream(stream)
    return out


# -- Connections -------------------------------------------------------------------------------------------------------


class _Http(web.Server):
    """Makes connections."""

    def __init__(self, handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]], door: Door) -> None:
        super().__init__(handler, handler_cancellation=True)
        self.door = door
        self.by_user: Counter[str] = Counter()  # connections

    def __call__(self) -> web.RequestHandler:
        return _Connection(self, self.door)


class _Connection(web.RequestHandler):
    """One connection, and who is at its other end."""

    def __init__(self, http: _Http, door: Door) -> None:
        options: dict[str, Any] = {"access_log": None}  # No line a request; what goes wrong is logged where it does.
        super().__init__(
            http,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=IDLE_TIMEOUT_S,
            tcp_keepalive=False,
            logger=_log,
            max_line_size=LINE_BYTES_MAX,
            max_field_size=LINE_BYTES_MAX,
            lingering_time=LINGER_S,
            auto_decompress=False,
            **options,
        )
        self.caller: Caller | None = None
        self.refusal: TaskdError | None = None
        self.source = ""
        self._http = http
        self._door = door

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Look who it is. Too many connections are answered and closed at once."""
        try:
            peer = transport.get_extra_info("socket")
            self.caller, self.source = self._door.admit(peer), source_of(peer)
        except Forbidden as error:
            self.refusal = error
        except OSError as error:  # Gone already.
            self.refusal = Forbidden(f"the socket does not say who you are: {error}")
        super().connection_made(transport)
        caller, http = self.caller, self._http
        if caller is not None:
            http.by_user[caller.user] += 1
        is_too_many = len(http.connections) > CONNECTIONS_MAX or (
            caller is not None and not caller.is_admin and http.by_user[caller.user] > USER_CONNECTIONS_MAX
        )
        if is_too_many and self.transport is not None:
            self.transport.write(_REFUSED)
            self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        """It is gone."""
        super().connection_lost(exc)
        caller, by_user = self.caller, self._http.by_user
        if caller is not None:
            by_user[caller.user] -= 1
            if not by_user[caller.user]:
                del by_user[caller.user]

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What HTTP itself could not make sense of, in the form of all errors."""
        if request.writer.output_size > 0 or isinstance(exc, ConnectionError):
            raise ConnectionError("the answer was broken off") from exc
        if status >= 500:
            _log.error("request failed: path=%s", request.path, exc_info=exc)
            return _last_words(TaskdError(), request)
        reason = " ".join((message or "").split())[:200]
        return _last_words(InvalidRequest(f"this is not valid HTTP: {reason}"), request)


def _refusal() -> bytes:
    error = Overloaded("too many connections are open already; try again later")
    body = error_response(error).body
    head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


_REFUSED = _refusal()
