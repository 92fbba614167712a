"""taskd key: the secret that makes machines one cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from taskd.cli.output import note
from taskd.errors import ConfigError

if TYPE_CHECKING:
    from taskd.net.security import Key

_key_file = click.option("--key-file", metavar="F", type=click.Path(dir_okay=False), help="The key's file.")
_role = click.Choice(["worker", "scheduler"])


@click.group("key")
def key() -> None:
    """Show or import the cluster key.

    The first scheduler makes the key. A machine that only works needs no more than the worker key: whoever steals that
    cannot pose as a scheduler.
    """


@key.command(
    "show",
    epilog="""\b
Example, to add a worker from the scheduler's machine:
  taskd key show --role worker | ssh other taskd key import""",
)
@click.option("--role", type=_role, default="worker", show_default=True, help="For which machines.")
@_key_file
def show(role: str, key_file: str | None) -> None:
    """Print the key that other machines need. Keep it secret."""
    from taskd.net.security import SchedulerKey, load_key

    path = key_path(key_file)
    found = load_key(path)
    if found is None:
        raise ConfigError(f"there is no key in {path} yet: the first `taskd start --role scheduler` makes one")
    if role == "scheduler" and not isinstance(found, SchedulerKey):
        raise ConfigError(f"{path} holds a worker key; the scheduler key is only on the machines of schedulers")
    wanted: Key = found.worker_key if role == "worker" and isinstance(found, SchedulerKey) else found
    click.echo(wanted.text)
    note(f"cluster {found.fingerprint}; on the other machine: taskd key import")


@key.command(
    "import",
    epilog="""\b
Examples:
  taskd key import              # and paste it
  taskd key import < key.txt""",
)
@click.option("--role", type=_role, help="Keep only what this role needs.")
@_key_file
@click.option("--force", is_flag=True, help="Replace another key.")
def import_key(role: str | None, key_file: str | None, force: bool) -> None:
    """Store a key that another machine showed; it is read from the standard input."""
    from taskd.net.security import SchedulerKey, parse_key

    text = click.prompt("Paste the key", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.read(1 << 16)
    found = parse_key(text)
    if role == "worker" and isinstance(found, SchedulerKey):
        found = found.worker_key
    if role == "scheduler" and not isinstance(found, SchedulerKey):
        raise ConfigError("this is a worker key; on a scheduler's machine run `taskd key show --role scheduler`")
    path = key_path(key_file)
    found.save(path, force)
    kind = "scheduler" if isinstance(found, SchedulerKey) else "worker"
    click.echo(f"stored the {kind} key of cluster {found.fingerprint} in {path}")


def key_path(told: str | None) -> Path:
    """Where the key is: as told, as configured, or in the usual place. Raises ConfigError."""
    if told:
        return Path(told)
    import os

    from taskd import config, paths

    return Path(config.load(None, os.environ, {}).node.key_file or paths.key_file())
