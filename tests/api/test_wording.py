"""What is wrong with a request, in words: of all that msgspec says of the types of requests, by real decoders."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import pytest
from msgspec import Meta, Struct

from taskd.api import types
from taskd.api.wording import in_words


class Inner(Struct, forbid_unknown_fields=True):
    """An object with a field that it needs."""

    name: str


ROWS: list[tuple[object, object, str]] = [
    (str, 1, "must be text, not a whole number"),
    (list[int], {}, "must be a list, not an object"),
    (bool, None, "must be true or false, not null"),
    (int, 1.5, "must be a whole number, not a fraction"),
    (int | str, 1.5, "must be a whole number or text, not a fraction"),
    (float, "1", "must be a number, not text"),
    (Annotated[float, Meta(ge=0)], -1, "must be a number of at least 0"),
    (Annotated[float, Meta(le=2.5)], 3, "must be a number of at most 2.5"),
    (Annotated[int, Meta(le=1_000_000)], 2_000_000, "must be a whole number of at most 1,000,000"),
    (Annotated[str, Meta(min_length=1)], "", "must not be empty"),
    (Annotated[str, Meta(max_length=2)], "abc", "must have at most 2 characters"),
    (Annotated[list[int], Meta(max_length=1)], [1, 2], "must have at most 1 items"),
    (Annotated[dict[str, int], Meta(max_length=1)], {"a": 1, "b": 2}, "must have at most 1 entries"),
    (Annotated[str, Meta(pattern="^https?://")], "ftp://a", "must begin with http:// or https://"),
    (Annotated[str, Meta(pattern="^x$")], "y", "must match ^x$"),
    (Literal["GET", "POST"], "HEAD'", "\"HEAD'\" is not one of the values that are allowed here"),
    (Inner, {"name": "a", "b`c": 1}, "there is no field b`c"),
    (Inner, {}, "the field name is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("type_", "value", "words"), ROWS, ids=[row[2] for row in ROWS])
def test_in_words(type_: object, value: object, words: str) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(msgspec.json.encode(value), type=type_)
    assert in_words(str(caught.value)) == words


def test_what_is_not_known_stays_as_it_is() -> None:
    assert in_words("Something new") == "Something new"


def test_every_pattern_of_requests_has_words() -> None:
    from taskd.api.wording import _PATTERNS

    schema = str(msgspec.json.schema_components([types.Submission, types.Selection, types.WaitRequest])[1])
    assert {pattern for pattern in _PATTERNS if pattern in schema} == {*_PATTERNS}
    assert schema.count("'pattern'") == len(_PATTERNS)
