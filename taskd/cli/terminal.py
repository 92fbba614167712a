"""What tasks write, made fit for a terminal: text and colours pass, and what could command the terminal is shown.
Pure."""

from __future__ import annotations

import codecs
import re

# Longer than the colours of any program: what is held back must have an end.
_PARAMETERS_CHARS_MAX = 64
_PARAMETERS = rf"[0-9;:]{{0,{_PARAMETERS_CHARS_MAX}}}"

# Colours (SGR) and the erasing of a line do no harm; nor do tab, line feed, carriage return and backspace. C1 controls
# do what the sequences do that they stand for; bytes outside UTF-8 are escaped before they get here.
_CONTROL = re.compile(rf"(\x1b\[{_PARAMETERS}[mK])|[\x00-\x07\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_BEGUN = re.compile(rf"\x1b(?:\[{_PARAMETERS})?")


class TerminalFilter:
    """Filters one stream of bytes, in whatever pieces it comes. What is left of it is UTF-8 text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._begun = ""  # a sequence whose end is still to come

    def feed(self, data: bytes) -> bytes:
        """What may be written by now; the beginning of a sequence or of a character is held back."""
        text = self._begun + self._decoder.decode(data)
        begin = text.rfind("\x1b")
        is_begun = begin >= 0 and _BEGUN.fullmatch(text, begin) is not None
        self._begun = text[begin:] if is_begun else ""
        return _shown(text[:begin] if is_begun else text)

    def end(self) -> bytes:
        """What was held back, as nothing will complete it."""
        text = self._begun + self._decoder.decode(b"", final=True)
        self._begun = ""
        return _shown(text)


def _shown(text: str) -> bytes:
    return _CONTROL.sub(lambda found: found[1] or f"\\x{ord(found[0]):02x}", text).encode()
