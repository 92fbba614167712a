"""Who may send what, and how much of it: every pair of role and message, and every budget."""

from __future__ import annotations

import itertools
import typing
from typing import Any

import pytest

from taskd.errors import ProtocolError
from taskd.protocol import messages as msg
from taskd.protocol.budget import BYTES_PER_S_MAX, GREETING_BYTES_MAX, MESSAGES_PER_S_MAX, WINDOW_S, Budget
from taskd.protocol.frames import encode
from taskd.protocol.session import Session
from tests.protocol.samples import ONE_OF_EACH
from tests.protocol.test_session import hello, opened
from tests.protocol.test_session import session as greeting

# Written out, so that who changes the table of the code has to say so here too. S: schedulers, W: workers.
TABLE = {
    "Hello": "SW", "Ping": "SW", "Pong": "SW", "Goodbye": "SW",
    "Request": "SW", "RequestPart": "SW", "Response": "SW", "ResponsePart": "SW", "Taken": "SW", "Abandon": "SW",
    "Leading": "SW",
    "Claim": "S", "Denied": "S", "Attach": "S", "Wanted": "S", "Page": "S", "PageTaken": "S", "Replicate": "S",
    "Replicated": "S", "HandOver": "S",
    "Register": "W", "Inventory": "W", "Started": "W", "Finished": "W", "Offering": "W",
    "Registered": "S", "Run": "S", "Cancel": "S", "Recall": "S", "Acknowledged": "S",
}  # fmt: skip
ROLES: tuple[tuple[msg.Role, ...], ...] = (("scheduler",), ("worker",), ("scheduler", "worker"))
PAIRS = list(itertools.product(ROLES, ONE_OF_EACH))


def test_the_tables_name_every_message() -> None:
    kinds = set(typing.get_args(msg.Any))
    assert kinds == set(msg.MAY_SEND) == set(MESSAGES_PER_S_MAX)
    assert {kind.__name__ for kind in kinds} == set(TABLE)


@pytest.mark.parametrize(
    ("roles", "message"), PAIRS, ids=lambda it: type(it).__name__ if isinstance(it, msg.Message) else "+".join(it)
)
def test_each_role_sends_what_is_its_own_and_nothing_else(roles: tuple[msg.Role, ...], message: msg.Message) -> None:
    session = opened(certified_roles=roles)
    may = any(role[0].upper() in TABLE[type(message).__name__] for role in roles)
    if isinstance(message, msg.Hello):
        with pytest.raises(ProtocolError, match="second Hello"):
            session.receive(encode(message), 1.0)
    elif may:
        session.receive(encode(message), 1.0)
    else:
        with pytest.raises(ProtocolError, match=f"may not send {type(message).__name__}"):
            session.receive(encode(message), 1.0)


def test_what_a_node_says_of_its_roles_does_not_widen_what_its_certificate_says() -> None:
    session: Session = opened(certified_roles=("worker",))
    with pytest.raises(ProtocolError, match="a worker may not send Claim"):
        session.receive(encode(msg.Claim(msg.Term(1, 1, 1), ())), 1.0)


@pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda it: type(it).__name__)
def test_a_torrent_of_one_kind_ends_the_connection(message: msg.Message) -> None:
    kind = type(message)
    budget = Budget(0.0)
    for _ in range(MESSAGES_PER_S_MAX[kind]):
        budget.spend(kind)
    with pytest.raises(ProtocolError, match=f"{kind.__name__} in a second"):
        budget.spend(kind)
    budget.take(1, WINDOW_S)
    budget.spend(kind)


def test_too_many_bytes_are_only_held_up() -> None:
    budget = Budget(0.0)
    assert budget.take(BYTES_PER_S_MAX, 0.1) == 0.0
    assert budget.take(1, 0.25) == pytest.approx(0.75)
    assert budget.take(1, 1.0) == 0.0


def test_before_its_hello_nobody_is_read_much_from() -> None:
    session: Any = Session(
        msg.NodeInfo(1, "we", ("scheduler",), b"w" * 16, 11, "1.0"), "home", 2, ("worker",), now=0.0, utc=lambda: 0.0
    )
    with pytest.raises(ProtocolError, match="is not allowed"):
        session.receive((GREETING_BYTES_MAX + 1).to_bytes(4, "big"), 0.0)


def test_a_large_message_may_follow_right_behind_the_hello() -> None:
    """A worker that comes back with much work says so in one go, and the network makes one piece of it."""
    large = msg.Inventory(1, tuple(msg.AttemptKey(bytes(16), number, msg.Term(1, 1, 1), 1) for number in range(3000)))
    assert len(encode(large)) > GREETING_BYTES_MAX
    assert greeting().receive(hello() + encode(large), 0.0) == [large]
