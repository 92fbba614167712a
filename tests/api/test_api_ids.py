"""The ids of the tasks that a request makes: the same whenever it is answered, and never those of another."""

from __future__ import annotations

from uuid import RFC_4122, UUID

import pytest

from taskd.api.ids import RequestIds
from taskd.daemon.ids import IdSource
from taskd.errors import InvalidRequest

NOW_S = 1_800_000_000.0


def test_they_count_on_from_the_requests_own() -> None:
    first = IdSource().next(NOW_S)
    ids = [RequestIds(first, NOW_S).id(place) for place in range(1000)]
    assert ids[0] == first
    assert ids == [RequestIds(first, NOW_S + 60).id(place) for place in range(1000)]
    assert ids == sorted(set(ids))
    assert all((UUID(bytes=made).version, UUID(bytes=made).variant) == (7, RFC_4122) for made in ids)


def test_requests_of_one_node_never_meet() -> None:
    source = IdSource()
    for _ in range(1000):
        one, other = source.next(NOW_S), source.next(NOW_S)
        assert RequestIds(one, NOW_S).id(100_000) < other


def test_the_greatest_id_counts_on_too() -> None:
    first = bytes.fromhex("01a31812c0007fffbfffffffffffffff")
    made = RequestIds(first, NOW_S)
    assert UUID(bytes=made.id(1)).variant == RFC_4122
    assert made.has_made(made.id(1), 2)


def test_it_knows_its_own() -> None:
    first = IdSource().next(NOW_S)
    made = RequestIds(first, NOW_S)
    assert made.has_made(made.id(0), 1)
    assert made.has_made(made.id(4), 5)
    assert not made.has_made(made.id(5), 5)
    assert not made.has_made(IdSource().next(NOW_S), 100_000)


@pytest.mark.parametrize(
    "first",
    [b"", b"x", bytes(16), IdSource().next(NOW_S)[:15], IdSource().next(NOW_S + 7200)],
    ids=["none", "short", "no version", "cut", "of the future"],
)
def test_what_is_no_id_is_refused(first: bytes) -> None:
    with pytest.raises(InvalidRequest):
        RequestIds(first, NOW_S)
