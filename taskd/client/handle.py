"""A submitted task in the hand of the one who submitted it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from taskd.client import calls
from taskd.client.errors import TaskError
from taskd.client.outputs import OutputReader, Written
from taskd.client.views import (
    Explanation,
    Result,
    TaskDetail,
    decode_acted,
    decode_detail,
    decode_explanation,
)

if TYPE_CHECKING:
    from taskd.client.client import Client


class Handle:
    """One task. It needs no closing; the task goes on without it.

    Everything here may raise NoDaemon, and ApiError where the daemon refuses.
    """

    __slots__ = ("_client", "id", "known_result")

    def __init__(self, client: Client, task_id: str) -> None:
        self._client = client
        self.id = task_id
        self.known_result: Result | None = None  # kept by whoever waited for it

    def result(self, timeout: float | None = None) -> Any:
        """What the task returned, once it has ended; None for a command.

        Raises TaskFailed, TaskCancelled, TaskTimedOut or TaskExpired where it did not succeed, and TimeoutError where
        it has not ended within `timeout` seconds; with 0 the daemon is asked just once.
        """
        return self.outcome(timeout).value()

    def exception(self, timeout: float | None = None) -> TaskError | None:
        """The error that `result` would raise for the task; None after a success."""
        return self.outcome(timeout).exception()

    def outcome(self, timeout: float | None = None) -> Result:
        """How the task ended, well or not: state, result, exit code, error. Raises TimeoutError."""
        if self.known_result is None:
            for _ in self._client.as_completed([self], timeout):
                pass
        assert self.known_result is not None
        return self.known_result

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end of the task; whether it came within `timeout` seconds."""
        try:
            self.outcome(timeout)
        except TimeoutError:
            return False
        return True

    def done(self) -> bool:
        """Whether the task has ended."""
        return self.known_result is not None or self.info().is_finished

    @property
    def state(self) -> str:
        """Where the task stands: "queued", "running", "succeeded" and so on. Asks the daemon until it is final."""
        return self.known_result.state if self.known_result is not None else self.info().state

    def info(self) -> TaskDetail:
        """Everything about the task, its attempts included."""
        return decode_detail(self._client.transport.request(calls.task(self.id)))

    def cancel(self) -> bool:
        """Have the task cancelled, whether it waits or runs; false where it has ended already."""
        return bool(decode_acted(self._client.transport.request(calls.cancel({"ids": [self.id]}))).ids)

    def retry(self) -> Handle:
        """Run a task that did not succeed again, as a new task."""
        (task_id,) = decode_acted(self._client.transport.request(calls.retry({"ids": [self.id]}))).ids
        return Handle(self._client, task_id)

    def explain(self) -> Explanation:
        """Why the task stands where it stands, node by node."""
        return decode_explanation(self._client.transport.request(calls.explain(self.id)))

    def output(self, stream: str = "stdout", *, attempt: int | None = None) -> bytes:
        """What the task has written so far to `stdout` or `stderr`, in its newest attempt unless told otherwise."""
        return self._client.transport.request(calls.output(self.id, stream, attempt=attempt))

    def follow(self) -> Iterator[Written]:
        """What the task writes, live, from the beginning of its newest attempt until it has ended."""
        reader = OutputReader()
        with self._client.transport.open(calls.output(self.id, "both", follow=True)) as stream:
            while data := stream.read():
                yield from reader.feed(data)

    def __repr__(self) -> str:
        state = f" {self.known_result.state}" if self.known_result is not None else ""
        return f"<Handle {self.id}{state}>"
