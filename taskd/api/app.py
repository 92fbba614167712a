"""The API on a Unix socket, and over HTTPS where the operator wants it: a thin layer of HTTP around dispatch().

It knows who calls, bounds what comes in, passes streams on at the reader's pace, and stops in good order.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web

from taskd.api.bearers import Bearers
from taskd.api.budgets import Budgets
from taskd.api.dispatch import dispatch, error_response
from taskd.api.https import TlsListener, fingerprint_of, open_listener, plain_host, server_context
from taskd.api.incoming import read_body, target_of
from taskd.api.peers import Door
from taskd.api.routes import allowed_methods
from taskd.api.service import ApiRequest, ApiResponse, Caller, Service
from taskd.api.strangers import Strangers
from taskd.api.streams import close_stream
from taskd.api.unix_socket import UnixListener, open_socket
from taskd.errors import (
    Forbidden,
    InvalidRequest,
    Overloaded,
    RateLimited,
    TaskdError,
    Unauthorized,
    Unavailable,
)

BODY_BYTES_MAX = 16 << 20
IDLE_TIMEOUT_S = 75.0  # For a request's head, from the connection's begin or its last answer on.
LINE_BYTES_MAX = 8190  # Of the request's first line, and of one header.
LINGER_S = 2.0  # How long a refused body is read on, so that the client gets to see why.
CONNECTIONS_MAX = 512  # Half of what processes may usually open; the rest is for peers, files and tasks.
USER_CONNECTIONS_MAX = 256  # Of one user who is no administrator: no single one keeps all others out.
STRANGERS_MAX = USER_CONNECTIONS_MAX  # Over TLS, that have shown no token yet: the other half is for those who have.
GRACE_S = 5.0

_HEADERS_OF_ALL = {"Server": "taskd"}  # And not which libraries of which versions it is made of.
_HEADERS = {
    401: {"WWW-Authenticate": 'Bearer realm="taskd"'},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "2"},
}
_log = logging.getLogger("taskd.api")


async def serve(
    service: Service,
    path: Path,
    mode: int = 0o660,
    group: str = "taskd",
    *,
    admin_group: str = "taskd-admin",
    body_bytes_max: int = BODY_BYTES_MAX,
    budgets: Budgets | None = None,
) -> ApiServer:
    """Answer at a Unix socket until closed. `mode` and `group` are those of its file, and say who is let in (peers.py).
    Raises AlreadyRunning where another process listens there, ConfigError where the path cannot be used."""
    file = open_socket(path, mode, group)
    server = ApiServer(service, Door(group, admin_group, file.mode), body_bytes_max, budgets)
    try:
        server.listeners.append(await UnixListener.open(file, server.protocol))
    except BaseException:
        file.remove()
        file.socket.close()
        raise
    return server


def serve_https(
    service: Service,
    addresses: Sequence[str],
    certificate: Path,
    key: Path,
    bearers: Bearers,
    *,
    body_bytes_max: int = BODY_BYTES_MAX,
    budgets: Budgets | None = None,
) -> ApiServer:
    """Answer over TLS at these addresses until closed, whoever has a token. Raises ConfigError."""
    context, fingerprint = server_context(certificate, key), fingerprint_of(certificate)
    server = ApiServer(service, TokenDoor(bearers), body_bytes_max, budgets)
    sockets = []
    try:
        for address in addresses:
            sockets.append(open_listener(address))
    except BaseException:
        for made in sockets:
            made.close()
        raise
    listeners = [TlsListener(made, context, server.protocol) for made in sockets]
    server.listeners += listeners
    where = ",".join(listener.address for listener in listeners)
    _log.info("the API listens: address=%s fingerprint=%s", where, fingerprint)
    return server


class Listener(Protocol):
    """Where connections come in. Closed, it lets none in any more; those that there are stay."""

    def close(self) -> None: ...
    async def wait_closed(self) -> None: ...


class Entrance(Protocol):
    """Says who is at the other end of a connection, and what the audit calls him."""

    def greet(self, transport: asyncio.BaseTransport) -> tuple[Caller | None, str]:
        """Of all that comes over a connection; None where each request has to say. Raises Forbidden, OSError."""

    def authenticate(self, authorization: str | None, source: str) -> tuple[Caller, str]:
        """Of one request. Raises Unauthorized, Overloaded."""

    def is_accepted(self, authorization: str | None) -> bool:
        """Whether what came with a request still counts, while its answer is on its way."""


class TokenDoor:
    """Anybody may connect over TLS; each request carries a token, or gets no answer."""

    def __init__(self, bearers: Bearers) -> None:
        self._bearers = bearers

    def greet(self, transport: asyncio.BaseTransport) -> tuple[None, str]:
        """Nobody is known by an address."""
        peer = transport.get_extra_info("peername")
        return None, plain_host(peer[0]) if peer else "unknown"

    def authenticate(self, authorization: str | None, source: str) -> tuple[Caller, str]:
        """Whoever the token was made for."""
        return self._bearers.authenticate(authorization, source)

    def is_accepted(self, authorization: str | None) -> bool:
        """Whether the token has not been revoked, nor expired."""
        return self._bearers.is_accepted(authorization)


class ApiServer:
    """The connections that come in by one entrance, made by serve() and serve_https()."""

    def __init__(self, service: Service, entrance: Entrance, body_bytes_max: int, budgets: Budgets | None) -> None:
        self.listeners: list[Listener] = []
        self._service = service
        self._entrance = entrance
        self._body_bytes_max = body_bytes_max
        self._budgets = budgets if budgets is not None else Budgets(0)
        self._http = _Http(self._handle, entrance)
        # What is being answered, by the scopes that can end it.
        self._requests: set[asyncio.Timeout] = set()
        self._streams: set[asyncio.Timeout] = set()

    def protocol(self) -> asyncio.Protocol:
        """What one more connection speaks."""
        return self._http()

    async def close(self, grace_s: float = GRACE_S) -> None:
        """Accept nothing more, break off open streams, give other requests `grace_s` seconds and then answer them with
        503. Returns when all connections are closed."""
        for listener in self.listeners:
            listener.close()
        now = asyncio.get_running_loop().time()
        for scope in self._streams:
            scope.reschedule(now)
        for scope in self._requests - self._streams:
            scope.reschedule(now + grace_s)
        self._http.pre_shutdown()
        await self._http.shutdown(grace_s + 1.0)
        for listener in self.listeners:
            await listener.wait_closed()

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
                return await _send_stream(request, response, response.stream, self._entrance)
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
        if connection.refusal is not None:
            raise _Refused(connection.refusal)
        caller, source = connection.caller, connection.source
        try:
            if caller is None:
                caller, source = self._entrance.authenticate(_authorization(request), source)
                connection.is_known()
            # Of an administrator's requests there may be any number: somebody has to be heard when others are too loud.
            if not caller.is_admin and not self._budgets.take(caller.user, time.monotonic()):
                raise RateLimited
            path, query = target_of(request)
            body = await read_body(request, self._body_bytes_max)
        except TaskdError as error:
            raise _Refused(error) from None  # The rest of the body may still come: what follows it cannot be found.
        asked = ApiRequest(request.method, path, query, caller, body, source=source)
        return await dispatch(asked, self._service)


class _Refused(Exception):
    """A request whose connection ends with the answer."""

    def __init__(self, error: TaskdError) -> None:
        super().__init__(error.message)
        self.error = error


def _authorization(request: web.BaseRequest) -> str | None:
    """What a request says of who makes it. Of several none counts: who put a second one there?"""
    return ", ".join(request.headers.getall("Authorization", ())) or None


# -- Answers -----------------------------------------------------------------------------------------------------------


def _whole(response: ApiResponse, request: web.BaseRequest) -> web.Response:
    headers = {**_HEADERS_OF_ALL, "Content-Type": response.content_type, **_HEADERS.get(response.status, {})}
    if response.status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(allowed_methods(request.raw_path.partition("?")[0]))
    return web.Response(body=response.body, status=response.status, headers=headers)


def _last_words(error: TaskdError, request: web.BaseRequest) -> web.Response:
    """An error after which the connection is closed."""
    response = _whole(error_response(error), request)
    response.force_close()
    return response


async def _send_stream(
    request: web.BaseRequest, response: ApiResponse, stream: AsyncIterator[bytes], entrance: Entrance
) -> web.StreamResponse:
    """Pass a stream on as it comes, at the reader's pace, for as long as he may have it. Raises ConnectionError where
    it breaks: the client is to see that the end is missing."""
    out = web.StreamResponse(status=response.status, headers={**_HEADERS_OF_ALL, "Content-Type": response.content_type})
    try:
        if request.version >= (1, 1):
            out.enable_chunked_encoding()
        await out.prepare(request)
        authorization = _authorization(request)
        async for part in stream:
            if not entrance.is_accepted(authorization):
                raise Unauthorized("the token was revoked, or has expired")
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

    def __init__(self, handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]], entrance: Entrance) -> None:
        super().__init__(handler, handler_cancellation=True)
        self.entrance = entrance
        self.by_user: Counter[str] = Counter()  # connections, by user or, where that is not known, address
        self.strangers: Strangers[_Connection] = Strangers(STRANGERS_MAX)

    def __call__(self) -> web.RequestHandler:
        return _Connection(self, self.entrance)


class _Connection(web.RequestHandler):
    """One connection, and who is at its other end."""

    def __init__(self, http: _Http, entrance: Entrance) -> None:
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
        self._entrance = entrance
        self._user = ""  # by whom it is counted

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Look who it is. Too many connections are answered and closed at once."""
        try:
            self.caller, self.source = self._entrance.greet(transport)
        except Forbidden as error:
            self.refusal = error
        except OSError as error:  # Gone already.
            self.refusal = Forbidden(f"the socket does not say who you are: {error}")
        super().connection_made(transport)
        caller, http = self.caller, self._http
        if self.refusal is None:
            self._user = caller.user if caller is not None else self.source
            http.by_user[self._user] += 1
        is_bounded = caller is None or not caller.is_admin
        if self.transport is not None and (
            len(http.connections) > CONNECTIONS_MAX or (is_bounded and http.by_user[self._user] > USER_CONNECTIONS_MAX)
        ):
            self.transport.write(_REFUSED)
            self.force_close()
        elif caller is None and self.refusal is None:
            if http.strangers.is_full:
                http.strangers.show_out().abort()
            http.strangers.add(self, self.source)

    def is_known(self) -> None:
        """A request over it has shown a token that counts."""
        self._http.strangers.remove(self)

    def abort(self) -> None:
        """Close it at once, without the farewell of TLS: whoever keeps silent would have it for that long."""
        if self.transport is not None:
            self.transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        """It is gone."""
        super().connection_lost(exc)
        self._http.strangers.remove(self)
        by_user = self._http.by_user
        if self._user:
            by_user[self._user] -= 1
            if not by_user[self._user]:
                del by_user[self._user]

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
