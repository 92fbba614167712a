"""A small daemon on a real Unix socket: enough of the local API, over real HTTP, for tests of clients.

What a task does is in its type, or in the first word of its command:

    echo VALUE       handler: returns params["value"]
    fail             handler: raises ValueError("no luck")
    hold             handler or command: runs until `release` or a cancel
    stubborn         command: runs until `release`
    print TEXT...    command: writes TEXT to stdout, each argument after the first to stderr
    exit N           command: ends with this exit code
    signal N         command: is ended by this signal
    timeout, expire  command: ends so
    true             command: exit code 0

It can be told to misbehave: `refuse` some requests, `break_stream` after some lines, be stopped and started again.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import resource
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from taskd.client.ids import new_id

FINAL = {"succeeded", "failed", "cancelled", "timed_out", "expired"}
Json = dict[str, Any]


@contextmanager
def silent_daemon(path: Path) -> Iterator[None]:
    """One that takes connections and never answers."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(16)
        yield


@contextmanager
def no_descriptors() -> Iterator[None]:
    """This process cannot open anything."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


class FakeDaemon:
    """Starts with the `with` statement, in a thread of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tasks: dict[str, Json] = {}
        self.requests: list[str] = []  # "METHOD /path?query"
        self.bodies: list[Any] = []
        self.connections = 0
        self.nodes = [node_view(1, "head", "scheduler", is_leader=True), node_view(2, "arm", "worker")]
        self.cluster: Json = {**CLUSTER}
        self.explanations: list[Json] = []
        self.event_lines: list[Json] = []
        self.events_end = True  # after those lines; else the stream stays open
        self.durability = ["replicated"]  # of what is submitted: the last holds on
        self.is_busy = False  # new tasks wait until `begin`
        self._refusals: list[tuple[str, int, str, str]] = []
        self._break_after: list[int] = []
        self._changed: asyncio.Condition
        self._loop: asyncio.AbstractEventLoop
        self._thread: threading.Thread | None = None
        self._stop: asyncio.Event

    # -- What tests do -------------------------------------------------------------------------------------------------

    def start(self) -> FakeDaemon:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)))
        self._thread.start()
        assert ready.wait(10)
        return self

    def stop(self) -> None:
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
            self._thread = None

    def __enter__(self) -> FakeDaemon:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def refuse(self, path: str, status: int, code: str, message: str = "no", times: int = 1) -> None:
        """Answer the next requests to this path with an error."""
        self._refusals += [(path, status, code, message)] * times

    def break_stream(self, *lines: int) -> None:
        """Cut the connection of the next streams of results after so many lines each, 0 for at once."""
        self._break_after += lines

    def release(self, result: Any = None) -> None:
        """End all tasks that are held."""

        async def end() -> None:
            for task in self.tasks.values():
                if task["state"] == "running":
                    await self._end(task, state="succeeded", result=result, exit_code=_exit_code(task))

        self._run(end())

    def write(self, text: str, stream: str = "stdout") -> None:
        """Have all tasks that are held write something."""

        async def add() -> None:
            for task in self.tasks.values():
                if task["state"] == "running":
                    task["written"].append((stream, text))
            await self._notify()

        self._run(add())

    def begin(self) -> None:
        """Let queued tasks begin."""

        async def run() -> None:
            self.is_busy = False
            for task in self.tasks.values():
                if task["state"] == "queued":
                    await self._work(task)

        self._run(run())

    def wait_for(self, check: Callable[[], bool]) -> None:
        """Until something that requests or tasks change is so."""

        async def wait() -> None:
            async with self._changed:
                await asyncio.wait_for(self._changed.wait_for(check), 20)

        self._run(wait())

    def _run(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    # -- The server ----------------------------------------------------------------------------------------------------

    async def _serve(self, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Condition()
        self._stop = asyncio.Event()
        app = web.Application(middlewares=[self._middleware], client_max_size=16 << 20)
        app.add_routes(
            [
                web.post("/v1/tasks", self._submit),
                web.get("/v1/tasks", self._list),
                web.post("/v1/tasks/plan", self._plan),
                web.post("/v1/tasks/wait", self._wait),
                web.post("/v1/tasks/cancel", self._cancel),
                web.post("/v1/tasks/retry", self._retry),
                web.get("/v1/tasks/{id}", self._show),
                web.get("/v1/tasks/{id}/explain", self._explain),
                web.get("/v1/tasks/{id}/result", self._result),
                web.get("/v1/tasks/{id}/output", self._output),
                web.get("/v1/nodes", self._nodes),
                web.get("/v1/nodes/{id}", self._node),
                web.post("/v1/nodes/{id}/drain", self._drain),
                web.post("/v1/nodes/{id}/resume", self._resume),
                web.get("/v1/cluster", self._cluster),
                web.get("/v1/handlers", self._handlers),
                web.get("/v1/events", self._events),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=0.01, handler_cancellation=True)
        await runner.setup()
        self.path.unlink(missing_ok=True)
        await web.UnixSite(runner, str(self.path)).start()
        ready.set()
        await self._stop.wait()
        await runner.cleanup()

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        transport = request.transport
        assert transport is not None
        if not getattr(transport, "is_counted", False):
            transport.is_counted = True
            self.connections += 1
        body = await request.read()
        self.requests.append(f"{request.method} {request.path_qs}")
        self.bodies.append(json.loads(body) if body else None)
        await self._notify()
        for refusal in self._refusals:
            path, status, code, message = refusal
            if request.path == path:
                self._refusals.remove(refusal)
                return error(status, code, message)
        response: web.StreamResponse = await handler(request)
        return response

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # -- Tasks ---------------------------------------------------------------------------------------------------------

    async def _submit(self, request: web.Request) -> web.StreamResponse:
        document = json.loads(await request.read())
        tasks = document if isinstance(document, list) else [document]
        ids, existing = [], 0
        for place, task in enumerate(tasks):
            if task.get("memory") == "lots":
                prefix = f"[{place}]." if isinstance(document, list) else ""
                return error(400, "invalid", "'lots' is not a size", f"{prefix}memory")
            if "~" in task.get("constraints", ()):
                return error(400, "invalid", "'~' is not a constraint", "constraints[0]")
            target = task.get("http", {})
            if target.get("method") == "SHOUT":
                return error(400, "invalid", "'SHOUT' is not one of the values that are allowed here", "http.method")
            if "a b" in target.get("headers", ()):
                return error(400, "invalid", "'a b' cannot be the name of a header", "http.headers")
            task_id = task.get("id") or new_id()
            ids.append(task_id)
            if task_id in self.tasks:
                existing += 1
            else:
                self.tasks[task_id] = self._new(task_id, task)
        for task_id in ids:
            if not self.tasks[task_id]["asked"].get("delay"):
                await self._work(self.tasks[task_id])
        durability = self.durability.pop(0) if len(self.durability) > 1 else self.durability[0]
        accepted = {"ids": ids, "durability": durability, "existing": existing}
        if request.query.get("stream"):
            return await self._stream(request, [accepted], self._ended(ids))
        if "wait" in request.query:
            results = [result async for result in self._ended(ids, float(request.query["wait"]))]
            return web.json_response({**accepted, "results": results})
        return web.json_response(accepted)

    async def _plan(self, request: web.Request) -> web.StreamResponse:
        document = json.loads(await request.read())
        tasks = document if isinstance(document, list) else [document]
        return web.json_response({"tasks": [{**detail(self._new("", task)), "id": ""} for task in tasks]})

    def _new(self, task_id: str, asked: Json) -> Json:
        return {"id": task_id, "state": "queued", "asked": asked, "written": [], "finished": None}

    async def _work(self, task: Json) -> None:
        """Do what a task says, at once."""
        if task["state"] != "queued" or self.is_busy:
            return
        asked = task["asked"]
        kind = asked.get("type", "command")
        words = [kind] if kind != "command" else asked.get("argv") or asked["shell"].split()
        task["state"] = "running"
        match words[0]:
            case "echo":
                await self._end(task, state="succeeded", result=asked.get("params", {}).get("value"))
            case "fail":
                fault = {"type": "ValueError", "message": "no luck", "traceback": "Traceback …\nValueError: no luck\n"}
                await self._end(task, state="failed", error=fault)
            case "print":
                task["written"] = [("stdout", words[1] + "\n"), *(("stderr", word + "\n") for word in words[2:])]
                await self._end(task, state="succeeded", exit_code=0)
            case "exit":
                code = int(words[1])
                await self._end(task, state="failed" if code else "succeeded", exit_code=code)
            case "signal":
                await self._end(task, state="failed", signal=int(words[1]))
            case "timeout":
                await self._end(task, state="timed_out", signal=15)
            case "expire":
                await self._end(task, state="expired")
            case "true":
                await self._end(task, state="succeeded", exit_code=0)
            case "hold" | "stubborn":
                await self._notify()
            case _:
                task["state"] = "queued"  # Nobody runs it.

    async def _end(self, task: Json, **end: Any) -> None:
        task.update(end, finished=1_767_225_605.0)
        await self._notify()

    async def _ended(self, ids: list[str], timeout_s: float = 86400.0) -> AsyncIterator[Json]:
        """The results of tasks as they end."""
        left = [task_id for task_id in ids if task_id in self.tasks]
        end_s = self._loop.time() + timeout_s
        while left:
            done = [task_id for task_id in left if self.tasks[task_id]["state"] in FINAL]
            for task_id in done:
                left.remove(task_id)
                yield result_of(self.tasks[task_id])
            if done:
                continue
            try:
                async with asyncio.timeout_at(end_s), self._changed:
                    await self._changed.wait_for(
                        lambda left=left: any(self.tasks[task_id]["state"] in FINAL for task_id in left)
                    )
            except TimeoutError:
                return

    async def _wait(self, request: web.Request) -> web.StreamResponse:
        asked = json.loads(await request.read())
        ids = []
        for text in asked["ids"]:
            found = self._find(text)
            if found is None and len(text) < 32:
                return error(404, "not_found", f"no task's id ends in {text}")
            if found is not None:
                ids.append(found)
        results = self._ended(ids, asked["timeout"])
        if asked.get("stream"):
            return await self._stream(request, [], results)
        listed = [result async for result in results]
        return web.json_response({"results": listed, "pending": len(ids) - len(listed)})

    async def _stream(
        self, request: web.Request, first: list[Json], results: AsyncIterator[Json]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        limit = self._break_after.pop(0) if self._break_after else None
        lines = 0

        async def send(document: Json) -> bool:
            nonlocal lines
            if lines != limit:
                await response.write(json.dumps(document).encode() + b"\n")
                lines += 1
            if lines == limit:
                assert request.transport is not None
                request.transport.abort()
            return lines != limit

        if limit == 0:
            assert request.transport is not None
            request.transport.abort()
            return response
        for document in first:
            if not await send(document):
                return response
        async for result in results:
            if not await send(result):
                return response
        await response.write_eof()
        return response

    def _find(self, text: str) -> str | None:
        if text in self.tasks:
            return text
        if text == "last":
            return max(self.tasks, default=None)
        digits = text.replace("-", "")
        return next((task_id for task_id in self.tasks if task_id.replace("-", "").endswith(digits)), None)

    def _selected(self, selection: Json) -> list[str] | web.Response:
        if selection.get("ids"):
            found = []
            for text in selection["ids"]:
                task_id = self._find(text)
                if task_id is None:
                    return error(404, "not_found", f"no task's id ends in {text}", "ids[0]")
                found.append(task_id)
            return found
        return [task["id"] for task in self._matching(selection)]

    def _matching(self, selection: Json) -> list[Json]:
        states = set(selection.get("states", ()))
        if "unfinished" in states:
            states |= {"queued", "running"}
        if "finished" in states:
            states |= FINAL
        found = []
        for task in sorted(self.tasks.values(), key=lambda task: task["id"], reverse=True):
            asked = task["asked"]
            if states and task["state"] not in states:
                continue
            if selection.get("queues") and asked.get("queue", "default") not in selection["queues"]:
                continue
            if selection.get("types") and asked.get("type", "command") not in selection["types"]:
                continue
            if not (selection.get("labels") or {}).items() <= asked.get("labels", {}).items():
                continue
            found.append(task)
        return found

    async def _list(self, request: web.Request) -> web.StreamResponse:
        def words(name: str) -> list[str]:
            return [word for word in request.query.get(name, "").split(",") if word]

        selection = {
            "states": words("state"),
            "queues": words("queue"),
            "types": words("type"),
            "labels": dict(label.split("=", 1) for label in words("label")),
        }
        limit, cursor = int(request.query.get("limit", "100")), request.query.get("cursor")
        found = [task for task in self._matching(selection) if not cursor or task["id"] < cursor]
        more = found[limit - 1]["id"] if len(found) > limit else None
        return web.json_response({"tasks": [view(task) for task in found[:limit]], "cursor": more})

    async def _cancel(self, request: web.Request) -> web.StreamResponse:
        found = self._selected(json.loads(await request.read()))
        if isinstance(found, web.Response):
            return found
        acted = [task_id for task_id in found if self.tasks[task_id]["state"] not in FINAL]
        for task_id in acted:
            task = self.tasks[task_id]
            if task["asked"].get("argv") == ["stubborn"]:
                task["state"] = "cancelling"
                await self._notify()
                continue
            signal = 15 if task["state"] == "running" else None
            await self._end(task, state="cancelled", signal=signal)
        return web.json_response({"ids": acted, "cursor": None})

    async def _retry(self, request: web.Request) -> web.StreamResponse:
        found = self._selected(json.loads(await request.read()))
        if isinstance(found, web.Response):
            return found
        ids = []
        for old in found:
            if self.tasks[old]["state"] not in FINAL:
                continue
            ids.append(new_id())
            self.tasks[ids[-1]] = self._new(ids[-1], self.tasks[old]["asked"])
            await self._work(self.tasks[ids[-1]])
        return web.json_response({"ids": ids, "cursor": None})

    async def _show(self, request: web.Request) -> web.StreamResponse:
        task_id = self._find(request.match_info["id"])
        if task_id is None:
            return error(404, "not_found", f"there is no task {request.match_info['id']}", "id")
        return web.json_response(detail(self.tasks[task_id]))

    async def _result(self, request: web.Request) -> web.StreamResponse:
        task_id = self._find(request.match_info["id"])
        if task_id is None:
            return error(404, "not_found", f"there is no task {request.match_info['id']}", "id")
        async for result in self._ended([task_id], float(request.query.get("wait", "0"))):
            return web.json_response(result)
        return web.json_response(result_of(self.tasks[task_id]))

    async def _explain(self, request: web.Request) -> web.StreamResponse:
        task_id = self._find(request.match_info["id"])
        if task_id is None:
            return error(404, "not_found", f"there is no task {request.match_info['id']}", "id")
        why = self.explanations.pop(0) if len(self.explanations) > 1 else (self.explanations or [EXPLANATION])[0]
        return web.json_response({**why, "id": task_id, "state": self.tasks[task_id]["state"]})

    async def _output(self, request: web.Request) -> web.StreamResponse:
        task_id = self._find(request.match_info["id"])
        if task_id is None:
            return error(404, "not_found", f"there is no task {request.match_info['id']}", "id")
        task, stream = self.tasks[task_id], request.query.get("stream", "stdout")
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        sent = 0
        while True:
            for written, text in task["written"][sent:]:
                if stream == "both":
                    line = {"stream": written, "data": base64.b64encode(text.encode()).decode()}
                    await response.write(json.dumps(line).encode() + b"\n")
                elif stream == written:
                    await response.write(text.encode())
            sent = len(task["written"])
            if task["state"] in FINAL or not request.query.get("follow"):
                break
            async with self._changed:
                await self._changed.wait_for(lambda: task["state"] in FINAL or len(task["written"]) > sent)  # noqa: B023
        await response.write_eof()
        return response

    # -- The cluster ---------------------------------------------------------------------------------------------------

    async def _nodes(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"nodes": self.nodes})

    async def _node(self, request: web.Request) -> web.StreamResponse:
        for node in self.nodes:
            if request.match_info["id"] in (str(node["node_id"]), node["name"]):
                return web.json_response(node)
        return error(404, "not_found", f"there is no node {request.match_info['id']}", "id")

    async def _drain(self, request: web.Request) -> web.StreamResponse:
        for node in self.nodes:
            if request.match_info["id"] in (str(node["node_id"]), node["name"]):
                node.update(state="drained", drain_reason=json.loads(await request.read())["reason"])
                return web.json_response(node)
        return error(404, "not_found", f"there is no node {request.match_info['id']}", "id")

    async def _resume(self, request: web.Request) -> web.StreamResponse:
        for node in self.nodes:
            if request.match_info["id"] in (str(node["node_id"]), node["name"]):
                node.update(state="up", drain_reason="")
                return web.json_response(node)
        return error(404, "not_found", f"there is no node {request.match_info['id']}", "id")

    async def _cluster(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self.cluster)

    async def _handlers(self, request: web.Request) -> web.StreamResponse:
        handler = {"type": "echo", "summary": "Says it again.", "version": "1", "schema": {}, "nodes": [2]}
        return web.json_response({"handlers": [handler]})

    async def _events(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(b": hello\n\n")
        for event in self.event_lines:
            await response.write(f"event: {event['kind']}\ndata: {json.dumps(event)}\n\n".encode())
        if not self.events_end:
            await asyncio.Event().wait()
        await response.write_eof()
        return response

    async def _healthz(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text="ok\n")

    async def _readyz(self, request: web.Request) -> web.StreamResponse:
        is_ready = self.cluster["leader"] is not None
        why = "" if is_ready else "no leader is known"
        return web.json_response({"ready": is_ready, "why": why}, status=200 if is_ready else 503)


def error(status: int, code: str, message: str, field: str | None = None) -> web.Response:
    return web.json_response({"error": {"code": code, "message": message, "field": field}}, status=status)


def _exit_code(task: Json) -> int | None:
    return 0 if task["asked"].get("type", "command") == "command" else None


def result_of(task: Json) -> Json:
    keys = ("result", "exit_code", "signal", "error")
    return {
        "id": task["id"],
        "state": task["state"],
        **{key: task.get(key) for key in keys},
        "reason": "",
        "attempts": 1,
    }


def view(task: Json) -> Json:
    asked, has_begun = task["asked"], task["state"] not in ("queued", "expired")
    return {
        "id": task["id"], "type": asked.get("type", "command"), "name": asked.get("name", ""), "state": task["state"],
        "queue": asked.get("queue", "default"), "priority": asked.get("priority", 0), "owner": "ann",
        "submitted": 1_767_225_600.0, "changed": 1_767_225_601.0, "finished": task["finished"],
        "attempt": 1 if has_begun else 0, "worker": 2 if has_begun else None,
        "worker_name": "arm" if has_begun else None, "started": 1_767_225_602.0 if has_begun else None,
        "exit_code": task.get("exit_code"), "reason": "", "labels": asked.get("labels", {}),
        "command": " ".join(asked.get("argv", ())) or asked.get("shell") or asked.get("type", ""),
    }  # fmt: skip


def detail(task: Json) -> Json:
    asked = task["asked"]
    outcomes = {"succeeded": "ok", "timed_out": "timeout", "cancelled": "signal"}
    tails = {name: "".join(text for stream, text in task["written"] if stream == name) for name in ("stdout", "stderr")}
    attempt = {
        "number": 1, "worker": 2, "worker_name": "arm", "dispatched": 1_767_225_601.0, "started": 1_767_225_602.0,
        "ended": task["finished"], "outcome": outcomes.get(task["state"], "exit_nonzero") if task["finished"] else None,
        "fence": "1.1.1.1.1", "exit_code": task.get("exit_code"), "signal": task.get("signal"),
        "error": task.get("error"), "reason": "", "stdout_tail": tails["stdout"], "stderr_tail": tails["stderr"],
        "stdout_bytes": len(tails["stdout"]), "stderr_bytes": len(tails["stderr"]), "memory_peak_bytes": 12 << 20,
        "cpu_s": 0.5,
    }  # fmt: skip
    return {
        **view(task), "argv": asked.get("argv", []), "shell": asked.get("shell", ""), "http": asked.get("http"),
        "params": asked.get("params"), "env": asked.get("env", {}), "cwd": asked.get("cwd", ""), "resources": {},
        "constraints": [], "not_before": None, "deadline": None, "timeout": 0.0, "grace": 5.0, "retries": 0,
        "backoff": None, "on_lost": "retry", "retry_of": None, "due": None, "signal": task.get("signal"),
        "error": task.get("error"), "result": task.get("result"),
        "attempts": [attempt] if view(task)["attempt"] else [], "provisional": False, **task.get("shown", {}),
    }  # fmt: skip


def node_view(node_id: int, name: str, *roles: str, is_leader: bool = False) -> Json:
    is_worker = "worker" in roles
    return {
        "node_id": node_id, "name": name, "roles": list(roles), "state": "up", "is_leader": is_leader,
        "version": "0.1.0", "address": "10.0.0.1:7710", "slots": 4 if is_worker else 0,
        "running": 1 if is_worker else 0, "waiting": 0,
        "capacity": {"cpus": 4.0, "memory": float(8 << 30)} if is_worker else {},
        "used": {"cpus": 1.0} if is_worker else {}, "labels": {"os": "debian"} if is_worker else {},
        "types": ["command", "echo"] if is_worker else [], "clock_offset_s": 0.001, "round_trip_s": 0.0004,
        "drain_reason": "", "seen": 1_767_225_600.0,
    }  # fmt: skip


CLUSTER: Json = {
    "cluster": "default", "node_id": 1, "name": "head", "roles": ["scheduler"], "leader": 1, "leader_name": "head",
    "term": 3, "health": "ok", "why": "", "durability": "local", "schedulers": 1, "workers": 1, "slots": 4,
    "running": 1, "tasks": {"queued": 2, "running": 1}, "version": "0.1.0",
    "replicas": [
        {
            "node_id": 1, "name": "head", "replication": "leading", "lag_commits": 0, "lag_s": 0.0, "may_lead": True,
            "seen": None, "copied": None,
        },
    ],
    "by_leader": True, "refuses": "", "workers_drained": 0, "slots_drained": 0, "state_dir": "",
}  # fmt: skip
EXPLANATION: Json = {
    "reason": "Resources", "text": "every worker that could run it is busy", "position": 3, "until": None,
    "nodes": [{"node_id": 2, "name": "arm", "fits": False, "ever": True, "why": "all 4 slots are busy"}],
}  # fmt: skip
