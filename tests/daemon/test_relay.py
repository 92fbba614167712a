"""Requests that outlive their leader: whoever leads next answers, and the client sees one answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from taskd.api.bodies import LINES, error_body
from taskd.api.dispatch import error_response
from taskd.api.service import ApiRequest, ApiResponse, Caller
from taskd.daemon import relay as relay_module
from taskd.daemon.calls import BrokenOff, PeerLost
from taskd.daemon.hub import Hub
from taskd.daemon.relay import Relay
from taskd.errors import NoLeader, NotFound, Stopping, Unavailable
from taskd.protocol.messages import NodeInfo, Term

OWN, ONE, TWO = 9, 1, 2
CALLER = Caller("ann", False)
SUBMIT = ApiRequest("POST", "/v1/tasks", {}, CALLER, b"[]", first_id=b"f" * 16)
WAIT = ApiRequest("POST", "/v1/tasks/wait", {}, CALLER, b'{"ids":["a"],"timeout":50,"stream":true}')
EVENTS = ApiRequest("GET", "/v1/events", {}, CALLER)
FOLLOW = ApiRequest("GET", "/v1/tasks/last/output", {"follow": "1"}, CALLER)
NOT_LEADING = error_response(NoLeader())
DONE = ApiResponse(body=b"done")

Answer = ApiResponse | Exception


class FakeShell:
    """Who leads, as one node knows it."""

    def __init__(self) -> None:
        self.hub = Hub()
        self.leader: int | None = None
        self.term: Term | None = None
        self.exited: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.node = self
        self.info = NodeInfo(OWN, "own", ("scheduler",), bytes(16), 1, "1")

    def utc(self) -> float:
        return 1000.0

    def follow(self, leader: int | None) -> None:
        epoch = self.term.epoch if self.term is not None else 0
        self.leader = leader
        self.term = Term(epoch + 1, leader, 1) if leader is not None else self.term
        self.hub.leader_changed()


class Cluster:
    """What each node answers, in turn; the last answer stands."""

    def __init__(self) -> None:
        self.shell = FakeShell()
        self.answers: dict[int, list[Answer]] = {}
        self.asked: list[tuple[int, ApiRequest]] = []
        self.was_asked = asyncio.Event()
        self.relay = Relay(self.shell, self, lambda request: self.ask(OWN, request))  # type: ignore[arg-type]

    async def ask(self, node_id: int, request: ApiRequest) -> ApiResponse:
        self.asked.append((node_id, request))
        self.was_asked.set()
        answers = self.answers[node_id]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def order(self) -> list[int]:
        return [node_id for node_id, _ in self.asked]


@pytest.fixture
async def cluster() -> Cluster:
    cluster = Cluster()
    cluster.shell.follow(ONE)
    return cluster


def stream(*parts: bytes | Exception | Callable[[], None], lines: bool = True) -> ApiResponse:
    """A streamed answer; a function in it is called when it is its turn."""

    async def source() -> AsyncIterator[bytes]:
        for part in parts:
            if isinstance(part, Exception):
                raise part
            if isinstance(part, bytes):
                yield part
            else:
                part()

    return ApiResponse(content_type=LINES if lines else "text/plain", stream=source())


async def read(response: ApiResponse) -> bytes:
    assert response.stream is not None
    return b"".join([part async for part in response.stream])


def line(letter: str) -> bytes:
    return b'{"id":"%b","state":"succeeded"}\n' % (letter.encode() * 36)


# -- Whole answers -----------------------------------------------------------------------------------------------------


async def test_the_leader_answers(cluster: Cluster) -> None:
    cluster.answers[ONE] = [DONE]
    assert await cluster.relay.ask(SUBMIT) is DONE
    assert cluster.asked == [(ONE, SUBMIT)]


async def test_where_we_lead_by_now_we_answer(cluster: Cluster) -> None:
    cluster.shell.follow(OWN)
    cluster.answers[OWN] = [DONE]
    assert await cluster.relay.ask(SUBMIT) is DONE


@pytest.mark.parametrize("trouble", [PeerLost(), NOT_LEADING, BrokenOff()], ids=["lost", "not leading", "broken off"])
async def test_the_next_leader_gets_the_very_same_request(cluster: Cluster, trouble: Answer) -> None:
    cluster.answers = {ONE: [trouble], TWO: [DONE]}
    asking = asyncio.ensure_future(cluster.relay.ask(SUBMIT))
    await cluster.was_asked.wait()
    cluster.shell.follow(None)
    await asyncio.sleep(0)
    cluster.shell.follow(TWO)
    assert await asking is DONE
    assert cluster.order[-1] == TWO
    assert all(request == SUBMIT for _, request in cluster.asked)


async def test_a_leader_that_leads_again_is_asked_again(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "PAUSE_FIRST_S", 0.001)
    cluster.answers[ONE] = [NOT_LEADING, PeerLost(), NOT_LEADING, DONE]
    assert await cluster.relay.ask(SUBMIT) is DONE
    assert cluster.order == [ONE] * 4


async def test_an_answer_that_breaks_off_is_asked_for_once_in_a_reign(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "LEADER_WAIT_S", 0.01)
    cluster.answers[ONE] = [BrokenOff()]
    with pytest.raises(NoLeader):
        await cluster.relay.ask(SUBMIT)
    assert cluster.order == [ONE]


@pytest.mark.parametrize("answer", [NOT_LEADING, PeerLost(), None], ids=["not leading", "lost", "nobody"])
async def test_patience_ends(cluster: Cluster, answer: Answer | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "LEADER_WAIT_S", 0.01)
    if answer is None:
        cluster.shell.follow(None)
    else:
        cluster.answers[ONE] = [answer]
    with pytest.raises(NoLeader):
        await cluster.relay.ask(SUBMIT)
    assert not cluster.shell.hub._leader_waiters


@pytest.mark.parametrize("error", [Unavailable("the worker does not answer"), NotFound()])
async def test_other_errors_are_answers(cluster: Cluster, error: Exception) -> None:
    response = error_response(error)  # type: ignore[arg-type]
    cluster.answers[ONE] = [response]
    assert await cluster.relay.ask(SUBMIT) is response


async def test_a_node_that_stops_waits_for_no_leader(cluster: Cluster) -> None:
    cluster.shell.follow(None)
    asking = asyncio.ensure_future(cluster.relay.ask(SUBMIT))
    await asyncio.sleep(0)
    cluster.shell.exited.set_result((0, "stopped"))
    cluster.shell.hub.close()
    with pytest.raises(Stopping):
        await asking


# -- Results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "end",
    [PeerLost(), BrokenOff(), error_body(Stopping()) + b"\n"],
    ids=["lost", "broken off", "stopping"],
)
async def test_results_go_on_with_the_next_leader_each_once(cluster: Cluster, end: bytes | Exception) -> None:
    def change() -> None:
        cluster.shell.follow(TWO)

    # An answer that breaks does so in the middle of a line, which the next leader says anew.
    half_line = line("c")[:20] if isinstance(end, Exception) else b""
    cluster.answers[ONE] = [stream(line("a") + line("b"), half_line, change, end)]
    cluster.answers[TWO] = [stream(line("b") + line("a"), line("c"), line("d"))]
    response = await cluster.relay.ask(WAIT)
    assert await read(response) == line("a") + line("b") + line("c") + line("d")
    assert cluster.order[-1] == TWO


async def test_what_a_submission_took_is_said_once(cluster: Cluster) -> None:
    accepted = b'{"ids":["x"],"durability":"replicated"}\n'
    request = ApiRequest("POST", "/v1/tasks", {"stream": "1", "wait": "30"}, CALLER, b"{}", first_id=b"f" * 16)
    cluster.answers[ONE] = [stream(accepted, PeerLost())]
    cluster.answers[TWO] = [stream(accepted + line("a"))]
    response = await cluster.relay.ask(request)
    cluster.shell.follow(TWO)
    assert await read(response) == accepted + line("a")
    _, again = cluster.asked[-1]
    assert again.first_id == request.first_id
    assert 0 < float(again.query["wait"]) <= 30, "for the time that is left"


async def test_an_error_of_the_next_leader_is_the_last_line(cluster: Cluster) -> None:
    cluster.answers[ONE] = [stream(line("a"), PeerLost())]
    cluster.answers[TWO] = [error_response(NotFound("there is no such task"))]
    response = await cluster.relay.ask(WAIT)
    cluster.shell.follow(TWO)
    assert await read(response) == line("a") + error_body(NotFound("there is no such task")) + b"\n"


async def test_other_last_words_are_passed_on(cluster: Cluster) -> None:
    last = error_body(NotFound("the task is no longer there")) + b"\n"
    cluster.answers[ONE] = [stream(line("a"), last)]
    assert await read(await cluster.relay.ask(WAIT)) == line("a") + last


# -- Other streams -----------------------------------------------------------------------------------------------------


async def test_a_stream_that_breaks_before_its_first_part_is_asked_for_again(cluster: Cluster) -> None:
    cluster.answers = {ONE: [stream(PeerLost(), lines=False)], TWO: [stream(b"out", lines=False)]}
    response = await cluster.relay.ask(FOLLOW)
    cluster.shell.follow(TWO)
    assert await read(response) == b"out"


async def test_a_stream_that_breaks_later_is_seen_to_break(cluster: Cluster) -> None:
    cluster.answers[ONE] = [stream(b"some", PeerLost("gone"), lines=False)]
    response = await cluster.relay.ask(FOLLOW)
    cluster.shell.follow(TWO)
    assert response.stream is not None
    assert await anext(response.stream) == b"some"
    with pytest.raises(Unavailable, match="gone"):
        await anext(response.stream)


async def test_a_stream_that_is_left_is_let_go(cluster: Cluster) -> None:
    closed: list[bool] = []

    async def source() -> AsyncIterator[bytes]:
        try:
            yield b"one"
            yield b"two"
        finally:
            closed.append(True)

    cluster.answers[ONE] = [ApiResponse(stream=source())]
    response = await cluster.relay.ask(FOLLOW)
    assert response.stream is not None
    await anext(response.stream)
    await response.stream.aclose()  # type: ignore[attr-defined]
    assert closed == [True]
    assert [part async for part in response.stream] == []


# -- Events ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_orderly", [True, False])
@pytest.mark.parametrize(
    ("query", "is_told"), [({}, True), ({"kind": "task"}, False), ({"kind": "leader"}, True), ({"task": "ffff"}, False)]
)
async def test_events_go_on_with_those_of_the_next_leader(
    cluster: Cluster, query: dict[str, str], is_told: bool, is_orderly: bool
) -> None:
    def change() -> None:
        cluster.shell.follow(TWO)

    broken = () if is_orderly else (PeerLost(),)
    cluster.answers[ONE] = [stream(b"one;", change, *broken, lines=False)]
    cluster.answers[TWO] = [stream(b"two;", lines=False)]
    response = await cluster.relay.ask(ApiRequest("GET", "/v1/events", query, CALLER))
    assert response.stream is not None
    parts = [await anext(response.stream) for _ in range(3 if is_told else 2)]
    assert (parts[0], parts[-1]) == (b"one;", b"two;")
    if is_told:
        assert parts[1].startswith(b"event: leader.changed\ndata: {")
        assert b'"node_id":2,"detail":"term 2"' in parts[1]
    await response.stream.aclose()  # type: ignore[attr-defined]


async def test_events_outlive_one_change_of_leaders_after_the_other(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "LEADER_WAIT_S", 0.05)
    clock = asyncio.get_running_loop().time

    def patience_passes_and_nobody_leads() -> None:
        ends_s = clock() + relay_module.LEADER_WAIT_S
        while clock() < ends_s:
            pass
        cluster.shell.follow(None)
        asyncio.get_running_loop().call_soon(cluster.shell.follow, ONE)

    cluster.answers[ONE] = [
        stream(b"one;", patience_passes_and_nobody_leads, PeerLost(), lines=False),
        stream(b"two;", patience_passes_and_nobody_leads, PeerLost(), lines=False),
        stream(b"three;", lines=False),
    ]
    response = await cluster.relay.ask(ApiRequest("GET", "/v1/events", {"kind": "task"}, CALLER))
    assert response.stream is not None
    assert [await anext(response.stream) for _ in range(3)] == [b"one;", b"two;", b"three;"]
    await response.stream.aclose()  # type: ignore[attr-defined]


async def test_a_reader_of_events_who_is_too_slow_is_let_go(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "END_WAIT_S", 0.001)
    cluster.answers[ONE] = [stream(b"one;", lines=False)]
    assert await read(await cluster.relay.ask(EVENTS)) == b"one;"
    assert cluster.order == [ONE]
