"""What a task may try against the daemon, other tasks and the machine, as a running process of the task user. Each row:
what is tried, the task that tries it, and what has to come of it. After all of them the daemon is the same process, and
has answered everything."""

from __future__ import annotations

import os
import pwd
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.integration.cluster import LOOPBACK, Daemon, eventually
from tests.runner.launch_stage import open_directory

USER = "games"  # One that no other test is: a row kills all processes that it can.
SECRET = "correct horse battery staple"
STREAM_BYTES_MAX = 1 << 20
RSS_BYTES_MAX = 512 << 20


def _has(name: str) -> bool:
    try:
        return pwd.getpwnam(name).pw_uid != 0
    except KeyError:
        return False


pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not _has(USER), reason=f"needs root and a user {USER}")


class Target(NamedTuple):
    """A daemon that is attacked."""

    daemon: Daemon
    home: Path
    key: Path

    def run(self, **task: Any) -> tuple[dict[str, Any], str]:
        """A task's end, and what it wrote to stdout."""
        (task_id,) = self.daemon.submit(task)
        end = self.daemon.wait([task_id])[task_id]
        return end, self.daemon.ok("GET", f"/v1/tasks/{task_id}/output")

    @property
    def pid(self) -> int:
        assert self.daemon.process is not None
        return self.daemon.process.pid

    def fill_in(self, text: str) -> str:
        words = {"PID": str(self.pid), "HOME_OF_TASKD": str(self.home), "KEY_OF_TASKD": str(self.key)}
        for word, value in words.items():
            text = text.replace(f"@{word}@", value)
        return text


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with open_directory() as directory:
        secrets = directory / "secrets"
        secrets.mkdir(mode=0o700)
        for name, text in (("token", SECRET), ("token.access", 'users = ["root"]'), ("closed", SECRET)):
            (secrets / name).write_text(text)
            (secrets / name).chmod(0o600)
        environment = {
            **LOOPBACK,
            "TASKD_WORKER_TASK_USER": USER,
            "TASKD_WORKER_TASK_PROCESSES_MAX": "60",
            "TASKD_WORKER_OUTPUT_STREAM_BYTES_MAX": str(STREAM_BYTES_MAX),
            "TASKD_WORKER_SECRETS_DIR": str(secrets),
            "TASKD_WORKER_SLOTS": "4",
        }
        home, key = directory / "node", directory / "cluster.key"
        daemon = Daemon(home, key, "scheduler,worker", env=environment)
        daemon.start()
        target = Target(daemon, home, key)
        pid = target.pid
        try:
            yield target
            assert target.pid == pid
            assert daemon.is_ready(), "it serves as before"
            assert _rss_bytes(pid) < RSS_BYTES_MAX
            assert daemon.stop() == 0
            assert not _processes_of(USER), "nothing is left"
        finally:
            if daemon.process is not None:
                daemon.kill()


Expected = Callable[[dict[str, Any], str], bool]


def _fails(end: dict[str, Any], output: str) -> bool:
    """It did not get what it wanted."""
    return end["state"] == "failed" and "GOT IT" not in output


def _is_told(end: dict[str, Any], output: str) -> bool:
    return end["state"] == "succeeded" and output.endswith("denied\n")


def _succeeds(end: dict[str, Any], output: str) -> bool:
    return end["state"] == "succeeded"


