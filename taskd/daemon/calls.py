"""Calls between nodes: a client's request relayed to the node that can answer it, and the answer streamed back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol
from urllib.parse import parse_qsl, urlencode

from taskd.api.dispatch import error_response
from taskd.api.service import ApiRequest, ApiResponse, Caller
from taskd.api.streams import close_stream
from taskd.daemon.inbox import Inbox, Incoming
from taskd.daemon.logs import log
from taskd.errors import TaskdError, Unavailable
from taskd.protocol import messages as msg

TAKEN_BYTES_MIN = msg.ANSWER_BYTES_AHEAD_MAX // 4  # Said so often that the way never runs dry.
FIRST_PART_TIMEOUT_S = 120.0  # Longer than any `wait`: the asker's own time-outs come first.

Answer = Callable[[ApiRequest], Awaitable[ApiResponse]]
CallMessage = msg.Request | msg.RequestPart | msg.Response | msg.ResponsePart | msg.Taken | msg.Abandon


class PeerLost(Unavailable):
    """The other node is not connected, or no longer."""


class BrokenOff(Unavailable):
    """The other node has broken off its answer."""


class CallMesh(Protocol):
    """The way to other nodes, as calls need it."""

    def send(self, node_id: int, message: msg.Message) -> bool: ...
    async def drained(self, node_id: int) -> None: ...


class _Asked:
    """A call that we made, and its answer as it comes: the parts, None at the end, an error where it broke."""

    def __init__(self) -> None:
        self.parts: asyncio.Queue[msg.Response | bytes | TaskdError | None] = asyncio.Queue()
        self.has_begun = False
        self.waiting_bytes = 0  # come and not yet read


class Calls:
    """All calls of one node, both ways."""

    def __init__(self, answer: Answer, group: asyncio.TaskGroup) -> None:
        self.mesh: CallMesh | None = None
        self._answer = answer
        self._group = group
        self._asked: dict[tuple[int, int], _Asked] = {}
        self._inbox = Inbox(self._refuse)
        self._last_call = 0

    @property
    def open(self) -> int:
        """How many calls are under way, both ways."""
        return len(self._asked) + self._inbox.open

    # -- Asking --------------------------------------------------------------------------------------------------------

    async def ask(self, node_id: int, request: ApiRequest) -> ApiResponse:
        """Have another node answer. Raises PeerLost where it is not there, or goes away meanwhile, BrokenOff and
        Unavailable where it does not answer. Read or not, a stream in the answer has to be closed."""
        self._last_call += 1
        call = self._last_call
        asked = self._asked[node_id, call] = _Asked()
        is_answered = False
        try:
            await self._send_request(node_id, call, request)
            async with asyncio.timeout(FIRST_PART_TIMEOUT_S):
                first = await asked.parts.get()
            is_answered = True
        except TimeoutError:
            raise Unavailable(f"node {node_id} did not answer") from None
        finally:
            if not is_answered:
                self._let_go(node_id, call, is_whole=False)
        if isinstance(first, msg.Response) and not first.last:
            stream = _AnswerStream(
                asked, first.body,
                taken=lambda size_bytes: self._say_taken(node_id, call, size_bytes),
                let_go=lambda is_whole: self._let_go(node_id, call, is_whole=is_whole),
            )  # fmt: skip
            return ApiResponse(first.status, first.content_type, stream=stream)
        self._let_go(node_id, call, is_whole=True)
        if isinstance(first, TaskdError):
            raise first
        assert isinstance(first, msg.Response), first
        return ApiResponse(first.status, first.content_type, first.body)

    async def _send_request(self, node_id: int, call: int, request: ApiRequest) -> None:
        target = request.path + ("?" + urlencode(request.query) if request.query else "")
        body, caller = request.body, request.caller
        sent = msg.CHUNK_BYTES_MAX
        first, is_last = body[:sent], len(body) <= sent
        message = msg.Request(
            call, caller.user, caller.is_admin, request.method, target, first, is_last, request.first_id
        )
        if not self._send(node_id, message):
            raise PeerLost(f"node {node_id} is not connected")
        while not is_last:
            await self._drained(node_id)
            part = body[sent : sent + msg.CHUNK_BYTES_MAX]
            sent += len(part)
            is_last = sent >= len(body)
            self._send(node_id, msg.RequestPart(call, part, is_last))

    def _say_taken(self, node_id: int, call: int, size_bytes: int) -> None:
        if (node_id, call) in self._asked:
            self._send(node_id, msg.Taken(call, size_bytes))

    def _let_go(self, node_id: int, call: int, *, is_whole: bool) -> None:
        """Expect no more of an answer, and say so where more would come."""
        if self._asked.pop((node_id, call), None) is not None and not is_whole:
            self._send(node_id, msg.Abandon(call, True))

    # -- Messages ------------------------------------------------------------------------------------------------------

    def on_message(self, node_id: int, message: CallMessage) -> None:
        """A peer's part of a call. What belongs to no call, or to none any more, is left alone."""
        match message:
            case msg.Request():
                self._answer_whole(self._inbox.begin(node_id, message))
            case msg.RequestPart():
                self._answer_whole(self._inbox.go_on(node_id, message))
            case msg.Response():
                self._on_response(node_id, message)
            case msg.ResponsePart():
                self._on_response_part(node_id, message)
            case msg.Taken():
                self._on_taken(node_id, message)
            case msg.Abandon():
                self._on_abandon(node_id, message)

    def _on_response(self, node_id: int, message: msg.Response) -> None:
        asked = self._asked.get((node_id, message.call))
        if asked is not None and not asked.has_begun:
            asked.has_begun = True
            asked.parts.put_nowait(message)

    def _on_response_part(self, node_id: int, message: msg.ResponsePart) -> None:
        asked = self._asked.get((node_id, message.call))
        if asked is None or not asked.has_begun:
            return
        asked.waiting_bytes += len(message.body)
        if asked.waiting_bytes > msg.ANSWER_BYTES_AHEAD_MAX + msg.CHUNK_BYTES_MAX:
            self._let_go(node_id, message.call, is_whole=False)
            asked.parts.put_nowait(Unavailable(f"node {node_id} sent more than was asked for"))
            return
        if message.body:
            asked.parts.put_nowait(message.body)
        if message.last:
            asked.parts.put_nowait(None)

    def _on_abandon(self, node_id: int, message: msg.Abandon) -> None:
        if message.is_caller:
            incoming = self._inbox.get(node_id, message.call)
            if incoming is not None:
                self._inbox.remove(incoming)
                if incoming.task is not None:
                    incoming.task.cancel()
        elif (asked := self._asked.get((node_id, message.call))) is not None:
            asked.parts.put_nowait(BrokenOff(f"node {node_id} broke off its answer"))

    def peer_down(self, node_id: int) -> None:
        """A peer is gone, and with it all calls to and from it."""
        for (peer, _), asked in self._asked.items():
            if peer == node_id:
                asked.parts.put_nowait(PeerLost(f"the connection to node {node_id} is gone"))
        for incoming in self._inbox.remove_peer(node_id):
            if incoming.task is not None:
                incoming.task.cancel()

    # -- Answering -----------------------------------------------------------------------------------------------------

    def _answer_whole(self, incoming: Incoming | None) -> None:
        """Begin with the answer to a call that has come whole."""
        if incoming is not None:
            incoming.task = task = self._group.create_task(self._serve(incoming))
            # Not at the end of the coroutine: one that is cancelled before its first step never gets there.
            task.add_done_callback(lambda _: self._inbox.remove(incoming))

    def _refuse(self, node_id: int, call: int, error: TaskdError) -> None:
        response = error_response(error)
        self._send(node_id, msg.Response(call, response.status, response.content_type, response.body, True))

    async def _serve(self, incoming: Incoming) -> None:
        node_id, message = incoming.node_id, incoming.request
        call = message.call
        path, _, query = message.target.partition("?")
        caller = Caller(message.user, message.is_admin)
        fields = dict(parse_qsl(query, keep_blank_values=True))
        body, incoming.body = bytes(incoming.body), b""
        try:
            response = await self._answer(
                ApiRequest(
                    message.method, path, fields, caller, body, first_id=message.first_id, source=f"node {node_id}"
                )
            )
            await self._send_response(node_id, call, incoming, response)
        except (TaskdError, OSError):
            self._send(node_id, msg.Abandon(call, False))  # The asker is to see that the end is missing.
        except Exception as error:
            # Our bug, and one call's: the others and the daemon go on.
            log("error", "a call from another node failed", node=node_id, path=path, reason=repr(error))
            self._send(node_id, msg.Abandon(call, False))

    async def _send_response(self, node_id: int, call: int, incoming: Incoming, response: ApiResponse) -> None:
        status, content_type, stream = response.status, response.content_type, response.stream
        if stream is None:
            body = response.body
            is_whole = len(body) <= msg.CHUNK_BYTES_MAX
            self._send(node_id, msg.Response(call, status, content_type, body if is_whole else b"", is_whole))
            if is_whole:
                return
            await self._send_parts(node_id, call, incoming, body)
        else:
            self._send(node_id, msg.Response(call, status, content_type, b"", False))
            try:
                async for part in stream:
                    await self._send_parts(node_id, call, incoming, part)
            finally:
                await close_stream(stream)
        self._send(node_id, msg.ResponsePart(call, b"", True))

    async def _send_parts(self, node_id: int, call: int, incoming: Incoming, body: bytes) -> None:
        """Send bytes of an answer, at the pace of its reader and of the connection."""
        for start in range(0, len(body), msg.CHUNK_BYTES_MAX):
            part = body[start : start + msg.CHUNK_BYTES_MAX]
            while incoming.ahead_bytes and incoming.ahead_bytes + len(part) > msg.ANSWER_BYTES_AHEAD_MAX:
                incoming.may_go_on.clear()
                await incoming.may_go_on.wait()
            incoming.ahead_bytes += len(part)
            await self._drained(node_id)
            self._send(node_id, msg.ResponsePart(call, part, False))

    def _on_taken(self, node_id: int, message: msg.Taken) -> None:
        incoming = self._inbox.get(node_id, message.call)
        if incoming is not None:
            incoming.ahead_bytes = max(0, incoming.ahead_bytes - message.size_bytes)
            incoming.may_go_on.set()

    # -- The mesh ------------------------------------------------------------------------------------------------------

    def _send(self, node_id: int, message: CallMessage) -> bool:
        assert self.mesh is not None
        return self.mesh.send(node_id, message)

    async def _drained(self, node_id: int) -> None:
        assert self.mesh is not None
        await self.mesh.drained(node_id)


