"""Calls between two nodes: both ends are real, joined in memory; what one sends arrives a turn of the loop later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from taskd.api.service import ApiRequest, ApiResponse, Caller
from taskd.daemon import calls as calls_module
from taskd.daemon import inbox as inbox_module
from taskd.daemon.calls import BrokenOff, Calls, PeerLost
from taskd.errors import NotFound, Unavailable
from taskd.protocol import messages as msg

LEADER, WORKER = 1, 2
CHUNK, AHEAD = msg.CHUNK_BYTES_MAX, msg.ANSWER_BYTES_AHEAD_MAX


class Wire:
    """One end's way to the other. What is sent while it is held stays here."""

    def __init__(self, own_id: int, peer_id: int) -> None:
        self.own_id = own_id
        self.peer_id = peer_id
        self.peer: Calls
        self.is_up = True
        self.is_held = False
        self.sent: list[msg.Message] = []
        self.held: list[msg.Message] = []

    def send(self, node_id: int, message: msg.Message) -> bool:
        assert node_id == self.peer_id
        if self.is_up:
            self.sent.append(message)
            self.held.append(message)
            if not self.is_held:
                self.release()
        return self.is_up

    def release(self) -> None:
        """All that was sent arrives in the next turn of the loop, at once, as from one read of a socket."""
        messages, self.held = self.held, []

        def arrive() -> None:
            for message in messages:
                self.peer.on_message(self.own_id, message)  # type: ignore[arg-type]

        asyncio.get_running_loop().call_soon(arrive)

    async def drained(self, node_id: int) -> None:
        await asyncio.sleep(0)


class Pair:
    """A leader that answers with `answer`, and a worker that asks."""

    def __init__(self, answer: Callable[[ApiRequest], Awaitable[ApiResponse]], group: asyncio.TaskGroup) -> None:
        async def nothing(request: ApiRequest) -> ApiResponse:
            raise AssertionError("nobody asks the worker")

        self.leader, self.worker = Calls(answer, group), Calls(nothing, group)
        self.to_worker, self.to_leader = Wire(LEADER, WORKER), Wire(WORKER, LEADER)
        self.leader.mesh, self.worker.mesh = self.to_worker, self.to_leader
        self.to_worker.peer, self.to_leader.peer = self.worker, self.leader

    async def ask(self, path: str = "/v1/tasks", body: bytes = b"", **query: str) -> ApiResponse:
        return await self.worker.ask(LEADER, ApiRequest("GET", path, query, Caller("ann", False), body))

    def break_connection(self) -> None:
        self.to_worker.is_up = self.to_leader.is_up = False
        self.leader.peer_down(WORKER)
        self.worker.peer_down(LEADER)

    async def settled(self) -> None:
        """Once nothing is under way at either end."""
        async with asyncio.timeout(10):
            while self.leader.open or self.worker.open:  # noqa: ASYNC110  # every turn may be the last
                await asyncio.sleep(0)


@asynccontextmanager
async def joined(answer: Callable[[ApiRequest], Awaitable[ApiResponse]]) -> AsyncIterator[Pair]:
    """A pair that must leave nothing behind."""
    async with asyncio.TaskGroup() as group:
        pair = Pair(answer, group)
        yield pair
        await pair.settled()


async def echo(request: ApiRequest) -> ApiResponse:
    return ApiResponse(201, "text/plain", f"{request.method} {request.path} {request.query}".encode() + request.body)


def echo_after(release: asyncio.Event) -> Callable[[ApiRequest], Awaitable[ApiResponse]]:
    """Answers as `echo` does, when it may."""

    async def answer(request: ApiRequest) -> ApiResponse:
        await release.wait()
        return await echo(request)

    return answer


class Source:
    """A stream whose reader can be watched."""

    def __init__(self, part: bytes, count: int) -> None:
        self.part = part
        self.left = count
        self.given = 0
        self.is_closed = asyncio.Event()

    def __aiter__(self) -> Source:
        return self

    async def __anext__(self) -> bytes:
        if not self.left:
            raise StopAsyncIteration
        self.left -= 1
        self.given += 1
        return self.part

    async def aclose(self) -> None:
        self.is_closed.set()

    async def answer(self, request: ApiRequest) -> ApiResponse:
        return ApiResponse(content_type="text/plain", stream=self)


async def turns(count: int = 50) -> None:
    """Let everything happen that can happen without us."""
    for _ in range(count):
        await asyncio.sleep(0)


async def read(response: ApiResponse) -> bytes:
    assert response.stream is not None
    return b"".join([part async for part in response.stream])


