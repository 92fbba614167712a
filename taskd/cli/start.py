"""taskd start: a daemon in the foreground; systemd and containers want no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

Role = Literal["scheduler", "worker"]
ROLES: tuple[Role, ...] = ("scheduler", "worker")


class _Roles(click.ParamType):  # type: ignore[type-arg]  # generic for the type checker, in newer versions only
    """One role, or both with a comma."""

    name = "role"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Role, ...]:
        words = {word.strip() for word in str(value).split(",")}
        if not words <= set(ROLES):
            self.fail(f"{value!r} is not scheduler, worker, or scheduler,worker", param, ctx)
        return tuple(role for role in ROLES if role in words)


@click.command(
    "start",
    epilog="""\b
Examples:
  taskd start --role scheduler,worker         a cluster of one machine
  taskd start --role worker                   one more; it finds the scheduler on the LAN
  taskd start --role worker --join 10.0.0.7   where multicast does not reach

It runs until SIGTERM or Ctrl-C, which it obeys in good order; SIGHUP has it read its settings again. Every option is
also a setting: see `taskd config check`.""",
)
@click.option(
    "--role", "roles", type=_Roles(), required=True, metavar="ROLE", help="scheduler, worker, or both with a comma."
)
@click.option("--node-id", type=click.IntRange(min=1), metavar="N", help="The live scheduler with the lowest id leads.")
@click.option("--name", help="What people see this node called; else the host's name.")
@click.option("--cluster", metavar="NAME", help="Only nodes of the same cluster talk.")
@click.option("--config", metavar="F", type=click.Path(dir_okay=False), help="The file with the settings.")
@click.option("--state-dir", metavar="D", type=click.Path(file_okay=False), help="Where tasks and outputs are kept.")
@click.option("--socket", metavar="PATH", type=click.Path(dir_okay=False), help="Where local clients ask.")
@click.option("--listen", multiple=True, metavar="HOST:PORT", help="Where a scheduler takes peers; may be repeated.")
@click.option("--join", multiple=True, metavar="HOST:PORT", help="A scheduler to dial; may be repeated.")
@click.option("--key-file", metavar="F", type=click.Path(dir_okay=False), help="The cluster key.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="The least that is logged.")
def start(roles: tuple[Role, ...], config: str | None, **given: Any) -> int:
    """Start a daemon: a scheduler, a worker, or both in one process."""
    from taskd.daemon.main import run

    keys = {
        "node_id": "node.id", "name": "node.name", "cluster": "node.cluster", "state_dir": "node.state_dir",
        "socket": "node.socket", "key_file": "node.key_file", "log_level": "node.log_level",
        "listen": "network.listen", "join": "network.join",
    }  # fmt: skip
    overrides: dict[str, object] = {keys[name]: value for name, value in given.items() if value not in (None, ())}
    return run(roles, Path(config) if config else None, overrides)