ATTACKS: dict[str, tuple[str, Expected]] = {
    # Against the daemon.
    "kill the daemon": ("kill -9 @PID@ || { echo denied; exit 0; }", _is_told),
    "kill everything that it can": ("kill -9 -1; echo denied", _is_told),
    "read the daemon's environment": ("cat /proc/@PID@/environ && echo GOT IT", _fails),
    "read the daemon's memory": ("head -c 1 /proc/@PID@/mem && echo GOT IT", _fails),
    "list the daemon's open files": ("ls /proc/@PID@/fd/ && echo GOT IT", _fails),
    "open one of them anew": ("cat /proc/@PID@/fd/0 && echo GOT IT", _fails),
    "trace the daemon": (
        "/usr/bin/python3 -c 'import ctypes; exit(ctypes.CDLL(None).ptrace(16, @PID@, 0, 0) == -1)' && echo GOT IT",
        _fails,
    ),
    "read the cluster key": ("cat @KEY_OF_TASKD@ && echo GOT IT", _fails),
    "read the database": ("cat @HOME_OF_TASKD@/scheduler/* && echo GOT IT", _fails),
    "read the journal of results": ("cat @HOME_OF_TASKD@/worker/journal && echo GOT IT", _fails),
    "read what other tasks wrote": (
        "ls @HOME_OF_TASKD@/worker/output && echo GOT IT; ls @HOME_OF_TASKD@/worker/slots && echo GOT IT",
        _fails,
    ),
    "read the secrets": (
        "cd $(dirname @KEY_OF_TASKD@); ls secrets && echo GOT IT; cat secrets/token",
        _fails,
    ),
    "write where private directories are": ("touch @HOME_OF_TASKD@/worker/tasks/tasks/x && echo GOT IT", _fails),
    "connect to the daemon's socket": (
        "/usr/bin/python3 -c 'import socket; socket.socket(socket.AF_UNIX).connect(\"@HOME_OF_TASKD@/taskd.sock\")'"
        " && echo GOT IT",
        _fails,
    ),
    # Against the machine.
    "become root by a setuid program": (
        "grep -q 'NoNewPrivs:.1' /proc/self/status && ! grep -E 'Cap(Eff|Prm|Inh|Amb):.*[1-9a-f]' /proc/self/status",
        _succeeds,
    ),
    "become root by setuid(0)": (
        "/usr/bin/python3 -c 'import os; os.setresuid(0, 0, 0)' && echo GOT IT; "
        "/usr/bin/python3 -c 'import os; os.setgroups([0])' && echo GOT IT; exit 1",
        _fails,
    ),
    "be spared when memory runs out": ("echo -1000 > /proc/self/oom_score_adj && echo GOT IT", _fails),
    "raise its limit of processes": (
        "/usr/bin/python3 -c 'import resource as r; r.setrlimit(r.RLIMIT_NPROC, (-1, -1))' && echo GOT IT",
        _fails,
    ),
    "use the descriptors of others": ("ls /proc/self/fd | wc -l | grep -qx 4", _succeeds),
    "dump core": ("ulimit -c | grep -qx 0", _succeeds),
    # Getting away.
    "fork twice into a session of its own": (
        "(setsid sleep 1000 &) ; (setsid setsid sleep 1000 &); echo denied",
        _is_told,
    ),
    "leave a child that ignores everything": ("(trap '' TERM HUP INT; sleep 1000) & echo denied", _is_told),
    "stop itself": ("(sleep 1000; kill -STOP $$) & echo denied", _is_told),
    "fork without end": (
        "/usr/bin/python3 -c 'import os\nwhile True:\n  try: os.fork()\n  except BlockingIOError: os.kill(0, 9)'",
        lambda end, _: end["signal"] == 9,
    ),
    # Against what is kept of it.
    "fill the disk with output": (
        "head -c 20000000 /dev/zero | tr '\\0' x; echo; echo denied",
        lambda end, output: len(output) < 4 * STREAM_BYTES_MAX and _is_told(end, output),
    ),
    "cut off its output": (
        "head -c 300000 /dev/zero; : > /proc/self/fd/1; echo denied",
        lambda end, output: len(output) < 100 and _is_told(end, output),
    ),
    "leave what cannot be removed": (
        "mkdir -p a/b/c && touch a/b/c/d && ln -s /etc a/b/etc && ln -s @HOME_OF_TASKD@ a/home && chmod 0 a/b/c a/b a"
        " && chmod 0 . && echo denied",
        _is_told,
    ),
    "replace its directory": ('cd / && rmdir "$TASKD_TASK_DIR" || echo denied', _is_told),
    "have a file of root's read as its error": (
        "ln -s /etc/shadow $TASKD_ERROR_FILE; exit 1",
        lambda end, output: end["state"] == "failed" and "root:" not in str(end["error"]),
    ),
    "report an endless error": (
        "head -c 100000000 /dev/zero | tr '\\0' e > $TASKD_ERROR_FILE; exit 1",
        lambda end, output: end["state"] == "failed" and len(end["error"]["message"]) <= 16 << 10,
    ),
    "report an error of nested rubbish": (
        "head -c 60000 /dev/zero | tr '\\0' '[' > $TASKD_ERROR_FILE; exit 1",
        lambda end, output: end["state"] == "failed" and end["error"]["type"] == "TaskError",
    ),
    "report an error that is no file": (
        "mkfifo $TASKD_ERROR_FILE; exit 1",
        lambda end, output: end["state"] == "failed" and end["error"] is None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack(attack: str, target: Target) -> None:
    script, is_as_expected = ATTACKS[attack]
    end, output = target.run(shell=target.fill_in(script), timeout=30)
    assert is_as_expected(end, output), (attack, end, output[-2000:])
    eventually(lambda: not _processes_of(USER))


def test_it_is_the_user_that_was_asked_for(target: Target) -> None:
    end, output = target.run(argv=["id", "-un"])
    assert (end["state"], output) == ("succeeded", f"{USER}\n"), "or all rows prove nothing"


def test_forged_variables_do_not_count(target: Target) -> None:
    forged = {"TASKD_TASK_ID": "x", "TASKD_FENCE": "x", "TASKD_SOCKET": "/x", "TASKD_ERROR_FILE": "/etc/shadow"}
    _, output = target.run(argv=["env"], env=forged)
    found = dict(line.split("=", 1) for line in output.splitlines())
    assert not forged.items() & found.items()


def test_a_secret_is_in_its_process_and_nowhere_else(target: Target) -> None:
    script = f'[ "$TOKEN" = "{SECRET[:7]}"* ] || echo "${{#TOKEN}}"; tr "\\0" "\\n" < /proc/self/cmdline'
    end, output = target.run(shell=script, secrets={"TOKEN": "token"})
    assert end["state"] == "succeeded"
    assert output.startswith(f"{len(SECRET)}\n")
    task = target.daemon.ok("GET", f"/v1/tasks/{end['id']}")
    assert task["secrets"] == {"TOKEN": "token"}
    assert SECRET not in str(task)
    kept = [path for path in target.home.rglob("*") if path.is_file()]
    assert len(kept) > 3
    assert not [path for path in kept if SECRET.encode() in path.read_bytes()], "database, journal, output, log"


@pytest.mark.parametrize(
    ("secret", "why"), [("closed", "nobody may use"), ("missing", "no secret 'missing'"), ("token.access", "cannot be")]
)
def test_a_secret_that_one_may_not_have_fails_the_task(target: Target, secret: str, why: str) -> None:
    end, output = target.run(argv=["env"], secrets={"TOKEN": secret})
    assert (end["state"], output, end["error"]["type"]) == ("failed", "", "SecretRefused")
    assert why in end["error"]["message"]
    assert SECRET not in str(end)


def _processes_of(name: str) -> list[int]:
    """Those that are no zombies of somebody else's."""
    uid = pwd.getpwnam(name).pw_uid
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{entry}").st_uid == uid:
                found.append(int(entry))
        except OSError:
            continue
    return found


def _rss_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
