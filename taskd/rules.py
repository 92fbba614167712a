"""What a setting may hold: each kind of value is read from TOML or from plain text, bounded, and told to people.

Values in text (environment, flags) are written as in TOML without quotes; lists are separated by commas, tables are
lists of name=value.
"""

from __future__ import annotations

import difflib
import os.path
import re
from collections.abc import Callable, Iterable
from typing import Any

from msgspec import Struct

from taskd.values import duration_s, format_duration, format_size, size_bytes

PATH_BYTES_MAX = 4095  # PATH_MAX of Linux, less its closing zero.
KEY_MARK = "-key-v1:"  # In every cluster key's text: a key in the place of its file's path must not be shown.
_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})
_ADDRESS = re.compile(r"(?:\[(?P<ip6>[0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|(?P<host>[^\s:\[\]/]*))(?::(?P<port>[0-9]{1,5}))?")


class Rule(Struct, frozen=True):
    """One kind of value. `read` and `read_text` raise ValueError for what does not fit; its text, where it has one,
    adds to what `allowed` says."""

    @property
    def allowed(self) -> str:
        """What fits, to follow "must be"."""
        raise NotImplementedError

    def read(self, value: object) -> Any:
        """The setting's value from one that TOML gave."""
        raise NotImplementedError

    def read_text(self, text: str) -> Any:
        """The setting's value from text of the environment or the command line."""
        return self.read(text.strip())


