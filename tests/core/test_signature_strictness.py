"""Checks of params: as strict as the schema where that can be said, never stricter than the handler, and harmless."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta

from taskd.core.signature import DEPTH_MAX, OBJECTS_MAX, ROUNDS_MAX, SCHEMA_BYTES_MAX, Checker, wrong_params


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.0


@dataclasses.dataclass
class Tree:
    value: int
    children: list[Tree] = dataclasses.field(default_factory=list)


class Settings(TypedDict, total=False):
    width: int
    names: list[str]


class Pair(NamedTuple):
    left: int
    right: str = "r"


class Cat(msgspec.Struct, tag=True):
    lives: int


class Dog(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    name: str


class Kebab(msgspec.Struct, rename="kebab"):
    long_name: int


class Row(msgspec.Struct, array_like=True):
    number: int
    name: str = ""


HINTS: dict[str, Any] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "none": None,
    "any": Any,
    "optional": int | None,
    "several": int | str | list[int] | None,
    "numbers": int | float,
    "bytes": bytes,
    "datetime": datetime.datetime,
    "date": datetime.date,
    "time": datetime.time,
    "duration": datetime.timedelta,
    "decimal": decimal.Decimal,
    "uuid": uuid.UUID,
    "enum": Colour,
    "int_enum": Level,
    "literal": Literal["a", 1, None],
    "list": list[int],
    "bare_list": list,
    "sequence": Sequence[float],
    "set": set[int],
    "bounded_set": Annotated[set[int], Meta(min_length=1, max_length=2)],
    "tuple": tuple[int, str],
    "empty_tuple": tuple[()],
    "long_tuple": tuple[int, ...],
    "pair": Pair,
    "row": Row,
    "dict": dict[str, int],
    "int_keys": dict[int, str],
    "mapping": Mapping[str, list[int]],
    "bare_dict": dict,
    "dataclass": Point,
    "tree": Tree,
    "typed_dict": Settings,
    "tagged": Cat | Dog,
    "renamed": Kebab,
    "nested": dict[str, list[Point | None]],
    "lower": Annotated[int, Meta(ge=0)],
    "between": Annotated[int, Meta(gt=0, lt=10)],
    "multiple": Annotated[int, Meta(multiple_of=5)],
    "fraction": Annotated[float, Meta(ge=0, le=1)],
    "float_multiple": Annotated[float, Meta(multiple_of=0.5)],
    "short": Annotated[str, Meta(min_length=1, max_length=3)],
    "pattern": Annotated[str, Meta(pattern="^a+$")],
    "short_bytes": Annotated[bytes, Meta(min_length=1, max_length=4)],
    "few": Annotated[list[int], Meta(min_length=1, max_length=2)],
    "small_dict": Annotated[dict[str, int], Meta(min_length=1, max_length=1)],
}

VALUES: list[Any] = [
    None, True, 0, 1, 5, -3, 2, 10, 1.0, 1.5, 0.5, 1 << 62, 1 << 70,
    "", "a", "aaaa", "red", "1.5", "YQ==", "2026-01-02", "2026-01-02T03:04:05Z", "03:04:05", "PT1H",
    "0b0e8b2e-6c5e-4c4f-8f3c-1d2f3a4b5c6d",
    [], [1], [1, 1, 1], [1, 2, 3], [1, "a"], ["a"], [1.5], [[1]], [None, {"x": 1}],
    {}, {"x": 1}, {"x": 1, "y": 2.5}, {"x": 1, "z": 1}, {"x": "1"}, {"1": "a"}, {"a": 1, "b": 2}, {"a": [1, 2]},
    {"a": [None, {"x": 1}]}, {"width": 1, "names": ["a"]}, {"width": "1"}, {"long-name": 1}, {"long_name": 1},
    {"value": 1, "children": [{"value": 2, "children": [{"value": 3}]}]}, {"value": 1, "children": [{"value": "2"}]},
    {"type": "Cat", "lives": 9}, {"type": "Dog", "name": "a"}, {"type": "Dog", "lives": 9}, {"type": "Cow"},
]  # fmt: skip


def schema_of(hint: Any) -> bytes:
    return msgspec.json.encode(msgspec.json.schema(hint))


def params_of(hint: Any, *, optional: bool = False) -> type[msgspec.Struct]:
    field = ("it", hint, None) if optional else ("it", hint)
    return msgspec.defstruct("Params", [field], forbid_unknown_fields=True)


@pytest.mark.parametrize("name", HINTS)
def test_a_check_is_never_stricter_than_the_handler(name):
    hint = HINTS[name]
    record = params_of(hint)
    checker, handler = Checker(schema_of(record)), msgspec.json.Decoder(record)
    for value in VALUES:
        params = msgspec.json.encode({"it": value})
        try:
            handler.decode(params)
        except msgspec.ValidationError:
            continue
        assert checker.check(params) is None, value


# What only the handler knows: patterns, formats, and more than one round of what contains itself.
LEFT_TO_THE_HANDLER = {
    "pattern", "bytes", "short_bytes", "datetime", "date", "time", "duration", "decimal", "uuid", "tree", "int_keys",
    "float_multiple", "set", "bounded_set", "pair", "row", "any",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in HINTS if name not in LEFT_TO_THE_HANDLER])
def test_a_check_is_as_strict_as_the_handler_wherever_it_can(name):
    record = params_of(HINTS[name])
    checker, handler = Checker(schema_of(record)), msgspec.json.Decoder(record)
    refused = 0
    for value in VALUES:
        params = msgspec.json.encode({"it": value})
        try:
            handler.decode(params)
        except msgspec.ValidationError:
            refused += 1
            assert checker.check(params) is not None, value
    assert refused


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (b'{"path": "a.jpg"}', None),
        (b'{"path": "a.jpg", "width": 640, "point": {"x": 1}}', None),
        (b"", "params.path: is missing"),
        (b"{}", "params.path: is missing"),
        (b'{"path": 1}', "params.path: expected `str`, got `int`"),
        (b'{"path": "a", "width": "wide"}', "params.width: expected `int`, got `str`"),
        (b'{"path": "a", "width": 0}', "params.width: expected `int` >= 1"),
        (b'{"path": "a", "wdith": 1}', "params.wdith: unknown parameter; this task takes: path, width, point"),
        (b'{"path": "a", "point": {}}', "params.point.x: is missing"),
        (b'{"path": "a", "point": {"x": 1.5}}', "params.point.x: expected `int`, got `float`"),
        (b"[]", "params: expected `object`, got `array`"),
        (b'{"path": "a"', "params: Input data was truncated"),
        (b'{"path": "\xff"}', "params: no valid UTF-8"),
    ],
)
def test_messages_name_the_place(params, message):
    fields = [("path", str), ("width", Annotated[int, Meta(ge=1)], 640), ("point", Point | None, None)]
    checker = Checker(schema_of(msgspec.defstruct("Params", fields, forbid_unknown_fields=True)))
    assert checker.check(params) == message


def test_a_handler_without_params_says_that_it_has_none():
    checker = Checker(schema_of(msgspec.defstruct("Params", [], forbid_unknown_fields=True)))
    assert checker.check(b"{}") is None
    assert checker.check(b'{"a": 1}') == "params.a: unknown parameter; this task takes none"


def test_many_names_are_not_all_listed():
    fields = [(f"field{number}", int, 0) for number in range(50)]
    wrong = Checker(schema_of(msgspec.defstruct("Params", fields, forbid_unknown_fields=True))).check(b'{"a": 1}')
    assert wrong is not None
    assert "field19, …" in wrong
    assert "field20" not in wrong


def test_deeply_nested_params_are_refused_not_fatal():
    record = msgspec.defstruct("Params", [("it", Any)])
    wrong = Checker(schema_of(record)).check(b'{"it": ' + b"[" * 200_000 + b"]" * 200_000 + b"}")
    assert wrong == "params: nested too deeply"


def test_a_wrong_alternative_is_named_where_a_field_tells_them_apart():
    checker = Checker(schema_of(params_of(Cat | Dog)))
    assert checker.check(b'{"it": {"type": "Cat", "lives": "nine"}}') == "params.it.lives: expected `int`, got `str`"
    assert checker.check(b'{"it": {"type": "Cow"}}') == "params.it.type: invalid value 'Cow'"


def test_of_alternatives_of_one_kind_only_the_kind_is_checked():
    schema = {"anyOf": [
        {"type": "array", "items": {"type": "integer"}}, {"type": "array", "items": {"type": "string"}},
        {"type": "object", "properties": {"a": {"type": "integer"}}}, {"type": "object", "properties": {}},
    ]}  # fmt: skip
    checker = Checker(msgspec.json.encode(schema))
    assert checker.check(b'[1, "a"]') is None
    assert checker.check(b'{"a": "b"}') is None
    assert checker.check(b"1") is not None


def test_a_list_of_types_and_a_constant_are_understood():
    checker = Checker(b'{"type": "object", "properties": {"a": {"type": ["string", "null"]}, "b": {"const": "x"}}}')
    assert checker.check(b'{"a": null, "b": "x"}') is None
    assert checker.check(b'{"a": 1}') is not None
    assert checker.check(b'{"b": "y"}') is not None


@pytest.mark.parametrize(
    "schema",
    [
        b"",
        b"no json",
        b"\xff",
        b"null",
        b"true",
        b"[]",
        b"{}",
        b"[" * 60_000,
        b'{"type": "' + b"x" * SCHEMA_BYTES_MAX + b'"}',
        b'{"$ref": "#/$defs/no"}',
        b'{"$ref": 7}',
        b'{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}',
        b'{"type": "elephant"}',
        b'{"type": 7}',
        b'{"type": []}',
        b'{"enum": []}',
        b'{"enum": [1.5]}',
        b'{"enum": [{"a": 1}]}',
        b'{"enum": 7}',
        b'{"anyOf": []}',
        b'{"anyOf": 7}',
        b'{"anyOf": [{}, {"type": "integer"}]}',
        b'{"type": "integer", "minimum": "x", "maximum": null}',
        b'{"type": "integer", "multipleOf": 0}',
        b'{"type": "string", "minLength": -1}',
        b'{"type": "string", "pattern": "(a+)+$"}',
        b'{"type": "array", "prefixItems": 7}',
        b'{"type": "array", "items": false}',
        b'{"type": "object", "properties": 7}',
        b'{"type": "object", "properties": {"a": 7}, "required": 7}',
        b'{"type": "object", "properties": {"a\\"b": {}}, "required": ["zzz", 7]}',
        b'{"anyOf": [{"type": "object", "properties": {"t": {"enum": ["a"]}}}, {"type": "null"}],'
        b' "discriminator": {"propertyName": "t"}}',
        b'{"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}], "discriminator": {"propertyName": "t"},'
        b' "$defs": {"a": {"type": "object", "properties": {"t": {"enum": ["a"]}}}}}',
    ],
)
def test_nonsense_does_no_harm(schema):
    checker = Checker(schema)
    for value in ({}, {"a": 1}, [], ["x"], "aaaa", 7, 10, None, {"t": "a"}):
        checker.check(msgspec.json.encode(value))


def test_a_pattern_is_never_run():
    checker = Checker(b'{"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a+)+$"}}}')
    assert checker.check(b'{"a": "' + b"a" * 50 + b'!"}') is None


def test_a_schema_too_large_to_be_looked_at_accepts_everything_beyond():
    wide = {f"p{n}": {"type": "object", "properties": {"x": {"type": "integer"}}} for n in range(2 * OBJECTS_MAX)}
    checker = Checker(json.dumps({"type": "object", "properties": wide}).encode())
    assert checker.check(b'{"p0": {"x": "wrong"}}') is not None
    assert checker.check(json.dumps({f"p{2 * OBJECTS_MAX - 1}": {"x": "passes"}}).encode()) is None
    deep: dict[str, Any] = {"type": "integer"}
    value: Any = "wrong"
    for _ in range(2 * DEPTH_MAX):
        deep, value = {"type": "array", "items": deep}, [value]
    assert Checker(json.dumps(deep).encode()).check(json.dumps(value).encode()) is None


def test_what_contains_itself_is_checked_for_some_rounds():
    checker = Checker(schema_of(params_of(Tree)))
    assert checker.check(b'{"it": {"value": "x"}}') == "params.it.value: expected `int`, got `str`"
    assert checker.check(b'{"it": {"value": 1, "children": 7}}') is not None
    assert checker.check(b'{"it": {"value": 1, "children": [{"value": "x"}]}}') is not None
    value: Any = {"value": "left to the handler"}
    for _ in range(ROUNDS_MAX):
        value = {"value": 1, "children": [value]}
    assert checker.check(msgspec.json.encode({"it": value})) is None


def test_an_error_of_another_kind_is_said_as_it_is():
    assert wrong_params(msgspec.ValidationError("odd")) == "params: odd"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYWORDS = [
    "type", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems", "enum",
    "const", "anyOf", "oneOf", "$ref", "$defs", "discriminator", "minimum", "exclusiveMaximum", "multipleOf", "format",
]  # fmt: skip
schema_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4)
    | st.sampled_from(["object", "array", "string", "integer", "number", "null", "#/$defs/a"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*KEYWORDS, "a"]), inner, max_size=5),
    max_leaves=25,
)  # fmt: skip


@given(schema=schema_values, params=json_values)
@settings(max_examples=300)
def test_any_schema_and_any_params_end_in_an_answer(schema, params):
    wrong = Checker(json.dumps(schema).encode()).check(json.dumps(params).encode())
    assert wrong is None or wrong.startswith("params")
