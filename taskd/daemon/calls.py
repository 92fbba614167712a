"""Calls between nodes: a client's request relayed to the node that can answer it, and the answer streamed back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Protocol
from urllib.parse import parse_qsl, urlencode, urlsplit

from taskd.api.service import ApiRequest, ApiResponse, Caller
from taskd.errors import TaskdError, Unavailable
from taskd.protocol import messages as msg

CALLS_PER_PEER_MAX = 1024
BODY_BYTES_MAX = 64 << 20
PARTS_WAITING_MAX = 64  # Of an answer that its reader takes slower than it comes; more ends the call.
FIRST_PART_TIMEOUT_S = 120.0  # Longer than any `wait`: the asker's own time-outs come first.


@asynccontextmanager
async def closing(stream: AsyncIterator[bytes]) -> AsyncIterator[AsyncIterator[bytes]]:
    """Let go of a stream's source as soon as its reader stops, also where it stops early."""
    try:
        yield stream
    finally:
        close = getattr(stream, "aclose", None)
        if close is not None:
            await close()


Answer = Callable[[ApiRequest], Awaitable[ApiResponse]]
CallMessage = msg.Request | msg.RequestPart | msg.Response | msg.ResponsePart | msg.Abandon


class CallMesh(Protocol):
    """The way to other nodes, as calls need it."""

    def send(self, node_id: int, message: msg.Message) -> bool: ...
    async def drained(self, node_id: int) -> None: ...


class _Asked:
    """A call that we made: parts of the answer as they come, None at the end, an error when it broke."""

    def __init__(self) -> None:
        self.parts: asyncio.Queue[msg.Response | bytes | TaskdError | None] = asyncio.Queue()


class _Incoming:
    """A call that a peer makes, while its body comes in."""

    def __init__(self, request: msg.Request) -> None:
        self.request = request
        self.body = bytearray(request.body)
        self.task: asyncio.Task[None] | None = None


