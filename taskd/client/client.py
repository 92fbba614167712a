"""The blocking client: submit tasks to the daemon of this machine and get their results."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Unpack

from taskd.client import calls, submission
from taskd.client.call import PATIENCE_S, Deadline
from taskd.client.handle import Handle
from taskd.client.results import MapWindow
from taskd.client.streams import ResultFlow
from taskd.client.submission import IDS_MAX, Options, groups_of
from taskd.client.transport import Transport
from taskd.client.views import (
    Cluster,
    Handler,
    Node,
    Task,
    decode_acted,
    decode_cluster,
    decode_handlers,
    decode_nodes,
    decode_page,
)


class Waited(NamedTuple):
    """What `wait` found: tasks that have ended, and tasks that have not."""

    done: list[Handle]
    pending: list[Handle]


class Client:
    """Talks to a taskd daemon, over its Unix socket or HTTPS. Threads may share one; it outlives restarts of a daemon.

        with Client() as client:
            print(client.submit("resize", path="a.jpg").result(timeout=10))
            for size in client.map("resize", [{"path": path} for path in paths]):
                print(size)

    `socket` names the daemon; without it the one of $TASKD_SOCKET, of this user or of the system is found, at the
    first use. `access` is a file that `taskd token create` wrote, and leads to a daemon on another machine; it is also
    taken from $TASKD_ACCESS where no socket is named. `patience` is for how many seconds requests are tried again while
    a daemon that has answered before is away or no scheduler leads: a task is never submitted twice by this, as it
    carries an id made here. Everything else are options for all tasks submitted, see Options.

    Every method may raise NoDaemon, and ApiError where the daemon refuses.
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
        self.transport = Transport(
            None if socket is None else os.fspath(socket),
            access=None if access is None else os.fspath(access),
            patience_s=patience,
        )

    def with_options(self, **options: Unpack[Options]) -> Client:
        """The same client, with more options for the tasks that are submitted through what this returns:

        client.with_options(priority=5, timeout="10m").submit("resize", path="a.jpg")
        """
        other = object.__new__(type(self))
        other._options = {**self._options, **submission.checked(options)}
        other.transport = self.transport
        return other

    def close(self) -> None:
        """Let go of the connections. Tasks go on."""
        self.transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- Submitting ----------------------------------------------------------------------------------------------------

    def submit(self, task: object, /, **params: Any) -> Handle:
        """Have a handler run: `task` is its type, or the function declared with @task; the rest are its parameters.

        When this returns, the task is on the disk of the scheduler. Parameters are JSON values, or what becomes one:
        dataclasses, datetimes, UUIDs. Raises TypeError for what does not.
        """
        return self._submit(submission.head(submission.task_type(task), self._options), params)

    def submit_command(self, command: Sequence[str] | str, /, **options: Unpack[Options]) -> Handle:
        """Have a command run: a program with its arguments as a list, or a line for the shell as text.

        It runs on whichever worker has room, in a directory of its own unless `cwd` says otherwise.
        """
        return self._submit(submission.command(command, {**self._options, **submission.checked(options)}))

    def submit_http(
        self,
        url: str,
        params: Any = None,
        /,
        *,
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
        expect_status: Sequence[int] = (),
        **options: Unpack[Options],
    ) -> Handle:
        """Have a service called: `params` is sent as JSON, and the JSON of the answer is the result.

        `expect_status` says which answers are a success, 200 to 299 unless told otherwise.
        """
        target = submission.http_target(url, method, headers, expect_status)
        return self._submit(submission.http(target, params, {**self._options, **submission.checked(options)}))

    def submit_many(self, task: object, params: Iterable[Mapping[str, Any]], /) -> list[Handle]:
        """Have a handler run once for each of `params`, in as few requests as their size permits.

        Each request is taken whole or not at all. Where a later one is refused, the tasks before it go on.
        """
        head = submission.head(submission.task_type(task), self._options)
        handles = []
        for chunk in submission.chunks(head, params):
            assert chunk.body is not None
            self.transport.request(calls.submit(chunk.body))
            handles += [Handle(self, task_id) for task_id in chunk.ids]
        return handles

    def map(
        self,
        task: object,
        params: Iterable[Mapping[str, Any]],
        /,
        *,
        ordered: bool = True,
        return_exceptions: bool = False,
        timeout: float | None = None,
    ) -> Iterator[Any]:
        """Have a handler run once for each of `params`; gives what it returned, as results come in.

        In the order of `params`, or with `ordered=False` as tasks end. The first tasks are submitted at once; of very
        many, thousands are outside at a time, so that memory stays flat. A task that does not succeed raises its error
        here, or with `return_exceptions` gives it in the place of a result. Raises TimeoutError where the last result
        is not there `timeout` seconds after this call. Tasks that were submitted go on however this ends.
        """
        head = submission.head(submission.task_type(task), self._options)
        flow = ResultFlow(self.transport, MapWindow(submission.chunks(head, params), ordered), Deadline(timeout))
        flow.fill()
        return _values(flow, return_exceptions)

    def _submit(self, head: bytes, params: Mapping[str, Any] | None = None) -> Handle:
        task_id, body = submission.one(head, params)
        self.transport.request(calls.submit(body))
        return Handle(self, task_id)

    # -- Waiting -------------------------------------------------------------------------------------------------------

    def wait(self, handles: Iterable[Handle], timeout: float | None = None) -> Waited:
        """Wait until these tasks have ended, at most `timeout` seconds."""
        handles = list(handles)
        done: set[int] = set()
        try:
            for handle in self.as_completed(handles, timeout):
                done.add(id(handle))
        except TimeoutError:
            pass  # Those that are left are the answer.
        return Waited([h for h in handles if id(h) in done], [h for h in handles if id(h) not in done])

    def as_completed(self, handles: Iterable[Handle], timeout: float | None = None) -> Iterator[Handle]:
        """These tasks as they end. Raises TimeoutError where one has not ended `timeout` seconds after this call."""
        by_id: dict[str, list[Handle]] = {}
        ended = []
        for handle in handles:
            if handle.known_result is not None:
                ended.append(handle)
            else:
                by_id.setdefault(handle.id, []).append(handle)
        window = MapWindow(groups_of(by_id), is_ordered=False)
        flow = ResultFlow(self.transport, window, Deadline(timeout))
        return _completed(ended, by_id, flow)

    # -- Looking -------------------------------------------------------------------------------------------------------

    def handle(self, task_id: str) -> Handle:
        """A task that was submitted earlier, or elsewhere. Raises ApiError where there is none.

        The end of an id will do if no other ends so, and "last" names the newest task of this user.
        """
        return Handle(self, Handle(self, task_id).info().id)

    def tasks(
        self,
        *,
        states: Sequence[str] = (),
        queues: Sequence[str] = (),
        types: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
        owner: str = "",
        name: str = "",
    ) -> Iterator[Task]:
        """All tasks that fit, newest first, page by page. `states` may hold "unfinished" and "finished"; "me" as
        `owner` is the user who asks."""
        cursor: str | None = ""
        while cursor is not None:
            call = calls.tasks(
                states=states, queues=queues, types=types, labels=labels, owner=owner, name=name, cursor=cursor
            )
            page = decode_page(self.transport.request(call))
            yield from page.tasks
            cursor = page.cursor

    def cancel(self, handles: Iterable[Handle | str]) -> int:
        """Have tasks cancelled, given by handles or ids; returns how many had not ended yet."""
        ids = [handle.id if isinstance(handle, Handle) else handle for handle in handles]
        cancelled = 0
        for start in range(0, len(ids), IDS_MAX):
            call = calls.cancel({"ids": ids[start : start + IDS_MAX]})
            cancelled += len(decode_acted(self.transport.request(call)).ids)
        return cancelled

    def nodes(self) -> list[Node]:
        """All nodes that the leader knows."""
        return decode_nodes(self.transport.request(calls.nodes())).nodes

    def cluster(self) -> Cluster:
        """The cluster in one look."""
        return decode_cluster(self.transport.request(calls.cluster()))

    def handlers(self) -> list[Handler]:
        """All types of tasks that workers have handlers for."""
        return decode_handlers(self.transport.request(calls.handlers())).handlers


def _values(flow: ResultFlow, return_exceptions: bool) -> Iterator[Any]:
    try:
        for result in flow.results():
            error = result.exception()
            if error is not None and not return_exceptions:
                raise error
            yield result.result if error is None else error
    finally:
        flow.close()


def _completed(ended: list[Handle], by_id: dict[str, list[Handle]], flow: ResultFlow) -> Iterator[Handle]:
    yield from ended
    try:
        for result in flow.results():
            for handle in by_id[result.id]:
                handle.known_result = result
                yield handle
    finally:
        flow.close()
