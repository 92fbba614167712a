"""What people write behind options, read: durations, sizes, times, key=value. Wrong values are wrong calls."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from typing import Any

import click


class _Text(click.ParamType):  # type: ignore[type-arg]  # generic for the type checker, in newer versions only
    """Reads text with a function of taskd.values, which is loaded only when such an option is used."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self.read(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def read(self, text: str) -> Any:
        raise NotImplementedError


class Duration(_Text):
    """Seconds, or text such as 1h30m."""

    name = "duration"

    def read(self, text: str) -> float:
        from taskd.values import duration_s

        return duration_s(text)


class Size(_Text):
    """Bytes, or text such as 2GiB."""

    name = "size"

    def read(self, text: str) -> int:
        from taskd.values import size_bytes

        return size_bytes(text)


class Instant(_Text):
    """A time of the machine's own zone, unless it names another: ISO 8601, "tomorrow 09:00", "+1h"."""

    name = "time"

    def read(self, text: str) -> float:
        from taskd.values import instant_s

        return instant_s(text, time.time(), None)


class Quantity(_Text):
    """A number of something, 0 or more."""

    name = "number"

    def read(self, text: str) -> float:
        return _quantity(text)


class Pair(_Text):
    """key=value."""

    name = "key=value"

    def read(self, text: str) -> tuple[str, str]:
        return _split(text)


class Amount(_Text):
    """key=number."""

    name = "key=number"

    def read(self, text: str) -> tuple[str, float]:
        key, value = _split(text)
        return key, _quantity(value)


class Variable(_Text):
    """KEY=VALUE, or KEY alone to take the caller's own."""

    name = "key[=value]"

    def read(self, text: str) -> tuple[str, str]:
        if "=" in text:
            return _split(text)
        if text not in os.environ:
            raise ValueError(f"there is no variable {text} to take over; write {text}=VALUE")
        return text, os.environ[text]


class SecretName(_Text):
    """VARIABLE=NAME of a secret, or NAME where the variable is called the same."""

    name = "[variable=]name"

    def read(self, text: str) -> tuple[str, str]:
        return _split(text) if "=" in text else (text, text)


class Document(_Text):
    """JSON, @FILE, or - for the standard input."""

    name = "json"

    def read(self, text: str) -> Any:
        if text == "-":
            text = sys.stdin.read()
        elif text.startswith("@"):
            try:
                with open(text[1:], encoding="utf-8") as file:
                    text = file.read()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"{text[1:]} cannot be read: {error}") from None
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"it is not JSON: {error}") from None


class Backoff(_Text):
    """The first delay, or parts such as initial=1s,factor=2,max=5m,jitter=0.1."""

    name = "backoff"

    def read(self, text: str) -> dict[str, float]:
        from taskd.values import duration_s

        if "=" not in text:
            return {"initial": duration_s(text)}
        parts: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            if name in ("initial", "max"):
                parts[name] = duration_s(value)
            elif name in ("factor", "jitter"):
                parts[name] = float(value)
            else:
                raise ValueError(f"{part!r} is none of initial, factor, max and jitter")
        return parts


def _quantity(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{text!r} is not a number of 0 or more")
    return number


def _split(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"{text!r} is not of the form key=value")
    return key, value
