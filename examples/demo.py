"""`make demo`: a real cluster on this machine finds itself, works, loses a worker and its leader, and loses no task.

Two schedulers and three workers start as separate processes and find each other by mDNS. They hash and compress files
of Python's standard library as commands, count the words in them with a Python handler, and call a small HTTP service.
In the middle a worker is killed with signal 9, and then the scheduler that leads; the other one goes on, and the first
one leads again when it is back. At the end every result is checked against the files themselves.
"""

from __future__ import annotations

import bz2
import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from taskd import Client

EXAMPLES = Path(__file__).resolve().parent
FILES_MAX = 200
START_TIMEOUT_S = 30.0
WAIT_TIMEOUT_S = 150.0
SCHEDULERS = {"scheduler-1": 1, "scheduler-2": 2}  # With their node ids: the live one with the lowest leads.
WORKERS = ("worker-1", "worker-2", "worker-3")
ENTRY = "worker-1"  # Whose socket the client uses: any node will do.
HAND_OVER_AFTER_S = 2.0  # By default 10: nobody likes to watch that.
console = Console()


class Demo:
    """The processes of one demonstration, in a directory that goes with it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.key = directory / "cluster.key"

    def socket(self, name: str) -> str:
        """Where a daemon answers."""
        return str(self.directory / name / "taskd.sock")

    def start(self, name: str) -> None:
        """Start a daemon in the way a user does, but with a state directory of its own."""
        home = self.directory / name
        home.mkdir(exist_ok=True)
        role = "scheduler" if name in SCHEDULERS else "worker"
        command = [
            sys.executable, "-m", "taskd", "start", "--role", role, "--name", name,
            "--state-dir", str(home), "--key-file", str(self.key),
        ]  # fmt: skip
        if name in SCHEDULERS:
            command += ["--node-id", str(SCHEDULERS[name])]
        settings = {
            # A demonstration stays on its machine; on a LAN these two lines are not needed.
            "TASKD_NETWORK_INTERFACES": "127.0.0.1",
            "TASKD_NETWORK_LISTEN": "127.0.0.1:0",
            "TASKD_SCHEDULER_HAND_OVER_AFTER_S": str(HAND_OVER_AFTER_S),
            "TASKD_WORKER_HANDLERS": "words",
            "TASKD_WORKER_HANDLER_PATH": str(EXAMPLES / "handlers"),
            "TASKD_WORKER_SLOTS": "2",
        }
        with (home / "log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **settings}
            )

    def kill(self, name: str) -> None:
        """Signal 9: no goodbye, no clean-up."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def stop(self) -> None:
        """End everything in good order."""
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def logs(self) -> str:
        """The last lines of every daemon, for when something went wrong."""
        parts = [f"--- {log.parent.name}\n{log.read_text()[-2000:]}" for log in self.directory.glob("*/log")]
        return "\n".join(parts)