async def test_a_request_comes_whole_and_its_answer_too() -> None:
    seen: list[ApiRequest] = []

    async def answer(request: ApiRequest) -> ApiResponse:
        seen.append(request)
        return await echo(request)

    async with joined(answer) as pair:
        response = await pair.ask("/v1/tasks/a%20b#c[", b"body", state="queued,running", label="a=b&c")
    assert (response.status, response.content_type, response.stream) == (201, "text/plain", None)
    assert response.body.endswith(b"body")
    assert seen[0].path == "/v1/tasks/a%20b#c["
    assert seen[0].query == {"state": "queued,running", "label": "a=b&c"}
    assert seen[0].caller == Caller("ann", False)
    assert seen[0].first_id == b""


async def test_a_request_keeps_the_id_that_names_its_tasks() -> None:
    async def answer(request: ApiRequest) -> ApiResponse:
        return ApiResponse(body=request.first_id)

    request = ApiRequest("POST", "/v1/tasks", {}, Caller("ann", False), bytes(3 * CHUNK), first_id=b"f" * 16)
    async with joined(answer) as pair:
        assert (await pair.worker.ask(LEADER, request)).body == b"f" * 16


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, 3 * CHUNK, 16 << 20])
async def test_bodies_of_any_size_pass_both_ways(size: int) -> None:
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)

    async def answer(request: ApiRequest) -> ApiResponse:
        return ApiResponse(body=request.body)

    async with joined(answer) as pair:
        response = await pair.ask(body=body)
        assert (response.body if response.stream is None else await read(response)) == body


async def test_a_stream_goes_at_its_readers_pace_and_loses_nothing() -> None:
    source = Source(bytes(CHUNK // 2), 64)
    async with joined(source.answer) as pair:
        response = await pair.ask()
        await turns(500)
        assert source.given * len(source.part) <= AHEAD + CHUNK, "a reader that does not read holds up the source"
        assert response.stream is not None
        parts = []
        async for part in response.stream:
            parts.append(part)
            await turns(5)
        assert b"".join(parts) == bytes(64 * len(source.part))
    assert source.is_closed.is_set()


async def test_parts_larger_than_a_frame_are_cut() -> None:
    source = Source(bytes(AHEAD * 2 + 1), 2)
    async with joined(source.answer) as pair:
        assert len(await read(await pair.ask())) == 2 * (AHEAD * 2 + 1)
    sizes = [len(message.body) for message in pair.to_worker.sent if isinstance(message, msg.ResponsePart)]
    assert max(sizes) == CHUNK


@pytest.mark.parametrize("read_parts", [0, 1])
async def test_a_stream_that_is_left_is_let_go_at_the_other_end(read_parts: int) -> None:
    source = Source(b"x" * 100, 10**9)
    async with joined(source.answer) as pair:
        response = await pair.ask()
        assert response.stream is not None
        for _ in range(read_parts):
            await anext(response.stream)
        await response.stream.aclose()  # type: ignore[attr-defined]
        async with asyncio.timeout(10):
            await source.is_closed.wait()
        assert [part async for part in response.stream] == []


async def test_a_request_whose_client_goes_is_abandoned() -> None:
    is_cancelled, is_asked = asyncio.Event(), asyncio.Event()

    async def answer(request: ApiRequest) -> ApiResponse:
        is_asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            is_cancelled.set()
        raise AssertionError

    async with joined(answer) as pair:
        asking = asyncio.ensure_future(pair.ask())
        await is_asked.wait()
        asking.cancel()
        async with asyncio.timeout(10):
            await is_cancelled.wait()
        with pytest.raises(asyncio.CancelledError):
            await asking


async def test_requests_abandoned_before_they_begin_take_nobodys_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "CALLS_PER_PEER_MAX", 3)
    async with joined(echo) as pair:
        for _ in range(10):
            # Request and Abandon come in one read: the task that answers is cancelled before its first step.
            pair.to_leader.is_held = True
            asking = asyncio.ensure_future(pair.ask())
            await turns(2)
            asking.cancel()
            await turns(2)
            pair.to_leader.is_held = False
            pair.to_leader.release()
            await turns(5)
            assert asking.cancelled()
        assert [type(message) for message in pair.to_leader.sent] == [msg.Request, msg.Abandon] * 10
        assert (await pair.ask()).status == 201


async def test_too_many_calls_of_one_peer_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "CALLS_PER_PEER_MAX", 3)
    release = asyncio.Event()
    async with joined(echo_after(release)) as pair:
        waiting = [asyncio.ensure_future(pair.ask()) for _ in range(3)]
        await turns()
        refused = await pair.ask()
        assert refused.status == 429
        assert b"3 calls" in refused.body
        release.set()
        assert [response.status for response in await asyncio.gather(*waiting)] == [201] * 3


