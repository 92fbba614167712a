"""How long a scheduler that came back stays a standby."""

from __future__ import annotations

import pytest

from taskd.core.flaps import KEPT_S, WAIT_MAX_S, Flaps


@pytest.mark.parametrize(
    ("times", "wait_s"), [(0, 10.0), (1, 10.0), (2, 20.0), (3, 40.0), (9, WAIT_MAX_S), (99, WAIT_MAX_S)]
)
def test_each_time_again_doubles_the_wait(times: int, wait_s: float) -> None:
    flaps = Flaps()
    for number in range(times):
        flaps.note(7, float(number))
    assert flaps.wait_s(7, float(times), 10.0) == wait_s
    assert flaps.wait_s(8, float(times), 10.0) == 10.0


def test_after_an_hour_it_is_forgotten() -> None:
    flaps = Flaps()
    flaps.note(7, 0.0)
    flaps.note(7, 1.0)
    assert flaps.wait_s(7, KEPT_S - 1, 10.0) == 20.0
    assert flaps.wait_s(7, KEPT_S + 1, 10.0) == 10.0
    flaps.note(7, 2 * KEPT_S)
    assert flaps.wait_s(7, 2 * KEPT_S, 10.0) == 10.0


def test_who_is_told_to_wait_for_longer_or_not_at_all_does() -> None:
    flaps = Flaps()
    for _ in range(5):
        flaps.note(7, 0.0)
    assert flaps.wait_s(7, 1.0, 3600.0) == 3600.0
    assert flaps.wait_s(7, 1.0, 0.0) == 0.0
