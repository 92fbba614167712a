"""Results of many tasks as they come, for asyncio: several streams at once, each made anew when it breaks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from taskd.client import calls
from taskd.client.async_transport import AsyncStream, AsyncTransport
from taskd.client.call import DELAY_FIRST_S, FULL_DELAY_S, Deadline, Patience, is_worth_repeating
from taskd.client.errors import ApiError, ConnectionLost
from taskd.client.results import MapWindow, ResultReader
from taskd.client.submission import Chunk
from taskd.client.views import Result


class AsyncResultStream:
    """The results of some tasks over one connection at a time."""

    def __init__(self, transport: AsyncTransport, chunk: Chunk, deadline: Deadline) -> None:
        self._transport = transport
        self._reader = ResultReader(chunk)
        self._deadline = deadline
        self._stream: AsyncStream | None = None
        self._patience = Patience(transport.patience_s)

    @property
    def is_done(self) -> bool:
        """Whether all results have come."""
        return not self._reader.open

    async def read(self) -> list[Result]:
        """The results that come next, perhaps none yet. Raises TimeoutError, ApiError, NoDaemon."""
        if self._stream is None:
            self._stream = await self._transport.open(self._reader.next_call(self._deadline), self._deadline)
        try:
            async with asyncio.timeout(self._reader.silence_s(self._deadline)):
                data = await self._stream.read()
            results = self._reader.feed(data)
        except TimeoutError:
            self.close()
            self._deadline.left_s()  # Raises, unless this was but one step of a long wait.
            return []
        except (ConnectionLost, ApiError) as error:
            self.close()
            await self._pause_after(error)
            return []
        if results:
            self._patience.restore()
        if self.is_done:
            await self._stream.finish()
            self._stream = None
        elif not data:
            self.close()
            await self._pause_after_early_end()
        return results

    def close(self) -> None:
        """Stop reading."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    async def _pause_after(self, error: ConnectionLost | ApiError) -> None:
        """The stream broke off: wait a moment, or give up."""
        delay_s = None
        if is_worth_repeating(error, is_repeatable=True, has_answered=True):
            delay_s = self._patience.next_delay_s(time.monotonic())
        if delay_s is None:
            raise error
        await asyncio.sleep(self._deadline.pause_s(delay_s))

    async def _pause_after_early_end(self) -> None:
        """The daemon stopped waiting: because its own time was up, or because it does not know what to wait for."""
        self._deadline.left_s()
        if not self._reader.is_fruitful:
            call = calls.task(next(iter(self._reader.open)))
            await self._transport.request(call, self._deadline)  # Raises where there is no such task.
            await asyncio.sleep(self._deadline.pause_s(DELAY_FIRST_S))


class AsyncResultFlow:
    """The results of all tasks of a window, over as many streams as it takes."""

    def __init__(self, transport: AsyncTransport, window: MapWindow, deadline: Deadline) -> None:
        self._transport = transport
        self._window = window
        self._deadline = deadline
        self._reads: dict[asyncio.Task[list[Result]], AsyncResultStream] = {}
        self._refused: list[AsyncResultStream] = []  # by a daemon that is full
        self._full_until_s = 0.0
        self._full_patience = Patience(transport.patience_s)

    async def results(self) -> AsyncGenerator[Result, None]:
        """Results, in the window's order. Raises TimeoutError."""
        try:
            self._fill()
            while not self._window.is_done:
                timeout_s = FULL_DELAY_S if self._refused else None  # The reads themselves keep the deadline.
                if self._reads:
                    done, _ = await asyncio.wait(self._reads, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
                    for read in sorted(done, key=lambda read: read.exception() is not None):  # What came wins.
                        for result in self._window.on_results(await self._take(read)):
                            yield result
                self._retry_refused()
                self._fill()
        finally:
            await self._stop()

    def _fill(self) -> None:
        """Send as many tasks as may be outside at once."""
        while not self._refused and self._window.has_room:
            chunk = self._window.next_chunk()
            if chunk is not None:
                self._read_on(AsyncResultStream(self._transport, chunk, self._deadline))

    def _read_on(self, stream: AsyncResultStream) -> None:
        self._reads[asyncio.ensure_future(stream.read())] = stream

    async def _take(self, read: asyncio.Task[list[Result]]) -> list[Result]:
        """What one read brought, and have its stream read on."""
        stream = self._reads.pop(read)
        try:
            results = read.result()
        except ApiError as error:
            self._refused.append(stream)
            await self._pause_after_refusal(error)
            return []
        if results:
            self._full_patience.restore()
        if not stream.is_done:
            self._read_on(stream)
        return results

    async def _pause_after_refusal(self, error: ApiError) -> None:
        """A daemon that is full: what is outside already makes room when it ends, or others' tasks do."""
        if error.code != "overloaded":
            raise error
        if not self._reads:
            delay_s = self._full_patience.next_delay_s(time.monotonic())
            if delay_s is None:
                raise error
            await asyncio.sleep(self._deadline.pause_s(delay_s))
        self._full_until_s = time.monotonic() + FULL_DELAY_S

    def _retry_refused(self) -> None:
        if self._refused and (not self._reads or time.monotonic() >= self._full_until_s):
            refused, self._refused = self._refused, []
            for stream in refused:
                self._read_on(stream)

    async def _stop(self) -> None:
        """Stop reading. Tasks that were submitted go on."""
        for read in self._reads:
            read.cancel()
        await asyncio.gather(*self._reads, return_exceptions=True)
        for stream in (*self._reads.values(), *self._refused):
            stream.close()
