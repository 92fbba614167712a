"""taskd service: have systemd run a daemon of this machine."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import click

_role = click.option(
    "--role", required=True, type=click.Choice(["scheduler", "worker"]), help="Which daemon; for both, call it twice."
)
_dry = click.option("--dry-run", "is_dry", is_flag=True, help="Say what would be done, and do nothing.")
_root = click.option(
    "--root", default="/", metavar="DIR", type=click.Path(file_okay=False, exists=True, resolve_path=True),
    help="The image of a machine, instead of this one.",
)  # fmt: skip


@click.group("service")
def service() -> None:
    """Have systemd run taskd: units, users, directories, settings.

    From the Debian package all of that is there already, and `systemctl enable --now taskd@worker` is enough.
    """


@service.command(
    "install",
    epilog="""\b
Examples:
  taskd service install --role scheduler --now
  taskd service install --role worker --dry-run

Doing it again changes nothing, or brings the units of a newer version.""",
)
@_role
@click.option("--now", "is_now", is_flag=True, help="Start it too, and wait until it serves.")
@click.option("--program", metavar="PATH", help="The program as the service finds it; else the one that runs now.")
@_dry
@_root
def install(role: str, is_now: bool, program: str | None, is_dry: bool, root: str) -> None:
    """Have a daemon start with the machine."""
    from taskd.errors import ConfigError
    from taskd.service.files import check_reachable, check_trusted, unit
    from taskd.service.steps import Installation

    if program is not None and not program.startswith("/"):
        raise ConfigError(f"--program {program}: give the whole path", field="program")
    words = [program] if program is not None else _own_words()
    check_reachable(words)
    paths = [word for word in words if word.startswith("/")]
    if program is None:
        paths += [os.path.realpath(word) for word in paths]
        check_reachable(paths)
        paths.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the package itself
    check_trusted(map(Path, paths))
    Installation(Path(root), is_dry, click.echo).install(role, words, is_now)
    if not is_dry and not is_now:
        click.echo(f"now: systemctl start {unit(role)}")


@service.command("remove")
@_role
@click.option("--purge", "is_purge", is_flag=True, help="Remove the settings, the key and all state too.")
@_dry
@_root
def remove(role: str, is_purge: bool, is_dry: bool, root: str) -> None:
    """Stop a daemon and undo its installation; tasks, settings and key are kept."""
    from taskd.service.steps import Installation

    Installation(Path(root), is_dry, click.echo).remove(role, is_purge)


def _own_words() -> list[str]:
    """The words that start the program that runs now: itself, where it is one file or folder, else its Python."""
    if getattr(sys, "frozen", False):
        own = shutil.which(sys.argv[0])
        return [os.path.abspath(own)] if own is not None else [sys.executable]
    return [sys.executable, "-m", "taskd"]
