"""Writes the man pages of all commands into a directory, from what the commands say of themselves: taskd(1) for the
whole, and taskd-COMMAND(1) for each.

    python packaging/manpages.py DIRECTORY
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from taskd.cli.main import SECTIONS, cli
from taskd.version import VERSION

FILES = (
    ("/etc/taskd/taskd.toml", "The settings; the file says what each is for. `taskd config check` checks it."),
    ("/var/lib/taskd", "Tasks, outputs and the cluster key of the services."),
    ("/run/taskd/taskd.sock", "Where local clients ask; group taskd may."),
)
VARIABLES = (
    ("TASKD_SOCKET", "The socket of the daemon to ask."),
    ("TASKD_ACCESS", "An access file, for a daemon on another machine."),
    ("TASKD_SECTION_KEY", "A setting, above the file: TASKD_WORKER_SLOTS=4 is slots in [worker]."),
    ("NO_COLOR", "No colours."),
)


def pages() -> Iterator[tuple[str, str]]:
    """Names of files and their content."""
    context = click.Context(cli, info_name="taskd")
    yield "taskd.1", _whole(context)
    for entries in SECTIONS.values():
        for name in entries:
            command = cli.get_command(context, name)
            assert command is not None, name
            yield f"taskd-{name}.1", _page(command, f"taskd {name}")


def _whole(context: click.Context) -> str:
    lines = [
        *_head("taskd", "run tasks on the machines of a LAN"),
        ".SH SYNOPSIS",
        "\\fBtaskd\\fR COMMAND [OPTIONS]...",
    ]
    lines += [".SH DESCRIPTION", *_paragraphs(cli.help or "")]
    for heading, entries in SECTIONS.items():
        lines.append(f".SH {_escaped(heading.upper())}")
        for name, entry in entries.items():
            lines += [".TP", f"\\fBtaskd\\-{_escaped(name)}\\fR(1)", _escaped(entry.help)]
    lines += [".SH EXIT STATUS", *_paragraphs(cli.epilog or "")]
    for heading, rows in (("FILES", FILES), ("ENVIRONMENT", VARIABLES)):
        lines.append(f".SH {heading}")
        for name, what in rows:
            lines += [".TP", f"\\fB{_escaped(name)}\\fR", _escaped(what)]
    lines += [".SH SEE ALSO", "\\fBsystemctl\\fR(1) for the services \\fBtaskd@scheduler\\fR and \\fBtaskd@worker\\fR"]
    return "\n".join(lines) + "\n"


def _page(command: click.Command, path: str) -> str:
    summary = (command.help or "").strip().partition("\n")[0].rstrip(".")
    lines = _head(path.replace(" ", "-"), summary[:1].lower() + summary[1:])
    lines.append(".SH SYNOPSIS")
    commands = list(_leaves(command, path))
    for leaf_path, leaf in commands:
        usage = " ".join(leaf.collect_usage_pieces(click.Context(leaf, info_name=leaf_path)))
        lines += [".br", f"\\fB{_escaped(leaf_path)}\\fR {_escaped(usage)}"]
    lines += [".SH DESCRIPTION", *_paragraphs(command.help or "")]
    if commands[0][1] is command:
        lines += [".SH OPTIONS", *_options(command)]
    else:
        for leaf_path, leaf in commands:
            lines += [f".SH {_escaped(leaf_path.removeprefix('taskd ').upper())}", *_paragraphs(leaf.help or "")]
            lines += [*_options(leaf), *_paragraphs(leaf.epilog or "")]
    if command.epilog:
        lines += [".SH NOTES", *_paragraphs(command.epilog)]
    lines += [".SH SEE ALSO", "\\fBtaskd\\fR(1)"]
    return "\n".join(lines) + "\n"


def _head(name: str, summary: str) -> list[str]:
    title = _escaped(name.upper())
    return [f'.TH "{title}" "1" "" "taskd {VERSION}" "taskd"', ".SH NAME", f"{_escaped(name)} \\- {_escaped(summary)}"]


def _leaves(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """The commands that can be called: itself, or those below it."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    for name, child in command.commands.items():
        if not child.hidden:
            yield from _leaves(child, f"{path} {name}")


def _options(command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name="")
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            yield from (".TP", f"\\fB{_escaped(record[0])}\\fR", _escaped(record[1]) or "\\&")


def _paragraphs(text: str) -> Iterator[str]:
    """Text as click has it: blank lines part paragraphs, and one that begins with \\b keeps its lines."""
    for part in re.split(r"\n\s*\n", _unindented(text)):
        body = part.strip("\n")
        if body.startswith("\b"):
            yield from (".PP", ".nf", *map(_escaped, body.lstrip("\b").strip("\n").splitlines()), ".fi")
        elif body:
            yield from (".PP", _escaped(" ".join(body.split())))


def _unindented(text: str) -> str:
    first, _, rest = text.strip("\n").partition("\n")
    widths = [len(line) - len(line.lstrip()) for line in rest.splitlines() if line.strip()]
    width = min(widths, default=0)
    return "\n".join([first.lstrip(" "), *(line[width:] for line in rest.splitlines())])


def _escaped(text: str) -> str:
    """Text in which nothing is a request or an escape of roff."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq")
    return "\\&" + escaped if escaped.startswith((".", "'")) else escaped


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in pages():
        (directory / name).write_text(text)


if __name__ == "__main__":
    main()
