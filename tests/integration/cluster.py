"""Real daemons as real processes, for tests and benchmarks: start, ask, kill -9, stop. Everything on loopback."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

Value = TypeVar("Value")
START_TIMEOUT_S = 30.0


class UnixConnection(http.client.HTTPConnection):
    """HTTP on a daemon's socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("taskd", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Events:
    """The stream of events of a daemon, heard from `with` on."""

    def __init__(self, daemon: Daemon, timeout_s: float = START_TIMEOUT_S) -> None:
        self._connection = UnixConnection(daemon.socket, timeout_s)

    def __enter__(self) -> Events:
        self._connection.request("GET", "/v1/events")
        self._response = self._connection.getresponse()
        assert self._response.status == 200
        assert self._response.readline().startswith(b"retry:")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.close()

    def wait_for(self, kind: str) -> dict[str, Any]:
        """The next event of a kind."""
        while line := self._response.readline():
            if line == f"event: {kind}\n".encode():
                event: dict[str, Any] = json.loads(self._response.readline().removeprefix(b"data: "))
                return event
        raise AssertionError(f"the stream ended before {kind}")


def eventually(check: Callable[[], Value], timeout_s: float = START_TIMEOUT_S) -> Value:
    """The first true value of `check`, asked again and again; fails when none comes in time."""
    end = time.monotonic() + timeout_s
    while True:
        value = check()
        if value or time.monotonic() > end:
            assert value, "it did not happen in time"
            return value
        time.sleep(0.02)


class Daemon:
    """One taskd process and its state directory, which outlives it."""

    def __init__(
        self,
        home: Path,
        key: Path,
        role: str,
        *options: str,
        env: dict[str, str] | None = None,
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.home = home
        self.role = role
        self.socket = home / "taskd.sock"
        self.log = home / "log"
        self._command = [
            sys.executable, "-m", "taskd", "start", "--role", role, "--state-dir", str(home), "--key-file", str(key),
            *options,
        ]  # fmt: skip
        self._env = {**os.environ, **(env or {})}
        self._prefix = prefix  # what puts it on a host of a LAN
        self.process: subprocess.Popen[bytes] | None = None
        home.mkdir(parents=True, exist_ok=True)

    def start(self, wait: bool = True, env: dict[str, str] | None = None) -> Daemon:
        """Start the process and wait until it serves. `env`: for this process alone."""
        assert self.process is None
        command = [*self._prefix, *self._command]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**self._env, **(env or {})}
            )
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"the daemon ended:\n{self.log.read_text()}"
            return self.is_ready()

        eventually(ready)

    def is_ready(self) -> bool:
        try:
            return self.ask("GET", "/readyz", timeout_s=5)[0] == 200
        except OSError:
            return False

    def ask(self, method: str, path: str, body: Any = None, timeout_s: float = 60) -> tuple[int, Any]:
        """One HTTP request on the daemon's socket: the status, and the JSON (or the text) of the answer."""
        connection = UnixConnection(self.socket, timeout_s)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            raw = response.read()
        finally:
            connection.close()
        is_json = "json" in (response.getheader("Content-Type") or "")
        return response.status, json.loads(raw) if is_json else raw.decode(errors="replace")

    def ok(self, method: str, path: str, body: Any = None, timeout_s: float = 60) -> Any:
        """The answer of a request that must succeed."""
        status, answer = self.ask(method, path, body, timeout_s)
        assert status == 200, (status, answer)
        return answer

    def submit(self, *tasks: dict[str, Any]) -> list[str]:
        """Submit tasks; returns their ids."""
        ids: list[str] = self.ok("POST", "/v1/tasks", list(tasks))["ids"]
        return ids

    def wait(self, ids: list[str], timeout_s: float = 60) -> dict[str, dict[str, Any]]:
        """The results of tasks, by id, once all have ended."""
        results: dict[str, dict[str, Any]] = {}
        end = time.monotonic() + timeout_s
        open_ids = list(ids)
        while open_ids:
            left_s = end - time.monotonic()
            assert left_s > 0, f"{len(open_ids)} tasks have not ended: {open_ids[:5]}"
            try:
                answer = self.ok("POST", "/v1/tasks/wait", {"ids": open_ids, "timeout": min(left_s, 10)})
            except (OSError, AssertionError, http.client.HTTPException):
                time.sleep(0.1)  # A leader that is away comes back.
                continue
            results.update((result["id"], result) for result in answer["results"])
            open_ids = [task for task in open_ids if task not in results]
        return results

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def signal(self, number: int) -> None:
        """Send the process a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self, timeout_s: float = 30) -> int:
        """SIGTERM, and the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait_exit(timeout_s)

    def wait_exit(self, timeout_s: float = 30) -> int:
        """The exit code of a process that ends by itself."""
        assert self.process is not None
        code = self.process.wait(timeout_s)
        self.process = None
        return code


LOOPBACK = {"TASKD_NETWORK_INTERFACES": "127.0.0.1", "TASKD_NETWORK_LISTEN": "127.0.0.1:0"}


class Cluster:
    """Daemons that share a key, below one directory. They stay on the loopback interface unless `env` says more."""

    def __init__(self, directory: Path) -> None:
        self.env = LOOPBACK
        self.directory = directory
        self.key = directory / "cluster.key"
        self.daemons: list[Daemon] = []

    def add(
        self, name: str, role: str, *options: str, env: dict[str, str] | None = None, prefix: tuple[str, ...] = ()
    ) -> Daemon:
        """A daemon that is not started yet."""
        env = {**self.env, **(env or {})}
        daemon = Daemon(self.directory / name, self.key, role, "--name", name, *options, env=env, prefix=prefix)
        self.daemons.append(daemon)
        return daemon

    def start(self, workers: int = 1, *worker_options: str, env: dict[str, str] | None = None) -> Cluster:
        """One scheduler and some workers, found by address: tests of discovery start theirs by hand."""
        port = free_port()
        self.add("head", "scheduler", "--listen", f"127.0.0.1:{port}", env={"TASKD_NETWORK_MDNS": "false"}).start()
        for number in range(workers):
            environment = {"TASKD_NETWORK_MDNS": "false", **(env or {})}
            self.add(
                f"worker{number + 1}", "worker", "--join", f"127.0.0.1:{port}", *worker_options, env=environment
            ).start()
        self.wait_for_workers(workers)
        return self

    @property
    def head(self) -> Daemon:
        return next(daemon for daemon in self.daemons if "scheduler" in daemon.role)

    def wait_for_workers(self, count: int) -> None:
        eventually(lambda: self.head.ok("GET", "/v1/cluster")["workers"] >= count)

    def close(self) -> None:
        """End all processes, the gentle way first."""
        for daemon in self.daemons:
            if daemon.process is not None:
                daemon.process.send_signal(signal.SIGTERM)
                daemon.process.send_signal(signal.SIGCONT)  # A test may have paused it.
        for daemon in self.daemons:
            if daemon.process is not None:
                try:
                    daemon.process.wait(15)
                except subprocess.TimeoutExpired:
                    daemon.process.kill()
                    daemon.process.wait()
                daemon.process = None


def free_port() -> int:
    """A TCP port that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def cluster(directory: Path, workers: int = 1, *options: str, env: dict[str, str] | None = None) -> Iterator[Cluster]:
    """A started cluster, ended again."""
    made = Cluster(directory)
    try:
        yield made.start(workers, *options, env=env)
    finally:
        made.close()
