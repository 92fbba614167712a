"""Deadlines, held against a plain dictionary."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from taskd.core.deadlines import GARBAGE_MIN, Deadlines

Operation = tuple[str, int, float]

TIMES = st.integers(0, 20).map(float)
OPERATIONS = st.lists(st.tuples(st.sampled_from(("set", "clear", "pop")), st.integers(0, 5), TIMES), max_size=200)


@given(OPERATIONS)
def test_it_behaves_as_a_dictionary_that_is_searched_for_the_earliest(operations: list[Operation]) -> None:
    deadlines: Deadlines[int] = Deadlines()
    model: dict[int, tuple[float, int]] = {}  # key -> due, order of setting
    for order, (operation, key, time) in enumerate(operations):
        if operation == "set":
            deadlines.set(key, time)
            if key not in model or model[key][0] != time:
                model[key] = (time, order)
        elif operation == "clear":
            deadlines.clear(key)
            model.pop(key, None)
        else:
            due = sorted((entry, key) for key, entry in model.items() if entry[0] <= time)
            assert deadlines.pop_due(time) == [key for _, key in due]
            for _, gone in due:
                del model[gone]
        assert len(deadlines) == len(model)
        assert deadlines.next() == min((due for due, _ in model.values()), default=None)
        assert [deadlines.get(key) for key in range(6)] == [model[key][0] if key in model else None for key in range(6)]


def test_what_is_due_at_one_time_comes_in_the_order_of_setting() -> None:
    deadlines: Deadlines[object] = Deadlines()
    keys = [object() for _ in range(5)]  # They cannot be compared.
    for key in keys:
        deadlines.set(key, 1.0)
    assert deadlines.pop_due(0.9) == []
    assert deadlines.pop_due(1.0) == keys
    assert deadlines.next() is None


@given(OPERATIONS)
def test_what_was_cleared_and_moved_does_not_pile_up(operations: list[Operation]) -> None:
    deadlines: Deadlines[int] = Deadlines()
    for _ in range(20):
        for operation, key, time in operations:
            if operation == "set":
                deadlines.set(key, time)
            else:
                deadlines.clear(key)
            assert len(deadlines._heap) <= GARBAGE_MIN + 2 * len(deadlines)


def test_the_same_deadline_set_and_cleared_for_ever_takes_no_room() -> None:
    deadlines: Deadlines[str] = Deadlines()
    deadlines.set("far", 1e9)
    for _ in range(1000):
        deadlines.set("near", 5.0)
        deadlines.set("near", 5.0)
        deadlines.clear("near")
    deadlines.set("near", 5.0)
    assert len(deadlines._heap) <= GARBAGE_MIN + 4
    assert deadlines.pop_due(5.0) == ["near"]
    assert deadlines.pop_due(5.0) == []
