"""Whether params fit a handler: the JSON Schema that its worker advertises, made into a check that costs a microsecond.

The schema comes from another machine, so it is data: its size and depth are bounded, none of its names becomes a name
in our code, its patterns are never run, and what is not understood is passed over. A check is never stricter than the
handler: where a schema says something that cannot be said here, anything fits, and the worker checks again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeGuard, Union

import msgspec
from msgspec import UNSET, Meta, UnsetType

SCHEMA_BYTES_MAX = 1 << 16
DEPTH_MAX = 32
ROUNDS_MAX = 3  # Of what contains itself.
NODES_MAX = 2000  # Parts of a schema that are looked at.
OBJECTS_MAX = 200  # Of those with named fields: each becomes a class, and a class takes 50 microseconds to make.
VALUES_MAX = 1000  # Of an enumeration.
SHOWN_NAMES_MAX = 20  # Known names in the message about an unknown one.

_NOTHING = b"{}"  # What a task without params is called with.
_INT_MIN, _INT_MAX = -(1 << 63), (1 << 63) - 1  # What msgspec takes as bounds.

# The error texts of msgspec that are said better.
_PLACE = re.compile(r"(.*?)(?: - at `\$?(.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)


class Checker:
    """The check for one schema (JSON text). A schema that makes no sense accepts everything."""

    def __init__(self, schema: bytes) -> None:
        self._decode: Callable[[bytes], Any] | None = None
        self._names: tuple[str, ...] | None = None  # of the params, where they are known
        if len(schema) > SCHEMA_BYTES_MAX:
            return
        try:
            root = msgspec.json.decode(schema)
            builder = _Builder(root)
            wanted = builder.type_of(root, 0)
            if wanted is not Any:
                self._decode = msgspec.json.Decoder(wanted).decode
                self._names = builder.property_names(root)
        except (msgspec.DecodeError, TypeError, ValueError, RecursionError):
            pass  # No JSON, or a mixture of types that msgspec does not take.

    def check(self, params: bytes) -> str | None:
        """None where params (JSON text; empty counts as {}) fit, else what is wrong, e.g. "params.width: expected
        `int`, got `str`"."""
        if self._decode is None:
            return None
        try:
            self._decode(params or _NOTHING)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return wrong_params(error, self._names)
        return None


def wrong_params(error: Exception, names: tuple[str, ...] | None = None) -> str:
    """What msgspec found wrong with params, as people read it. `names` are the ones that a handler knows."""
    if isinstance(error, RecursionError):
        return "params: nested too deeply"
    if not isinstance(error, msgspec.ValidationError):  # No JSON at all.
        # Versions of msgspec say this in different words, not all of them for people.
        return "params: no valid UTF-8" if "utf-8" in str(error).lower() else f"params: {error}"
    found = _PLACE.fullmatch(str(error))
    what, place = (found[1], found[2] or "") if found is not None else (str(error), "")
    if missing := _MISSING.fullmatch(what):
        return f"params{place}.{missing[1]}: is missing"
    if unknown := _UNKNOWN.fullmatch(what):
        return f"params{place}.{unknown[1]}: unknown parameter{_known(names) if not place else ''}"
    return f"params{place}: {what[:1].lower()}{what[1:]}"


def _known(names: tuple[str, ...] | None) -> str:
    if not names:
        return "" if names is None else "; this task takes none"
    more = ", …" if len(names) > SHOWN_NAMES_MAX else ""
    return f"; this task takes: {', '.join(names[:SHOWN_NAMES_MAX])}{more}"


_SCALARS: dict[str, Any] = {"string": str, "integer": int, "number": float, "boolean": bool, "null": None}
_NUMBER_BOUNDS = {
    "minimum": "ge", "maximum": "le", "exclusiveMinimum": "gt", "exclusiveMaximum": "lt", "multipleOf": "multiple_of",
}  # fmt: skip
_DEFINITIONS = "#/$defs/"


