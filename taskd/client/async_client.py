"""The client for asyncio: submit tasks to the daemon of this machine and await their results."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Generator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple, Unpack

from taskd.client import calls, submission
from taskd.client.async_streams import AsyncResultFlow
from taskd.client.async_transport import AsyncTransport
from taskd.client.call import PATIENCE_S, Deadline
from taskd.client.errors import TaskError
from taskd.client.outputs import OutputReader, Written
from taskd.client.results import MapWindow
from taskd.client.submission import IDS_MAX, Options, groups_of
from taskd.client.views import (
    Cluster,
    Explanation,
    Handler,
    Node,
    Result,
    Task,
    TaskDetail,
    decode_acted,
    decode_cluster,
    decode_detail,
    decode_explanation,
    decode_handlers,
    decode_nodes,
    decode_page,
)


class AsyncHandle:
    """One task. Awaiting it gives what `result` gives. See Handle for what may be raised."""

    __slots__ = ("_client", "id", "known_result")

    def __init__(self, client: AsyncClient, task_id: str) -> None:
        self._client = client
        self.id = task_id
        self.known_result: Result | None = None  # kept by whoever waited for it

    def __await__(self) -> Generator[Any, None, Any]:
        return self.result().__await__()

    async def result(self, timeout: float | None = None) -> Any:
        """What the task returned, once it has ended; None for a command.

        Raises TaskFailed, TaskCancelled, TaskTimedOut or TaskExpired where it did not succeed, and TimeoutError where
        it has not ended within `timeout` seconds; with 0 the daemon is asked just once.
        """
        return (await self.outcome(timeout)).value()

    async def exception(self, timeout: float | None = None) -> TaskError | None:
        """The error that `result` would raise for the task; None after a success."""
        return (await self.outcome(timeout)).exception()

    async def outcome(self, timeout: float | None = None) -> Result:
        """How the task ended, well or not: state, result, exit code, error. Raises TimeoutError."""
        if self.known_result is None:
            async for _ in self._client.as_completed([self], timeout):
                pass
        assert self.known_result is not None
        return self.known_result

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end of the task; whether it came within `timeout` seconds."""
        try:
            await self.outcome(timeout)
        except TimeoutError:
            return False
        return True

    async def done(self) -> bool:
        """Whether the task has ended."""
        return self.known_result is not None or (await self.info()).is_finished

    async def state(self) -> str:
        """Where the task stands: "queued", "running", "succeeded" and so on."""
        return self.known_result.state if self.known_result is not None else (await self.info()).state

    async def info(self) -> TaskDetail:
        """Everything about the task, its attempts included."""
        return decode_detail(await self._client.transport.request(calls.task(self.id)))

    async def cancel(self) -> bool:
        """Have the task cancelled, whether it waits or runs; false where it has ended already."""
        return bool(await self._client.cancel([self]))

    async def retry(self) -> AsyncHandle:
        """Run a task that did not succeed again, as a new task."""
        answer = await self._client.transport.request(calls.retry({"ids": [self.id]}))
        (task_id,) = decode_acted(answer).ids
        return AsyncHandle(self._client, task_id)

    async def explain(self) -> Explanation:
        """Why the task stands where it stands, node by node."""
        return decode_explanation(await self._client.transport.request(calls.explain(self.id)))

    async def output(self, stream: str = "stdout", *, attempt: int | None = None) -> bytes:
        """What the task has written so far to `stdout` or `stderr`, in its newest attempt unless told otherwise."""
        return await self._client.transport.request(calls.output(self.id, stream, attempt=attempt))

    async def follow(self) -> AsyncIterator[Written]:
        """What the task writes, live, from the beginning of its newest attempt until it has ended."""
        reader = OutputReader()
        stream = await self._client.transport.open(calls.output(self.id, "both", follow=True))
        try:
            while data := await stream.read():
                for written in reader.feed(data):
                    yield written
        finally:
            stream.close()

    def __repr__(self) -> str:
        state = f" {self.known_result.state}" if self.known_result is not None else ""
        return f"<AsyncHandle {self.id}{state}>"


class AsyncWaited(NamedTuple):
    """What `wait` found: tasks that have ended, and tasks that have not."""

    done: list[AsyncHandle]
    pending: list[AsyncHandle]


