"""The fields that a request's query may have: declared once, for reading them and for the OpenAPI description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from msgspec import Struct

from taskd.errors import InvalidRequest
from taskd.values import duration_s

Schema = dict[str, object]

_YES = frozenset({"1", "true", "yes", ""})
_NO = frozenset({"0", "false", "no"})


class Parameter(Protocol):
    """One field of a query."""

    @property
    def name(self) -> str:
        """As it stands in the query."""

    @property
    def summary(self) -> str:
        """What it is for."""

    def schema(self) -> Schema:
        """Its JSON Schema."""


class Flag(Struct, frozen=True):
    """Yes or no; given without a value it means yes."""

    name: str
    summary: str

    def schema(self) -> Schema:
        return {"type": "boolean", "default": False}

    def read(self, query: Mapping[str, str]) -> bool:
        """Its value. Raises InvalidRequest."""
        text = query.get(self.name, "0").lower()
        if text in _YES:
            return True
        if text in _NO:
            return False
        raise InvalidRequest(f"{text!r} is neither 1 nor 0", field=self.name)


class Whole(Struct, frozen=True):
    """A whole number within bounds."""

    name: str
    summary: str
    minimum: int
    maximum: int
    default: int | None = None

    def schema(self) -> Schema:
        schema: Schema = {"type": "integer", "minimum": self.minimum, "maximum": self.maximum}
        return schema if self.default is None else {**schema, "default": self.default}

    def read(self, query: Mapping[str, str]) -> int | None:
        """Its value, or the default. Raises InvalidRequest."""
        text = query.get(self.name)
        if text is None:
            return self.default
        # int() takes more than digits: blanks, underscores, digits of other scripts.
        value = int(text) if text.isascii() and text.isdigit() and len(text) <= 20 else -1
        if not self.minimum <= value <= self.maximum:
            raise InvalidRequest(
                f"{text!r} is not a whole number from {self.minimum} to {self.maximum}", field=self.name
            )
        return value


class Span(Struct, frozen=True):
    """A duration: seconds, or text such as 1m30s."""

    name: str
    summary: str
    maximum_s: float

    def schema(self) -> Schema:
        return {"type": "string", "examples": ["30", "1m30s"], "maxLength": 64}

    def read(self, query: Mapping[str, str]) -> float | None:
        """Seconds, or None where it is not given. Raises InvalidRequest."""
        text = query.get(self.name)
        if text is None:
            return None
        try:
            seconds = duration_s(text)
        except ValueError as error:
            raise InvalidRequest(str(error), field=self.name) from None
        if seconds > self.maximum_s:
            raise InvalidRequest(f"at most {self.maximum_s:g} seconds are allowed", field=self.name)
        return seconds


class Words(Struct, frozen=True):
    """One or several words, with commas between them or the field repeated."""

    name: str
    summary: str

    def schema(self) -> Schema:
        return {"type": "array", "items": {"type": "string"}}

    def read(self, query: Mapping[str, str]) -> tuple[str, ...]:
        """The words; none where the field is missing or empty."""
        text = query.get(self.name)
        return tuple(word for word in text.split(",") if word) if text else ()


class Choice(Struct, frozen=True):
    """One of a few words."""

    name: str
    summary: str
    choices: tuple[str, ...]
    default: str

    def schema(self) -> Schema:
        return {"type": "string", "enum": list(self.choices), "default": self.default}

    def read(self, query: Mapping[str, str]) -> str:
        """The word, or the default. Raises InvalidRequest."""
        text = query.get(self.name, self.default)
        if text not in self.choices:
            raise InvalidRequest(f"{text!r} is not one of {', '.join(self.choices)}", field=self.name)
        return text


class Line(Struct, frozen=True):
    """A short text."""

    name: str
    summary: str
    length_max: int

    def schema(self) -> Schema:
        return {"type": "string", "maxLength": self.length_max}

    def read(self, query: Mapping[str, str]) -> str:
        """The text, empty where it is missing. Raises InvalidRequest."""
        text = query.get(self.name, "")
        if len(text) > self.length_max or not text.isprintable():
            raise InvalidRequest(f"at most {self.length_max} printable characters are allowed", field=self.name)
        return text
