"""Requests that are the leader's to answer: asked of whoever leads, and of the next one where leadership changes.

Every request may be answered twice with the effect of once: the tasks that it makes are named by its `first_id`, and
everything else says what is to be, not what is to be done. So a client does not notice that a leader is gone, but for a
moment's delay. What streams has begun already: results are asked for again and each is passed on once; events go on
with those of the next leader; other streams end with an error once a part of them has been passed on.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

import msgspec

from taskd.api.bodies import LINES
from taskd.api.cluster import leader_changed
from taskd.api.dispatch import says_no_leader
from taskd.api.routes import find_route
from taskd.api.service import ApiRequest, ApiResponse
from taskd.api.streams import close_stream
from taskd.api.types import ErrorAnswer
from taskd.api.waiting import shortened
from taskd.daemon.calls import BrokenOff, PeerLost
from taskd.daemon.outputs import error_of
from taskd.daemon.shell import Shell
from taskd.errors import NoLeader, Stopping, Unavailable

LEADER_WAIT_S = 10.0  # Beyond any change of leaders; whoever gets no answer by then is told that nobody leads.
PAUSE_FIRST_S, PAUSE_MAX_S = 0.05, 0.5  # Before the same leader is asked again.
END_WAIT_S = 2.0  # A leader that has ended its stream of events because it leads no more is followed by another.

# What a line is about: a task's result, or what a submission has taken, which is said once.
_NAME = re.compile(rb'^\{"(?:id":"[0-9a-f-]{36}"|ids":)', re.MULTILINE)
_LAST_WORDS = re.compile(rb'^\{"error":.*\n', re.MULTILINE)
_read_error = msgspec.json.Decoder(ErrorAnswer).decode


class Asker(Protocol):
    """The way to other nodes."""

    async def ask(self, node_id: int, request: ApiRequest) -> ApiResponse: ...


class Relay:
    """Finds an answer for the requests of local clients. `here` answers where it is us who lead."""

    def __init__(self, shell: Shell, calls: Asker, here: Callable[[ApiRequest], Awaitable[ApiResponse]]) -> None:
        self.shell = shell
        self.calls = calls
        self.here = here

    async def ask(self, request: ApiRequest) -> ApiResponse:
        """The answer of the leader. Raises NoLeader where there is none for ten seconds, Unavailable, Stopping."""
        asking = _Asking(self, request)
        response = await asking.answer()
        if response.stream is None:
            return response
        route, _ = find_route(request.method, request.path)
        if route.resumes == "results" and response.content_type == LINES:
            return _with(response, _Results(asking, response.stream))
        if route.resumes == "events":
            return _with(response, _Events(asking, response.stream))
        return _with(response, _Stream(asking, response.stream))


def _with(response: ApiResponse, stream: AsyncIterator[bytes]) -> ApiResponse:
    return ApiResponse(response.status, response.content_type, stream=stream)


class _Asking:
    """One request, until it is answered for good."""

    def __init__(self, relay: Relay, request: ApiRequest) -> None:
        self.request = request
        self.shell = relay.shell
        self._relay = relay
        self._clock = asyncio.get_running_loop().time
        self._begun_s = self._clock()
        self._trouble_ends_s: float | None = None
        self._pause_s = PAUSE_FIRST_S
        self._asked: object = None  # which reign was asked last
        self._useless: object = None  # a reign that is not asked again

    @property
    def _reign(self) -> object:
        return (self.shell.leader, self.shell.term)

    async def answer(self) -> ApiResponse:
        """What the leader says, or the next one. Raises NoLeader, Unavailable, Stopping."""
        request = self.request if self._asked is None else shortened(self.request, self._clock() - self._begun_s)
        while True:
            begun_s, self._asked = self._clock(), self._reign
            response = await self._ask(request) if self._asked != self._useless else None
            if response is not None:
                self._trouble_ends_s = None  # A stream that breaks off later is in a new one.
                return response
            if self.shell.exited.done():
                raise Stopping()
            await self._wait(begun_s)

    async def _ask(self, request: ApiRequest) -> ApiResponse | None:
        leader = self.shell.leader
        try:
            if leader is None:
                return None
            if leader == self.shell.node.info.node_id:
                response = await self._relay.here(request)
            else:
                response = await self._relay.calls.ask(leader, request)
        except PeerLost:
            return None
        except BrokenOff:
            self._useless = self._asked  # It may be a bug over there: asking it again would only repeat that.
            return None
        return None if says_no_leader(response) else response

    async def _wait(self, begun_s: float) -> None:
        """Wait for another leader, or a little before the same one is asked again."""
        now_s = self._clock()
        if self._trouble_ends_s is None or now_s - begun_s > LEADER_WAIT_S:  # A new trouble: it was being answered.
            self._trouble_ends_s, self._pause_s = now_s + LEADER_WAIT_S, PAUSE_FIRST_S
        left_s = self._trouble_ends_s - now_s
        if left_s <= 0:
            raise NoLeader()
        if self._reign != self._asked:
            return
        has_other = self.shell.leader is not None and self._asked != self._useless
        await self.shell.hub.wait_for_leader(min(self._pause_s, left_s) if has_other else left_s)
        self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)

    async def succeeded(self) -> bool:
        """Whether the leader that was asked last leads no more; waits a moment for that."""
        if self._reign == self._asked and not self.shell.exited.done():
            await self.shell.hub.wait_for_leader(END_WAIT_S)
        return self._reign != self._asked and not self.shell.exited.done()


class _Stream:
    """A streamed answer. Where it breaks before anything was passed on, the next leader is asked."""

    def __init__(self, asking: _Asking, source: AsyncIterator[bytes]) -> None:
        self._asking = asking
        self._source = source
        self._has_passed = False
        self._is_over = False

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> bytes:
        while not self._is_over:
            try:
                part = await anext(self._source)
            except StopAsyncIteration:
                part = await self._ended()
            except (PeerLost, BrokenOff) as error:
                part = await self._broken(error)
            part = self._passed(part)
            if part:
                self._has_passed = True
                return part
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Read no more."""
        self._is_over = True
        await close_stream(self._source)

    async def _ended(self) -> bytes:
        self._is_over = True
        return b""

    async def _broken(self, error: Unavailable) -> bytes:
        if self._has_passed:
            raise error
        return await self._go_on()

    def _passed(self, part: bytes) -> bytes:
        """What of a part is to be passed on."""
        return part

    async def _go_on(self) -> bytes:
        """Read the answer of the next leader from now on."""
        await close_stream(self._source)
        response = await self._asking.answer()
        if response.stream is not None:
            self._source = response.stream
            return b""
        self._is_over = True
        return self._last_part(response)

    def _last_part(self, response: ApiResponse) -> bytes:
        """The rest, where it came at once. Raises what the answer says is wrong."""
        if response.status != 200:
            raise error_of(response)
        return response.body


