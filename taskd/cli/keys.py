"""taskd key: the secret that makes machines one cluster."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from taskd.cli.output import note
from taskd.cli.parameters import Duration
from taskd.errors import ConfigError

if TYPE_CHECKING:
    from taskd.net.keyring import Keys

_key_file = click.option("--key-file", metavar="F", type=click.Path(dir_okay=False), help="The key's file.")
_role = click.Choice(["worker", "scheduler"])
_RELOAD = "have the daemon read it: systemctl reload, or SIGHUP"


@click.group("key")
def key() -> None:
    """Show, import or replace the cluster key.

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
    from taskd.net.security import SchedulerKey

    path = key_path(key_file)
    found = _load(path)
    if role == "scheduler" and not isinstance(found.current, SchedulerKey):
        raise ConfigError(f"{path} holds a worker key; the scheduler key is only on the machines of schedulers")
    wanted = found.of_workers() if role == "worker" else found
    click.echo(wanted.text)
    note(f"cluster {found.current.fingerprint}; on the other machine: taskd key import")


@key.command("fingerprint")
@_key_file
def fingerprint(key_file: str | None) -> None:
    """Say which key this machine has, without showing it."""
    from taskd.net.keyring import describe

    path = key_path(key_file)
    _load(path)
    for line in describe(path, time.time()):
        click.echo(line)


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
    """Store a key that another machine showed; it is read from the standard input.

    The next key of the same cluster, which `taskd key rotate` has made there, takes the place of the present one.
    """
    from taskd.net.keyring import parse_keys
    from taskd.net.security import SchedulerKey

    is_person = sys.stdin.isatty()
    text = click.prompt("Paste the key", hide_input=True, err=True) if is_person else sys.stdin.read(1 << 16)
    found = parse_keys(text)
    if role == "worker":
        found = found.of_workers()
    if role == "scheduler" and not isinstance(found.current, SchedulerKey):
        raise ConfigError("this is a worker key; on a scheduler's machine run `taskd key show --role scheduler`")
    path = key_path(key_file)
    is_next = _is_next(path, found) if not force else False
    found.save(path, force=force or is_next)
    kind = "scheduler" if isinstance(found.current, SchedulerKey) else "worker"
    click.echo(f"stored the {kind} key of cluster {found.current.fingerprint} in {path}")
    if is_next:
        note(_RELOAD)


def _is_next(path: Path, found: Keys) -> bool:
    """Whether these keys are those of a file, or the next after them."""
    from taskd.net.keyring import load_keys
    from taskd.net.security import SchedulerKey

    there = load_keys(path)
    if there is None:
        return False
    if isinstance(there.current, SchedulerKey) and not isinstance(found.current, SchedulerKey):
        raise ConfigError(f"{path} holds a scheduler key, and this is a worker key; use --force to replace it")
    return there.current.fingerprint in found.lineage


@key.command(
    "rotate",
    epilog="""\b
Example, on one scheduler's machine, and then for each other one while the grace lasts:
  taskd key rotate --grace 2d && systemctl reload taskd@scheduler
  taskd key show --role worker | ssh other 'taskd key import && systemctl reload taskd@worker'""",
)
@click.option(
    "--grace",
    type=Duration(),
    metavar="D",
    help="How long the present key is still accepted.  [default: [node] key_grace]",
)
@_key_file
def rotate(grace: float | None, key_file: str | None) -> None:
    """Make a new cluster key, and accept the present one for a while.

    Until the grace is over, machines with the new key and machines with only the present one go on talking. Bring the
    new key to all of them in that time: who has not got it by then is refused. With --grace 0, after a theft, the
    present key opens nothing any more from the reload on.
    """
    from taskd.net.security import SchedulerKey
    from taskd.values import format_instant

    path = key_path(key_file)
    found = _load(path)
    if not isinstance(found.current, SchedulerKey):
        raise ConfigError(f"{path} holds a worker key: rotate the key on a scheduler's machine")
    now_s = time.time()
    if len(found.valid(now_s)) > 1:
        text = f"the last change goes on until {format_instant(found.until_s)}"
        raise ConfigError(f"{text}: end it first with `taskd key end-grace`, on every machine")
    made = SchedulerKey.generate()
    grace_s = _settings_grace_s() if grace is None else grace
    new = found.followed_by(made, float(int(now_s + grace_s)) if grace_s else None)
    new.save(path, force=True)
    click.echo(f"made the key of cluster {made.fingerprint} in {path}")
    if new.previous is not None:
        click.echo(f"the previous key {new.previous.fingerprint} is accepted until {format_instant(new.until_s)}")
    else:
        click.echo(f"the previous key {found.current.fingerprint} is accepted no more by who has read this one")
    note(f"{_RELOAD}; then on each other machine: taskd key import")


@key.command("end-grace")
@_key_file
def end_grace(key_file: str | None) -> None:
    """Accept the previous key no more from now on: where it may have been stolen, on every machine at once."""
    path = key_path(key_file)
    found = _load(path)
    if found.previous is None:
        click.echo(f"{path} holds one key only")
        return
    found.without_previous().save(path, force=True)
    click.echo(f"the previous key {found.previous.fingerprint} is forgotten")
    note(_RELOAD)


def _load(path: Path) -> Keys:
    from taskd.net.keyring import load_keys

    found = load_keys(path)
    if found is None:
        raise ConfigError(f"there is no key in {path} yet: the first `taskd start --role scheduler` makes one")
    return found


def _settings_grace_s() -> float:
    import os

    from taskd import config

    return config.load(None, os.environ, {}).node.key_grace


def key_path(told: str | None) -> Path:
    """Where the key is: as told, as configured, or in the usual place. Raises ConfigError."""
    if told:
        return Path(told)
    import os

    from taskd import config

    return config.key_path(config.load(None, os.environ, {}))
