"""Constraints on labels: `key=value`, `key!=value`, `key in a,b`, `key` (has that label), `!key` (has not)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

Operator = Literal["=", "!=", "in", "has", "lacks"]

VALUES_MAX = 64  # Of one `in`.

_KEY = r"[A-Za-z0-9_](?:[A-Za-z0-9._/-]*[A-Za-z0-9_])?"
_CONSTRAINT = re.compile(
    rf"(?P<lacks>!\s*)?(?P<key>{_KEY})\s*(?:(?P<sign>!=|==?)(?P<value>.*)|\s(?P<word>in)(?:\s(?P<list>.*))?)?"
)
_LABEL_KEY = re.compile(_KEY)
_FORMS = "write key=value, key!=value, key in a,b, key, or !key"


class Constraint(Struct, frozen=True):
    """What one label of a worker must be. `values` holds one value for `=` and `!=`, none for `has` and `lacks`."""

    key: str
    op: Operator
    values: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The one way to write it, so that equal constraints are equal texts."""
        match self.op:
            case "has":
                return self.key
            case "lacks":
                return f"!{self.key}"
            case "in":
                return f"{self.key} in {','.join(self.values)}"
            case sign:
                return f"{self.key}{sign}{self.values[0]}"


def parse(text: str) -> Constraint:
    """Read a constraint. Raises ValueError with a text that says what is wrong and what is allowed."""
    stripped = text.strip()
    if not stripped.isprintable():
        raise ValueError(f"the constraint {text!r} holds characters that cannot be printed")
    found = _CONSTRAINT.fullmatch(stripped)
    if found is None or (found["lacks"] and (found["sign"] or found["word"])):
        raise ValueError(f"{text!r} is not a constraint: {_FORMS}")
    key = found["key"]
    if found["sign"]:
        value = found["value"].strip()
        if not value:
            raise ValueError(f"the constraint {text!r} has no value: {_FORMS}")
        return Constraint(key, "!=" if found["sign"] == "!=" else "=", (value,))
    if found["word"]:
        return Constraint(key, "in", _values(text, found["list"] or ""))
    return Constraint(key, "lacks" if found["lacks"] else "has")


def _values(text: str, listed: str) -> tuple[str, ...]:
    values = tuple(sorted({value.strip() for value in listed.split(",")}))
    if "" in values:
        raise ValueError(f"the constraint {text!r} has an empty value: {_FORMS}")
    if len(values) > VALUES_MAX:
        raise ValueError(f"the constraint {text!r} lists {len(values)} values; {VALUES_MAX} are allowed")
    return values


def matches(constraint: Constraint, labels: Mapping[str, str]) -> bool:
    """Whether a worker with these labels fulfils it. A worker without the label fulfils `!=` and `!key` only."""
    value = labels.get(constraint.key)
    match constraint.op:
        case "has":
            return value is not None
        case "lacks":
            return value is None
        case "!=":
            return value != constraint.values[0]
        case _:
            return value in constraint.values


def is_label_key(text: str) -> bool:
    """Whether a label may be called so: letters, digits, and `. _ / -` between them."""
    return _LABEL_KEY.fullmatch(text) is not None
