"""What `taskd doctor` has found out about one thing."""

from __future__ import annotations

from typing import NamedTuple

OK, WARN, FAIL = "ok", "warn", "fail"


class Finding(NamedTuple):
    """One line: how it is, what was looked at, what was found, and what to do where it is not well."""

    level: str
    what: str
    text: str
    advice: str = ""