class Calls:
    """All calls of one node, both ways."""

    def __init__(self, answer: Answer, group: asyncio.TaskGroup) -> None:
        self.mesh: CallMesh | None = None
        self._answer = answer
        self._group = group
        self._asked: dict[tuple[int, int], _Asked] = {}
        self._incoming: dict[tuple[int, int], _Incoming] = {}
        self._last_call = 0
        self._count_by_peer: dict[int, int] = {}

    # -- Asking --------------------------------------------------------------------------------------------------------

    async def ask(self, node_id: int, request: ApiRequest) -> ApiResponse:
        """Have another node answer. Raises Unavailable where it does not, or goes away meanwhile."""
        assert self.mesh is not None
        self._last_call += 1
        call = self._last_call
        asked = self._asked[node_id, call] = _Asked()
        is_streaming = False
        try:
            await self._send_request(node_id, call, request)
            async with asyncio.timeout(FIRST_PART_TIMEOUT_S):
                first = await asked.parts.get()
            if isinstance(first, TaskdError):
                raise first
            assert isinstance(first, msg.Response)
            if first.last:
                return ApiResponse(first.status, first.content_type, first.body)
            is_streaming = True
            return ApiResponse(first.status, first.content_type, stream=self._stream(node_id, call, asked, first.body))
        except TimeoutError:
            self.mesh.send(node_id, msg.Abandon(call, True))
            raise Unavailable(f"node {node_id} did not answer") from None
        except asyncio.CancelledError:
            self.mesh.send(node_id, msg.Abandon(call, True))
            raise
        finally:
            if not is_streaming:
                self._asked.pop((node_id, call), None)

    async def _send_request(self, node_id: int, call: int, request: ApiRequest) -> None:
        assert self.mesh is not None
        target = request.path + ("?" + urlencode(request.query) if request.query else "")
        body = request.body
        first, rest = body[: msg.CHUNK_BYTES_MAX], body[msg.CHUNK_BYTES_MAX :]
        caller = request.caller
        message = msg.Request(call, caller.user, caller.is_admin, request.method, target, first, not rest)
        if not self.mesh.send(node_id, message):
            raise Unavailable(f"node {node_id} is not connected")
        while rest:
            await self.mesh.drained(node_id)
            part, rest = rest[: msg.CHUNK_BYTES_MAX], rest[msg.CHUNK_BYTES_MAX :]
            self.mesh.send(node_id, msg.RequestPart(call, part, not rest))

    async def _stream(self, node_id: int, call: int, asked: _Asked, first: bytes) -> AsyncIterator[bytes]:
        assert self.mesh is not None
        is_whole = False
        try:
            if first:
                yield first
            while True:
                part = await asked.parts.get()
                if part is None:
                    is_whole = True
                    return
                if isinstance(part, TaskdError):
                    is_whole = True
                    raise part
                assert isinstance(part, bytes)
                yield part
        finally:
            self._asked.pop((node_id, call), None)
            if not is_whole:
                self.mesh.send(node_id, msg.Abandon(call, True))

    # -- Messages ------------------------------------------------------------------------------------------------------

    def on_message(self, node_id: int, message: CallMessage) -> None:
        """A peer's part of a call."""
        if isinstance(message, msg.Response):
            asked = self._asked.get((node_id, message.call))
            if asked is not None:
                asked.parts.put_nowait(message)
        elif isinstance(message, msg.ResponsePart):
            self._on_response_part(node_id, message)
        elif isinstance(message, msg.Request):
            self._on_request(node_id, message)
        elif isinstance(message, msg.RequestPart):
            self._on_request_part(node_id, message)
        else:
            self._on_abandon(node_id, message)

    def _on_response_part(self, node_id: int, message: msg.ResponsePart) -> None:
        asked = self._asked.get((node_id, message.call))
        if asked is None:
            return
        if asked.parts.qsize() > PARTS_WAITING_MAX:
            assert self.mesh is not None
            self._asked.pop((node_id, message.call), None)
            self.mesh.send(node_id, msg.Abandon(message.call, True))
            asked.parts.put_nowait(Unavailable("the answer came faster than it was read"))
            return
        if message.body:
            asked.parts.put_nowait(message.body)
        if message.last:
            asked.parts.put_nowait(None)

    def _on_abandon(self, node_id: int, message: msg.Abandon) -> None:
        key = (node_id, message.call)
        if message.is_caller:
            incoming = self._incoming.pop(key, None)
            if incoming is not None and incoming.task is not None:
                incoming.task.cancel()
        elif (asked := self._asked.get(key)) is not None:
            asked.parts.put_nowait(Unavailable(f"node {node_id} broke off its answer"))

    def peer_down(self, node_id: int) -> None:
        """A peer is gone, and with it all calls to and from it."""
        for (peer, _), asked in list(self._asked.items()):
            if peer == node_id:
                asked.parts.put_nowait(Unavailable(f"the connection to node {node_id} is gone"))
        for (peer, call), incoming in list(self._incoming.items()):
            if peer == node_id:
                del self._incoming[peer, call]
                if incoming.task is not None:
                    incoming.task.cancel()

    # -- Answering -----------------------------------------------------------------------------------------------------

    def _on_request(self, node_id: int, message: msg.Request) -> None:
        assert self.mesh is not None
        key = (node_id, message.call)
        if key in self._incoming or self._count_by_peer.get(node_id, 0) >= CALLS_PER_PEER_MAX:
            self.mesh.send(node_id, msg.Abandon(message.call, False))
            return
        incoming = self._incoming[key] = _Incoming(message)
        if message.last:
            self._begin(key, incoming)

    def _on_request_part(self, node_id: int, message: msg.RequestPart) -> None:
        assert self.mesh is not None
        key = (node_id, message.call)
        incoming = self._incoming.get(key)
        if incoming is None or incoming.task is not None:
            return
        incoming.body += message.body
        if len(incoming.body) > BODY_BYTES_MAX:
            del self._incoming[key]
            self.mesh.send(node_id, msg.Abandon(message.call, False))
        elif message.last:
            self._begin(key, incoming)

    def _begin(self, key: tuple[int, int], incoming: _Incoming) -> None:
        self._count_by_peer[key[0]] = self._count_by_peer.get(key[0], 0) + 1
        incoming.task = self._group.create_task(self._serve(key, incoming))

    async def _serve(self, key: tuple[int, int], incoming: _Incoming) -> None:
        assert self.mesh is not None
        node_id, call = key
        try:
            message = incoming.request
            parts = urlsplit(message.target)
            request = ApiRequest(
                message.method, parts.path, dict(parse_qsl(parts.query, keep_blank_values=True)),
                Caller(message.user, message.is_admin), bytes(incoming.body),
            )  # fmt: skip
            response = await self._answer(request)
            await self._send_response(node_id, call, response)
        except asyncio.CancelledError:
            if key in self._incoming:
                raise  # The daemon stops; an abandoned call was taken out before.
        finally:
            self._incoming.pop(key, None)
            self._count_by_peer[node_id] -= 1

    async def _send_response(self, node_id: int, call: int, response: ApiResponse) -> None:
        assert self.mesh is not None
        if response.stream is None:
            first, rest = response.body[: msg.CHUNK_BYTES_MAX], response.body[msg.CHUNK_BYTES_MAX :]
            self.mesh.send(node_id, msg.Response(call, response.status, response.content_type, first, not rest))
            while rest:
                await self.mesh.drained(node_id)
                part, rest = rest[: msg.CHUNK_BYTES_MAX], rest[msg.CHUNK_BYTES_MAX :]
                self.mesh.send(node_id, msg.ResponsePart(call, part, not rest))
            return
        self.mesh.send(node_id, msg.Response(call, response.status, response.content_type, b"", False))
        try:
            async with closing(response.stream) as stream:
                async for chunk in stream:
                    for start in range(0, len(chunk), msg.CHUNK_BYTES_MAX):
                        part = chunk[start : start + msg.CHUNK_BYTES_MAX]
                        await self.mesh.drained(node_id)
                        self.mesh.send(node_id, msg.ResponsePart(call, part, False))
        except (TaskdError, OSError):
            self.mesh.send(node_id, msg.Abandon(call, False))
        else:
            self.mesh.send(node_id, msg.ResponsePart(call, b"", True))
