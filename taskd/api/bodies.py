"""From bytes to requests and from answers to bytes: JSON in, JSON and lines of JSON out, and what was wrong with it."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from taskd.api.service import ApiResponse
from taskd.api.types import ErrorAnswer, ErrorBody
from taskd.api.wording import in_words
from taskd.errors import InvalidRequest, TaskdError

LINES = "application/x-ndjson"

_Answer = TypeVar("_Answer")
_encoder = msgspec.json.Encoder()
encode = _encoder.encode
encode_lines = _encoder.encode_lines

_PLACE = re.compile(r"(?P<message>.*?)(?: - at (?P<key>`key` in )?`\$?(?P<path>.*)`)?", re.DOTALL)
_NAMED_FIELD = re.compile(r"Object (?:contains unknown|missing required) field `(?P<name>.*)`", re.DOTALL)


def decode(decoder: msgspec.json.Decoder[_Answer], body: bytes) -> _Answer:
    """The request in a body. Raises InvalidRequest with the field that is wrong, as `name`, `outer.name` or
    `[17].name`."""
    try:
        # The parts of a body that travel on undecoded (params) are not looked into: this covers them too.
        if not body.isascii():
            body.decode()
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}" if body else "the request needs a body") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8, from byte {error.start} on") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


def _invalid(text: str) -> InvalidRequest:
    found = _PLACE.fullmatch(text)
    assert found is not None, text
    message, path = found["message"], (found["path"] or "").removeprefix(".")
    named = _NAMED_FIELD.fullmatch(message)
    message = in_words(message)
    if found["key"]:
        message += " (of its keys)"
    if named is not None:
        path = f"{path}.{named['name']}" if path else named["name"]
    return InvalidRequest(message, field=path or None)


def error_body(error: TaskdError) -> bytes:
    """The one form of all errors."""
    return encode(ErrorAnswer(ErrorBody(error.code, error.message, error.field)))


def error_line(error: TaskdError) -> bytes:
    """The last line of a stream of lines that has to end early."""
    return error_body(error) + b"\n"


def answer(value: object, status: int = 200, did: str = "") -> ApiResponse:
    """A JSON answer; `did` is for the audit."""
    return ApiResponse(status, body=encode(value), did=did)
