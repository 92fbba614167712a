"""Results of tasks out of the lines that a daemon streams, and the order in which a user gets them. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec

from taskd.client import calls
from taskd.client.call import ANSWER_S, RECEIVED_S, Call, Deadline, error_from
from taskd.client.lines import LineSplitter
from taskd.client.submission import Chunk
from taskd.client.views import Result, decode_result

# What may be outside at once of one `map`: enough to keep a cluster busy, bounded so that memory stays flat.
WINDOW_TASKS_MAX = 8000
HELD_TASKS_MAX = 20_000  # Results that wait for an earlier one before new tasks wait too.


class ResultReader:
    """The results of a set of tasks, read from a submission that streams or from a wait; however often the stream
    breaks off, `next_call` asks for the rest."""

    def __init__(self, chunk: Chunk) -> None:
        self.open = dict.fromkeys(chunk.ids)  # ids whose result has not come yet, in order
        self._submission = chunk.body  # what is still to be submitted
        self._lines = LineSplitter()
        self.is_fruitful = False  # whether a result has come since the last call
        self._has_asked = False
        self._is_timed = False  # whether the daemon ends its answer at the deadline by itself

    def next_call(self, deadline: Deadline) -> Call:
        """What to ask the daemon: first to take the tasks, then to tell of those that have not ended. Raises
        TimeoutError where the time is up, but not before it was asked once: tasks may have ended already."""
        is_poll = self._submission is None and not self._has_asked
        left_s = deadline.silence_s(0.0) if is_poll else deadline.left_s()
        self._lines = LineSplitter()
        self.is_fruitful = False
        self._has_asked = True
        self._is_timed = self._submission is None
        if self._submission is not None:
            return calls.submit(self._submission, is_stream=True)
        return calls.wait(list(self.open), left_s)

    def silence_s(self, deadline: Deadline) -> float | None:
        """For how long to wait for more of the answer. What has come is read however late it is; so is what the daemon
        says last where it keeps the time itself."""
        return deadline.silence_s(ANSWER_S if self._is_timed else RECEIVED_S)

    def feed(self, data: bytes) -> list[Result]:
        """The results in these bytes; none is told twice. Raises ApiError where the daemon gives up in between."""
        results = []
        for line in self._lines.feed(data):
            result = decode_result(line)
            if result.id in self.open:
                del self.open[result.id]
                results.append(result)
            elif not result.id:
                self._on_other_line(line)
        self.is_fruitful |= bool(results)
        return results

    def _on_other_line(self, line: bytes) -> None:
        document = msgspec.json.decode(line)
        if "error" in document:
            raise error_from(503, line)
        if "ids" in document:
            self._submission = None  # Taken: from now on it is enough to wait.


class MapWindow:
    """Which tasks of a `map` are outside, and which results are due. With `is_ordered` they come in the order of the
    tasks, else as tasks end."""

    def __init__(self, chunks: Iterator[Chunk], is_ordered: bool) -> None:
        self._chunks = chunks
        self._is_ordered = is_ordered
        self._outside = 0
        self._is_exhausted = False
        self._order: deque[str] = deque()  # ids in the order in which their results are due
        self._held: dict[str, Result] = {}

    @property
    def has_room(self) -> bool:
        """Whether another chunk may go out."""
        return not self._is_exhausted and self._outside < WINDOW_TASKS_MAX and len(self._held) < HELD_TASKS_MAX

    @property
    def is_done(self) -> bool:
        """Whether all tasks went out and all their results came."""
        return self._is_exhausted and not self._outside

    def next_chunk(self) -> Chunk | None:
        """The next tasks to send; None when there are no more."""
        chunk = next(self._chunks, None)
        if chunk is None:
            self._is_exhausted = True
            return None
        self._outside += len(chunk.ids)
        if self._is_ordered:
            self._order.extend(chunk.ids)
        return chunk

    def on_results(self, results: list[Result]) -> list[Result]:
        """Take what came; returns what is due now."""
        self._outside -= len(results)
        if not self._is_ordered:
            return results
        self._held.update((result.id, result) for result in results)
        due = []
        while self._order and self._order[0] in self._held:
            due.append(self._held.pop(self._order.popleft()))
        return due
