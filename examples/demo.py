"""`make demo`: a real cluster on this machine finds itself, works, loses a worker, carries on, and proves it.

One scheduler and three workers start as separate processes and find each other by mDNS. They hash and compress files of
Python's standard library as commands, count the words in them with a Python handler, and call a small HTTP service.
One worker is killed with signal 9 in the middle. At the end every result is checked against the files themselves.
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
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from taskd import Client

EXAMPLES = Path(__file__).resolve().parent
FILES_MAX = 200
START_TIMEOUT_S = 30.0
WAIT_TIMEOUT_S = 150.0
VICTIM = "worker-2"
console = Console()


class Demo:
    """The processes of one demonstration, in a directory that goes with it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.socket = str(directory / "scheduler" / "taskd.sock")

    def start(self, name: str, role: str) -> None:
        """Start a daemon in the way a user does, but with a state directory of its own."""
        home = self.directory / name
        home.mkdir(exist_ok=True)
        command = [
            sys.executable, "-m", "taskd", "start", "--role", role, "--name", name,
            "--state-dir", str(home), "--key-file", str(self.directory / "cluster.key"),
        ]  # fmt: skip
        settings = {
            # A demonstration stays on its machine; on a LAN these two lines are not needed.
            "TASKD_NETWORK_INTERFACES": "127.0.0.1",
            "TASKD_NETWORK_LISTEN": "127.0.0.1:0",
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


def until(check: Callable[[], bool], what: str) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(Exception):  # The socket may not be there yet.
            if check():
                return
        if time.monotonic() > end:
            raise SystemExit(f"demo: waited {START_TIMEOUT_S:.0f} s in vain for {what}")
        time.sleep(0.05)


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


def sha256_command(path: Path) -> list[str]:
    """Slow enough that a worker can be killed in the middle of it."""
    return ["sh", "-c", 'sleep 0.1; sha256sum "$0"', str(path)]


def compress_command(path: Path, target: Path) -> list[str]:
    return ["sh", "-c", 'bzip2 -c "$0" > "$1.part" && mv "$1.part" "$1"', str(path), str(target)]


def work(demo: Demo, client: Client, url: str) -> Checked:
    """Submit everything, kill a worker in the middle, wait for the end, and check."""
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
    console.print(f"Submitted {len(handles)} tasks; every one is on the scheduler's disk by now.")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("working", total=len(handles))
        is_killed = False
        for handle in client.as_completed(handles, timeout=WAIT_TIMEOUT_S):
            progress.advance(bar)
            if not is_killed and progress.tasks[0].completed > len(handles) / 3:
                is_killed = True
                demo.kill(VICTIM)
                progress.console.print(f"[bold red]kill -9 {VICTIM}[/]: after 5 s the others get what it ran.")
            assert handle.known_result is not None

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
    console.print(f"Lost: 0 of {len(handles)}. Run again because their worker was killed: {moved}.")
    return checked


def main() -> int:
    directory = Path(tempfile.mkdtemp(prefix="taskd-demo-"))
    demo = Demo(directory)
    begun = time.monotonic()
    try:
        console.rule("[bold]taskd: a cluster on one machine")
        demo.start("scheduler", "scheduler")
        for name in ("worker-1", VICTIM, "worker-3"):
            demo.start(name, "worker")
        with microservice() as url, Client(demo.socket) as client:
            until(lambda: client.cluster().workers == 3, "three workers to find the scheduler")
            seconds = time.monotonic() - begun
            console.print(f"One scheduler and three workers found each other by mDNS, {seconds:.1f} s after start.")
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
