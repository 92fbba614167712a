"""Checking params against a schema from another machine: the same answers as the worker's, and nothing that hurts."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd.core.signature import Checker
from taskd.handler import Handler


class Node(msgspec.Struct):
    value: int
    next: Node | None = None


def plain(path: str, width: int = 640, ratio: float = 1.0, is_fast: bool = False) -> None: ...
def nested(sizes: list[tuple[int, int]], names: dict[str, list[str]], mode: Literal["a", "b"] = "a") -> None: ...
def optional(word: str | None = None, number: int | str = 0) -> None: ...
def recursive(node: Node) -> None: ...
def free(known: int, **rest: Any) -> None: ...
def nothing() -> None: ...


FUNCTIONS = [plain, nested, optional, recursive, free, nothing]
NAMES = st.sampled_from(
    ["path", "width", "ratio", "is_fast", "sizes", "names", "mode", "word", "number", "node", "known", "other"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False, allow_infinity=False) | st.text("ab"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "value", "next"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def is_taken_by_the_worker(handler: Handler, params: bytes) -> bool:
    try:
        handler.bind(params)
    except msgspec.ValidationError:
        return False
    return True


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda it: it.__name__)
@given(params=st.dictionaries(NAMES, VALUES, max_size=4))
def test_whatever_is_refused_here_the_worker_refuses_too(function: Callable[..., None], params: dict[str, Any]) -> None:
    handler = Handler("it", function, takes_params=False)
    text = json.dumps(params).encode()
    wrong = Checker(handler.schema).check(text)
    assert wrong is None or not is_taken_by_the_worker(handler, text), wrong


@pytest.mark.parametrize(
    ("function", "params", "place"),
    [
        (plain, {}, "path"),
        (plain, {"path": 1}, "params.path"),
        (plain, {"path": "a", "width": "b"}, "params.width"),
        (plain, {"path": "a", "depth": 1}, "depth"),
        (plain, {"path": "a", "is_fast": 1}, "params.is_fast"),
        (nested, {"sizes": [[1, 2], [1]], "names": {}}, "params.sizes[1]"),
        (nested, {"sizes": [], "names": {"a": [1]}}, "params.names[...][0]"),
        (nested, {"sizes": [], "names": {}, "mode": "c"}, "params.mode"),
        (optional, {"word": 1}, "params.word"),
        (recursive, {"node": {"value": 1, "next": {"value": "two"}}}, "params.node.next.value"),
        (free, {"other": 1}, "known"),
        (nothing, {"other": 1}, "other"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(function: Callable[..., None], params: Any, place: str) -> None:
    checker = Checker(Handler("it", function, takes_params=False).schema)
    assert place in (checker.check(json.dumps(params).encode()) or "")


@pytest.mark.parametrize(
    ("function", "params"),
    [
        (plain, {"path": "a", "ratio": 1}),
        (nested, {"sizes": [[1, 2]], "names": {"a": ["b"]}, "mode": "b"}),
        (optional, {}),
        (optional, {"word": None, "number": "x"}),
        (recursive, {"node": {"value": 1, "next": None}}),
        (free, {"known": 1, "other": {"x": []}}),
    ],
)
def test_what_fits_passes(function: Callable[..., None], params: Any) -> None:
    assert Checker(Handler("it", function, takes_params=False).schema).check(json.dumps(params).encode()) is None


def test_limits_count() -> None:
    schema = {
        "type": "object", "properties": {
            "number": {"type": "integer", "minimum": 1, "exclusiveMaximum": 10, "multipleOf": 3},
            "text": {"type": "string", "maxLength": 2, "pattern": "^(a+)+$"},
            "list": {"type": "array", "items": {"type": "number"}, "minItems": 1},
        },
    }  # fmt: skip
    checker = Checker(json.dumps(schema).encode())
    assert checker.check(b'{"number": 9, "text": "aa", "list": [1.5]}') is None
    assert checker.check(b'{"text": "b!"}') is None  # Patterns are not run: they come from another machine.
    for params in (b'{"number": 0}', b'{"number": 10}', b'{"number": 4}', b'{"text": "aaa"}', b'{"list": []}'):
        assert checker.check(params) is not None, params
    assert checker.check(b"") is None
    assert checker.check(b"{") is not None


@pytest.mark.parametrize(
    "schema",
    [
        b"", b"{", b"[]", b"{}", b"null", b"\xff", b'{"type": "object", "properties": 3}',
        b'{"$ref": "#/$defs/missing"}', b'{"$ref": 3}', b'{"$ref": "#/$defs/a", "$defs": 5}',
        b'{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}',
        b'{"type": "integer", "multipleOf": 0}', b'{"type": "integer", "minimum": "one"}',
        b'{"type": "string", "maxLength": -1}', b'{"enum": []}', b'{"enum": [[1]]}', b'{"enum": 3}',
        b'{"anyOf": []}', b'{"anyOf": 3}', b'{"type": ["string", "null"]}', b'{"type": "soul"}',
        b'{"type": "object", "properties": {}, "required": 3}',
        b'{"type": "array", "prefixItems": 3}', b'{"const": {}}',
        b'{"anyOf": [{"type": "object", "properties": {}}, {"type": "object", "properties": {}}]}',
        b'{"items": ' * 5000 + b"{}" + b"}" * 5000,
        b'{"type": "array", "items": ' * 200 + b"{}" + b"}" * 200,
    ],
    ids=lambda schema: repr(schema[:40]),
)  # fmt: skip
def test_schemas_that_say_nothing_of_use_refuse_nothing_a_worker_might_take(schema: bytes) -> None:
    assert Checker(schema).check(b'{"anything": [1, "two", null]}') is None or b"type" in schema


def test_a_schema_that_branches_without_end_is_cut() -> None:
    definition = {"type": "object", "properties": {f"p{n}": {"$ref": "#/$defs/a"} for n in range(50)}}
    schema = json.dumps({"$ref": "#/$defs/a", "$defs": {"a": definition}}).encode()
    assert Checker(schema).check(b'{"p1": {"p2": {}}}') is None


@given(VALUES)
def test_no_schema_raises(schema: Any) -> None:
    Checker(json.dumps(schema).encode()).check(b'{"a": 1}')
