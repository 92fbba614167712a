"""Constraints: what is read, what is refused, and which labels fulfil them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd.core.constraints import VALUES_MAX, Constraint, is_label_key, matches, parse


@pytest.mark.parametrize(
    ("text", "constraint", "canonical"),
    [
        ("zone=a", Constraint("zone", "=", ("a",)), "zone=a"),
        ("  zone ==  a b ", Constraint("zone", "=", ("a b",)), "zone=a b"),
        ("zone!=a", Constraint("zone", "!=", ("a",)), "zone!=a"),
        ("zone in b, a ,b", Constraint("zone", "in", ("a", "b")), "zone in a,b"),
        ("zone\tin a".expandtabs(1), Constraint("zone", "in", ("a",)), "zone in a"),
        ("gpu", Constraint("gpu", "has"), "gpu"),
        ("! gpu", Constraint("gpu", "lacks"), "!gpu"),
        ("_private", Constraint("_private", "has"), "_private"),
        ("in", Constraint("in", "has"), "in"),
        ("in in in", Constraint("in", "in", ("in",)), "in in in"),
        ("example.org/disk-type=ssd", Constraint("example.org/disk-type", "=", ("ssd",)), "example.org/disk-type=ssd"),
        ("note=a=b", Constraint("note", "=", ("a=b",)), "note=a=b"),
    ],
)
def test_forms(text: str, constraint: Constraint, canonical: str) -> None:
    assert parse(text) == constraint
    assert constraint.text == canonical
    assert parse(canonical) == constraint


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is not a constraint"),
        ("  ", "is not a constraint"),
        ("=a", "is not a constraint"),
        ("!zone=a", "is not a constraint"),
        ("!zone in a", "is not a constraint"),
        ("!", "is not a constraint"),
        ("cpus >= 4", "is not a constraint"),
        ("two words", "is not a constraint"),
        ("-key=a", "is not a constraint"),
        ("zone=", "has no value"),
        ("zone!= ", "has no value"),
        ("zone in", "has an empty value"),
        ("zone in a,,b", "has an empty value"),
        ("zone=a\0b", "cannot be printed"),
        ("zone=a\nb", "cannot be printed"),
        ("zone in " + ",".join(map(str, range(VALUES_MAX + 1))), "64 are allowed"),
    ],
)
def test_what_is_refused_is_explained(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse(text)


@pytest.mark.parametrize(
    ("text", "labels", "verdict"),
    [
        ("zone=a", {"zone": "a"}, True),
        ("zone=a", {"zone": "b"}, False),
        ("zone=a", {}, False),
        ("zone!=a", {"zone": "b"}, True),
        ("zone!=a", {"zone": "a"}, False),
        ("zone!=a", {}, True),
        ("zone in a,b", {"zone": "b"}, True),
        ("zone in a,b", {"zone": "c"}, False),
        ("zone in a,b", {}, False),
        ("zone", {"zone": ""}, True),
        ("zone", {"Zone": "a"}, False),
        ("!zone", {}, True),
        ("!zone", {"zone": ""}, False),
    ],
)
def test_matches(text: str, labels: dict[str, str], verdict: bool) -> None:
    assert matches(parse(text), labels) is verdict


def test_label_keys() -> None:
    assert all(is_label_key(key) for key in ("a", "A-b", "example.org/x_y", "9"))
    assert not any(is_label_key(key) for key in ("", ".a", "a-", "a b", "a=b", "ä", "a\n"))


@given(st.text(max_size=80))
def test_any_text_is_read_the_same_again_or_refused(text: str) -> None:
    try:
        constraint = parse(text)
    except ValueError:
        return
    assert parse(constraint.text) == constraint