async def test_bodies_that_never_end_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "BODY_BYTES_MAX", 3 * CHUNK)
    monkeypatch.setattr(inbox_module, "BODIES_PER_PEER_BYTES_MAX", 4 * CHUNK)
    async with joined(echo) as pair:
        assert (await pair.ask(body=bytes(3 * CHUNK + 1))).status == 413
        half = msg.Request(1000, "ann", False, "POST", "/v1/tasks", bytes(CHUNK), False)
        for number in range(3):  # Three that a peer has begun and never ends.
            pair.to_leader.send(
                LEADER, msg.Request(1000 + number, *(getattr(half, f) for f in half.__struct_fields__[1:]))
            )
        assert (await pair.ask(body=bytes(2 * CHUNK))).status == 429
        assert (await pair.ask(body=bytes(CHUNK // 2))).status == 201
        for number in range(3):
            pair.to_leader.send(LEADER, msg.Abandon(1000 + number, True))


class Peers:
    """Any number of peers of one node, of whose messages only its answers are seen."""

    def __init__(self, group: asyncio.TaskGroup, answer: Callable[[ApiRequest], Awaitable[ApiResponse]]) -> None:
        self.calls = Calls(answer, group)
        self.calls.mesh = self
        self.statuses: dict[tuple[int, int], int] = {}

    def send(self, node_id: int, message: msg.Message) -> bool:
        if isinstance(message, msg.Response):
            self.statuses[node_id, message.call] = message.status
        return True

    async def drained(self, node_id: int) -> None:
        await asyncio.sleep(0)

    def begin(self, node_id: int, call: int, body: bytes = b"", *, last: bool = False) -> None:
        self.calls.on_message(node_id, msg.Request(call, "ann", False, "POST", "/v1/tasks", body, last))

    def go_on(self, node_id: int, call: int, body: bytes = b"", *, last: bool = False) -> None:
        self.calls.on_message(node_id, msg.RequestPart(call, body, last))


async def test_many_peers_together_hold_no_more_than_all_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "BODIES_BYTES_MAX", 4 * CHUNK)

    async def answer(request: ApiRequest) -> ApiResponse:
        return ApiResponse(201)

    async with asyncio.TaskGroup() as group:
        peers = Peers(group, answer)
        for node_id in range(10):
            peers.begin(node_id, 1, bytes(CHUNK))
        assert peers.statuses == {(node_id, 1): 429 for node_id in range(4, 10)}, "the first ones stay"
        assert peers.calls.open == 4
        peers.begin(11, 1, last=True)  # Without a body: it takes no room.
        await turns()
        assert peers.statuses[11, 1] == 201
        for node_id in range(4):
            peers.calls.peer_down(node_id)
        peers.begin(12, 1, bytes(4 * CHUNK), last=True)
        await turns()
        assert peers.statuses[12, 1] == 201, "what has gone takes no room"
        peers.begin(13, 1, bytes(4 * CHUNK), last=True)
        await turns()
        assert peers.statuses[13, 1] == 201, "what was answered takes no room"
        assert peers.calls.open == 0


async def test_many_peers_together_have_no_more_calls_than_all_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "CALLS_MAX", 3)
    async with asyncio.TaskGroup() as group:
        peers = Peers(group, echo)
        for node_id in range(4):
            peers.begin(node_id, 1)
        assert peers.statuses == {(3, 1): 429}
        for node_id in range(3):
            peers.go_on(node_id, 1, last=True)
        await turns()
        assert peers.statuses == {(0, 1): 201, (1, 1): 201, (2, 1): 201, (3, 1): 429}
        peers.begin(3, 2, last=True)
        await turns()
        assert peers.statuses[3, 2] == 201


async def test_what_has_no_end_for_long_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "BODIES_BYTES_MAX", 4 * CHUNK)
    monkeypatch.setattr(inbox_module, "BODY_STALE_S", 0.0)
    release = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        peers = Peers(group, echo_after(release))
        peers.begin(1, 1, bytes(CHUNK), last=True)  # Being answered: it stays.
        peers.begin(2, 1, bytes(CHUNK))
        peers.begin(3, 1, bytes(2 * CHUNK))
        peers.begin(4, 1, bytes(CHUNK))
        assert peers.statuses == {(2, 1): 429}
        peers.go_on(2, 1, bytes(CHUNK), last=True)  # More of what was given up.
        peers.go_on(4, 1, bytes(CHUNK), last=True)
        assert peers.statuses == {(2, 1): 429, (3, 1): 429}
        peers.begin(5, 1, bytes(CHUNK), last=True)
        peers.begin(6, 1, bytes(CHUNK), last=True)
        assert peers.statuses == {(2, 1): 429, (3, 1): 429, (6, 1): 429}, "nothing is left that could make room"
        release.set()
        await turns()
        assert {node_id for (node_id, _), status in peers.statuses.items() if status == 201} == {1, 4, 5}
        assert peers.calls.open == 0


