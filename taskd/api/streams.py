"""Streams of bytes on their way to a client: begun before the answer is, closed whatever happens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any


async def close_stream(stream: AsyncIterator[Any]) -> None:
    """Let a stream go, where it holds anything: generators do, other iterators need not."""
    aclose = getattr(stream, "aclose", None)
    if aclose is not None:
        await aclose()


async def begun(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same stream after its first part, which is awaited here: what goes wrong before it can still be answered with
    an error. Generators give an empty part when all is checked and the rest may take long. Empty parts are left out."""
    try:
        first = await anext(stream, b"")
    except BaseException:
        await close_stream(stream)
        raise
    return _resumed(first, stream)


async def _resumed(first: bytes, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        if first:
            yield first
        async for part in stream:
            if part:
                yield part
    finally:
        await close_stream(stream)
