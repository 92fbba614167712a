"""A request of HTTP as it comes in: its path, its query and its body, within bounds."""

from __future__ import annotations

import asyncio
from urllib.parse import parse_qsl

from aiohttp import web

from taskd.errors import InvalidRequest, TooLarge, TooSlow

BODY_TIMEOUT_S = 60.0  # For the whole body: a local client sends 16 MiB in a fraction of a second.
QUERY_FIELDS_MAX = 64


def target_of(request: web.BaseRequest) -> tuple[str, dict[str, str]]:
    """The path, still encoded, and the query. Raises InvalidRequest."""
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


async def read_body(request: web.BaseRequest, bytes_max: int) -> bytes:
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
