"""taskd config: the configuration, checked before a daemon has to live with it."""

from __future__ import annotations

import os
from pathlib import Path

import click

from taskd.cli.output import plural, print_fields, print_json


@click.group("config")
def config() -> None:
    """Check the configuration."""


@config.command(
    "check",
    epilog="""\b
Examples:
  taskd config check
  taskd config check ./taskd.toml && systemctl reload taskd@scheduler""",
)
@click.argument("file", required=False, type=click.Path(dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print all settings as JSON.")
def check(file: str | None, as_json: bool) -> None:
    """Read the settings as a daemon would, from FILE or the usual one and TASKD_*, and say what is wrong with them."""
    from taskd import config as settings
    from taskd import paths

    path = Path(file) if file else None
    found = settings.load(path, os.environ, {})
    values = {key: settings.value_of(found, key) for key in settings.SETTINGS}
    if as_json:
        print_json(values)
        return
    shown = path or Path(paths.config_file())
    changed = [(key, _text(value)) for key, value in values.items() if value != settings.SETTINGS[key].default]
    where = str(shown) if shown.exists() else f"{shown} does not exist, which"
    click.echo(f"{where} is fine; {plural(len(changed), 'setting')} differ from the defaults")
    print_fields(changed, indent="  ")


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={part}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
