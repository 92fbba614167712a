"""What anybody on the network may try at the HTTPS listener. Each row: who asks, what is sent, and what has to come of
it. After all of them no request has failed inside, the memory is within its cap, and the daemon serves as before."""

from __future__ import annotations

import itertools
import json
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from taskd.tokens import PREFIX, TokenFile
from tests.attacks.test_http import CLOSED, RSS_BYTES_MAX, get, post, rss_bytes, submit
from tests.integration.cluster import LOOPBACK, Daemon, eventually, free_port

TIMEOUT_S = 20.0
_addresses = itertools.count(2)  # Each row comes from an address of its own: guesses are counted by address.


def with_header(request: bytes, line: str) -> bytes:
    head, _, body = request.partition(b"\r\n\r\n")
    return head + b"\r\n" + line.encode("latin-1") + b"\r\n\r\n" + body


# Without a token: what is sent, with @USER@ and the like in the place of that token, and the status.
STRANGERS: dict[str, tuple[bytes, int]] = {
    "no token": (get("/v1/tasks"), 401),
    "is it alive": (get("/healthz"), 401),
    "is it ready": (get("/readyz"), 401),
    "figures": (get("/metrics"), 401),
    "the description of the API": (get("/openapi.json"), 401),
    "the root": (get("/"), 401),
    "a path that does not exist, of which nothing is told": (get("/secret"), 401),
    "a method that does not exist": (b"DELETE /v1/tasks HTTP/1.1\r\nHost: x\r\n\r\n", 401),
    "a preflight of a browser": (
        b"OPTIONS /v1/tasks HTTP/1.1\r\nHost: x\r\nOrigin: https://evil.example\r\n"
        b"Access-Control-Request-Method: POST\r\n\r\n",
        401,
    ),
    "a proxy's request": (b"CONNECT 10.0.0.1:22 HTTP/1.1\r\nHost: x\r\n\r\n", 401),
    "an upgrade": (get("/v1/events", "Connection: Upgrade", "Upgrade: websocket"), 401),
    "HTTP/1.0": (b"GET /v1/tasks HTTP/1.0\r\n\r\n", 401),
    "submit": (submit(argv=["true"]), 401),
    "a body of which nothing is read": (
        b"POST /v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 16000000\r\n\r\n",
        401,
    ),
    "the token in the query": (get("/v1/tasks?token=@USER@"), 401),
    "the token as a password": (get("/v1/tasks", "Authorization: Basic @USER@"), 401),
    "the token without its scheme": (get("/v1/tasks", "Authorization: @USER@"), 401),
    "the token in a cookie": (get("/v1/tasks", "Cookie: token=@USER@"), 401),
    "an empty token": (get("/v1/tasks", "Authorization: Bearer "), 401),
    "half a token": (get("/v1/tasks", "Authorization: Bearer @HALF@"), 401),
    "a token in other letters": (get("/v1/tasks", "Authorization: Bearer @UPPER@"), 401),
    "a token that nobody made": (get("/v1/tasks", f"Authorization: Bearer {PREFIX}{'a' * 43}"), 401),
    "the digest in the place of the token": (get("/v1/tasks", "Authorization: Bearer @DIGEST@"), 401),
    "a token that has expired": (get("/v1/tasks", "Authorization: Bearer @OLD@"), 401),
    "a token that was revoked": (get("/v1/tasks", "Authorization: Bearer @GONE@"), 401),
    "a token of 8,000 characters": (get("/v1/tasks", "Authorization: Bearer " + "a" * 8000), 401),
    "a token of bytes": (get("/v1/tasks", "Authorization: Bearer \xff\xfe\x80"), 401),
    "claim to be root by a header": (get("/v1/tasks", "X-Forwarded-User: root", "X-Real-IP: 127.0.0.1"), 401),
    "a header of 100,000 characters": (get("/v1/tasks", "X: " + "a" * 100_000), 400),
    "length and chunks": (
        b"POST /v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    "binary nonsense": (bytes(range(256)) * 4, 400),
}

# With a token: whose, what is sent, the status.
HOLDERS: dict[str, tuple[str, bytes, int]] = {
    "a user reads": ("USER", get("/v1/tasks"), 200),
    "a user submits": ("USER", submit(argv=["true"]), 200),
    "a user cancels somebody else's task": ("USER", post("/v1/tasks/@TASK@/cancel", b""), 403),
    "a user cancels all": ("USER", post("/v1/tasks/cancel", {"ids": ["@TASK@"]}), 403),
    "a user drains a node": ("USER", post("/v1/nodes/7/drain", b""), 403),
    "a user takes a backup": ("USER", get("/v1/backup"), 403),
    "a user names another as owner": ("USER", submit(argv=["true"], owner="root"), 400),
    "a user sends a packed body": ("USER", post("/v1/tasks", b"\x1f\x8b", "Content-Encoding: gzip"), 400),
    "a user sends too much": ("USER", post("/v1/tasks", b"[" + b" " * (17 << 20) + b"]"), 413),
    "a user asks for another's inner paths": ("USER", get("/outputs/00/1/stdout"), 404),
    "a user sends two tokens": ("USER", get("/v1/tasks", "Authorization: Bearer @ADMIN@"), 401),
    "a user of a page of somebody else": ("USER", get("/v1/tasks", "Origin: https://evil.example"), 200),
    "a user names a host twice": ("USER", get("/v1/tasks", "Host: evil.example"), 400),
    "a user names no host": ("USER", b"GET /v1/tasks HTTP/1.1\r\nX: y\r\n\r\n", 400),
    "a reader reads": ("READER", get("/v1/tasks/@TASK@"), 200),
    "a reader submits": ("READER", submit(argv=["true"]), 403),
    "a reader cancels": ("READER", post("/v1/tasks/@TASK@/cancel", b""), 403),
    "a reader retries": ("READER", post("/v1/tasks/@TASK@/retry", b""), 403),
    "a reader drains a node": ("READER", post("/v1/nodes/7/drain", b""), 403),
    "a reader takes a backup": ("READER", get("/v1/backup"), 403),
    "an administrator cancels anybody's": ("ADMIN", post("/v1/tasks/@TASK@/cancel", b""), 200),
    "a scheme in other letters": ("", get("/v1/tasks", "Authorization: bEARER @USER@"), 200),
}


class Target:
    """A daemon with the listener, and tokens for it."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.tokens = TokenFile(directory / "tokens.json")
        env = {
            **LOOPBACK,
            "TASKD_API_LISTEN": f"127.0.0.1:{self.port}",
            "TASKD_API_TOKENS_FILE": str(self.tokens.path),
            "TASKD_API_REQUESTS_PER_S_MAX": "50",
        }
        self.daemon = Daemon(directory / "node", directory / "key", "scheduler,worker", "--node-id", "7", env=env)
        now_s = time.time()
        self.words = {
            "USER": self.tokens.make("laptop", "ana", "user", now_s, 0.0),
            "ADMIN": self.tokens.make("desk", "root", "admin", now_s, 0.0),
            "READER": self.tokens.make("board", "board", "read-only", now_s, 0.0),
            "GONE": self.tokens.make("lost", "ana", "user", now_s, 0.0),
        }
        self.tokens.revoke("lost")
        self.words["HALF"] = self.words["USER"][:-8]
        self.words["UPPER"] = self.words["USER"].swapcase()
        self.words["DIGEST"] = self.tokens.load()[0].sha256
        self.words["OLD"] = self.tokens.make("old", "ana", "user", now_s - 100.0, now_s - 1.0)

    def connect(self, host: str = "") -> socket.socket:
        """TCP only."""
        source = host or f"127.0.0.{next(_addresses)}"
        return socket.create_connection(("127.0.0.1", self.port), TIMEOUT_S, source_address=(source, 0))

    def open(self, host: str = "") -> ssl.SSLSocket:
        """TLS, and nothing said yet."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context.wrap_socket(self.connect(host))

    def ask(self, request: bytes, token: str = "", host: str = "") -> tuple[int, bytes]:
        """The status that a request gets, and the head and the beginning of the body."""
        if token:
            request = with_header(request, f"Authorization: Bearer @{token}@")
        for word, text in self.words.items():
            request = request.replace(b"@%s@" % word.encode(), text.encode())
        answer = b""
        with closing(self.open(host)) as peer:
            with suppress(BrokenPipeError, ConnectionResetError, ssl.SSLError):
                peer.sendall(request)
            with suppress(ConnectionResetError, ssl.SSLEOFError):
                while b"\r\n\r\n" not in answer and (part := peer.recv(1 << 16)):
                    answer += part
        return (int(answer.split()[1]) if answer else CLOSED), answer


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    target = Target(tmp_path_factory.mktemp("https"))
    target.daemon.start()
    try:
        yield target
        daemon = target.daemon
        assert rss_bytes(daemon) < RSS_BYTES_MAX
        log = daemon.log.read_text()
        assert "request failed" not in log
        assert "a bug" not in log
        audit = next(daemon.home.rglob("audit.log")).read_text()
        assert "token laptop from 127.0.0." in audit
        secrets = [text for word, text in target.words.items() if word != "DIGEST"]
        assert not any(text in log or text in audit for text in secrets)
        (task_id,) = daemon.submit({"argv": ["true"]})
        assert daemon.wait([task_id])[task_id]["state"] == "succeeded"
    finally:
        target.daemon.stop()


@pytest.mark.parametrize("row", STRANGERS)
def test_who_has_no_token_gets_nothing(row: str, target: Target) -> None:
    request, expected = STRANGERS[row]
    status, answer = target.ask(request)
    assert status == expected
    assert b"aiohttp" not in answer
    assert b"Access-Control" not in answer
    if status == 401:
        assert b'WWW-Authenticate: Bearer realm="taskd"' in answer


@pytest.mark.parametrize("row", HOLDERS)
def test_a_token_is_good_for_its_role(row: str, target: Target) -> None:
    token, request, expected = HOLDERS[row]
    (task_id,) = target.daemon.submit({"argv": ["true"], "delay": 3600})
    request = request.replace(b"@TASK@", task_id.encode())
    body = request.partition(b"\r\n\r\n")[2]
    request = b"\r\n".join(
        b"Content-Length: %d" % len(body) if line.startswith(b"Content-Length") else line
        for line in request.split(b"\r\n")
    )
    assert target.ask(request, token)[0] == expected


def test_many_guesses_are_refused_and_a_right_token_is_not(target: Target) -> None:
    wrong = get("/v1/tasks", f"Authorization: Bearer {PREFIX}{'b' * 43}")
    found = [target.ask(wrong, host="127.0.0.100")[0] for _ in range(30)]
    assert found[0] == 401
    assert 429 in found
    assert target.ask(get("/v1/tasks"), "USER", host="127.0.0.100")[0] == 200
    assert target.ask(wrong, host="127.0.0.101")[0] == 401


def test_a_token_counts_from_when_it_is_made_until_it_is_revoked(target: Target) -> None:
    target.words["NEW"] = target.tokens.make("new", "eva", "user", time.time(), 0.0)
    assert target.ask(submit(argv=["true"]), "NEW")[0] == 200
    target.tokens.revoke("new")
    assert target.ask(get("/v1/tasks"), "NEW")[0] == 401


def test_a_user_who_asks_too_often_is_slowed_down_and_nobody_else_is(target: Target) -> None:
    target.words["LOUD"] = target.tokens.make("loud", "max", "user", time.time(), 0.0)
    answers = (target.ask(get("/healthz"), "LOUD") for _ in range(1000))
    status, answer = next(found for found in answers if found[0] != 200)
    assert status == 429
    assert b"Retry-After: 1" in answer
    assert b'"rate_limited"' in answer
    assert [target.ask(get("/healthz"), token)[0] for token in ("USER", "READER", "ADMIN")] == [200, 200, 200]


def test_whose_tasks_are_submitted_with_a_token(target: Target) -> None:
    status, answer = target.ask(submit(argv=["true"], name="by-token"), "USER")
    assert status == 200
    (found,) = target.daemon.ok("GET", "/v1/tasks?name=by-token")["tasks"]
    assert (found["owner"], answer.count(found["id"].encode())) == ("ana", 1)


@pytest.mark.parametrize(
    "sent",
    [get("/healthz"), bytes(range(256)) * 8, b"taskd1\n", b"\x16\x03\x01\x02\x00" + bytes(512)],
    ids=["plain HTTP", "nonsense", "a peer's banner", "half a hello"],
)
def test_what_is_no_tls_is_not_answered(sent: bytes, target: Target) -> None:
    with closing(target.connect()) as peer:
        peer.sendall(sent)
        answer = b""
        with suppress(ConnectionResetError):
            while part := peer.recv(1 << 16):
                answer += part
    assert b"HTTP" not in answer  # An alert of TLS at most.


def test_older_tls_is_refused(target: Target) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with closing(target.connect()) as peer, pytest.raises((ssl.SSLError, ConnectionResetError)):
        context.wrap_socket(peer)


def test_connections_that_never_shake_hands_keep_nobody_out(target: Target) -> None:
    with ExitStack() as silent:
        for number in range(320):
            silent.enter_context(closing(target.connect(f"127.0.0.{110 + number % 8}")))
        assert [target.ask(get("/healthz"), "USER", host="127.0.0.103")[0] for _ in range(5)] == [200] * 5


def test_connections_that_show_no_token_keep_nobody_out(target: Target) -> None:
    with ExitStack() as silent:
        for number in range(520):
            silent.enter_context(closing(target.open(f"127.0.0.{120 + number % 2}")))
        assert [target.ask(get("/healthz"), "USER", host="127.0.0.104")[0] for _ in range(5)] == [200] * 5
        assert target.ask(get("/healthz"), "USER", host="127.0.0.120")[0] == 200


@pytest.mark.parametrize("is_revoked", [True, False], ids=["revoked", "expired"])
def test_a_stream_ends_with_the_token_that_opened_it(is_revoked: bool, target: Target) -> None:
    end_s = 0.0 if is_revoked else time.time() + 1.0
    secret = target.tokens.make(f"stream{is_revoked}", "eve", "read-only", time.time(), end_s)
    with closing(target.open()) as peer:
        peer.sendall(get("/v1/events", f"Authorization: Bearer {secret}"))
        heard = peer.recv(1 << 16)
        assert b"200 OK" in heard
        while b"retry:" not in heard:
            heard += peer.recv(1 << 16)
        if is_revoked:
            target.tokens.revoke(f"stream{is_revoked}")
        else:
            eventually(lambda: time.time() > end_s)
        target.daemon.submit({"argv": ["true"]})
        rest = b""
        with suppress(ConnectionResetError, ssl.SSLEOFError):
            while part := peer.recv(1 << 16):
                rest += part
    assert rest == b""


def test_each_of_two_requests_at_once_has_to_carry_a_token(target: Target) -> None:
    with_token = get("/v1/cluster", f"Authorization: Bearer {target.words['USER']}")
    with closing(target.open()) as peer:
        peer.sendall(with_token + get("/v1/tasks"))
        answer = b""
        with suppress(ConnectionResetError, ssl.SSLEOFError):
            while part := peer.recv(1 << 16):
                answer += part
    assert (answer.count(b"HTTP/1.1 200 "), answer.count(b"HTTP/1.1 401 ")) == (1, 1)


def test_the_files_are_private(target: Target) -> None:
    def others_may(path: Path) -> int:
        return path.stat().st_mode & 0o077

    key = target.tokens.path.parent / "api.key"
    assert others_may(target.tokens.path) == others_may(key) == 0
    stored: list[dict[str, Any]] = json.loads(target.tokens.path.read_text())
    assert not any(target.words["USER"] in str(token) for token in stored)
    text = target.tokens.path.read_text()
    target.tokens.path.chmod(0o644)
    target.tokens.path.write_text(text + " ")
    assert target.ask(get("/healthz"), "USER")[0] == 401  # Whoever could read it could have written it too.
    target.tokens.path.chmod(0o600)
    assert target.ask(get("/healthz"), "USER")[0] == 200


def test_the_table_is_long_enough() -> None:
    assert len(STRANGERS) + len(HOLDERS) >= 25
