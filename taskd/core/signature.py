"""Whether params fit a handler: the JSON Schema that its worker advertises, made into a check that costs a microsecond.

The schema comes from another machine: it is data. Its depth and size are bounded, nothing in it is evaluated, and its
patterns are ignored. Where it says something that cannot be checked here, anything fits: the worker checks again.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

import msgspec
from msgspec import Meta

DEPTH_MAX = 16
NODES_MAX = 1000
_PLAIN: dict[str, Any] = {"string": str, "integer": int, "number": float, "boolean": bool, "null": None}
_LIMITS = {
    "minimum": "ge", "maximum": "le", "exclusiveMinimum": "gt", "exclusiveMaximum": "lt", "multipleOf": "multiple_of",
    "minLength": "min_length", "maxLength": "max_length", "minItems": "min_length", "maxItems": "max_length",
}  # fmt: skip


class Checker:
    """The check for one schema (JSON text)."""

    def __init__(self, schema: bytes) -> None:
        self._decoder: msgspec.json.Decoder[Any] | None = None
        try:
            root = msgspec.json.decode(schema, type=dict[str, Any])
            kind = _Builder(root.get("$defs") or {}).type_of(root, 0)
            self._decoder = None if kind is Any else msgspec.json.Decoder(kind)
        except (msgspec.MsgspecError, TypeError, ValueError, KeyError, RecursionError, AttributeError):
            self._decoder = None  # Not a schema we understand: the worker decides.

    def check(self, params: bytes) -> str | None:
        """None where params (JSON text) fit, otherwise what is wrong, with its place."""
        if self._decoder is None:
            return None
        try:
            self._decoder.decode(params or b"{}")
        except msgspec.DecodeError as error:
            return str(error)
        return None


class _Builder:
    """Makes types for msgspec from a schema."""

    def __init__(self, definitions: dict[str, Any]) -> None:
        self._definitions = definitions
        self._nodes = 0

    def type_of(self, schema: Any, depth: int) -> Any:
        """The type that a schema describes; Any where it cannot be said."""
        self._nodes += 1
        if depth > DEPTH_MAX or self._nodes > NODES_MAX or not isinstance(schema, dict):
            return Any
        if "$ref" in schema:
            name = str(schema["$ref"]).removeprefix("#/$defs/")
            return self.type_of(self._definitions[name], depth + 1)
        if "enum" in schema:
            values = schema["enum"]
            return Literal[tuple(values)] if all(type(value) in (str, int) for value in values) else Any
        if "const" in schema:
            return Literal[schema["const"]] if type(schema["const"]) in (str, int) else Any
        if "anyOf" in schema:
            kinds = [self.type_of(part, depth + 1) for part in schema["anyOf"]]
            return Any if Any in kinds else Union[tuple(kinds)]  # noqa: UP007  # made at run time
        kind = schema.get("type")
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            return self._array(schema, depth)
        if kind not in _PLAIN:
            return Any
        return _limited(_PLAIN[kind], schema)

    def _object(self, schema: dict[str, Any], depth: int) -> Any:
        properties = schema.get("properties")
        if properties is None:
            values = schema.get("additionalProperties", True)
            value_kind: Any = self.type_of(values, depth + 1)
            return dict[str, value_kind]
        required = set(schema.get("required", ()))
        fields: list[Any] = []
        renamed: dict[str, str] = {}
        for number, (name, part) in enumerate(properties.items()):
            field, kind = f"field{number}", self.type_of(part, depth + 1)
            renamed[field] = str(name)
            fields.append((field, kind) if name in required else (field, kind, msgspec.UNSET))
        fields.sort(key=len)  # Those without a default come first.
        return msgspec.defstruct(
            "Params", fields, rename=renamed, forbid_unknown_fields=schema.get("additionalProperties") is False
        )

    def _array(self, schema: dict[str, Any], depth: int) -> Any:
        if "prefixItems" in schema:
            kinds: Any = tuple(self.type_of(part, depth + 1) for part in schema["prefixItems"])
            return tuple[kinds]
        item_kind: Any = self.type_of(schema.get("items"), depth + 1)
        return _limited(list[item_kind], schema)


def _limited(kind: Any, schema: dict[str, Any]) -> Any:
    limits = {ours: schema[theirs] for theirs, ours in _LIMITS.items() if theirs in schema}
    return Annotated[kind, Meta(**limits)] if limits else kind
