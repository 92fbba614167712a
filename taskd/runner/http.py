"""Runs `http` tasks: calls to services, so that any language can implement a task behind a URL.

The body of the request is the task's params as JSON; the JSON of a good answer is the result, any other text becomes a
JSON string. A service that fails may say why by an answer `{"error": {"type": "...", "message": "..."}}`.

In headers `${NAME}` stands for the secret that the task has under this name.

A call goes to the host of its URL and nowhere else: no proxy from the environment, no cookies, and a redirect is
followed only within the same origin, and only where it repeats the request as it is. How long a call may take is the
core's to say; only the time to connect is bounded here.
"""

from __future__ import annotations

import asyncio
import re
import signal
import time
from functools import partial

import aiohttp
import msgspec
from msgspec import Struct
from multidict import CIMultiDict
from yarl import URL

from taskd.core.effects import Begin
from taskd.core.task import RESULT_BYTES_MAX, ErrorInfo, HttpCall, Outcome, Report, TaskSpec
from taskd.protocol.messages import AttemptKey
from taskd.runner.base import OnProgress, Progress, ended, error_info
from taskd.version import VERSION

CONNECT_S_MAX = 30.0
REDIRECTS_MAX = 5
FAULT_BYTES_MAX = 64 << 10  # Read of an unwanted answer.
EXCERPT_BYTES = 1024  # Shown of it.
_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")  # To a secret, in the text of a header.
_BODYLESS = ("GET", "HEAD", "DELETE")  # These carry params only where there are some.


class CallFailed(Exception):
    """A call that did not end well: how, and why, for the record."""

    def __init__(self, type: str, message: str, traceback: str = "", outcome: Outcome = Outcome.EXCEPTION) -> None:
        self.info: ErrorInfo = error_info(type, message, traceback)
        self.outcome = outcome
        super().__init__(message)


class _Fault(Struct):
    type: str = "ServiceError"
    message: str = ""
    traceback: str = ""


class _FaultAnswer(Struct):
    error: _Fault


class _Running:
    """One call under way."""

    __slots__ = ("signal", "started_s", "task")

    def __init__(self, task: asyncio.Task[bytes], started_s: float) -> None:
        self.task = task
        self.started_s = started_s
        self.signal = signal.SIGTERM  # with which it was broken off, if it was


class HttpKind:
    """Runs HTTP calls; see `Kind` in base.py. How many at once is bounded by the worker's slots."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._progress = Progress(on_progress)
        self._session: aiohttp.ClientSession | None = None
        self._running: dict[AttemptKey, _Running] = {}

    async def open(self) -> None:
        """Get ready to run."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_S_MAX),
            trust_env=False,
            # A result is at most 1 MiB; to what size a compressed one unfolds is not known before.
            headers={"Accept-Encoding": "identity", "User-Agent": f"taskd/{VERSION}"},
        )

    def start(self, begins: list[Begin]) -> None:
        """Start these attempts."""
        assert self._session is not None
        for begin in begins:
            started_s = time.time()
            task = asyncio.create_task(_call(self._session, begin.key, begin.spec))
            self._running[begin.key] = _Running(task, started_s)
            self._progress.began(begin.key, started_s)
            task.add_done_callback(partial(self._done, begin.key))

    def terminate(self, key: AttemptKey) -> None:
        """Break the call off: there is nothing more gentle to ask a service for."""
        self._break_off(key, signal.SIGTERM)

    def kill(self, key: AttemptKey) -> None:
        """Break the call off."""
        self._break_off(key, signal.SIGKILL)

    async def close(self) -> None:
        """Break off what still runs, tell of it, and close all connections."""
        for key in self._running:
            self._break_off(key, signal.SIGKILL)
        while self._running:
            await asyncio.wait([running.task for running in self._running.values()])
        self._progress.close()
        if self._session is not None:
            await self._session.close()

    def _break_off(self, key: AttemptKey, number: signal.Signals) -> None:
        running = self._running.get(key)
        if running is not None:
            running.signal = number
            running.task.cancel()

    def _done(self, key: AttemptKey, task: asyncio.Task[bytes]) -> None:
        running = self._running.pop(key)
        if task.cancelled():
            outcome, report = Outcome.SIGNAL, Report(signal=int(running.signal))
        elif (error := task.exception()) is None:
            outcome, report = Outcome.OK, Report(result=task.result())
        elif isinstance(error, CallFailed):
            outcome, report = error.outcome, Report(error=error.info)
        else:
            outcome, report = Outcome.EXCEPTION, Report(error=error_info(type(error).__name__, str(error)))
        started_s = 0.0 if outcome is Outcome.SPAWN_FAILED else running.started_s
        self._progress.ended(ended(key, outcome, report, started_s))


async def _call(session: aiohttp.ClientSession, key: AttemptKey, spec: TaskSpec) -> bytes:
    """Make a task's call; returns its result as JSON. Raises CallFailed."""
    call = spec.http
    if call is None:
        raise CallFailed("InvalidTask", "an http task needs a URL to call", outcome=Outcome.SPAWN_FAILED)
    url = _url(call)
    body = spec.params or (None if call.method.upper() in _BODYLESS else b"{}")
    try:
        return await _exchange(session, call, url, _headers(key, call, spec.secrets), body)
    # ValueError: a header that cannot be written, a host name that cannot be one.
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise CallFailed(type(error).__name__, f"{_named(call, url)} failed: {error}") from error


