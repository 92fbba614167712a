"""taskd backup, taskd restore: what a scheduler keeps, as a file, and back."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import click

from taskd.cli.output import note, print_json, size_text
from taskd.cli.session import Session, talks
from taskd.client import calls
from taskd.errors import ConfigError, TaskdError


@click.command(
    "backup",
    epilog="""\b
Examples:
  taskd backup /var/backups/taskd-$(date +%F).tar
  taskd backup nightly.tar --force            replaces the last one

A backup holds the tasks, their results and the nodes, as they were when it began: all that a scheduler keeps. It does
not hold the cluster key, and not what tasks wrote beyond their last lines, which is at the workers.""",
)
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--force", is_flag=True, help="Replace FILE when the new backup is whole.")
@click.option("--json", "as_json", is_flag=True, help="Print what the backup says of itself as JSON.")
@talks
def backup(session: Session, file: str, *, force: bool, as_json: bool) -> None:
    """Write a consistent copy of a scheduler's state to FILE, while it serves."""
    from taskd.backup_file import BackupFile

    path = Path(file)
    if path.exists() and not force:
        raise ConfigError(f"{path} exists: with --force it is replaced")
    partial = path.with_name(f".{path.name}.partial")
    try:
        _receive(session, partial)
        with BackupFile(partial) as made:
            made.check()
        os.replace(partial, path)
        _sync_directory(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    manifest = made.manifest
    if as_json:
        print_json({name: getattr(manifest, name) for name in manifest.__struct_fields__})
    else:
        click.echo(
            f"{path}: {size_text(manifest.bytes)}, node {manifest.node_id} ({manifest.node_name}) of cluster "
            f"{manifest.cluster}, made {manifest.made}"
        )
        note("the cluster key is not in it: keep that apart, see `taskd key show --role scheduler`")


@click.command(
    "restore",
    epilog="""\b
Examples:
  systemctl stop taskd@scheduler
  taskd restore /var/backups/taskd-2026-03-01.tar --force
  systemctl start taskd@scheduler

Where other schedulers of the cluster live, nothing has to be restored: start with an empty state directory, and all of
it comes from them.""",
)
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--state-dir", metavar="D", type=click.Path(file_okay=False), help="Where the scheduler keeps its state.")
@click.option("--force", is_flag=True, help="Move a state that is there aside.")
@click.option("--new-node", is_flag=True, help="Be another node: the one of the backup lives on elsewhere.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def restore(file: str, state_dir: str | None, *, force: bool, new_node: bool, as_json: bool) -> None:
    """Put a backup into the state directory of a scheduler that is stopped."""
    from taskd import config, paths
    from taskd.daemon.restore import restore as put_in_place

    directory = state_dir or config.load(None, os.environ, {}).node.state_dir or paths.places().state
    done = put_in_place(Path(file), Path(directory), is_forced=force, is_new_node=new_node)
    manifest = done.manifest
    if as_json:
        moved_to = None if done.moved_to is None else str(done.moved_to)
        print_json({"directory": str(done.directory), "node_id": done.node_id, "moved_to": moved_to})
        return
    who = f"node {done.node_id}" if done.node_id else "a new node"
    click.echo(f"restored the state of {manifest.made} into {done.directory}, as {who}")
    if done.moved_to is not None:
        note(f"what was there is now {done.moved_to}")


def _receive(session: Session, partial: Path) -> None:
    """Write what the daemon sends to a new file, durably."""
    try:
        with (
            session.transport.open(calls.backup()) as stream,
            open(partial, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file,
        ):
            while part := stream.read():
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if isinstance(error, TaskdError):
            raise
        raise ConfigError(f"{partial} cannot be written: {error.strerror}") from None


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
