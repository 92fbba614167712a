"""How commands print: tables and colours for people at a terminal, plain text into pipes, JSON for programs."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import click

SHORT_ID_CHARS = 8
GAP_CHARS = 2  # Between the columns of a table.
FLEXIBLE_CHARS_MIN = 8  # A column narrower than this says nothing.

_STYLES = {
    "running": "cyan", "cancelling": "yellow", "retrying": "yellow", "succeeded": "green", "failed": "red",
    "timed_out": "red", "expired": "red", "cancelled": "yellow", "up": "green", "draining": "yellow",
    "drained": "yellow", "lost": "red", "ok": "green", "degraded": "yellow", "down": "red", "warn": "yellow",
    "fail": "red", "leading": "green", "in_sync": "green", "catching_up": "yellow", "away": "red",
    "superseded": "yellow", "replicated": "green", "local": "yellow",
}  # fmt: skip


_CONTROL = re.compile(r"[\x7f-\x9f]")  # Those below a space are always escaped.


def print_json(document: object) -> None:
    """One JSON document: indented at a terminal, on one line elsewhere."""
    click.echo(json_text(document, indent=2 if sys.stdout.isatty() else None))


def print_lines(documents: Iterable[object]) -> None:
    """A JSON document a line."""
    for document in documents:
        click.echo(json_text(document))


def json_text(document: object, indent: int | None = None) -> str:
    """A document as text: JSON that programs read, without the control characters that JSON lets through."""
    text = json.dumps(document, ensure_ascii=False, indent=indent)
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def note(text: str) -> None:
    """Something that helps a person at a terminal, and is of no use elsewhere."""
    if sys.stderr.isatty():
        click.secho(text, err=True, dim=True)


def warn(text: str) -> None:
    """Something that a person must know, beside what is printed."""
    click.echo(f"taskd: {text}", err=True)


def clean(text: str, allowed: str = "") -> str:
    """Text that somebody else wrote, fit for a terminal: no control characters, which could repaint the screen, but
    those `allowed`."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in allowed else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def state_text(state: str) -> str:
    """A state as people read it, in its colour."""
    return click.style(state.replace("_", " "), fg=_STYLES.get(state))


def short(task_id: str) -> str:
    """The end of an id that people type: the beginning is the time, and much the same for tasks of one day."""
    return task_id[-SHORT_ID_CHARS:]


def duration_text(seconds: float | None) -> str:
    """A duration for people; a hyphen for none."""
    from taskd.values import format_duration

    return "-" if seconds is None else format_duration(max(0.0, seconds))


def size_text(size: float) -> str:
    """A size for people."""
    from taskd.values import format_size

    return format_size(round(size))


def instant_text(seconds: float | None, now_s: float | None = None) -> str:
    """An instant for people, with how long ago it was, or how soon it is."""
    if seconds is None:
        return "-"
    from taskd.values import format_instant

    away_s = (time.time() if now_s is None else now_s) - seconds
    relative = f"{duration_text(away_s)} ago" if away_s >= 0 else f"in {duration_text(-away_s)}"
    return f"{format_instant(seconds, None)} ({relative})"


def amounts_text(amounts: dict[str, float]) -> str:
    """Resources for people: "cpus 4, memory 8GiB"."""
    return ", ".join(
        f"{name} {size_text(amount) if name == 'memory' else f'{amount:g}'}" for name, amount in amounts.items()
    )


def pairs_text(pairs: dict[str, Any]) -> str:
    """Labels, variables: "a=b, c=d"."""
    return ", ".join(f"{name}={value}" for name, value in pairs.items())


def plural(count: int, what: str) -> str:
    """ "1 task", "2 tasks"."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def print_fields(fields: Iterable[tuple[str, str]], indent: str = "") -> None:
    """Names and values below each other; those without a value are left out. Values may have several lines."""
    shown = [(name, value) for name, value in fields if value and value != "-"]
    width = max((len(name) for name, _ in shown), default=0) + 2
    for name, value in shown:
        first, *rest = value.splitlines() or [""]
        click.echo(f"{indent}{click.style(f'{name:<{width}}', dim=True)}{first}")
        for line in rest:
            click.echo(f"{indent}{' ' * width}{line}")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, flexible: str = "") -> None:
    """A table. At a terminal the `flexible` column gives way where the window is narrow; elsewhere nothing is cut."""
    if sys.stdout.isatty():
        _print_rich(columns, rows, flexible)
        return
    plain = [list(columns), *([click.unstyle(cell) for cell in row] for row in rows)]
    widths = [max(len(row[place]) for row in plain) for place in range(len(columns))]
    for row in plain:
        click.echo((" " * GAP_CHARS).join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_rich(columns: Sequence[str], rows: Iterable[Sequence[str]], flexible: str) -> None:
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    cells = [[Text.from_ansi(cell) for cell in row] for row in rows]
    widths = {
        column: max([cell_len(column), *(cell_len(row[place].plain) for row in cells)])
        for place, column in enumerate(columns)
    }
    if flexible:
        over = sum(widths.values()) + GAP_CHARS * (len(columns) - 1) - console.width
        widths[flexible] = max(FLEXIBLE_CHARS_MIN, widths[flexible] - max(0, over))
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, GAP_CHARS, 0, 0))
    for column, width in widths.items():
        table.add_column(column, no_wrap=True, overflow="ellipsis", width=width)
    for row in cells:
        table.add_row(*row)
    console.print(table)
