"""HTTP as a client reads it: any answer, cut anywhere; anything else is refused, never waited for."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd.client.errors import ConnectionLost, ProtocolError
from taskd.client.http1 import HEAD_BYTES_MAX, ResponseReader, encode_request, query, quote


def read(data: bytes, cuts: list[int] | None = None, *, ends: bool = False) -> tuple[ResponseReader, bytes]:
    """What a reader makes of these bytes, cut at these places."""
    reader, body = ResponseReader(), b""
    places = [0, *sorted(cuts or []), len(data)]
    for start, end in pairwise(places):
        if data[start:end]:
            body += b"".join(reader.feed(data[start:end]))
    if ends:
        body += b"".join(reader.feed(b""))
    return reader, body


@st.composite
def chunked(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A body, and the same as chunks."""
    parts = draw(st.lists(st.binary(min_size=1, max_size=40), max_size=6))
    extension = draw(st.sampled_from([b"", b";name=value"]))
    trailer = draw(st.sampled_from([b"", b"X-Sum: 1\r\n"]))
    encoded = b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts)
    return b"".join(parts), encoded + b"0\r\n" + trailer + b"\r\n"


@given(chunked(), st.lists(st.integers(0, 300), max_size=8))
def test_chunks_cut_anywhere(body: tuple[bytes, bytes], cuts: list[int]) -> None:
    data = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-A: b\r\n\r\n" + body[1]
    reader, found = read(data, [cut for cut in cuts if cut < len(data)])
    assert found == body[0]
    assert (reader.status, reader.is_complete, reader.is_reusable) == (200, True, True)
    assert reader.headers["x-a"] == "b"


@given(st.binary(max_size=100), st.lists(st.integers(0, 150), max_size=5))
def test_a_body_of_known_length_cut_anywhere(body: bytes, cuts: list[int]) -> None:
    data = b"HTTP/1.1 404 Not Found\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    reader, found = read(data, [cut for cut in cuts if cut < len(data)])
    assert (reader.status, found, reader.is_complete) == (404, body, True)


@given(st.binary(max_size=300))
def test_any_bytes_are_an_answer_or_an_error(data: bytes) -> None:
    reader = ResponseReader()
    try:
        reader.feed(data or b"x")
        reader.feed(b"")
    except (ProtocolError, ConnectionLost):
        return
    assert reader.is_complete


def test_a_body_without_length_ends_with_the_connection() -> None:
    reader, body = read(b"HTTP/1.1 200 OK\r\n\r\nabc", ends=True)
    assert (body, reader.is_complete, reader.is_reusable) == (b"abc", True, False)


def test_answers_without_a_body() -> None:
    reader, _ = read(b"HTTP/1.1 204 No Content\r\n\r\n")
    assert reader.is_complete
    reader, _ = read(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    assert (reader.is_complete, reader.is_reusable) == (True, False)
    reader, _ = read(b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert not reader.is_reusable


def test_an_interim_answer_is_passed_over() -> None:
    reader, body = read(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")
    assert (reader.status, body) == (200, b"x")


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nxy",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n+1\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nxyz",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 5000,
        b"x" * (HEAD_BYTES_MAX + 1),
    ],
)
def test_what_is_not_http_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        read(data)


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_an_answer_that_breaks_off_is_a_lost_connection(data: bytes) -> None:
    with pytest.raises(ConnectionLost):
        read(data, ends=True)


def test_requests_as_they_are_sent() -> None:
    assert encode_request("GET", "/a").startswith(b"GET /a HTTP/1.1\r\nHost: taskd\r\nUser-Agent: taskd/")
    assert b"Content-Length" not in encode_request("GET", "/a")
    posted = encode_request("POST", "/a", b"{}")
    assert posted.endswith(b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")


@given(st.text(max_size=20))
def test_quoting_leaves_nothing_that_has_a_meaning(text: str) -> None:
    from urllib.parse import unquote

    quoted = quote(text.encode("utf-8", "surrogatepass").decode("utf-8", "replace"))
    assert not set(quoted) & set(" /?&=#+\r\n")
    assert quote(unquote(quoted)) == quoted


def test_queries_leave_out_what_is_not_given() -> None:
    assert query(a=None, b="", c=0, d="x y") == "?c=0&d=x%20y"
    assert query() == ""
