"""What benchmarks print and keep: figures, each beside what the machine itself does in the same run."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path

from msgspec import Struct, to_builtins
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


class Figure(Struct):
    """One of them. `ceiling`: what it is held against, measured in the same run."""

    name: str
    value: float
    unit: str
    ceiling: float | None = None
    ceiling_name: str = ""


def text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.1f}" if abs(value) >= 10 else f"{value:,.2f}"


def show(title: str, figures: list[Figure]) -> None:
    """A table."""
    table = Table(title=f"{title}: {os.cpu_count()} CPUs, Python {platform.python_version()}", title_justify="left")
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("in the same run", no_wrap=True)
    for it in figures:
        beside = ""
        if it.ceiling is not None:
            times = it.value / it.ceiling
            share = f", {100 * times:.0f} % of it" if it.unit == "/s" else f", {text(times)} times that"
            beside = f"{it.ceiling_name} {text(it.ceiling)}{share}"
        table.add_row(it.name, f"{text(it.value)} {it.unit}", beside)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120).print(table)


def keep(figures: list[Figure], path: Path) -> None:
    """Write them as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_builtins(figures), indent=2) + "\n")