class _Builder:
    """Makes types for msgspec out of one schema."""

    def __init__(self, root: Any) -> None:
        definitions = root.get("$defs") if isinstance(root, dict) else None
        self._definitions: dict[str, Any] = definitions if isinstance(definitions, dict) else {}
        self._open: Counter[str] = Counter()  # definitions that are being made
        self._nodes = 0
        self._objects = 0

    def property_names(self, root: dict[str, Any]) -> tuple[str, ...] | None:
        """The names of the params at the top, where they have some."""
        schema, _ = self._resolved(root)
        properties = schema.get("properties")
        return tuple(properties) if isinstance(properties, dict) else None

    def type_of(self, schema: Any, depth: int) -> Any:
        """The type that takes all that the schema takes; Any where that cannot be said."""
        self._nodes += 1
        if depth > DEPTH_MAX or self._nodes > NODES_MAX or not isinstance(schema, dict):
            return Any
        schema, name = self._resolved(schema)
        if not name:
            return self._plain_type_of(schema, depth)
        if self._open[name] >= ROUNDS_MAX:
            return Any  # It contains itself: some rounds are checked here, the worker checks them all.
        self._open[name] += 1
        try:
            return self._plain_type_of(schema, depth)
        finally:
            self._open[name] -= 1

    def _resolved(self, schema: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """A schema, or the definition that it refers to and its name. One that leads nowhere says nothing."""
        reference = schema.get("$ref")
        if reference is None:
            return schema, ""
        name = reference.removeprefix(_DEFINITIONS) if isinstance(reference, str) else ""
        found = self._definitions.get(name)
        return (found, name) if isinstance(found, dict) and "$ref" not in found else ({}, "")

    def _plain_type_of(self, schema: dict[str, Any], depth: int) -> Any:
        for key in ("enum", "const"):
            if key in schema:
                return _literal(schema["enum"] if key == "enum" else [schema["const"]])
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self._union(schema, schema[key], depth)
        kind = schema.get("type")
        if isinstance(kind, list):
            return self._union({}, [{**schema, "type": each} for each in kind], depth)
        match kind:
            case "object":
                return self._object(schema, depth)
            case "array":
                return self._array(schema, depth)
            case "integer" | "number":
                return _limited(_SCALARS[kind], _number_bounds(schema))
            case "string" if schema.get("format") == "decimal":
                return str | float  # A handler takes both.
            case "string" if "contentEncoding" not in schema:
                return _limited(str, _length_bounds(schema, "minLength", "maxLength"))
        return _SCALARS.get(kind, Any) if isinstance(kind, str) else Any

    # -- Objects -------------------------------------------------------------------------------------------------------

    def _object(self, schema: dict[str, Any], depth: int, tag: tuple[str, str] | None = None) -> Any:
        properties = schema.get("properties")
        others = schema.get("additionalProperties", True)
        if not isinstance(properties, dict):
            value: Any = self.type_of(others, depth + 1)
            return _limited(dict[str, value], _length_bounds(schema, "minProperties", "maxProperties"))
        self._objects += 1
        if self._objects > OBJECTS_MAX:
            return dict[str, Any]
        required = schema.get("required")
        needed = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
        fields: list[Any] = []
        renamed: dict[str, str] = {}
        for number, (name, part) in enumerate(properties.items()):
            if tag is not None and name == tag[0]:
                continue
            field, wanted = f"f{number}", self.type_of(part, depth + 1)
            renamed[field] = name
            fields.append((field, wanted) if name in needed else (field, Union[wanted, UnsetType], UNSET))  # noqa: UP007  # `|` takes no Literal with None
        tagging: dict[str, Any] = {"tag_field": tag[0], "tag": tag[1]} if tag is not None else {}
        return msgspec.defstruct(
            "Params", fields, rename=renamed, forbid_unknown_fields=others is False, kw_only=True, gc=False, **tagging
        )

    # -- Arrays --------------------------------------------------------------------------------------------------------

    def _array(self, schema: dict[str, Any], depth: int) -> Any:
        bounds = _length_bounds(schema, "minItems", "maxItems")
        if schema.get("uniqueItems"):
            bounds.pop("max_length", None)  # A handler's set counts equal ones once.
        prefix = schema.get("prefixItems")
        if not isinstance(prefix, list):
            item: Any = self.type_of(schema.get("items"), depth + 1)
            return _limited(list[item], bounds)
        if prefix and bounds == {"min_length": len(prefix), "max_length": len(prefix)}:
            items = tuple(self.type_of(part, depth + 1) for part in prefix)
            return tuple[items]  # type: ignore[valid-type]  # made at run time
        return _limited(list[Any], bounds)  # Some may be missing, or more may follow.

    # -- Alternatives --------------------------------------------------------------------------------------------------

    def _union(self, schema: dict[str, Any], parts: Any, depth: int) -> Any:
        if not isinstance(parts, list) or not parts:
            return Any
        tagged = self._tagged(schema, parts, depth)
        kinds = tagged if tagged is not None else [self.type_of(part, depth + 1) for part in parts]
        if Any in kinds:
            return Any
        wanted: Any = Union[tuple(kinds)]  # noqa: UP007  # made at run time
        if _is_possible(wanted):
            return wanted
        # Two of one kind, such as two lists: of those only the kind is checked.
        wanted = Union[tuple(map(_widened, kinds))]  # noqa: UP007
        return wanted if _is_possible(wanted) else Any

    def _tagged(self, schema: dict[str, Any], parts: list[Any], depth: int) -> list[Any] | None:
        """The alternatives where all are objects that one of their fields tells apart, else None."""
        discriminator = schema.get("discriminator")
        field = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
        if not isinstance(field, str):
            return None
        kinds: list[Any] = []
        for part in parts:
            found, name = self._resolved(part) if isinstance(part, dict) else ({}, "")
            properties = found.get("properties")
            mark = properties.get(field) if isinstance(properties, dict) else None
            values = mark.get("enum") if isinstance(mark, dict) else None
            if self._open[name] or not (isinstance(values, list) and len(values) == 1 and isinstance(values[0], str)):
                return None
            kinds.append(self._object(found, depth + 1, tag=(field, values[0])))
        return kinds


def _literal(values: Any) -> Any:
    """One of these values; Any where not all of them are text, whole numbers or null."""
    if not isinstance(values, list) or not 0 < len(values) <= VALUES_MAX:
        return Any
    if not all(value is None or type(value) is str or _is_int(value) for value in values):
        return Any
    return Literal[tuple(values)]


def _widened(kind: Any) -> Any:
    """The kind of JSON value that a type takes, without what it says of it."""
    try:
        example = msgspec.json.schema(kind)
    except TypeError:
        return Any
    if "$ref" in example:
        return dict[str, Any]
    return {"object": dict[str, Any], "array": list[Any], **_SCALARS}.get(example.get("type", ""), Any)


def _is_possible(kind: Any) -> bool:
    try:
        msgspec.json.Decoder(kind)
    except TypeError:
        return False
    return True


def _limited(kind: Any, bounds: dict[str, Any]) -> Any:
    return Annotated[kind, Meta(**bounds)] if bounds else kind


def _number_bounds(schema: dict[str, Any]) -> dict[str, Any]:
    is_whole = schema["type"] == "integer"
    bounds: dict[str, Any] = {}
    for key, ours in _NUMBER_BOUNDS.items():
        bound = schema.get(key)
        if _is_int(bound) or (type(bound) is float and not is_whole):
            bounds[ours] = bound
    # Of two lower bounds msgspec takes one only; and a multiple of nothing is nothing.
    if "ge" in bounds:
        bounds.pop("gt", None)
    if "le" in bounds:
        bounds.pop("lt", None)
    if bounds.get("multiple_of", 1) <= 0 or not is_whole:
        bounds.pop("multiple_of", None)
    return bounds


def _length_bounds(schema: dict[str, Any], lower: str, upper: str) -> dict[str, Any]:
    bounds = {"min_length": schema.get(lower), "max_length": schema.get(upper)}
    return {ours: bound for ours, bound in bounds.items() if _is_int(bound) and bound >= 0}


def _is_int(value: Any) -> TypeGuard[int]:
    return type(value) is int and _INT_MIN <= value <= _INT_MAX
