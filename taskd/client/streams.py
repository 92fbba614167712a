"""Results of many tasks as they come, blocking: several streams at once, each made anew when it breaks."""

from __future__ import annotations

import select
import time
from collections.abc import Generator

from taskd.client import calls
from taskd.client.call import DELAY_FIRST_S, FULL_DELAY_S, Deadline, Patience, is_worth_repeating
from taskd.client.errors import ApiError, ConnectionLost
from taskd.client.results import MapWindow, ResultReader
from taskd.client.submission import Chunk
from taskd.client.transport import Stream, Transport
from taskd.client.views import Result


class ResultStream:
    """The results of some tasks over one connection at a time."""

    def __init__(self, transport: Transport, chunk: Chunk, deadline: Deadline) -> None:
        self._transport = transport
        self._reader = ResultReader(chunk)
        self._deadline = deadline
        self._stream: Stream | None = None
        self._patience = Patience(transport.patience_s)

    @property
    def is_done(self) -> bool:
        """Whether all results have come."""
        return not self._reader.open

    @property
    def is_open(self) -> bool:
        """Whether there is a connection to read from."""
        return self._stream is not None

    @property
    def has_data(self) -> bool:
        """Whether `read` will not block."""
        return self._stream is not None and self._stream.has_data

    @property
    def silence_s(self) -> float | None:
        """For how long to wait for more."""
        return self._reader.silence_s(self._deadline)

    def fileno(self) -> int:
        """For poll."""
        assert self._stream is not None
        return self._stream.fileno()

    def open(self) -> None:
        """Ask the daemon. Raises ApiError, NoDaemon, TimeoutError."""
        if self._stream is None:
            self._stream = self._transport.open(self._reader.next_call(self._deadline), self._deadline)

    def read(self) -> list[Result]:
        """The results that come next, perhaps none yet. Raises TimeoutError, ApiError, NoDaemon."""
        self.open()
        assert self._stream is not None
        try:
            data = self._stream.read(self.silence_s)
            results = self._reader.feed(data)
        except TimeoutError:
            self._deadline.left_s()  # Raises, unless this was but one step of a long wait.
            return []
        except (ConnectionLost, ApiError) as error:
            self._on_break(error)
            return []
        if results:
            self._patience.restore()
        if self.is_done:
            self._stream.finish()
            self._stream = None
        elif not data:
            self._on_early_end()
        return results

    def close(self) -> None:
        """Stop reading."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _on_break(self, error: ConnectionLost | ApiError) -> None:
        """The stream broke off: wait a moment, or give up."""
        self.close()
        delay_s = None
        if is_worth_repeating(error, is_repeatable=True, has_answered=True):
            delay_s = self._patience.next_delay_s(time.monotonic())
        if delay_s is None:
            raise error
        if self._transport.on_trouble is not None:
            self._transport.on_trouble(error)
        time.sleep(self._deadline.pause_s(delay_s))

    def _on_early_end(self) -> None:
        """The daemon stopped waiting: because its own time was up, or because it does not know what to wait for."""
        self.close()
        self._deadline.left_s()
        if not self._reader.is_fruitful:
            call = calls.task(next(iter(self._reader.open)))
            self._transport.request(call, self._deadline)  # Raises where there is no such task.
            time.sleep(self._deadline.pause_s(DELAY_FIRST_S))


class ResultFlow:
    """The results of all tasks of a window, over as many streams as it takes."""

    def __init__(self, transport: Transport, window: MapWindow, deadline: Deadline) -> None:
        self._transport = transport
        self._window = window
        self._deadline = deadline
        self._streams: list[ResultStream] = []
        self._full_until_s = 0.0
        self._full_patience = Patience(transport.patience_s)

    def fill(self) -> None:
        """Send as many tasks as may be outside at once."""
        while all(stream.is_open for stream in self._streams) and self._window.has_room:
            chunk = self._window.next_chunk()
            if chunk is None:
                break
            self._streams.append(ResultStream(self._transport, chunk, self._deadline))
            self._open_streams()

    def results(self) -> Generator[Result, None, None]:
        """Results, in the window's order."""
        try:
            self.fill()
            while not self._window.is_done:
                stream = self._next_ready()
                results = stream.read()
                if stream.is_done:
                    self._streams.remove(stream)
                due = self._window.on_results(results)
                if results:
                    self.fill()
                yield from due
        finally:
            self.close()

    def close(self) -> None:
        """Stop reading. Tasks that were submitted go on."""
        for stream in self._streams:
            stream.close()

    def _open_streams(self) -> None:
        for stream in self._streams:
            may_wait = any(other.is_open for other in self._streams)
            if stream.is_open or (may_wait and time.monotonic() < self._full_until_s):
                continue
            try:
                stream.open()
            except ApiError as error:
                self._on_refusal(error, may_wait)
            else:
                self._full_patience.restore()

    def _on_refusal(self, error: ApiError, may_wait: bool) -> None:
        """A daemon that is full: what is outside already makes room when it ends, or others' tasks do."""
        if error.code != "overloaded":
            raise error
        if not may_wait:
            delay_s = self._full_patience.next_delay_s(time.monotonic())
            if delay_s is None:
                raise error
            time.sleep(self._deadline.pause_s(delay_s))
        self._full_until_s = time.monotonic() + FULL_DELAY_S

    def _next_ready(self) -> ResultStream:
        """A stream that has something to read. Raises TimeoutError."""
        is_open: list[ResultStream] = []
        while not is_open:
            self._open_streams()
            is_open = [stream for stream in self._streams if stream.is_open]
        if len(is_open) == 1:
            return is_open[0]  # Nothing else to wait for: its own read may block.
        for stream in is_open:
            if stream.has_data:
                return stream
        stream = self._first_of(is_open)
        self._streams.remove(stream)
        self._streams.append(stream)  # The others come first the next time.
        return stream

    def _first_of(self, streams: list[ResultStream]) -> ResultStream:
        """The first of these that can be read. Raises TimeoutError."""
        poll = select.poll()
        by_number = {stream.fileno(): stream for stream in streams}
        for number in by_number:
            poll.register(number, select.POLLIN)
        while True:
            # With a deadline none of them may be silent for 0 s; without one all may be for ever.
            silence_s = max(stream.silence_s or 0.0 for stream in streams)
            ready = poll.poll(silence_s * 1000 or None)
            if ready:
                return by_number[ready[0][0]]
            self._deadline.left_s()  # Raises, unless this was but one step of a long wait.
