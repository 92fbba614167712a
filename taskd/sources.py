"""Where settings come from: a TOML file, the environment, flags. Says everything that is wrong with them in one go."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from taskd.errors import ConfigError
from taskd.rules import KEY_MARK, Rule, did_you_mean

FILE_BYTES_MAX = 1 << 20  # A configuration file larger than this is some other file.
LINE_DOTS_MAX = 2000  # The parser takes memory by the square of the parts of a key; 256 addresses have 768.
SHOWN_CHARS_MAX = 80  # Of a wrong value, in an error.
# Variables of clients, of tasks and of tests, which are no settings: a daemon may be started by any of these.
OTHER_VARIABLES = frozenset({
    "TASKD_ACCESS", "TASKD_ATTEMPT", "TASKD_DEBUG", "TASKD_ERROR_FILE", "TASKD_FAILPOINT", "TASKD_FENCE",
    "TASKD_SOCKET", "TASKD_TASK_DIR", "TASKD_TASK_ID", "TASKD_WORKER",
})  # fmt: skip
PROBLEMS_MAX = 20  # Shown at once: more say no more.


class Setting(Struct, frozen=True):
    """One key: how it is read, what for, and its default."""

    rule: Rule
    why: str
    default: Any


class Sources:
    """Values by key (`section.name`), a later source over an earlier, and all problems on the way."""

    def __init__(self, settings: Mapping[str, Setting]) -> None:
        self._settings = settings
        self._sections = tuple(dict.fromkeys(_section(key) for key in settings))
        self._values: dict[str, Any] = {}
        self._origins: dict[str, str] = {}
        self._problems: list[tuple[str, str]] = []  # key, text

    def read_file(self, path: Path, must_exist: bool) -> None:
        """Take all keys of a TOML file."""
        try:
            with path.open("rb") as file:
                raw = file.read(FILE_BYTES_MAX + 1)
        except FileNotFoundError:
            if must_exist:
                self._problem("", f"{path}: there is no such file")
            return
        except OSError as error:
            self._problem("", f"{path}: cannot be read: {error.strerror or error}")
            return
        if len(raw) > FILE_BYTES_MAX:
            self._problem("", f"{path}: is no configuration: it has more than {FILE_BYTES_MAX} bytes")
            return
        if any(line.count(b".") > LINE_DOTS_MAX for line in raw.splitlines()):
            self._problem("", f"{path}: is no configuration: a line has more than {LINE_DOTS_MAX} dots")
            return
        try:
            sections = tomllib.loads(raw.decode())
        except (ValueError, RecursionError) as error:  # Of TOML, of UTF-8, or of a number with thousands of digits.
            self._problem("", f"{path}: is not valid TOML: {_printable(str(error))}")
            return
        for section, table in sections.items():
            if section not in self._sections:
                self._problem(section, f"{path}: {self._unknown_section(section)}")
            elif not isinstance(table, dict):
                self._problem(section, f"{path}: {section} must be a section: write [{section}] above its keys")
            else:
                for name, value in table.items():
                    self._take(f"{section}.{name}", value, str(path), f"[{section}] {name}", is_text=False)

    def read_environment(self, environ: Mapping[str, str]) -> None:
        """Take all TASKD_<SECTION>_<NAME>. Tasks and clients have other TASKD_* variables, which are passed over; one
        that was probably meant to be a setting is a problem."""
        for variable, text in sorted(environ.items()):
            if not variable.startswith("TASKD_") or variable in OTHER_VARIABLES:
                continue
            section, underscore, name = variable.removeprefix("TASKD_").lower().partition("_")
            if section in self._sections and underscore:
                self._take(f"{section}.{name}", text, "the environment", variable, is_text=True)
            elif meant := self._meant(section, name):
                self._problem("", f"the environment: {_printable(variable)}: there is no such setting; {meant}")

    def read_flags(self, flags: Mapping[str, object]) -> None:
        """Take values from the command line, by key."""
        for key, value in flags.items():
            self._take(key, value, "the command line", key, is_text=isinstance(value, str))

    def section(self, section: str) -> dict[str, Any]:
        """The values of one section that any source gave, by name."""
        return {_name(key): value for key, value in self._values.items() if _section(key) == section}

    def disagree(self, values: Mapping[str, object], why: str) -> None:
        """Note that values, each right by itself, do not go together."""
        shown = ", ".join(
            f"{key} = {_shown(value)} ({self._origins.get(key, 'the default')})" for key, value in values.items()
        )
        self._problem(next(iter(values)), f"{shown}: {why}")

    def check(self) -> None:
        """Raises ConfigError, a line for each problem, where there are any."""
        if not self._problems:
            return
        lines = [text for _, text in self._problems[:PROBLEMS_MAX]]
        if len(self._problems) > PROBLEMS_MAX:
            lines.append(f"and {len(self._problems) - PROBLEMS_MAX} more")
        raise ConfigError("\n".join(lines), field=self._problems[0][0] or None)

    def _take(self, key: str, value: object, origin: str, written: str, is_text: bool) -> None:
        """Read one value; `written` is the key as its source has it."""
        setting = self._settings.get(key)
        if setting is None:
            self._problem(key, f"{origin}: {_printable(written)}: there is no such key; {self._hint(key)}")
            return
        rule = setting.rule
        try:
            self._values[key] = rule.read_text(value) if is_text and isinstance(value, str) else rule.read(value)
            self._origins[key] = origin
        except ValueError as error:
            more = f"; {_printable(str(error))}" if str(error) else ""
            self._problem(key, f"{origin}: {written} = {_shown(value)}: must be {rule.allowed}{more}")

    def _problem(self, key: str, text: str) -> None:
        self._problems.append((key, text))

    def _hint(self, key: str) -> str:
        """What an unknown key was probably meant to be."""
        own = [_name(known) for known in self._settings if _section(known) == _section(key)]
        meant = did_you_mean(_name(key), own)
        elsewhere = self._homes(_name(key))
        if not meant and elsewhere:
            return f"it belongs in [{elsewhere[0]}]"
        return meant or "there are " + ", ".join(own)

    def _meant(self, section: str, name: str) -> str:
        """The setting that a variable without a section of ours was probably meant to be: its section is misspelt, or
        left out. Empty where it looks like neither."""
        bare = f"{section}_{name}".rstrip("_")
        if homes := self._homes(bare):
            return f"did you mean TASKD_{homes[0].upper()}_{bare.upper()}?"
        return did_you_mean(section, self._sections).replace("did you mean", "did you mean the section") if name else ""

    def _unknown_section(self, section: str) -> str:
        homes = self._homes(section)
        if homes:
            return f"{section} belongs in a section: write it below [{homes[0]}]"
        hint = did_you_mean(section, self._sections) or "there are " + ", ".join(self._sections)
        return f"[{_printable(section)}]: there is no such section; {hint}"

    def _homes(self, name: str) -> list[str]:
        """The sections that have a key of this name."""
        return [_section(key) for key in self._settings if _name(key) == name]


def _section(key: str) -> str:
    return key.partition(".")[0]


def _name(key: str) -> str:
    return key.partition(".")[2]


def _shown(value: object) -> str:
    """A value as it was written, on one line and not too long; never a key."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return "(a key)" if KEY_MARK in text else _printable(text)


def _printable(text: str) -> str:
    """Text from outside, fit to be shown."""
    shown = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)
    return shown if len(shown) <= SHOWN_CHARS_MAX else shown[: SHOWN_CHARS_MAX - 1] + "…"
