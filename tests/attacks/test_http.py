"""What a user of the machine may try at the daemon's socket. Each row: what is sent, and what has to come of it. After
all of them no request has failed inside, the memory is within its cap, and the daemon serves as before."""

from __future__ import annotations

import json
import os
import pwd
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.integration.cluster import LOOPBACK, Daemon, eventually
from tests.runner.launch_stage import open_directory

RSS_BYTES_MAX = 400 << 20
TIMEOUT_S = 20.0
CLOSED = 0  # Nothing is answered, and the connection ends.
STRANGER = "nobody"


def get(target: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {target} HTTP/1.1", "Host: x", *headers, "", ""]).encode("latin-1")


def post(target: str, body: bytes | str | dict[str, Any] | list[Any], *headers: str) -> bytes:
    raw = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()
    head = "\r\n".join([f"POST {target} HTTP/1.1", "Host: x", f"Content-Length: {len(raw)}", *headers, "", ""])
    return head.encode("latin-1") + raw


def submit(**task: Any) -> bytes:
    return post("/v1/tasks", task)


# What is sent, and the statuses that may answer it.
ROWS: dict[str, tuple[bytes, int]] = {
    # What is no HTTP.
    "binary nonsense": (bytes(range(256)) * 4, 400),
    "a TLS hello": (bytes.fromhex("1603010200010001fc0303") + bytes(500), 400),
    "a peer's banner": (b"taskd1\n\x00\x00\x00\x05hello\r\n\r\n", 400),
    "no version, which is harmless": (b"GET /healthz\r\n\r\n", 200),
    "version nine": (b"GET /healthz HTTP/9.9\r\nHost: x\r\n\r\n", 400),
    "a method with a blank": (b"GE T /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a NUL in the target": (b"GET /health\0z HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a bare line feed in a header": (b"GET /healthz HTTP/1.1\r\nHost: x\nX: y\r\n\r\n", 400),
    "a header without a name": (b"GET /healthz HTTP/1.1\r\nHost: x\r\n: y\r\n\r\n", 400),
    "a folded header": (b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n", 400),
    # What is too much.
    "a target of 100,000 characters": (get("/" + "a" * 100_000), 400),
    "a header of 100,000 characters": (get("/healthz", "X: " + "a" * 100_000), 400),
    "20,000 headers": (get("/healthz", *(f"X{number}: y" for number in range(20_000))), 400),
    "10,000 fields in the query": (get("/v1/tasks?" + "&".join(f"a{n}=1" for n in range(1000))), 400),
    "a body said to be of an exabyte": (
        b"POST /v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 1152921504606846976\r\n\r\n",
        413,
    ),
    "a body beyond the bound": (post("/v1/tasks", b"[" + b" " * (17 << 20) + b"]"), 413),
    "200,000 tasks": (post("/v1/tasks", b"[" + b'{"argv":["a"]},' * 199_999 + b'{"argv":["a"]}]'), 413),
    "100,001 ids to wait for": (post("/v1/tasks/wait", {"ids": ["0" * 32] * 100_001}), 413),
    "a million brackets": (post("/v1/tasks", b"[" * 1_000_000), 400),
    "a million nested params": (
        post("/v1/tasks", b'{"type":"x","params":' + b"[" * 500_000 + b"]" * 500_000 + b"}"),
        400,
    ),
    "a number of a million digits": (post("/v1/tasks", b'{"argv":["a"],"priority":' + b"9" * 1_000_000 + b"}"), 400),
    "params above their bound": (submit(type="x", params={"a": "b" * (2 << 20)}), 413),
    "an argument longer than any program takes": (submit(argv=["a", "b" * 200_000]), 413),
    "an environment longer than any program takes": (
        submit(argv=["a"], env={f"V{n}": "x" * 100_000 for n in range(20)}),
        413,
    ),
    # Smuggling: two ways to say how long a body is.
    "two lengths": (b"POST /v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", 400),
    "length and chunks": (
        b"POST /v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    "a negative length": (b"POST /v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
    "a length with a sign": (b"POST /v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\nhello", 400),
    "a chunk that is no number": (
        b"POST /v1/tasks HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        400,
    ),
    "a chunk of an exabyte": (
        b"POST /v1/tasks HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\n",
        400,
    ),
    "a body that is packed": (post("/v1/tasks", b"\x1f\x8b" + bytes(100), "Content-Encoding: gzip"), 400),
    # Keys that make a submission one of its kind.
    "a key with a bell": (post("/v1/tasks", {"argv": ["a"]}, "Idempotency-Key: a\x07b"), 400),
    "a key of nothing, which is none": (post("/v1/tasks?idempotency_key=", {"argv": ["a"]}), 200),
    "a key for the first time": (post("/v1/tasks", {"argv": ["a"]}, "Idempotency-Key: once"), 200),
    "the same key and the same task": (post("/v1/tasks", {"argv": ["a"]}, "Idempotency-Key: once"), 200),
    "the same key and another task, which is not taken": (
        post("/v1/tasks", {"argv": ["b"]}, "Idempotency-Key: once"),
        200,
    ),
    # Paths.
    "up and out": (get("/v1/../../../etc/passwd"), 404),
    "up and out, encoded": (get("/v1/tasks/..%2f..%2f..%2fetc%2fpasswd"), 400),
    "an id with a NUL": (get("/v1/tasks/%00"), 400),
    "a queue with a NUL": (get("/v1/tasks?queue=%00x"), 200),
    "half a surrogate in a filter": (get("/v1/tasks?owner=%ed%a0%80"), 400),
    "an id that is no UTF-8": (get("/v1/tasks/%ff%fe"), 400),
    "an id like SQL": (get("/v1/tasks/' OR 1=1 --".replace(" ", "%20")), 400),
    "a wildcard for an id": (get("/v1/tasks/%25"), 400),
    "somebody else's output": (get("/v1/tasks/0199ffff-ffff-7fff-bfff-ffffffffffff/output?attempt=-1"), 400),
    "an offset beyond everything": (get("/v1/tasks/last/output?offset=99999999999999999999999"), 400),
    "the inner path of outputs": (get("/outputs/00/1/stdout"), 404),
    "another method": (b"DELETE /v1/tasks HTTP/1.1\r\nHost: x\r\n\r\n", 405),
    "CONNECT": (b"CONNECT 10.0.0.1:22 HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    # JSON.
    "no JSON": (post("/v1/tasks", b"argv=true"), 400),
    "no UTF-8": (post("/v1/tasks", b'{"argv":["\xff\xfe"]}'), 400),
    "half a surrogate": (post("/v1/tasks", b'{"argv":["\\ud800"]}'), 400),
    "not a number": (post("/v1/tasks", b'{"argv":["a"],"timeout":NaN}'), 400),
    "an infinite time-out": (post("/v1/tasks", b'{"argv":["a"],"timeout":1e999}'), 400),
    "a field that there is not": (submit(argv=["a"], owner="root"), 400),
    "a number for a command": (submit(argv=[1]), 400),
    "a list of nothing": (post("/v1/tasks", []), 400),
    "a key twice, the second worse": (post("/v1/tasks", b'{"argv":["a"],"argv":5}'), 400),
    # Values.
    "a NUL in a command": (submit(argv=["a\0b"]), 400),
    "a variable with an equals sign": (submit(argv=["a"], env={"A=B": "c"}), 400),
    "a directory that is relative": (submit(argv=["a"], cwd="../../etc"), 400),
    "a line break in a name": (submit(argv=["a"], name="a\nerror forged=1"), 400),
    "a terminal's escape in a queue": (submit(argv=["a"], queue="\x1b]0;owned\x07"), 400),
    "a priority beyond all": (submit(argv=["a"], priority=10**9), 400),
    "less than nothing of a resource": (submit(argv=["a"], cpus=-1), 400),
    "a constraint that is none": (submit(argv=["a"], constraints=["__import__('os')"]), 400),
    "an id of tomorrow": (submit(argv=["a"], id="ffffffff-ffff-7fff-bfff-ffffffffffff"), 400),
    "an id of version four": (submit(argv=["a"], id="00000000-0000-4000-8000-000000000000"), 400),
    "a url that is a file": (submit(type="http", http={"url": "file:///etc/shadow"}), 400),
    "a header with a line break": (submit(type="http", http={"url": "http://x/", "headers": {"a": "b\r\nc: d"}}), 400),
    "the host header of a call": (submit(type="http", http={"url": "http://x/", "headers": {"Host": "y"}}), 400),
    "a key of 10,000 characters": (post("/v1/tasks", {"argv": ["a"]}, "Idempotency-Key: " + "k" * 8000), 400),
    "a wait of a century": (post("/v1/tasks?wait=3155760000", {"argv": ["a"]}), 400),
    "a filter that is misspelt": (post("/v1/tasks/cancel?state=queued", {}), 400),
    "a cursor that is none": (get("/v1/tasks?cursor=../../x"), 400),
    "a page of a billion": (get("/v1/tasks?limit=1000000000"), 400),
    "a node that is a path": (post("/v1/nodes/..%2f1/drain", b""), 404),
}

# The same from a user who is nobody here: who the socket lets in (its mode is open in this test) and may do little.
STRANGERS: dict[str, tuple[bytes, int]] = {
    "drain a node": (post("/v1/nodes/@NODE@/drain", b""), 403),
    "resume a node": (post("/v1/nodes/@NODE@/resume", b""), 403),
    "take a backup": (get("/v1/backup"), 403),
    "cancel a task of root": (post("/v1/tasks/@TASK@/cancel", b""), 403),
    "cancel everybody's": (post("/v1/tasks/cancel", {"owners": ["root"]}), 403),
    "cancel one of root by its id": (post("/v1/tasks/cancel", {"ids": ["@TASK@"]}), 403),
    "do a task of root again": (post("/v1/tasks/@TASK@/retry", b""), 403),
    "claim to be root by a header": (
        post("/v1/tasks/@TASK@/cancel", b"", "X-User: root", "Authorization: Basic cm9vdDo="),
        403,
    ),
    "read, which anybody may": (get("/v1/tasks/@TASK@"), 200),
}

_CLIENT = """
import os, socket, sys
path, request = sys.argv[1], sys.stdin.buffer.read()
os.setgroups([]); os.setgid(int(sys.argv[3])); os.setuid(int(sys.argv[2]))
with socket.socket(socket.AF_UNIX) as peer:
    peer.settimeout(20); peer.connect(path); peer.sendall(request)
    answer = b""
    while b"\\r\\n\\r\\n" not in answer and (part := peer.recv(65536)):
        answer += part
print(answer.split()[1].decode())
"""


@pytest.fixture(scope="module")
def target() -> Iterator[Daemon]:
    with open_directory() as directory:
        home = directory / "node"
        daemon = Daemon(
            home,
            directory / "key",
            "scheduler,worker",
            "--node-id",
            "7",
            env={**LOOPBACK, "TASKD_API_SOCKET_MODE": "0666"},
        )
        daemon.start()
        home.chmod(0o755)
        try:
            yield daemon
            assert rss_bytes(daemon) < RSS_BYTES_MAX
            log = daemon.log.read_text()
            assert "request failed" not in log
            assert "a bug" not in log
            assert daemon.process is not None
            assert daemon.process.poll() is None
            (task_id,) = daemon.submit({"argv": ["true"]})
            assert daemon.wait([task_id])[task_id]["state"] == "succeeded"
        finally:
            daemon.stop()


def rss_bytes(daemon: Daemon) -> int:
    assert daemon.process is not None
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10


def answered(daemon: Daemon, request: bytes) -> int:
    """The status that a request gets, CLOSED for none."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(daemon.socket))
        peer.settimeout(TIMEOUT_S)
        with suppress(BrokenPipeError, ConnectionResetError):  # It may have refused before it has read all.
            peer.sendall(request)
        answer = b""
        with suppress(ConnectionResetError):
            while b"\r\n\r\n" not in answer and (part := peer.recv(1 << 16)):
                answer += part
    return int(answer.split()[1]) if answer else CLOSED


@pytest.mark.parametrize("row", ROWS)
def test_requests(row: str, target: Daemon) -> None:
    request, expected = ROWS[row]
    assert answered(target, request) == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
@pytest.mark.parametrize("row", STRANGERS)
def test_requests_of_a_stranger(row: str, target: Daemon) -> None:
    request, expected = STRANGERS[row]
    (task_id,) = target.submit({"argv": ["true"], "delay": 3600})
    request = request.replace(b"@TASK@", task_id.encode()).replace(b"@NODE@", b"7")
    request = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(request.partition(b"\r\n\r\n")[2]), request)
    user = pwd.getpwnam(STRANGER)
    command = [sys.executable, "-I", "-c", _CLIENT, str(target.socket), str(user.pw_uid), str(user.pw_gid)]
    result = subprocess.run(command, input=request, capture_output=True, timeout=60, check=True)
    assert int(result.stdout) == expected


def test_a_thousand_connections_that_say_nothing(target: Daemon) -> None:
    silent = []
    try:
        for _ in range(1000):
            peer = socket.socket(socket.AF_UNIX)
            peer.connect(str(target.socket))
            silent.append(peer)
        refused = answered(target, get("/healthz"))
        assert refused == 429
    finally:
        for peer in silent:
            peer.close()
    eventually(target.is_ready)
