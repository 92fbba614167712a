"""Frames: messages survive any cutting, and nothing that comes over the wire raises anything but ProtocolError."""

from __future__ import annotations

import contextlib
import typing
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd.errors import ProtocolError
from taskd.protocol import messages as msg
from taskd.protocol.frames import FRAME_BYTES_MAX, FrameReader, encode
from tests.protocol.samples import BY_KIND, ONE_OF_EACH, messages


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def packed(*fields: object) -> bytes:
    return framed(msgspec.msgpack.encode(fields))


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """Data cut at these places."""
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:stop] for start, stop in pairwise(places)]


def test_the_samples_are_of_every_kind() -> None:
    kinds = set(typing.get_args(msg.Any))
    assert set(BY_KIND) == {type(message) for message in ONE_OF_EACH} == set(msg.MAY_SEND) == kinds


@given(st.lists(messages, max_size=6), st.lists(st.integers(0, 1 << 20), max_size=12))
def test_messages_survive_any_cutting(sent: list[msg.Message], cuts: list[int]) -> None:
    reader = FrameReader()
    data = b"".join(map(encode, sent))
    assert [message for piece in pieces(data, cuts) for message in reader.feed(piece)] == sent


@pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda message: type(message).__name__)
def test_messages_survive_byte_by_byte(message: msg.Message) -> None:
    reader = FrameReader()
    received = [reader.feed(bytes([byte])) for byte in encode(message)]
    assert received == [[]] * (len(received) - 1) + [[message]]


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=6))
def test_any_bytes_are_messages_or_a_protocol_error(data: bytes, cuts: list[int]) -> None:
    reader = FrameReader()
    with contextlib.suppress(ProtocolError):
        for piece in pieces(data, cuts):
            assert all(isinstance(message, msg.Message) for message in reader.feed(piece))


@given(messages, st.integers(0), st.integers(1, 255))
def test_a_flipped_byte_is_a_message_or_a_protocol_error(message: msg.Message, place: int, flip: int) -> None:
    data = bytearray(encode(message))
    data[place % len(data)] ^= flip
    try:
        received = FrameReader().feed(data)
    except ProtocolError:
        return
    assert all(isinstance(it, msg.Message) for it in received)


@pytest.mark.parametrize("size", [0, FRAME_BYTES_MAX + 1, 0x47455420, 0xFFFFFFFF])  # The third is "GET ".
def test_a_wrong_length_is_refused_at_once(size: int) -> None:
    with pytest.raises(ProtocolError, match=f"frame of {size} bytes"):
        FrameReader().feed(size.to_bytes(4, "big"))


def test_the_largest_frame_is_taken_and_one_byte_more_is_not_sent() -> None:
    message = msg.RequestPart(1, b"x" * (FRAME_BYTES_MAX - 100), False)
    padding = FRAME_BYTES_MAX + 4 - len(encode(message))
    largest = msg.RequestPart(1, b"x" * (FRAME_BYTES_MAX - 100 + padding), False)
    frame = encode(largest)
    assert len(frame) == 4 + FRAME_BYTES_MAX
    assert FrameReader().feed(frame) == [largest]
    with pytest.raises(ProtocolError, match="does not fit into a frame"):
        encode(msg.RequestPart(1, largest.body + b"x", False))


@pytest.mark.parametrize(
    ("frame", "complaint"),
    [
        (packed("pwn", 1, 2.0), "pwn"),
        (packed("ping", 1), "at least"),
        (packed("ping", 1, 2.0, 3), "at most"),
        (packed("ping", "one", 2.0), "int"),
        (packed("ping", -1, 2.0), ">= 0"),
        (packed("ping", 1 << 63, 2.0), "<="),
        (packed("goodbye", "x" * 4097), "4096"),
        (packed("goodbye", 7), "str"),
        (packed("registered", [1, 2, 3, 4]), "at most"),
        (packed("response", 1, 99, "", b"", True), "100"),
        (packed("cancel", [1, 2, 3], [[b"short", 1, [1, 2, 3], 4]]), "16"),
        (framed(msgspec.msgpack.encode({"type": "ping"})), "array"),
        (framed(b"\xc1"), "not a message"),
        (framed(b"\x92\xa7goodbye\xa1\xff"), "not a message"),  # no UTF-8
        (framed(encode(msg.Ping(1, 2.0))[4:] + b"\x00"), "trailing"),
    ],
)
def test_what_is_no_message_is_refused_with_words(frame: bytes, complaint: str) -> None:
    with pytest.raises(ProtocolError, match=complaint):
        FrameReader().feed(frame)


@pytest.mark.parametrize(
    "body",
    [
        b"\x91" * 1_000_000,
        b"\x93\xa4ping\x01" + b"\x91" * 1_000_000,
        b"\x92\xa8finished\xdd\xff\xff\xff\xff",  # an array that claims four thousand million elements
        b"\x92\xa8offering\x95\x01\xdf\xff\xff\xff\xff",  # a map that does
        b"\x92\xa7goodbye\xdb\xff\xff\xff\xff",  # a string that does
    ],
    ids=["nested", "nested in a field", "array", "map", "string"],
)
def test_bombs_do_not_go_off(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        FrameReader().feed(framed(body))


def test_good_messages_before_a_bad_one_do_not_make_it_good() -> None:
    with pytest.raises(ProtocolError):
        FrameReader().feed(encode(msg.Ping(1, 2.0)) + framed(b"\xc1"))
