"""One connection's life: who is let in, who may say what, heartbeats, clocks, silence, goodbye."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from taskd.errors import ProtocolError, Refused
from taskd.protocol.frames import FrameReader, encode
from taskd.protocol.messages import (
    MAY_SEND,
    PROTOCOL_VERSION,
    Goodbye,
    HandOver,
    Hello,
    Leading,
    Message,
    NodeInfo,
    Ping,
    Pong,
    Role,
    Term,
)
from taskd.protocol.session import HELLO_TIMEOUT_S, LATE_HEARTBEATS, MEASURE_HEARTBEATS, Session, State
from tests.protocol.samples import ONE_OF_EACH

WE = NodeInfo(1, "we", ("scheduler",), b"w" * 16, 11, "1.0")
THEY = NodeInfo(2, "they", ("worker",), b"t" * 16, 22, "1.0")
HEARTBEAT_S, TIMEOUT_S = 0.5, 2.5


def session(
    certified_id: int = 2, certified_roles: tuple[Role, ...] = ("worker",), utc: float = 1000.0, we: NodeInfo = WE
) -> Session:
    return Session(
        we, "home", certified_id, certified_roles,
        now=0.0, utc=lambda: utc, heartbeat_s=HEARTBEAT_S, timeout_s=TIMEOUT_S,
    )  # fmt: skip


def opened(certified_roles: tuple[Role, ...] = ("worker",)) -> Session:
    """A session after a good hello, with nothing left to send."""
    made = session(certified_roles=certified_roles)
    assert made.receive(hello(roles=certified_roles), 0.0) == []
    made.to_send()
    return made


def hello(version: int = PROTOCOL_VERSION, cluster: str = "home", **changes: Any) -> bytes:
    return encode(Hello(version, cluster, msgspec.structs.replace(THEY, **changes)))


def sent(session: Session) -> list[Message]:
    return FrameReader().feed(b"".join(session.to_send()))


# -- Greeting ----------------------------------------------------------------------------------------------------------


def test_a_session_says_hello_first_and_opens_with_the_answer() -> None:
    made = session()
    assert sent(made) == [Hello(PROTOCOL_VERSION, "home", WE)]
    assert made.state is State.GREETING
    assert made.peer is None
    made.receive(hello(), 1.0)
    assert made.state is State.OPEN
    assert made.peer == THEY
    assert sent(made) == [Ping(1, 1000.0)]


@pytest.mark.parametrize(
    "message", [it for it in ONE_OF_EACH if type(it) not in (Hello, Goodbye)], ids=lambda it: type(it).__name__
)
def test_nothing_counts_before_hello(message: Message) -> None:
    with pytest.raises(ProtocolError, match=f"must be Hello, not {type(message).__name__}"):
        session(certified_roles=("scheduler", "worker")).receive(encode(message), 0.0)


def test_a_peer_that_refuses_us_is_heard_before_its_hello() -> None:
    with pytest.raises(Refused, match="does not take us in: refused: no"):
        session().receive(encode(Goodbye("refused: no")), 0.0)


@pytest.mark.parametrize(
    ("greeting", "complaint"),
    [
        (hello(version=PROTOCOL_VERSION + 2), "upgrade taskd here"),
        (hello(version=PROTOCOL_VERSION - 2), "upgrade taskd there"),
        (hello(cluster="other"), "cluster 'other'"),
        (hello(node_id=3), "says it is node 3, and its certificate says 2"),
        (hello(roles=("scheduler",)), "certificate"),
        (hello(roles=("scheduler", "worker")), "certificate"),
        (hello(store_id=WE.store_id, boot=WE.boot), "this node itself"),
        (hello(store_id=WE.store_id), "copy of our own disk"),
    ],
)
def test_who_may_not_come_in(greeting: bytes, complaint: str) -> None:
    made = session()
    with pytest.raises(Refused, match=complaint):
        made.receive(greeting, 0.0)
    assert made.peer is None


def test_another_node_with_our_id_may_not_come_in() -> None:
    made = session(certified_id=WE.node_id)
    with pytest.raises(Refused, match="has our node id 1 and another store"):
        made.receive(hello(node_id=WE.node_id), 0.0)


def test_a_node_may_claim_less_than_its_certificate_says() -> None:
    made = session(certified_roles=("scheduler", "worker"))
    made.receive(hello(), 0.0)
    assert made.peer == THEY


def test_a_second_hello_breaks_the_rules() -> None:
    with pytest.raises(ProtocolError, match="second Hello"):
        opened().receive(hello(), 0.0)


def test_hello_must_come_in_time() -> None:
    made = session()
    assert made.next_deadline() == HELLO_TIMEOUT_S
    made.on_deadline(HELLO_TIMEOUT_S - 0.1)
    made.receive(b"\x00", HELLO_TIMEOUT_S - 0.05)  # A byte now and then buys no time.
    with pytest.raises(ProtocolError, match="no hello within"):
        made.on_deadline(HELLO_TIMEOUT_S)


# -- Roles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("roles", [("scheduler",), ("worker",), ("scheduler", "worker")], ids=",".join)
@pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda message: type(message).__name__)
def test_who_may_send_what(message: Message, roles: tuple[Role, ...]) -> None:
    made = opened(roles)
    kind = type(message)
    if kind is Hello:
        return  # Everybody's, and once: see above.
    if MAY_SEND[kind] & frozenset(roles):
        received = made.receive(encode(message), 0.0)
        assert received == ([] if kind in (Ping, Pong, Goodbye) else [message])
    else:
        with pytest.raises(ProtocolError, match=f"may not send {kind.__name__}"):
            made.receive(encode(message), 0.0)


def test_what_a_peer_claims_does_not_widen_what_it_may_send() -> None:
    made = session(certified_roles=("worker",))
    made.receive(hello(roles=("worker", "worker")), 0.0)
    with pytest.raises(ProtocolError, match="a worker may not send HandOver"):
        made.receive(encode(HandOver(Term(1, 1, 1), 1)), 0.0)


def test_messages_behind_hello_in_the_same_bytes_count() -> None:
    made = session(certified_roles=("scheduler",))
    assert made.receive(hello(roles=("scheduler",)) + encode(Leading(None)), 0.0) == [Leading(None)]


# -- Heartbeats --------------------------------------------------------------------------------------------------------


def test_a_ping_is_answered_by_its_number_and_our_clock() -> None:
    made = opened()
    made.receive(encode(Ping(77, 5.0)), 0.1)
    assert sent(made) == [Pong(77, 1000.0)]


def test_pings_go_out_at_every_heartbeat() -> None:
    made = opened()
    assert made.next_deadline() == HEARTBEAT_S
    made.on_deadline(HEARTBEAT_S - 0.01)
    assert sent(made) == []
    made.on_deadline(HEARTBEAT_S)
    assert sent(made) == [Ping(2, 1000.0)]
    assert made.next_deadline() == 2 * HEARTBEAT_S


def test_who_is_asked_need_not_ask() -> None:
    """Of two nodes the one with the greater id."""
    made = session(we=msgspec.structs.replace(WE, node_id=3))
    made.receive(hello(), 0.0)
    made.to_send()
    now = 0.0
    asked = 0
    for number in range(1, 4 * MEASURE_HEARTBEATS + 1):
        now = number * HEARTBEAT_S
        made.receive(encode(Ping(number, 1.0)), now - 0.01)
        made.on_deadline(now)
        messages = sent(made)
        assert Pong(number, 1000.0) in messages
        asked += len(messages) - 1
    assert asked == 3  # For the round trip.
    made.on_deadline(now + LATE_HEARTBEATS * HEARTBEAT_S - 0.02)
    assert sent(made) == []
    made.on_deadline(now + LATE_HEARTBEATS * HEARTBEAT_S)  # The other one is late.
    assert len(sent(made)) == 1


def test_the_node_with_the_lesser_id_always_asks() -> None:
    made = opened()
    for number in range(1, 10):
        made.receive(encode(Ping(number, 1.0)), number * HEARTBEAT_S - 0.01)
        made.on_deadline(number * HEARTBEAT_S)
        assert [type(message) for message in sent(made)] == [Pong, Ping]


def test_round_trip_and_offset_are_those_of_the_quickest_answer() -> None:
    made = opened()
    # Sent at 0 by our clock 1000; the answer says 1010.2 and comes 0.4 s later: the peer is 10 s ahead.
    made.receive(encode(Pong(1, 1010.2)), 0.4)
    assert made.round_trip_s == pytest.approx(0.4)
    assert made.clock_offset_s == pytest.approx(10.0)
    made.on_deadline(0.5)
    made.receive(encode(Pong(2, 1013.0)), 0.6)
    assert made.round_trip_s == pytest.approx(0.1)
    assert made.clock_offset_s == pytest.approx(12.95)
    made.on_deadline(1.0)
    made.receive(encode(Pong(3, 1099.0)), 1.9)  # A slow answer says nothing better.
    assert made.clock_offset_s == pytest.approx(12.95)


def test_pongs_that_nobody_asked_for_say_nothing() -> None:
    made = opened()
    made.receive(encode(Pong(5, 9999.0)), 0.1)
    assert made.round_trip_s is None
    made.receive(encode(Pong(1, 1000.0)), 0.2)
    made.receive(encode(Pong(1, 9999.0)), 0.2)
    assert made.clock_offset_s == pytest.approx(-0.1)


def test_an_old_quick_answer_is_forgotten_in_time() -> None:
    made = opened()
    made.receive(encode(Pong(1, 1000.0)), 0.001)
    now = 0.0
    for number in range(2, 12):
        now += HEARTBEAT_S
        made.on_deadline(now)
        made.receive(encode(Pong(number, 1000.0)), now + 0.1)
    assert made.round_trip_s == pytest.approx(0.1)


def test_a_silent_peer_is_given_up_and_anything_heard_puts_it_off() -> None:
    made = opened()
    now = 0.0
    while now < TIMEOUT_S - HEARTBEAT_S:
        now = made.next_deadline()
        made.on_deadline(now)
    made.receive(encode(Pong(1, 0.0))[:3], 2.0)  # Part of a frame is a sign of life, too.
    made.on_deadline(TIMEOUT_S)
    with pytest.raises(ProtocolError, match=r"silent for 2\.5 s"):
        made.on_deadline(2.0 + TIMEOUT_S)


# -- Goodbye -----------------------------------------------------------------------------------------------------------


def test_goodbye_ends_it_and_what_follows_is_not_heard() -> None:
    made = opened(("scheduler",))
    assert made.receive(encode(Leading(None)) + encode(Goodbye("stopping")) + encode(Leading(None)), 0.0) == [
        Leading(None)
    ]
    assert made.state is State.CLOSED
    assert made.goodbye == "stopping"
    made.on_deadline(100.0)
