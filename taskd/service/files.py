"""The files of the service: units, users, directories and settings, made from one source for every way of installing.

The sources are in taskd/systemd. They name the program /usr/bin/taskd; another place is put in here.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath

from msgspec import Struct

from taskd.errors import ConfigError

ROLES = ("scheduler", "worker")
USERS = ("taskd", "taskd-task")
CONFIG = "etc/taskd/taskd.toml"
STATE = ("var/lib/taskd", "var/lib/taskd-launcher")
PROGRAM = "/usr/bin/taskd"

# What a service sets otherwise than a daemon that somebody starts by hand.
SETTINGS = {
    "key_file": '"/var/lib/taskd/cluster.key"',
    "task_user": '"taskd-task"',
    "launcher": '"/run/taskd/launcher.sock"',
}

# What a unit cannot reach: these units hide the homes, and have a /tmp of their own.
_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108  # they are named to be refused


class File(Struct, frozen=True):
    """A file of the service: where, below the root of the machine, and what is in it."""

    path: str
    text: str


def files(program: Sequence[str], is_package: bool) -> list[File]:
    """All files but the settings. `program`: the words that start taskd. `is_package`: in the directories of a system's
    packages, else in those of its administrator."""
    base = "usr/lib" if is_package else "etc"
    source = resources.files("taskd") / "systemd"
    found = [
        File(f"{base}/sysusers.d/taskd.conf", (source / "sysusers.conf").read_text()),
        File(f"{base}/tmpfiles.d/taskd.conf", (source / "tmpfiles.conf").read_text()),  # noqa: S108
    ]
    for name, text in _units(source):
        found.append(File(f"{base}/systemd/system/{name}", text.replace(PROGRAM, " ".join(map(_quoted, program)))))
    return found


def settings_file() -> File:
    """The settings of a service: the commented file of all settings, with what is different here."""
    lines = (resources.files("taskd") / "systemd" / "taskd.toml").read_text().splitlines()
    wanted = dict(SETTINGS)
    for number, line in enumerate(lines):
        name = line.removeprefix("#").partition(" = ")[0]
        if line.startswith("#") and name in wanted:
            lines[number] = f"{name} = {wanted.pop(name)}"
    assert not wanted, wanted
    return File(CONFIG, "\n".join(lines) + "\n")


def unit(role: str) -> str:
    """The unit of a role."""
    return f"taskd@{role}.service"


def check_reachable(words: Sequence[str]) -> None:
    """Raise ConfigError where the units could not start this program."""
    for word in words:
        if word.startswith("/") and any(PurePosixPath(word).is_relative_to(hidden) for hidden in _HIDDEN):
            raise ConfigError(
                f"the service cannot reach {word}: it sees no homes and no temporary files. Install taskd elsewhere, "
                "such as in a virtual environment in /opt/taskd, or name another one with --program"
            )


def check_trusted(paths: Iterable[Path]) -> None:
    """Raise ConfigError where others than root could put another program in the place of one of these: a part of the
    service runs as root. What does not exist is passed over."""
    for path in paths:
        for part in (path, *path.parents):
            try:
                status = part.stat()
            except OSError:
                continue
            # Whose group may write is the administrator's choice; in a sticky directory nobody replaces what is root's.
            is_for_all = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
            if status.st_uid != 0 or is_for_all:
                raise ConfigError(
                    f"{part} can be changed by others than root, and a part of the service runs as root: install taskd "
                    f"as root, such as in a virtual environment in /opt/taskd, or chown root {part} and chmod o-w"
                )


def _units(source: Traversable) -> list[tuple[str, str]]:
    found = []
    for entry in source.iterdir():
        if entry.is_dir() and entry.name.endswith(".d"):
            found += [(f"{entry.name}/{part.name}", part.read_text()) for part in entry.iterdir()]
        elif entry.name.endswith((".service", ".socket")):
            found.append((entry.name, entry.read_text()))
    return sorted(found)


def _quoted(word: str) -> str:
    """A word of ExecStart."""
    escaped = word.replace("\\", "\\\\").replace("%", "%%").replace("$", "$$").replace('"', '\\"')
    return f'"{escaped}"' if escaped != word or not word or set(word) & set(" \t'") else word
