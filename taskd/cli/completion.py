"""taskd completion: what a shell needs to complete taskd's commands, options, tasks and nodes."""

from __future__ import annotations

import click

_HOW = {
    "bash": "echo 'eval \"$(taskd completion bash)\"' >> ~/.bashrc",
    "zsh": "echo 'eval \"$(taskd completion zsh)\"' >> ~/.zshrc",
    "fish": "taskd completion fish > ~/.config/fish/completions/taskd.fish",
}


@click.command("completion", epilog="\b\nTo have it in every shell:\n" + "\n".join(f"  {how}" for how in _HOW.values()))
@click.argument("shell", type=click.Choice(list(_HOW)))
def completion(shell: str) -> None:
    """Print the completion script for a shell."""
    from click.shell_completion import get_completion_class

    from taskd.cli.main import cli

    kind = get_completion_class(shell)
    assert kind is not None, shell
    complete = kind(cli, {}, "taskd", "_TASKD_COMPLETE")
    # Not source(): that of bash starts a bash to ask for its version, and fails where there is none.
    click.echo(kind.source_template % complete.source_vars())
