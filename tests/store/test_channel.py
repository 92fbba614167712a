"""The daemon's end of the socket to its store's process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import pytest

from taskd.errors import Overloaded, StoreError
from taskd.store import wire
from taskd.store.channel import WAITING_MAX, Channel


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel, and what it talks to."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    channel = Channel(ours, lambda: "it is gone")
    with theirs, contextlib.closing(channel):
        yield channel, theirs


async def asked(channel: Channel, times: int = 1) -> list[asyncio.Future[wire.Answer]]:
    """Requests on their way."""
    waiting = [asyncio.ensure_future(channel.ask(wire.Count(b""))) for _ in range(times)]
    await asyncio.sleep(0)
    return waiting


async def test_answers_go_to_whom_they_belong_however_they_are_cut(ends):
    channel, theirs = ends
    waiting = await asked(channel, 3)
    answers = [wire.Counts([(number, "q", number)], b"") for number in range(3)]
    for byte in b"".join(map(wire.frame, answers)):
        theirs.send(bytes([byte]))
        await asyncio.sleep(0)
    assert await asyncio.gather(*waiting) == answers


async def test_a_request_that_cannot_be_said_takes_nobody_elses_answer(ends):
    channel, theirs = ends
    with pytest.raises(StoreError, match="cannot be made"):
        await channel.ask(wire.ScanIds("\ud800", b"", 1))
    (waiting,) = await asked(channel)
    theirs.send(wire.frame(wire.Counts([], b"")))
    assert await waiting == wire.Counts([], b"")


async def test_an_end_is_told_to_all_who_wait_and_to_all_who_come(ends):
    channel, theirs = ends
    waiting = await asked(channel, 2)
    theirs.close()
    for outcome in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(outcome, StoreError)
        assert outcome.message == "it is gone"
    with pytest.raises(StoreError, match="it is gone"):
        await channel.ask(wire.Count(b""))


async def test_an_end_that_sending_meets_first(ends):
    channel, theirs = ends
    theirs.close()
    with pytest.raises(StoreError, match="it is gone"):
        await channel.ask(wire.Count(b""))


async def test_an_end_in_the_middle_of_a_long_request(ends):
    channel, theirs = ends
    waiting = asyncio.ensure_future(channel.ask(wire.Write(None, [bytes(10 << 20)], [], [])))
    await asyncio.sleep(0)
    theirs.recv(1000)
    theirs.close()
    with pytest.raises(StoreError, match="it is gone"):
        await waiting


async def test_too_many_are_refused(ends):
    channel, _ = ends
    waiting = await asked(channel, WAITING_MAX)
    with pytest.raises(Overloaded):
        await channel.ask(wire.Count(b""))
    channel.close()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(outcome, StoreError) for outcome in outcomes)


async def test_a_failure_is_raised_where_it_was_asked(ends):
    channel, theirs = ends
    (waiting,) = await asked(channel)
    theirs.sendall(wire.frame(wire.Failed("the page is torn")))
    with pytest.raises(StoreError, match="the page is torn"):
        await waiting
