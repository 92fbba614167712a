"""Log lines: readable, one for an event, not to be forged, and without secrets."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd.daemon.logs import VALUE_CHARS_MAX, escape, log, set_level, set_up


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    names = ("", "taskd", "zeroconf", "aiohttp.access")
    levels = {name: logging.getLogger(name).level for name in names}
    handlers = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def lines(format: str, level: str = "info") -> io.StringIO:
    """Set up logging into memory."""
    stream = io.StringIO()
    set_up(level, format, {}, stream)
    return stream


def without_time(stream: io.StringIO) -> str:
    time, _, rest = stream.getvalue().partition(" ")
    assert datetime.fromisoformat(time).tzinfo is not None
    return rest


def test_text_says_when_how_grave_what_and_the_fields():
    stream = lines("text")
    log("warning", "worker lost", worker="a", open=3, reason="connection reset", after_s=2.5000001, by=None)
    assert without_time(stream) == 'warning worker lost worker=a open=3 reason="connection reset" after_s=2.5 by=None\n'


def test_json_has_one_object_a_line():
    stream = lines("json")
    log("info", "worker registered", worker="ä\n", slots=2, share=0.5, odd=float("nan"), level="mine", event="mine")
    logging.getLogger("zeroconf").error("no %s", "route")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "info", "event": "worker registered", "worker": "ä\n", "slots": 2, "share": 0.5, "odd": "nan",
    }  # fmt: skip
    assert (second["level"], second["event"]) == ("error", "zeroconf: no route")


@pytest.mark.parametrize("format", ["text", "json"])
def test_nothing_from_outside_forges_a_line(format):
    stream = lines(format)
    evil = 'x" level=error\n2026-01-01 error you were hacked \x1b[2J\r\u2028\x85\u202e'
    log("info", evil, peer=evil)
    logging.getLogger("aiohttp.server").error("bad request %s", evil)
    out = stream.getvalue()
    assert out.count("\n") == 2
    assert all(char.isprintable() for char in out.replace("\n", ""))


@given(st.text())
def test_any_text_is_escaped_into_printable_text(text):
    assert escape(text).isprintable()


@given(name=st.text(), value=st.text())
def test_a_text_line_is_always_one_line(name, value):
    stream = lines("text")
    log("info", name, value=value)
    line, end, rest = stream.getvalue().partition("\n")
    assert line.isprintable()
    assert (end, rest) == ("\n", "")


def test_values_are_quoted_where_they_could_be_misread():
    stream = lines("text")
    log("info", "e", a="", b="x y", c="a=b", d='say "no"', e="back\\slash", f="/plain/päth", g="tab\t")
    assert without_time(stream) == (
        r'info e a="" b="x y" c="a=b" d="say \"no\"" e="back\\slash" f=/plain/päth g="tab\t"' + "\n"
    )


@pytest.mark.parametrize("format", ["text", "json"])
def test_keys_and_raw_data_are_not_shown(format):
    stream = lines(format)
    key = "taskd-scheduler-key-v1:c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LTEyMzQ"
    log("info", f"read {key}", key=key, error=ValueError(key), secret=b"s" * 32, id=b"\x01\xff")
    try:
        raise ValueError(key)
    except ValueError:
        logging.getLogger("taskd.net").exception("it broke")
    out = stream.getvalue()
    assert "c2VjcmV0" not in out
    assert "taskd-scheduler-key-v1:" in out
    assert "ssss" not in out
    assert "(32 bytes)" in out
    assert "01ff" in out


def test_long_values_are_cut():
    stream = lines("text")
    log("info", "e", value="x" * 100_000)
    assert len(stream.getvalue()) < VALUE_CHARS_MAX + 100


def test_a_traceback_is_indented_and_cannot_pass_for_a_line():
    stream = lines("text")
    try:
        raise ValueError("first\n2026-01-01 info forged\x1b[2J")
    except ValueError:
        logging.getLogger("taskd.net").exception("it broke")
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("error taskd.net: it broke")
    assert r"    2026-01-01 info forged\x1b[2J" in rest
    assert all(line.startswith("    ") for line in rest)


def test_json_has_the_traceback_in_a_field():
    stream = lines("json")
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        logging.getLogger("asyncio").exception("it broke")
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["traceback"].endswith("ValueError: first\nsecond")


def test_levels_count_and_change_while_running():
    stream = lines("text", "warning")
    log("info", "unheard")
    set_level("debug")
    log("debug", "heard")
    assert without_time(stream) == "debug heard\n"
    with pytest.raises(KeyError):
        log("loud", "no such level")


def test_libraries_are_quiet_until_something_is_wrong():
    stream = lines("text", "debug")
    logging.getLogger("aiohttp.access").info("GET /")
    logging.getLogger("zeroconf").warning("interface gone")
    logging.getLogger("asyncio").debug("using selector")
    assert stream.getvalue() == ""
    logging.getLogger("asyncio").warning("slow callback")
    assert without_time(stream) == "warning asyncio: slow callback\n"


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("auto", "<4>warning worker lost worker=a\n<3>error taskd.net: it broke\n<3>    "),
        ("json", '<4>{"time": '),
    ],
)
def test_a_journal_reads_the_level_and_needs_no_time(tmp_path, format, expected):
    path = tmp_path / "journal"
    with path.open("w") as stream:
        found = os.fstat(stream.fileno())
        set_up("info", format, {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}, stream)
        log("warning", "worker lost", worker="a")
        try:
            raise ValueError("x")
        except ValueError:
            logging.getLogger("taskd.net").exception("it broke")
    assert path.read_text().startswith(expected)
    assert all(line.startswith(("<4>", "<3>")) for line in path.read_text().splitlines())


def test_a_stream_that_is_not_the_journals_gets_the_time(tmp_path: Path):
    # As in a shell started from a service: the variable is inherited, stderr is another one.
    path = tmp_path / "log"
    with path.open("w") as stream:
        set_up("info", "auto", {"JOURNAL_STREAM": "1:2", "INVOCATION_ID": "x"}, stream)
        log("info", "started")
    assert path.read_text().startswith("20")


def test_a_log_that_cannot_be_written_stops_nothing(capsys):
    with open("/dev/full", "w") as stream:
        set_up("info", "text", {}, stream)
        log("info", "started")
        stream_errors = capsys.readouterr().err
        set_up("info", "text", {}, io.StringIO())
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    assert stream_errors == ""
