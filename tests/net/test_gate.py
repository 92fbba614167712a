"""The gate, hints and refusals: what strangers can use up, and what they cannot."""

from __future__ import annotations

from typing import Any

import pytest

from taskd.net import gate as gate_module
from taskd.net import hints as hints_module
from taskd.net import refusals as refusals_module
from taskd.net.gate import (
    KNOWN_BURST,
    KNOWN_S,
    SOURCE_BURST,
    SOURCE_PER_S,
    STRANGERS_BURST,
    Gate,
    source_of,
)
from taskd.net.hints import MET_S, NAMES_MAX, Hints
from taskd.net.refusals import LOGGED_S, Refusals


def admitted(gate: Gate, host: str, tries: int, now: float = 0.0) -> int:
    return sum(not gate.admit(host, now) for _ in range(tries))


# -- The gate ----------------------------------------------------------------------------------------------------------


def test_one_address_has_a_budget_that_comes_back_slowly() -> None:
    gate = Gate(0.0)
    assert admitted(gate, "10.0.0.1", 1000) == SOURCE_BURST
    assert gate.admit("10.0.0.1", 0.0) == "begins too many handshakes"
    assert admitted(gate, "10.0.0.1", 1000, 2.0) == 2 * SOURCE_PER_S


def test_all_strangers_together_have_one_too() -> None:
    gate = Gate(0.0)
    assert sum(admitted(gate, f"10.0.{number}.1", 10) for number in range(200)) == STRANGERS_BURST
    assert "strangers" in gate.admit("10.1.0.1", 0.0)


def test_a_node_that_came_before_is_kept_out_by_no_flood() -> None:
    gate = Gate(0.0)
    assert gate.admit("10.0.0.7", 0.0) == ""
    gate.greeted("10.0.0.7", 0.0)
    for number in range(300):
        admitted(gate, f"10.0.{number % 200}.1", 10)
    assert "strangers" in gate.admit("10.9.0.1", 0.0)
    assert admitted(gate, "10.0.0.7", 1000) == KNOWN_BURST
    assert "strangers" in gate.admit("10.0.0.7", KNOWN_S) or admitted(gate, "10.0.0.7", 1000, KNOWN_S) < KNOWN_BURST


def test_good_hellos_cost_nothing() -> None:
    gate = Gate(0.0)
    for _ in range(1000):
        assert gate.admit("10.0.0.1", 0.0) == ""
        gate.greeted("10.0.0.1", 0.0)


def test_even_a_member_cannot_come_without_end() -> None:
    gate = Gate(0.0)
    greeted = 0
    while not gate.admit("10.0.0.1", 0.0):
        gate.greeted("10.0.0.1", 0.0)
        greeted += 1
    assert greeted < gate_module.GREETED_BURST + SOURCE_BURST + KNOWN_BURST + 1


def test_sources_are_forgotten_before_they_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "SOURCES_MAX", 10)
    gate = Gate(0.0)
    for number in range(100):
        gate.admit(f"10.0.0.{number}", float(number))
        gate.greeted(f"10.0.1.{number}", float(number))
    assert len(gate._sources) == len(gate._known) == len(gate._greeted) == 10


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8::1:2:3:4", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("head.local", "head.local"),
    ],
)
def test_what_counts_as_one_source(host: str, source: str) -> None:
    assert source_of(host) == source


# -- Hints -------------------------------------------------------------------------------------------------------------

OWN, FALSE = "a" * 32, "f" * 32


def test_where_a_node_was_met_stands_above_what_is_announced() -> None:
    hints = Hints()
    hints.add(1, OWN, ["10.0.0.1:7710"])
    hints.met(1, OWN, "10.0.0.1:7710", 0.0)
    hints.add(1, FALSE, ["6.6.6.6:7710"])
    hints.add(1, OWN, ["6.6.6.7:7710"])  # In its own name.
    assert hints.addresses(1, 0.0) == ("10.0.0.1:7710", "6.6.6.7:7710", "6.6.6.6:7710")


def test_what_strangers_take_back_is_theirs() -> None:
    hints = Hints()
    hints.add(1, OWN, ["10.0.0.1:7710"])
    hints.add(1, FALSE, ["6.6.6.6:7710"])
    hints.remove(1, FALSE)
    assert hints.addresses(1, 0.0) == ("10.0.0.1:7710",)
    hints.met(1, OWN, "10.0.0.1:7710", 0.0)
    hints.remove(1, OWN)  # Said in its name, perhaps by another.
    assert hints.addresses(1, MET_S) == ("10.0.0.1:7710",)
    assert hints.addresses(1, MET_S + 1) == ()


def test_names_of_one_node_are_bounded_and_its_own_stays() -> None:
    hints = Hints()
    hints.add(1, OWN, ["10.0.0.1:7710"])
    hints.met(1, OWN, "10.0.0.9:7710", 0.0)
    for number in range(100):
        hints.add(1, f"{number:032x}", [f"6.6.6.{number}:1"] * 100)
    addresses = hints.addresses(1, 0.0)
    assert addresses[:2] == ("10.0.0.9:7710", "10.0.0.1:7710")
    assert len(addresses) <= 1 + NAMES_MAX


def test_announced_nodes_push_out_each_other_and_nobody_who_was_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hints_module, "UNMET_MAX", 3)
    hints = Hints()
    hints.met(1, OWN, "10.0.0.1:7710", 0.0)
    dropped = [hints.add(number, FALSE, ["6.6.6.6:1"]) for number in range(2, 10)]
    assert [node_id for node_id in dropped if node_id is not None] == [2, 3, 4, 5, 6]
    assert hints.addresses(1, 0.0)
    assert not hints.addresses(2, 0.0)
    assert hints.addresses(9, 0.0)


# -- The log -----------------------------------------------------------------------------------------------------------


def test_each_source_has_one_line_a_minute_whatever_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals_module, "LINES_MAX", 3)
    lines: list[dict[str, Any]] = []
    refusals = Refusals(lambda level, event, **fields: lines.append(fields))
    for number in range(1000):
        refusals.note("10.0.0.1", "10.0.0.1:99", f"reason {number}", now=number / 100)
    assert [line["before"] for line in lines] == [0]
    for number in range(10):
        refusals.note(f"10.0.1.{number}", "", "", now=11.0)
    assert len(lines) == 3
    refusals.note("10.0.0.1", "10.0.0.1:99", "again", now=LOGGED_S)
    assert lines[3:] == [{"address": "10.0.0.1:99", "reason": "again", "before": 999, "others": 8}]
    assert refusals.count == 1011