class _AnswerStream:
    """The parts of an answer as they come. No generator: closing one that nobody has read from would let nothing go."""

    def __init__(
        self, asked: _Asked, first: bytes, taken: Callable[[int], None], let_go: Callable[[bool], None]
    ) -> None:
        self._asked = asked
        self._first = first
        self._taken = taken
        self._let_go = let_go
        self._unsaid_bytes = 0  # read, and the other node not told yet
        self._is_over = False

    def __aiter__(self) -> _AnswerStream:
        return self

    async def __anext__(self) -> bytes:
        """Raises PeerLost, BrokenOff or Unavailable where the answer broke."""
        if self._is_over:
            raise StopAsyncIteration
        if self._first:
            first, self._first = self._first, b""
            return first
        part = await self._asked.parts.get()
        if isinstance(part, bytes):
            self._read(len(part))
            return part
        self._end(is_whole=True)
        if part is None:
            raise StopAsyncIteration
        assert isinstance(part, TaskdError), part
        raise part

    async def aclose(self) -> None:
        """Read no more."""
        if not self._is_over:
            self._end(is_whole=False)

    def _read(self, size_bytes: int) -> None:
        self._asked.waiting_bytes -= size_bytes
        self._unsaid_bytes += size_bytes
        if self._unsaid_bytes >= TAKEN_BYTES_MIN:
            self._taken(self._unsaid_bytes)
            self._unsaid_bytes = 0

    def _end(self, *, is_whole: bool) -> None:
        self._is_over = True
        self._let_go(is_whole)