class Switch(Rule, frozen=True):
    """On or off."""

    @property
    def allowed(self) -> str:
        return "true or false"

    def read(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value

    def read_text(self, text: str) -> bool:
        word = text.strip().lower()
        if word not in _TRUE | _FALSE:
            raise ValueError
        return word in _TRUE


class Whole(Rule, frozen=True):
    """A whole number."""

    least: int
    most: int

    @property
    def allowed(self) -> str:
        return f"a whole number from {self.least} " + (f"to {self.most:_}" if self.most < 1 << 62 else "up")

    def read(self, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not self.least <= value <= self.most:
            raise ValueError
        return value

    def read_text(self, text: str) -> int:
        return self.read(_converted(int, text))


class Number(Rule, frozen=True):
    """A number with a fraction."""

    least: float
    most: float
    unit: str = ""

    @property
    def allowed(self) -> str:
        unit = f" of {self.unit}" if self.unit else ""
        return f"a number{unit} from {self.least:.15g} to {self.most:.15g}"

    def read(self, value: object) -> float:
        # Not-a-number lies in no range, so it is refused here too.
        if not isinstance(value, int | float) or isinstance(value, bool) or not self.least <= value <= self.most:
            raise ValueError
        return float(value)

    def read_text(self, text: str) -> float:
        return self.read(_converted(float, text))


class Duration(Rule, frozen=True):
    """A stretch of time, in seconds."""

    least_s: float
    most_s: float

    @property
    def allowed(self) -> str:
        return (
            f'a duration such as "7d" or "1h30m", or seconds, '
            f"from {format_duration(self.least_s)} to {format_duration(self.most_s)}"
        )

    def read(self, value: object) -> float:
        return Number(self.least_s, self.most_s).read(_converted(duration_s, value))


class Size(Rule, frozen=True):
    """A number of bytes."""

    least: int
    most: int

    @property
    def allowed(self) -> str:
        return (
            f'a size such as "512MiB" or "2GiB", or bytes, from {format_size(self.least)} to {format_size(self.most)}'
        )

    def read(self, value: object) -> int:
        return Whole(self.least, self.most).read(_converted(size_bytes, value))


class Word(Rule, frozen=True):
    """One of a few words."""

    words: tuple[str, ...]

    @property
    def allowed(self) -> str:
        return "one of " + ", ".join(self.words)

    def read(self, value: object) -> str:
        if value not in self.words:
            raise ValueError(did_you_mean(str(value), self.words))
        return str(value)


class Text(Rule, frozen=True):
    """Text of a certain form, matched whole; empty text only where the form says so."""

    form: str  # regular expression
    what: str  # the form in words

    @property
    def allowed(self) -> str:
        return self.what

    def read(self, value: object) -> str:
        if not isinstance(value, str) or re.fullmatch(self.form, value) is None:
            raise ValueError
        return value


class FilePath(Rule, frozen=True):
    """A path of a file or directory; empty for the usual place. In text, a relative path starts where we run."""

    @property
    def allowed(self) -> str:
        return 'an absolute path, or one that begins with "~/"'

    def read(self, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError
        if not value:
            return ""
        if KEY_MARK in value:
            raise ValueError("this is a key itself: put it into a file of mode 0600 and name that file")
        path = os.path.expanduser(value)
        if not os.path.isabs(path) or "\0" in path or len(os.fsencode(path)) > PATH_BYTES_MAX:
            raise ValueError
        return os.path.normpath(path)

    def read_text(self, text: str) -> str:
        is_relative = text and not text.startswith(("/", "~/")) and KEY_MARK not in text
        return self.read(os.path.abspath(text) if is_relative else text)


class FileMode(Rule, frozen=True):
    """Permissions of a file that its owner may read and write."""

    @property
    def allowed(self) -> str:
        return 'octal permissions in quotes such as "0660", with read and write for the owner'

    def read(self, value: object) -> int:
        if not isinstance(value, str) or re.fullmatch("0?[0-7]{3}", value) is None:
            raise ValueError
        mode = int(value, 8)
        if mode & 0o600 != 0o600:
            raise ValueError
        return mode


class Address(Rule, frozen=True):
    """Where a scheduler listens or is reached, as HOST:PORT; `is_listen` allows no host (all) and port 0 (any free)."""

    port_default: int
    is_listen: bool = False

    @property
    def allowed(self) -> str:
        return (
            "HOST:PORT, HOST or :PORT, IPv6 in brackets, port 0 for any free one"
            if self.is_listen
            else "HOST:PORT or HOST, IPv6 in brackets"
        )

    def read(self, value: object) -> str:
        found = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
        if not value or found is None:
            raise ValueError
        host = f"[{found['ip6']}]" if found["ip6"] else found["host"]
        port = self.port_default if found["port"] is None else int(found["port"])
        if not (0 if self.is_listen else 1) <= port <= 65535 or not (host or self.is_listen) or len(host) > 255:
            raise ValueError
        return f"{host}:{port}"


class ListOf(Rule, frozen=True):
    """A list without repetitions."""

    item: Rule
    most: int = 64

    @property
    def allowed(self) -> str:
        return f"a list of at most {self.most}, each {self.item.allowed}"

    def read(self, value: object) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise ValueError
        return self._bounded([_part(self.item.read, item, str(item)) for item in value])

    def read_text(self, text: str) -> tuple[Any, ...]:
        return self._bounded([_part(self.item.read_text, part, part) for part in _split(text)])

    def _bounded(self, items: Iterable[Any]) -> tuple[Any, ...]:
        unique = tuple(dict.fromkeys(items))
        if len(unique) > self.most:
            raise ValueError
        return unique


class TableOf(Rule, frozen=True):
    """Values by name."""

    item: Rule
    names: Rule
    reserved: tuple[str, ...] = ()  # names that have settings of their own
    most: int = 64

    @property
    def allowed(self) -> str:
        return f"a table of at most {self.most}, each name {self.names.allowed}, each value {self.item.allowed}"

    def read(self, value: object) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError
        return self._bounded({self._name(name): _part(self.item.read, item, name) for name, item in value.items()})

    def read_text(self, text: str) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for part in _split(text):
            name, equals, rest = part.partition("=")
            if not equals:
                raise ValueError(f"{part!r} is not name=value")
            table[self._name(name.strip())] = _part(self.item.read_text, rest, name)
        return self._bounded(table)

    def _name(self, name: str) -> str:
        if name in self.reserved:
            raise ValueError(f"{name} is a setting of its own")
        return str(_part(self.names.read, name, name))

    def _bounded(self, table: dict[str, Any]) -> dict[str, Any]:
        if len(table) > self.most:
            raise ValueError
        return table


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint at the known word that is meant; empty where none is close."""
    close = difflib.get_close_matches(word.lower(), list(known), n=1)
    return f"did you mean {close[0]}?" if close else ""


def _converted(convert: Callable[[str], object], value: object) -> object:
    """Text made a number, anything else as it is. The error says nothing: `allowed` says it all."""
    if not isinstance(value, str):
        return value
    try:
        return convert(value)
    except ValueError:
        raise ValueError from None


def _split(text: str) -> list[str]:
    return [part for part in (part.strip() for part in text.split(",")) if part]


def _part(read: Callable[[Any], Any], value: object, name: str) -> Any:
    """Read one part of a list or table; an error says which."""
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"{name!r} is wrong" + (f": {error}" if str(error) else "")) from None