@contextlib.contextmanager
def microservice() -> Iterator[str]:
    """The example service in Python, as a process of its own; yields its URL."""
    command = [sys.executable, str(EXAMPLES / "microservice" / "handler.py"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()


def until(check: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(Exception):  # The socket may not be there yet.
            if check():
                return
        if time.monotonic() > end:
            raise SystemExit(f"demo: waited {timeout_s:.0f} s in vain for {what}")
        time.sleep(0.05)


def is_whole(client: Client) -> bool:
    """Whether everybody is there, and a copy of everything at the second scheduler."""
    view = client.cluster()
    return (view.leader_name, view.workers, view.durability) == ("scheduler-1", len(WORKERS), "replicated")


def library_files() -> list[Path]:
    """Some files of the standard library, the same ones each time."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in root.glob("*.py") if path.stat().st_size > 1000)[:FILES_MAX]


class Checked:
    """What was asked for, and whether what came back is right."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, int, int, str]] = []
        self.is_good = True

    def add(self, what: str, how: str, total: int, right: int, note: str = "") -> None:
        self.rows.append((what, how, total, right, note))
        self.is_good = self.is_good and total == right

    def table(self) -> Table:
        table = Table(title="Every result, checked against the files themselves")
        for name, justify in (("task", "left"), ("kind", "left"), ("tasks", "right"), ("right", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        table.add_column("")
        for what, how, total, right, note in self.rows:
            mark = "[green]✔[/]" if total == right else "[red]✘[/]"
            table.add_row(what, how, str(total), str(right), f"{mark} {note}".strip())
        return table


class Troubles:
    """What happens while the cluster works, and what it does about it, told as it comes; in a thread of its own."""

    def __init__(self, demo: Demo, say: Callable[[str], None]) -> None:
        self._demo = demo
        self._say = say
        self._done = 0.0  # which part of the work
        self._is_over = False

    def progress(self, done: float) -> None:
        """So much of the work is done, of 1."""
        self._done = done

    def stop(self) -> None:
        """The work has failed."""
        self._is_over = True

    def run(self) -> None:
        """One trouble after the other."""
        with Client(self._demo.socket(ENTRY)) as entry:
            self._wait(lambda: self._done > 0.15)
            self._demo.kill("worker-2")
            self._say("[bold red]kill -9 worker-2.[/] What it was running goes to the other workers after 5 s.")
            self._wait(lambda: self._done > 0.3)
            self._demo.kill("scheduler-1")
            killed_at = time.monotonic()
            self._say(
                "[bold red]kill -9 scheduler-1, the leader.[/] Nothing is lost with it: scheduler-2 had every task on "
                "its own disk before anybody was told that it was taken. The workers go on with what they run."
            )
            self._wait(lambda: entry.cluster().leader_name == "scheduler-2")
            seconds = time.monotonic() - killed_at
            term = entry.cluster().term
            self._say(
                f"[bold green]scheduler-2 leads[/] {seconds:.1f} s later: it is the live scheduler with the lowest id. "
                f"This is term {term}; whoever comes with an older term is not obeyed any more."
            )
            self._wait(lambda: self._done > 0.45)
            self._demo.start("scheduler-1")
            self._say("[bold]scheduler-1 is started again[/], with its old disk. First it copies what it has missed.")
            self._wait(lambda: entry.cluster().leader_name == "scheduler-1")
            self._say(
                f"[bold green]scheduler-1 leads again[/], in term {entry.cluster().term}: it has the lowest id, has "
                f"everything that scheduler-2 has, and was well for {HAND_OVER_AFTER_S:.0f} s. scheduler-2 stands by."
            )

    def _wait(self, check: Callable[[], bool]) -> None:
        until(lambda: self._is_over or check(), "the cluster to get over its troubles", WAIT_TIMEOUT_S)
        if self._is_over:
            raise CancelledError


def sha256_command(path: Path) -> list[str]:
    """Slow enough that daemons can be killed in the middle of it."""
    return ["sh", "-c", 'sleep 0.2; sha256sum "$0"', str(path)]


def compress_command(path: Path, target: Path) -> list[str]:
    return ["sh", "-c", 'sleep 0.1; bzip2 -c "$0" > "$1.$$" && mv "$1.$$" "$1"', str(path), str(target)]


def work(demo: Demo, client: Client, url: str) -> Checked:
    """Submit everything, have daemons killed in the middle, wait for the end, and check."""
    files = library_files()
    packed = demo.directory / "packed"
    packed.mkdir()
    hashes = [client.submit_command(sha256_command(path), name=f"sha256 {path.name}") for path in files]
    compressed = [
        client.submit_command(compress_command(path, packed / f"{path.name}.bz2"), name=f"bzip2 {path.name}")
        for path in files
    ]
    counts = client.submit_many("count_words", [{"path": str(path)} for path in files])
    frequent = client.submit_many("frequent_words", [{"path": str(path)} for path in files[:20]])
    digests = [client.submit_http(f"{url}/execute", {"text": path.name}) for path in files[:20]]
    handles = [*hashes, *compressed, *counts, *frequent, *digests]
    console.print(f"Submitted {len(handles)} tasks; every one is on the disks of both schedulers by now.")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(1) as pool:
        bar = progress.add_task("working", total=len(handles))
        troubles = Troubles(demo, progress.console.print)
        told = pool.submit(troubles.run)
        try:
            for count, handle in enumerate(client.as_completed(handles, timeout=WAIT_TIMEOUT_S), 1):
                progress.advance(bar)
                troubles.progress(count / len(handles))
                assert handle.known_result is not None
        except BaseException:
            troubles.stop()
            raise
        told.result()

    checked = Checked()
    sums = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    right = sum(handle.output().split()[0].decode() == sums[path] for handle, path in zip(hashes, files, strict=True))
    checked.add("hash a file", "command", len(files), right, "sha256 of each file is the same")
    right = sum(
        hashlib.sha256(bz2.decompress((packed / f"{path.name}.bz2").read_bytes())).hexdigest() == sums[path]
        for path in files
    )
    checked.add("compress a file", "command", len(files), right, "unpacked again, the same bytes")
    sys.path.insert(0, str(EXAMPLES / "handlers"))
    from words import FrequentWords, count_words  # noqa: PLC0415  # only now: the workers are what loads them

    right = sum(handle.result() == count_words(str(path)) for handle, path in zip(counts, files, strict=True))
    checked.add("count words", "Python function", len(files), right)
    frequencies = FrequentWords()
    right = sum(
        handle.result() == frequencies.execute({"path": str(path)})
        for handle, path in zip(frequent, files[:20], strict=True)
    )
    checked.add("frequent words", "Python class", 20, right)
    right = sum(
        handle.result()["sha256"] == hashlib.sha256(path.name.encode()).hexdigest()
        for handle, path in zip(digests, files[:20], strict=True)
    )
    checked.add("digest of a name", "HTTP service", 20, right)
    moved = sum(handle.known_result.attempts > 1 for handle in handles if handle.known_result is not None)
    console.print(checked.table())
    lost = sum(handle.known_result is None for handle in handles)
    console.print(f"Lost: {lost} of {len(handles)}. Run again because their worker was killed: {moved}.")
    return checked


def main() -> int:
    directory = Path(tempfile.mkdtemp(prefix="taskd-demo-"))
    demo = Demo(directory)
    begun = time.monotonic()
    try:
        console.rule("[bold]taskd: a cluster on one machine")
        demo.start("scheduler-1")
        until(demo.key.exists, "the first scheduler to make the cluster's key")
        for name in ("scheduler-2", *WORKERS):
            demo.start(name)
        with microservice() as url, Client(demo.socket(ENTRY)) as client:
            until(lambda: is_whole(client), "the workers and both schedulers to find each other")
            seconds = time.monotonic() - begun
            console.print(
                f"Two schedulers and three workers found each other by mDNS, {seconds:.1f} s after start. "
                "scheduler-1 leads, for its id is the lowest; scheduler-2 keeps a copy of everything."
            )
            checked = work(demo, client, url)
    except BaseException:
        console.print(demo.logs(), style="dim", markup=False, highlight=False)
        raise
    finally:
        demo.stop()
        shutil.rmtree(directory, ignore_errors=True)
    console.print(f"Done in {time.monotonic() - begun:.0f} s." if checked.is_good else "[bold red]Something is wrong.")
    console.print(NEXT)
    return 0 if checked.is_good else 1


NEXT = """
How to go on, with this checkout's program in [bold].venv/bin/taskd[/]:
  [bold]taskd start --role scheduler,worker[/]      a cluster of one, here
  [bold]taskd key show --role worker[/]             the key for other machines: there, `taskd key import`
  [bold]taskd start --role worker[/]                on each of them; they find the scheduler by themselves
  [bold]taskd run -- hostname[/]                    runs where there is room"""


if __name__ == "__main__":
    raise SystemExit(main())