async def _exchange(
    session: aiohttp.ClientSession, call: HttpCall, url: URL, headers: CIMultiDict[str], body: bytes | None
) -> bytes:
    for _ in range(REDIRECTS_MAX + 1):
        async with session.request(call.method, url, data=body, headers=headers, allow_redirects=False) as response:
            if response.status in (call.expect_status or range(200, 300)):
                return await _result(call, url, response)
            target = _redirect(call, url, response)
            if target is None:
                raise await _failure(call, url, response)
            url = target
    raise CallFailed("TooManyRedirects", f"{_named(call, url)}: redirected more than {REDIRECTS_MAX} times")


def _url(call: HttpCall) -> URL:
    try:
        url = URL(call.url)
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError("it is no absolute http or https URL")
    except ValueError as error:
        problem = f"{call.url[:EXCERPT_BYTES]!r} cannot be called: {error}"
        raise CallFailed("InvalidUrl", problem, outcome=Outcome.SPAWN_FAILED) from None
    return url


def _headers(key: AttemptKey, call: HttpCall, secrets: dict[str, str]) -> CIMultiDict[str]:
    headers = CIMultiDict(call.headers)
    if secrets:
        for name, text in call.headers.items():
            headers[name] = _REFERENCE.sub(lambda found: secrets.get(found[1], found[0]), text)
    headers.setdefault("Content-Type", "application/json")
    headers.setdefault("Accept", "application/json, */*;q=0.5")
    headers["X-Taskd-Task-Id"] = key.task_text
    headers["X-Taskd-Attempt"] = str(key.number)
    headers["X-Taskd-Fence"] = key.fence
    return headers


def _redirect(call: HttpCall, url: URL, response: aiohttp.ClientResponse) -> URL | None:
    """Where to repeat the request; None where that is not asked for, or would not be the same request."""
    repeats = response.status in (307, 308) or (response.status in (301, 302, 303) and call.method.upper() == "GET")
    location = response.headers.get("Location")
    if not repeats or location is None:
        return None
    try:
        target = url.join(URL(location))
        if target.origin() != url.origin():
            return None
    except ValueError:
        return None
    return target.with_user(url.user).with_password(url.password) if url.user else target


async def _result(call: HttpCall, url: URL, response: aiohttp.ClientResponse) -> bytes:
    """A good answer as JSON; empty where it is empty."""
    body = await _read(response, RESULT_BYTES_MAX + 1)
    if len(body) > RESULT_BYTES_MAX:
        problem = f"{_named(call, url)}: the answer is longer than {RESULT_BYTES_MAX} bytes"
        raise CallFailed("ResultTooLarge", problem)
    body = body.removeprefix(b"\xef\xbb\xbf").strip()
    if not body:
        return b""
    try:
        msgspec.json.decode(body)
        return body
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if response.content_type == "application/json" or response.content_type.endswith("+json"):
            raise CallFailed("InvalidJson", f"{_named(call, url)}: the answer is no valid JSON: {error}") from None
    try:
        result = msgspec.json.encode(body.decode(response.charset or "utf-8"))
    except (UnicodeDecodeError, LookupError):
        raise CallFailed("NotText", f"{_named(call, url)}: the answer is neither JSON nor text") from None
    if len(result) > RESULT_BYTES_MAX:
        raise CallFailed("ResultTooLarge", f"{_named(call, url)}: the answer is too long as a JSON string")
    return result


async def _failure(call: HttpCall, url: URL, response: aiohttp.ClientResponse) -> CallFailed:
    """What an unwanted answer says."""
    try:
        body = await _read(response, FAULT_BYTES_MAX)
    except (aiohttp.ClientError, OSError):
        body = b""  # It broke off: its status is what there is to tell.
    try:
        fault = msgspec.json.decode(body, type=_FaultAnswer).error
        return CallFailed(fault.type, fault.message, fault.traceback)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    message = f"{_named(call, url)}: {response.status} {response.reason or ''}".rstrip()
    if location := response.headers.get("Location"):
        message += f", to {location}, which is not followed"
    excerpt = body[:EXCERPT_BYTES].decode(errors="replace").strip()
    return CallFailed("HttpStatus", f"{message}: {excerpt}" if excerpt else message)


async def _read(response: aiohttp.ClientResponse, bytes_max: int) -> bytes:
    """The body, or its first `bytes_max` bytes: the rest is never read."""
    body = bytearray()
    async for part in response.content.iter_any():
        body += part
        if len(body) >= bytes_max:
            break
    return bytes(body[:bytes_max])


def _named(call: HttpCall, url: URL) -> str:
    """The call in a message: no password, and no query, which may be one."""
    return f"{call.method} {url.with_user(None).with_query(None).with_fragment(None)}"