class _Results(_Stream):
    """Lines of results, in whole lines: each task's is passed on once, whoever says it."""

    def __init__(self, asking: _Asking, source: AsyncIterator[bytes]) -> None:
        super().__init__(asking, source)
        self._ids: set[bytes] = set()  # of those passed on
        self._is_first = True  # nothing can come twice yet
        self._ends_early = False  # as its last line said
        self._half_line = b""

    async def _ended(self) -> bytes:
        return await self._go_on() if self._ends_early else await super()._ended()

    async def _broken(self, error: Unavailable) -> bytes:
        return await self._go_on()

    async def _go_on(self) -> bytes:
        self._is_first, self._ends_early, self._half_line = False, False, b""
        return await super()._go_on()

    def _last_part(self, response: ApiResponse) -> bytes:
        return response.body + b"\n"  # An error, in the form of a last line.

    def _passed(self, part: bytes) -> bytes:
        data = self._half_line + part
        end = data.rfind(b"\n") + 1
        lines, self._half_line = data[:end], data[end:]
        words = _LAST_WORDS.search(lines)
        if words is not None and _read_error(words[0]).error.code == Unavailable.code:
            self._ends_early, lines = True, lines[: words.start()]
        if not self._is_first:
            return b"".join(line for line in lines.splitlines(keepends=True) if self._is_new(line))
        self._ids.update(_NAME.findall(lines))
        return lines

    def _is_new(self, line: bytes) -> bool:
        found = _NAME.match(line)
        if found is None:
            return True
        is_new = found[0] not in self._ids
        self._ids.add(found[0])
        return is_new


class _Events(_Stream):
    """Events. After a change of leaders, which is an event itself, those of the next leader."""

    async def _ended(self) -> bytes:
        if await self._asking.succeeded():
            return await self._of_the_next()
        return await super()._ended()  # We were too slow a reader.

    async def _broken(self, error: Unavailable) -> bytes:
        return await self._of_the_next()

    async def _of_the_next(self) -> bytes:
        part = await self._go_on()
        shell = self._asking.shell
        if self._is_over or shell.leader is None or shell.term is None:
            return part
        return leader_changed(self._asking.request, shell.leader, shell.term.epoch, shell.utc())
