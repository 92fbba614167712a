"""Constraints on the labels of nodes: `key=value`, `key!=value`, `key in a,b`, `key` (has that label), `!key` (has not)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

Operator = Literal["=", "!=", "in", "has", "lacks"]
_KEY = r"[A-Za-z0-9_][A-Za-z0-9_.\-/]{0,62}"
_FORMS: tuple[tuple[re.Pattern[str], Operator], ...] = (
    (re.compile(rf"({_KEY})\s+in\s+(.+)"), "in"),
    (re.compile(rf"({_KEY})\s*!=\s*(.*)"), "!="),
    (re.compile(rf"({_KEY})\s*=\s*(.*)"), "="),
    (re.compile(rf"!\s*({_KEY})()"), "lacks"),
    (re.compile(rf"({_KEY})()"), "has"),
)


class Constraint(Struct, frozen=True):
    """One condition; `text` is how it was written."""

    text: str
    key: str
    operator: Operator
    values: tuple[str, ...] = ()


def parse(text: str) -> Constraint:
    """A constraint from its text. Raises ValueError that shows the forms."""
    for pattern, operator in _FORMS:
        match = pattern.fullmatch(text.strip())
        if match is None:
            continue
        key, value = match.group(1), match.group(2).strip()
        if operator == "in":
            values = tuple(part.strip() for part in value.split(","))
            if not all(values):
                break
            return Constraint(text, key, operator, values)
        return Constraint(text, key, operator, (value,) if operator in ("=", "!=") else ())
    raise ValueError(f"{text!r} is no constraint; write key=value, key!=value, key in a,b, key, or !key")


def matches(constraint: Constraint, labels: Mapping[str, str]) -> bool:
    """Whether labels meet it. A label that is missing meets `!=` and `!key`, nothing else."""
    value = labels.get(constraint.key)
    match constraint.operator:
        case "has":
            return value is not None
        case "lacks":
            return value is None
        case "!=":
            return value not in constraint.values
        case _:
            return value in constraint.values
