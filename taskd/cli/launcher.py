"""taskd launcher: starts the tasks of a worker as another user. Run by the service manager, or by a worker that is
root."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(
    "launcher",
    hidden=True,
    epilog="It listens on the socket that the service manager hands over, or on --socket. A worker finds it by "
    "`[worker] launcher`. See docs/operations.md.",
)
@click.option("--user", required=True, help="The user that tasks run as; never root.")
@click.option(
    "--directory", default="/var/lib/taskd-launcher", show_default=True, type=click.Path(file_okay=False),
    help="Where tasks have their private directories.",
)  # fmt: skip
@click.option("--allow-user", default="taskd", show_default=True, help="Who may connect, beside root.")
@click.option(
    "--processes-max", default=16384, show_default=True, type=click.IntRange(1, 4_000_000),
    help="How many processes all tasks may have together.",
)  # fmt: skip
@click.option("--socket", "path", type=click.Path(dir_okay=False), help="Where to listen.")
@click.option("--connection", type=int, hidden=True, help="The number of a connected socket.")
def launcher(
    user: str, directory: str, allow_user: str, processes_max: int, path: str | None, connection: int | None
) -> int:
    """Start the tasks of a worker as another user. Has to be root."""
    import pwd

    from taskd.daemon.launcher import run

    try:
        allowed_uid = int(allow_user) if allow_user.isdecimal() else pwd.getpwnam(allow_user).pw_uid
    except KeyError:
        allowed_uid = 0  # There is no such user on this machine: only root may.
    return run(
        user=user, directory=Path(directory), allowed_uid=allowed_uid, processes_max=processes_max,
        connection=connection, path=path,
    )  # fmt: skip