async def test_a_body_that_does_not_end_in_time_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "BODY_TIMEOUT_S", 0.0)
    release = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        peers = Peers(group, echo_after(release))
        peers.begin(1, 1)
        peers.begin(2, 1, b"half")
        peers.go_on(2, 1, b"whole", last=True)
        peers.begin(3, 1, b"whole", last=True)
        await turns()
        assert peers.statuses == {(1, 1): 408}
        peers.go_on(1, 1, b"too late", last=True)
        release.set()
        await turns()
        assert peers.statuses == {(1, 1): 408, (2, 1): 201, (3, 1): 201}, "an answer may take as long as it likes"
        assert peers.calls.open == 0


async def test_a_connection_that_breaks_ends_all_calls_on_it() -> None:
    source = Source(bytes(CHUNK), 100)
    is_cancelled = asyncio.Event()

    async def answer(request: ApiRequest) -> ApiResponse:
        if request.path == "/stream":
            return await source.answer(request)
        try:
            await asyncio.Event().wait()
        finally:
            is_cancelled.set()
        raise AssertionError

    async with joined(answer) as pair:
        response = await pair.ask("/stream")
        asking = asyncio.ensure_future(pair.ask("/waits"))
        await turns()
        pair.break_connection()
        with pytest.raises(PeerLost, match="gone"):
            await asking
        with pytest.raises(PeerLost, match="gone"):
            await read(response)
        async with asyncio.timeout(10):
            await is_cancelled.wait()
            await source.is_closed.wait()


async def test_a_node_that_is_not_connected_is_not_waited_for() -> None:
    async with joined(echo) as pair:
        pair.break_connection()
        with pytest.raises(PeerLost, match="not connected"):
            await pair.ask()


async def test_an_answer_that_breaks_is_seen_to_break() -> None:
    async def breaking() -> AsyncIterator[bytes]:
        yield b"first"
        raise NotFound("the file is gone")

    async def answer(request: ApiRequest) -> ApiResponse:
        return ApiResponse(stream=breaking())

    async with joined(answer) as pair:
        response = await pair.ask()
        assert response.stream is not None
        assert await anext(response.stream) == b"first"
        with pytest.raises(BrokenOff, match="broke off"):
            await anext(response.stream)


@pytest.mark.parametrize("is_streaming", [False, True])
async def test_a_bug_in_one_answer_costs_that_call_alone(is_streaming: bool) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"first"
        raise ZeroDivisionError

    async def answer(request: ApiRequest) -> ApiResponse:
        if request.path == "/good":
            return await echo(request)
        if is_streaming:
            return ApiResponse(stream=broken())
        raise ZeroDivisionError

    async with joined(answer) as pair:
        with pytest.raises(BrokenOff, match="broke off"):
            await read(await pair.ask("/bad"))
        assert (await pair.ask("/good")).status == 201


async def test_a_silent_peer_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_module, "FIRST_PART_TIMEOUT_S", 0.0)

    async def answer(request: ApiRequest) -> ApiResponse:
        await asyncio.Event().wait()
        raise AssertionError

    async with joined(answer) as pair:
        with pytest.raises(Unavailable, match="did not answer"):
            await pair.ask()


async def test_an_answer_beyond_what_was_taken_is_refused() -> None:
    async def answer(request: ApiRequest) -> ApiResponse:
        await asyncio.Event().wait()
        raise AssertionError

    async with joined(answer) as pair:
        asking = asyncio.ensure_future(pair.ask())
        await turns()
        pair.to_worker.send(WORKER, msg.ResponsePart(1, b"before its head", False))  # Left alone.
        pair.to_worker.send(WORKER, msg.Response(1, 200, "text/plain", b"", False))
        for _ in range(AHEAD // CHUNK + 2):
            pair.to_worker.send(WORKER, msg.ResponsePart(1, bytes(CHUNK), False))
        await turns()
        with pytest.raises(Unavailable, match="more than was asked for"):
            await read(await asking)
        assert isinstance(pair.to_leader.sent[-1], msg.Abandon)


async def test_what_belongs_to_no_call_is_left_alone() -> None:
    async with joined(echo) as pair:
        for message in (
            msg.RequestPart(7, b"x", True), msg.Response(7, 200, "", b"", True), msg.ResponsePart(7, b"x", True),
            msg.Taken(7, 100), msg.Abandon(7, True), msg.Abandon(7, False),
        ):  # fmt: skip
            pair.leader.on_message(WORKER, message)
        assert pair.leader.open == 0
        assert (await pair.ask()).status == 201
