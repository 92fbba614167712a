"""How people write durations, sizes and instants, and how they are written back. Pure: the clock comes in as `now_s`.

Durations are seconds, sizes bytes, instants UTC seconds since 1970. Every function that reads raises ValueError with a
text that says what was wrong and what is allowed.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta, tzinfo

DURATION_S_MAX = 10 * 366 * 86400.0  # Ten years: longer is a slip of the pen.
SIZE_BYTES_MAX = 1 << 50
INSTANT_S_MAX = 1e11  # The year 5138: beyond it somebody wrote milliseconds.

_NUMBER = r"[0-9]{1,20}(?:\.[0-9]{1,20})?|\.[0-9]{1,20}"
# Each unit at most once, from long to short: "1h1h" and "5s 3h" are rather mistakes than sums.
_DURATION = re.compile(
    "".join(rf"(?:({_NUMBER})\s*{unit}\s*)?" for unit in ("w", "d", "h", "(?:min|m(?!s))", "(?:sec|s)", "ms"))
)
_DURATION_UNITS_S = (7 * 86400.0, 86400.0, 3600.0, 60.0, 1.0, 0.001)
_SECONDS = re.compile(_NUMBER)
_SIZE = re.compile(rf"({_NUMBER})\s*(?:([kmgtp])(i?))?(b?)")
_PREFIXES = "kmgtp"
_DAY_WORD = re.compile(r"(today|tomorrow)(?:\s+(\d{1,2}):(\d{2})(?::(\d{2}))?)?")


# -- Durations ---------------------------------------------------------------------------------------------------------


def duration_s(text: str) -> float:
    """Seconds from "90", "1h30m", "1.5s", "500ms", "2d 12h", "1w". Zero is allowed, less is not."""
    lowered = text.strip().lower()
    if _SECONDS.fullmatch(lowered):
        return _bounded(float(lowered), DURATION_S_MAX, text, "a duration", "ten years")
    found = _DURATION.fullmatch(lowered)
    if not lowered or found is None:
        raise ValueError(f"{text!r} is not a duration: write seconds, or text such as 1h30m, 2d, 1.5s, 500ms")
    parts = zip(found.groups(), _DURATION_UNITS_S, strict=True)
    seconds = sum(float(number) * unit_s for number, unit_s in parts if number)
    return _bounded(seconds, DURATION_S_MAX, text, "a duration", "ten years")


def format_duration(seconds: float) -> str:
    """For people, in at most two steps of precision: "1h30m", "2d4h", "12s", "1.5s", "250ms", "0s"."""
    sign, seconds = ("-", -seconds) if seconds < 0 else ("", seconds)
    if seconds < 1:
        milliseconds = round(seconds * 1000)
        if milliseconds == 0:
            return "0s"
        if milliseconds < 1000:
            return f"{sign}{milliseconds}ms"
    if seconds < 9.95:
        return f"{sign}{seconds:.1f}".removesuffix(".0") + "s"
    whole = round(seconds)
    if whole >= 86400:
        whole = round(whole / 3600) * 3600
    elif whole >= 3600:
        whole = round(whole / 60) * 60
    parts = []
    for name, unit_s in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, whole = divmod(whole, unit_s)
        if count:
            parts.append(f"{count}{name}")
    return sign + "".join(parts)


# -- Sizes -------------------------------------------------------------------------------------------------------------


def size_bytes(text: str) -> int:
    """Bytes from "4096", "2GiB", "1.5 MiB", "500MB", "512k".

    KiB and so on are powers of 1024, KB and so on powers of 1000; a bare k, M, G counts in 1024, as in Slurm, ulimit
    and systemd. Upper and lower case are the same.
    """
    found = _SIZE.fullmatch(text.strip().lower())
    if found is None:
        raise ValueError(f"{text!r} is not a size: write bytes, or text such as 2GiB, 500MB, 512k")
    number, prefix, binary, unit = found.groups()
    base = 1000 if unit and not binary else 1024
    factor = base ** (_PREFIXES.index(prefix) + 1) if prefix else 1
    return round(_bounded(float(number) * factor, SIZE_BYTES_MAX, text, "a size", "1 PiB"))


def format_size(size: int) -> str:
    """For people, in powers of 1024 and three digits: "512B", "1.5KiB", "2GiB". `size_bytes` reads it again."""
    if abs(size) < 1024:
        return f"{size}B"
    amount = float(size)
    for prefix in "KMGTP":
        amount /= 1024
        if abs(amount) < 999.5 or prefix == "P":
            break
    digits = f"{amount:.2f}" if abs(amount) < 9.995 else f"{amount:.1f}" if abs(amount) < 99.95 else f"{amount:.0f}"
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return f"{digits}{prefix}iB"


# -- Instants ----------------------------------------------------------------------------------------------------------


def instant_s(text: str, now_s: float, zone: tzinfo | None = UTC) -> float:
    """UTC seconds from ISO 8601 ("2026-03-01T09:00:00+01:00", "2026-03-01 09:00", "2026-03-01"), "@1767225600" (seconds
    since 1970), "now", "+1h30m", "today 18:00", "tomorrow 09:00".

    Where the text names no zone, `zone` counts: UTC unless told otherwise, None for the machine's local time.
    """
    stripped = text.strip()
    lowered = stripped.lower()
    if lowered == "now":
        return now_s
    if lowered.startswith("+"):
        return _bounded(now_s + duration_s(lowered[1:]), INSTANT_S_MAX, text, "an instant", "the year 5138")
    if lowered.startswith("@"):
        if _SECONDS.fullmatch(lowered[1:]) is None:
            raise ValueError(f"{text!r} is not an instant: after @ come seconds since 1970")
        return _bounded(float(lowered[1:]), INSTANT_S_MAX, text, "an instant", "the year 5138")
    found = _DAY_WORD.fullmatch(lowered)
    try:
        moment = datetime.fromisoformat(stripped) if found is None else _on_day(found, now_s, zone)
        if moment.tzinfo is None and zone is not None:
            moment = moment.replace(tzinfo=zone)
        seconds = moment.timestamp()
    except (ValueError, OverflowError, OSError):
        raise ValueError(
            f"{text!r} is not an instant: write ISO 8601 such as 2026-03-01T09:00:00Z, or +1h30m, or tomorrow 09:00"
        ) from None
    if seconds < 0:
        raise ValueError(f"{text!r} lies before 1970")
    return seconds


def _on_day(found: re.Match[str], now_s: float, zone: tzinfo | None) -> datetime:
    day, *clock = found.groups()
    today = datetime.fromtimestamp(now_s, zone).replace(tzinfo=None)
    if day == "tomorrow":
        today += timedelta(days=1)
    hour, minute, second = (int(part or 0) for part in clock)
    return today.replace(hour=hour, minute=minute, second=second, microsecond=0)


def format_instant(seconds: float, zone: tzinfo | None = UTC) -> str:
    """ISO 8601 to the second: "2026-03-01T09:00:00Z", or with the offset of `zone` (None: the machine's local time)."""
    moment = datetime.fromtimestamp(math.floor(seconds), UTC)
    if zone is UTC:
        return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
    return moment.astimezone(zone).isoformat()


def _bounded(amount: float, bound: float, text: str, what: str, bound_text: str) -> float:
    if amount > bound:
        raise ValueError(f"{text!r} is too much for {what}: at most {bound_text}")
    return amount