class AsyncClient:
    """Talks to a taskd daemon, over its Unix socket or HTTPS, from one event loop. The same as Client, to be awaited.

    async with AsyncClient() as client:
        handle = await client.submit("resize", path="a.jpg")
        print(await handle.result(timeout=10))
        async for size in client.map("resize", [{"path": path} for path in paths]):
            print(size)
    """

    def __init__(
        self,
        socket: str | os.PathLike[str] | None = None,
        *,
        access: str | os.PathLike[str] | None = None,
        patience: float = PATIENCE_S,
        **options: Unpack[Options],
    ) -> None:
        self._options = submission.checked(options)
        self.transport = AsyncTransport(
            None if socket is None else os.fspath(socket),
            access=None if access is None else os.fspath(access),
            patience_s=patience,
        )

    def with_options(self, **options: Unpack[Options]) -> AsyncClient:
        """The same client, with more options for the tasks that are submitted through what this returns."""
        other = object.__new__(type(self))
        other._options = {**self._options, **submission.checked(options)}
        other.transport = self.transport
        return other

    async def close(self) -> None:
        """Let go of the connections. Tasks go on."""
        self.transport.close()
        await asyncio.sleep(0)  # The loop closes aborted connections in its next turn.

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    # -- Submitting ----------------------------------------------------------------------------------------------------

    async def submit(self, task: object, /, **params: Any) -> AsyncHandle:
        """Have a handler run: `task` is its type, or the function declared with @task; the rest are its parameters."""
        return await self._submit(submission.head(submission.task_type(task), self._options), params)

    async def submit_command(self, command: Sequence[str] | str, /, **options: Unpack[Options]) -> AsyncHandle:
        """Have a command run: a program with its arguments as a list, or a line for the shell as text."""
        return await self._submit(submission.command(command, {**self._options, **submission.checked(options)}))

    async def submit_http(
        self,
        url: str,
        params: Any = None,
        /,
        *,
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
        expect_status: Sequence[int] = (),
        **options: Unpack[Options],
    ) -> AsyncHandle:
        """Have a service called: `params` is sent as JSON, and the JSON of the answer is the result."""
        target = submission.http_target(url, method, headers, expect_status)
        return await self._submit(submission.http(target, params, {**self._options, **submission.checked(options)}))

    async def submit_many(self, task: object, params: Iterable[Mapping[str, Any]], /) -> list[AsyncHandle]:
        """Have a handler run once for each of `params`, in as few requests as their size permits."""
        head = submission.head(submission.task_type(task), self._options)
        handles = []
        for chunk in submission.chunks(head, params):
            assert chunk.body is not None
            await self.transport.request(calls.submit(chunk.body))
            handles += [AsyncHandle(self, task_id) for task_id in chunk.ids]
        return handles

    async def map(
        self,
        task: object,
        params: Iterable[Mapping[str, Any]],
        /,
        *,
        ordered: bool = True,
        return_exceptions: bool = False,
        timeout: float | None = None,
    ) -> AsyncIterator[Any]:
        """Have a handler run once for each of `params`; gives what it returned, as results come in. See Client.map;
        here the first tasks are submitted when the iteration begins."""
        head = submission.head(submission.task_type(task), self._options)
        window = MapWindow(submission.chunks(head, params), ordered)
        async with aclosing(AsyncResultFlow(self.transport, window, Deadline(timeout)).results()) as results:
            async for result in results:
                error = result.exception()
                if error is not None and not return_exceptions:
                    raise error
                yield result.result if error is None else error

    async def _submit(self, head: bytes, params: Mapping[str, Any] | None = None) -> AsyncHandle:
        task_id, body = submission.one(head, params)
        await self.transport.request(calls.submit(body))
        return AsyncHandle(self, task_id)

    # -- Waiting -------------------------------------------------------------------------------------------------------

    async def wait(self, handles: Iterable[AsyncHandle], timeout: float | None = None) -> AsyncWaited:
        """Wait until these tasks have ended, at most `timeout` seconds."""
        handles = list(handles)
        done: set[int] = set()
        try:
            async for handle in self.as_completed(handles, timeout):
                done.add(id(handle))
        except TimeoutError:
            pass  # Those that are left are the answer.
        return AsyncWaited([h for h in handles if id(h) in done], [h for h in handles if id(h) not in done])

    async def as_completed(
        self, handles: Iterable[AsyncHandle], timeout: float | None = None
    ) -> AsyncIterator[AsyncHandle]:
        """These tasks as they end. Raises TimeoutError where one has not ended within `timeout` seconds."""
        by_id: dict[str, list[AsyncHandle]] = {}
        for handle in handles:
            if handle.known_result is not None:
                yield handle
            else:
                by_id.setdefault(handle.id, []).append(handle)
        window = MapWindow(groups_of(by_id), is_ordered=False)
        async with aclosing(AsyncResultFlow(self.transport, window, Deadline(timeout)).results()) as results:
            async for result in results:
                for handle in by_id[result.id]:
                    handle.known_result = result
                    yield handle

    # -- Looking -------------------------------------------------------------------------------------------------------

    async def handle(self, task_id: str) -> AsyncHandle:
        """A task that was submitted earlier, or elsewhere. Raises ApiError where there is none."""
        return AsyncHandle(self, (await AsyncHandle(self, task_id).info()).id)

    async def tasks(
        self,
        *,
        states: Sequence[str] = (),
        queues: Sequence[str] = (),
        types: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
        owner: str = "",
        name: str = "",
    ) -> AsyncIterator[Task]:
        """All tasks that fit, newest first, page by page. See Client.tasks."""
        cursor: str | None = ""
        while cursor is not None:
            call = calls.tasks(
                states=states, queues=queues, types=types, labels=labels, owner=owner, name=name, cursor=cursor
            )
            page = decode_page(await self.transport.request(call))
            for task in page.tasks:
                yield task
            cursor = page.cursor

    async def cancel(self, handles: Iterable[AsyncHandle | str]) -> int:
        """Have tasks cancelled, given by handles or ids; returns how many had not ended yet."""
        ids = [handle.id if isinstance(handle, AsyncHandle) else handle for handle in handles]
        cancelled = 0
        for start in range(0, len(ids), IDS_MAX):
            call = calls.cancel({"ids": ids[start : start + IDS_MAX]})
            cancelled += len(decode_acted(await self.transport.request(call)).ids)
        return cancelled

    async def nodes(self) -> list[Node]:
        """All nodes that the leader knows."""
        return decode_nodes(await self.transport.request(calls.nodes())).nodes

    async def cluster(self) -> Cluster:
        """The cluster in one look."""
        return decode_cluster(await self.transport.request(calls.cluster()))

    async def handlers(self) -> list[Handler]:
        """All types of tasks that workers have handlers for."""
        return decode_handlers(await self.transport.request(calls.handlers())).handlers
