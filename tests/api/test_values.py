"""Durations, sizes and instants: every way to write them, what is refused, and how they are written back."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd.values import (
    DURATION_S_MAX,
    SIZE_BYTES_MAX,
    duration_s,
    format_duration,
    format_instant,
    format_size,
    instant_s,
    size_bytes,
)

NOW_S = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC).timestamp()


def utc(*parts: int) -> float:
    return datetime(*parts, tzinfo=UTC).timestamp()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("90", 90),
        ("1.5", 1.5),
        (".5s", 0.5),
        ("1.5s", 1.5),
        ("500ms", 0.5),
        ("1m", 60),
        ("5min", 300),
        ("10 sec", 10),
        ("1h30m", 5400),
        ("1H30M", 5400),
        (" 2d 12h ", 216000),
        ("1w", 604800),
        ("1w1d1h1m1s1ms", 694861.001),
        ("3660d", DURATION_S_MAX),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "h",
        "-1",
        "-1s",
        "1x",
        "1h30",
        "30m1h",
        "1h1h",
        "1,5s",
        "1e3",
        "inf",
        "nan",
        "1 2",
        "\u0661s",
        "1..5s",
        "1s\0",
    ],
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration: write seconds, or text such as"):
        duration_s(text)


@pytest.mark.parametrize("text", ["11y", "3661d", "9" * 20])
def test_durations_beyond_the_bound(text: str) -> None:
    with pytest.raises(ValueError, match=r"ten years|is not a duration"):
        duration_s(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0004, "0s"),
        (0.25, "250ms"),
        (0.9999, "1s"),
        (1, "1s"),
        (1.5, "1.5s"),
        (9.97, "10s"),
        (59.7, "1m"),
        (90, "1m30s"),
        (3599.6, "1h"),
        (5400, "1h30m"),
        (5430, "1h30m"),
        (86399, "1d"),
        (90000, "1d1h"),
        (-90, "-1m30s"),
    ],
)
def test_durations_written(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.floats(0, DURATION_S_MAX))
def test_a_written_duration_reads_as_nearly_the_same(seconds: float) -> None:
    assert duration_s(format_duration(seconds)) == pytest.approx(seconds, rel=0.06, abs=0.001)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("100B", 100),
        ("512k", 512 << 10),
        ("512K", 512 << 10),
        ("2GiB", 2 << 30),
        ("2Gi", 2 << 30),
        ("2 gib", 2 << 30),
        ("2G", 2 << 30),
        ("500MB", 500_000_000),
        ("1.5GiB", 3 << 29),
        ("1kB", 1000),
        ("1TiB", 1 << 40),
        ("1PiB", SIZE_BYTES_MAX),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert size_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "k", "-1", "1.2.3M", "1 2", "2GBi", "2XB", "0x10", "1e9", "two", "1iB", "\u0662k"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size: write bytes, or text such as"):
        size_bytes(text)


def test_a_size_beyond_the_bound() -> None:
    with pytest.raises(ValueError, match="at most 1 PiB"):
        size_bytes("2PiB")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1KiB"),
        (1536, "1.5KiB"),
        (1 << 20, "1MiB"),
        ((1 << 20) - 1, "1MiB"),
        (123_456_789, "118MiB"),
        (2 << 30, "2GiB"),
        (1 << 50, "1PiB"),
    ],
)
def test_sizes_written(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, SIZE_BYTES_MAX))
def test_a_written_size_reads_as_nearly_the_same(size: int) -> None:
    assert size_bytes(format_size(size)) == pytest.approx(size, rel=0.006)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2026-03-01T09:00:00Z", utc(2026, 3, 1, 9)),
        ("2026-03-01T09:00:00+01:00", utc(2026, 3, 1, 8)),
        ("2026-03-01T09:00:00.5Z", utc(2026, 3, 1, 9) + 0.5),
        ("2026-03-01 09:00", utc(2026, 3, 1, 9)),
        ("2026-03-01", utc(2026, 3, 1)),
        ("@1767225600", 1767225600),
        ("@0.5", 0.5),
        ("now", NOW_S),
        ("+1h30m", NOW_S + 5400),
        ("today 18:30", utc(2026, 3, 1, 18, 30)),
        ("Tomorrow 09:00:05", utc(2026, 3, 2, 9, 0, 5)),
        ("tomorrow", utc(2026, 3, 2)),
    ],
)
def test_instants(text: str, seconds: float) -> None:
    assert instant_s(text, NOW_S) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "soon",
        "2026-13-01",
        "2026-03-01T25:00",
        "1767225600",
        "@",
        "@soon",
        "@-5",
        "today 25:00",
        "tomorrow 9",
        "+-5s",
    ],
)
def test_what_is_no_instant(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not an instant|is not a duration"):
        instant_s(text, NOW_S)


def test_instants_out_of_bounds() -> None:
    with pytest.raises(ValueError, match="before 1970"):
        instant_s("1969-12-31T23:59:59Z", NOW_S)
    with pytest.raises(ValueError, match="the year 5138"):
        instant_s("@1767225600000", NOW_S)


def test_a_zone_counts_where_the_text_names_none() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    assert instant_s("2026-03-01 09:00", NOW_S, berlin) == utc(2026, 3, 1, 8)
    assert instant_s("2026-07-01 09:00", NOW_S, berlin) == utc(2026, 7, 1, 7)
    assert instant_s("2026-07-01 09:00Z", NOW_S, berlin) == utc(2026, 7, 1, 9)
    # Across the change to summer time on 29 March 2026, "tomorrow 09:00" is what the clock on the wall says then.
    assert instant_s("tomorrow 09:00", utc(2026, 3, 28, 12), berlin) == utc(2026, 3, 29, 7)
    # Late in the evening of UTC, tomorrow has begun in Berlin.
    assert instant_s("today 09:00", utc(2026, 3, 1, 23, 30), berlin) == utc(2026, 3, 2, 8)


def test_the_local_zone_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        assert instant_s("2026-07-01 09:00", NOW_S, None) == utc(2026, 7, 1, 13)
        assert instant_s("today 09:00", NOW_S, None) == utc(2026, 3, 1, 14)
        assert format_instant(NOW_S, None) == "2026-03-01T07:00:00-05:00"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_instants_written() -> None:
    assert format_instant(NOW_S + 0.9) == "2026-03-01T12:00:00Z"
    assert format_instant(NOW_S, timezone(timedelta(hours=1))) == "2026-03-01T13:00:00+01:00"


@given(st.integers(0, 4_000_000_000))
def test_a_written_instant_reads_the_same(seconds: int) -> None:
    assert instant_s(format_instant(seconds), NOW_S) == seconds
