"""How many requests one user may make."""

from __future__ import annotations

from taskd.api.budgets import BURST_S, USERS_KEPT, Budgets


def test_a_user_who_asks_too_often_waits_and_others_do_not() -> None:
    budgets = Budgets(10)
    at_once = sum(budgets.take("ana", 100.0) for _ in range(100))
    assert at_once == 10 * BURST_S
    assert budgets.take("eva", 100.0)
    assert not budgets.take("ana", 100.05)
    assert budgets.take("ana", 100.2)
    assert sum(budgets.take("ana", 200.0) for _ in range(100)) == 10 * BURST_S


def test_none_is_any_number() -> None:
    budgets = Budgets(0)
    assert all(budgets.take("ana", 100.0) for _ in range(10_000))


def test_a_slow_rate_lets_one_through() -> None:
    assert Budgets(1).take("ana", 0.0)


def test_users_who_are_quiet_are_forgotten() -> None:
    budgets = Budgets(1)
    for number in range(10 * USERS_KEPT):
        budgets.take(f"user {number}", float(number))
    assert len(budgets._left) == USERS_KEPT
