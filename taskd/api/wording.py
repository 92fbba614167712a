"""What msgspec finds wrong with a request, in words that name no types of Python."""

from __future__ import annotations

import re

_TYPES = {
    "str": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "null": "null",
    "array": "a list", "object": "an object", "bytes": "text in base64",
}  # fmt: skip
_PATTERNS = {"^https?://": "begin with http:// or https://"}  # those of types.py
_UNITS = {"str": "characters", "array": "items", "object": "entries"}
_BOUNDS = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}

_GOT = re.compile(r"Expected `(?P<wanted>[^`]+)`, got `(?P<got>[^`]+)`")
_LENGTH = re.compile(r"Expected `(?P<type>\w+)` of length (?P<sign>[<>]=) (?P<bound>\d+)")
_RANGE = re.compile(r"Expected `(?P<type>\w+)` (?P<sign>[<>]=?) (?P<bound>[-+.\de]+)")
_MATCHING = re.compile(r"Expected `str` matching regex '(?P<pattern>.*)'", re.DOTALL)
_ENUM = re.compile(r"Invalid enum value (?P<value>.+)", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`", re.DOTALL)


def in_words(message: str) -> str:
    """A message of msgspec, without the place that it ends with. One of a kind that we do not know stays as it is."""
    if found := _GOT.fullmatch(message):
        wanted, got = found["wanted"], found["got"]
        is_fraction = got == "float" and "int" in wanted
        return f"must be {_names(wanted)}, not {'a fraction' if is_fraction else _names(got)}"
    if found := _LENGTH.fullmatch(message):
        bound, unit = found["bound"], _UNITS.get(found["type"], "items")
        if (found["sign"], bound) == (">=", "1"):
            return "must not be empty"
        return f"must have {_BOUNDS[found['sign']]} {int(bound):,} {unit}"
    if found := _RANGE.fullmatch(message):
        return f"must be {_names(found['type'])} of {_BOUNDS[found['sign']]} {_number(found['bound'])}"
    if found := _MATCHING.fullmatch(message):
        return f"must {_PATTERNS.get(found['pattern'], 'match ' + found['pattern'])}"
    if found := _ENUM.fullmatch(message):
        return f"{found['value']} is not one of the values that are allowed here"
    if found := _UNKNOWN.fullmatch(message):
        return f"there is no field {found['name']}"
    if found := _MISSING.fullmatch(message):
        return f"the field {found['name']} is missing"
    return message


def _names(types: str) -> str:
    return " or ".join(_TYPES.get(name.strip(), name.strip()) for name in types.split("|"))


def _number(text: str) -> str:
    return f"{float(text):,.15g}"
