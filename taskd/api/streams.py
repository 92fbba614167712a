"""Streams of bytes on their way to a client: begun before the answer is, closed whatever happens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from taskd.errors import TaskdError


async def close_stream(stream: AsyncIterator[Any]) -> None:
    """Let a stream go, where it holds anything: generators do, other iterators need not."""
    aclose = getattr(stream, "aclose", None)
    if aclose is not None:
        await aclose()


class BegunStream:
    """A stream whose first part is there already: what went wrong before it could still be answered with an error.
    Generators give an empty part when all is checked and the rest may take long; empty parts are left out here.

    What breaks it is a TaskdError in any case: `unexpected` makes one of anything else. No generator itself, for
    closing one that nobody has read from would leave the source open.
    """

    def __init__(self, first: bytes, source: AsyncIterator[bytes], unexpected: Callable[[], TaskdError]) -> None:
        self._first = first
        self._source = source
        self._unexpected = unexpected

    def __aiter__(self) -> BegunStream:
        return self

    async def __anext__(self) -> bytes:
        part, self._first = self._first, b""
        try:
            while not part:
                part = await anext(self._source)
        except (StopAsyncIteration, TaskdError):
            raise
        except Exception:
            raise self._unexpected() from None
        return part

    async def aclose(self) -> None:
        """Let the source go."""
        await close_stream(self._source)


async def begin(source: AsyncIterator[bytes], unexpected: Callable[[], TaskdError]) -> BegunStream:
    """Await the first part of a stream. Raises what the source raises before it."""
    try:
        first = await anext(source, b"")
    except BaseException:
        await close_stream(source)
        raise
    return BegunStream(first, source, unexpected)
