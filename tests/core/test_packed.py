"""The packed set does what a sorted list would."""

from __future__ import annotations

from bisect import bisect_left

from hypothesis import given
from hypothesis import strategies as st

from taskd.core import packed
from taskd.core.packed import PackedSet

numbers = st.integers(0, 60)
operations = st.lists(
    st.tuples(st.sampled_from(("add", "extend", "discard", "take", "peek", "below", "in")), numbers), max_size=80
)


def entry(number: int) -> bytes:
    return number.to_bytes(2)


@given(operations, st.integers(1, 4))
def test_it_is_a_sorted_set(steps: list[tuple[str, int]], chunk: int) -> None:
    packed_before, packed.CHUNK_ENTRIES = packed.CHUNK_ENTRIES, chunk
    try:
        made = PackedSet(2)
    finally:
        packed.CHUNK_ENTRIES = packed_before
    model: list[bytes] = []
    for name, number in steps:
        one = entry(number)
        at = bisect_left(model, one)
        is_there = at < len(model) and model[at] == one
        match name:
            case "add":
                made.add(one)
                if not is_there:
                    model.insert(at, one)
            case "extend":  # Ascending ones, and where the last two are the same, not.
                many = [entry(number), entry(number + 1), entry(number + 3), entry(number + 3 - number % 2)]
                made.extend(b"".join(many))
                model = sorted({*model, *many})
            case "discard":
                assert made.discard(one) == is_there
                if is_there:
                    del model[at]
            case "take":
                assert made.take(number % 7) == model[: number % 7]
                del model[: number % 7]
            case "peek":
                assert made.peek(number) == model[:number]
            case "below":
                assert made.count_below(one) == at
            case _:
                assert (one in made) == is_there
        assert len(made) == len(model)
        assert made.first() == (model[0] if model else None)
    assert made.peek(10_000) == model


def test_many_come_at_once_in_any_order() -> None:
    made = PackedSet(2)
    made.extend(b"".join(entry(number) for number in (*range(0, 5000, 2), *range(1, 5000, 2))))
    assert made.peek(10_000) == [entry(number) for number in range(5000)]
