"""What tasks write, on a terminal and in a pipe."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd.cli.terminal import TerminalFilter
from tests.cli.conftest import Taskd
from tests.client.fake_daemon import FakeDaemon

Start = Callable[..., "subprocess.Popen[bytes]"]

PASSED = {
    "text": "plain, grün, 日本語 and 😀",
    "text whose UTF-8 has bytes of C1": "ě ś “quotes” \u0600",
    "lines, tabs and progress": "a\tb\r50%\r\n|\b/\n",
    "colours": "\x1b[1;31mred\x1b[0m \x1b[38;2;1;2;3mtrue\x1b[m \x1b[4:3mcurly",
    "the erasing of a line": "50%\r\x1b[K100%\x1b[2K",
}
SHOWN = {
    "a title": (b"\x1b]0;owned\x07", rb"\x1b]0;owned\x07"),
    "a clear screen": (b"\x1b[2J", rb"\x1b[2J"),
    "a question to the terminal": (b"\x1b[6n\x1b[c", rb"\x1b[6n\x1b[c"),
    "a string of DCS": (b"\x1bP+q544e\x1b\\", rb"\x1bP+q544e\x1b\\"[:-1]),
    "a mode of the keyboard, which ends like a colour": (b"\x1b[>4;2m", rb"\x1b[>4;2m"),
    "a private erasing": (b"\x1b[?2K", rb"\x1b[?2K"),
    "a reset": (b"\x1bc", rb"\x1bc"),
    "a colour without an end": (b"\x1b[" + b"1" * 65 + b"m", rb"\x1b[" + b"1" * 65 + b"m"),
    "C1 as a byte": (b"a\x9b2J", rb"a\x9b2J"),
    "C1 as a character": ("a\x9b2J".encode(), rb"a\x9b2J"),
    "bytes that are no text": (b"\xff\xc3(", rb"\xff\xc3("),
    "half a character at the end": (b"a\xe2\x82", rb"a\xe2\x82"),
    "half a sequence at the end": (b"a\x1b[3", rb"a\x1b[3"),
    "bells, nulls and other character sets": (b"\x07\x00\x0e\x0c\x7f", rb"\x07\x00\x0e\x0c\x7f"),
}


def filtered(*pieces: bytes) -> bytes:
    terminal = TerminalFilter()
    return b"".join([*map(terminal.feed, pieces), terminal.end()])


@pytest.mark.parametrize("text", PASSED.values(), ids=PASSED)
def test_what_passes(text: str) -> None:
    assert filtered(text.encode()) == text.encode()


@pytest.mark.parametrize(("data", "shown"), SHOWN.values(), ids=SHOWN)
def test_what_is_shown_as_text(data: bytes, shown: bytes) -> None:
    assert filtered(data) == shown


def test_a_colour_waits_for_its_end_and_nothing_else_waits() -> None:
    terminal = TerminalFilter()
    assert [terminal.feed(piece) for piece in (b"a\x1b", b"[3", b"1mb", b"c")] == [b"a", b"", b"\x1b[31mb", b"c"]


_output = st.lists(
    st.one_of(
        st.binary(max_size=8),
        st.text(max_size=8).map(str.encode),
        st.sampled_from([b"\x1b", b"\x1b[", b"31;1", b"m", b"K", b"\xc2", b"\x9b", b"\xe2\x82", b"2J", b"\x07"]),
    ),
    max_size=12,
)  # fmt: skip


@given(_output)
def test_pieces_make_no_difference_and_nothing_commands_the_terminal(pieces: list[bytes]) -> None:
    written = filtered(*pieces)
    whole = b"".join(pieces)
    assert written == filtered(whole) == filtered(*(whole[place : place + 1] for place in range(len(whole))))
    harmless = re.sub(r"\x1b\[[0-9;:]*[mK]", "", written.decode())
    assert not re.search(r"[\x00-\x07\x0b\x0c\x0e-\x1f\x7f-\x9f]", harmless)
    assert filtered(written) == written


# -- The commands ------------------------------------------------------------------------------------------------------

EVIL = "\x1b]0;owned\x07\x1b[31mred\x1b[0m\x1b[6n"
HARMLESS = b"\\x1b]0;owned\\x07\x1b[31mred\x1b[0m\\x1b[6n"


def on_terminal(start: Start, *args: str) -> bytes:
    """What a command writes to a terminal."""
    ours, theirs = os.openpty()
    try:
        process = start(*args, stdout=theirs)
        os.close(theirs)
        seen = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other side is closed
                break
            seen += part
        assert process.wait(10) == 0
        return seen
    finally:
        os.close(ours)


@pytest.mark.parametrize("command", [("logs", "last"), ("logs", "-f", "last"), ("run", "--", "print", EVIL)])
def test_a_terminal_gets_text_and_colours(
    start: Start, taskd: Taskd, daemon: FakeDaemon, command: tuple[str, ...]
) -> None:
    taskd("submit", "--", "print", EVIL)
    assert on_terminal(start, *command) == HARMLESS + b"\r\n"
    name, *rest = command
    assert on_terminal(start, name, "--raw", *rest) == EVIL.encode() + b"\r\n"


def test_a_pipe_gets_the_exact_bytes(start: Start, taskd: Taskd, daemon: FakeDaemon) -> None:
    taskd("submit", "--", "print", EVIL)
    for command in (("logs", "last"), ("run", "--", "print", EVIL)):
        assert start(*command).communicate(timeout=20)[0] == EVIL.encode() + b"\n"
