"""The entry point: finds the command, loads only what it needs, and tells every error in one form."""

from __future__ import annotations

import io
import os
import sys
from importlib import import_module
from typing import Any, NamedTuple

import click

from taskd.errors import NoDaemon, TaskdError
from taskd.version import VERSION

WRONG_CALL = 2
NO_DAEMON = 3
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
BROKEN_PIPE = 141  # 128 + SIGPIPE
DEBUG_VARIABLE = "TASKD_DEBUG"


class Entry(NamedTuple):
    """A command: where it is, and its line in the help, so that the help loads none of them."""

    module: str
    attribute: str
    help: str


# In the order of the help.
SECTIONS: dict[str, dict[str, Entry]] = {
    "Run work": {
        "run": Entry("run", "run", "Run a command on the cluster, as if it ran here."),
        "submit": Entry("submit", "submit", "Submit tasks and print their ids."),
        "wait": Entry("wait", "wait", "Wait until tasks have ended."),
        "cancel": Entry("act", "cancel", "Cancel tasks, waiting or running."),
        "retry": Entry("act", "retry", "Run ended tasks again, as new ones."),
    },
    "Look": {
        "list": Entry("listing", "list_tasks", "List tasks, newest first."),
        "show": Entry("show", "show", "Show a task in full."),
        "logs": Entry("logs", "logs", "Print what a task wrote."),
        "explain": Entry("explain", "explain", "Explain why a task is waiting."),
        "events": Entry("events", "events", "Print what happens, as it happens."),
    },
    "The cluster": {
        "start": Entry("start", "start", "Start a daemon: a scheduler, a worker, or both."),
        "cluster": Entry("cluster", "cluster", "Say how the cluster is."),
        "node": Entry("nodes", "node", "List, show, drain and resume nodes."),
        "key": Entry("keys", "key", "Show or import the cluster key."),
        "token": Entry("tokens", "token", "Make, list and revoke tokens for HTTPS."),
        "service": Entry("service", "service", "Have systemd run a daemon of this machine."),
        "backup": Entry("backup", "backup", "Write a copy of a scheduler's state to a file."),
        "restore": Entry("backup", "restore", "Begin again from such a copy."),
        "doctor": Entry("doctor", "doctor", "Check this machine and its daemon."),
        "config": Entry("settings", "config", "Check the configuration."),
        "completion": Entry("completion", "completion", "Print the completion script for a shell."),
    },
}
# Run by programs, not by people.
HIDDEN = {"launcher": Entry("launcher", "launcher", "Start the tasks of a worker as another user.")}
COMMANDS = {name: entry for section in SECTIONS.values() for name, entry in section.items()}


class ReaderGone(Exception):
    """Whoever read our output has had enough."""


class Commands(click.Group):
    """The commands, each imported when it is used."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise ReaderGone() from None  # As it is, click would end the process with an exit code of its own.

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name) or HIDDEN.get(cmd_name)
        if entry is None:
            return None
        command: click.Command = getattr(import_module(f"taskd.cli.{entry.module}"), entry.attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in (*COMMANDS, *HIDDEN) and not args[0].startswith("-"):
            from difflib import get_close_matches

            close = get_close_matches(args[0], COMMANDS, 1)
            hint = f"did you mean `taskd {close[0]}`?" if close else "`taskd` lists them."
            raise click.UsageError(f"there is no command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, entries in SECTIONS.items():
            with formatter.section(heading):
                formatter.write_dl([(name, entry.help) for name, entry in entries.items()], col_max=12)


@click.command(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="`taskd COMMAND --help` tells more. Exit codes: 2 for a wrong call, 3 when no daemon answers, 1 otherwise; "
    "run and wait end with the task's own.",
)
@click.version_option(VERSION, message="taskd %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Run tasks on the machines of a LAN."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def run(args: list[str]) -> int:
    """Run one command line; returns the exit code. Errors have been told by then."""
    color = False if os.environ.get("NO_COLOR") else None
    try:
        code = cli.main(args, prog_name="taskd", standalone_mode=False, color=color)
        sys.stdout.flush()
    except click.exceptions.Abort:
        return INTERRUPTED
    except KeyboardInterrupt:
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (ReaderGone, BrokenPipeError):
        # What is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        return _tell(error)
    return code if isinstance(code, int) else 0


def _tell(error: Exception) -> int:
    """Say what went wrong, and with which code to leave."""
    if isinstance(error, TaskdError):
        is_named = not error.field or error.field in error.message or error.status in (404, 409)
        where = "" if is_named else f" ({error.field})"
        click.echo(f"taskd: {error.message}{where}", err=True)
        if isinstance(error, NoDaemon):
            return NO_DAEMON
        return WRONG_CALL if error.status == 400 else 1
    if isinstance(error, OSError):
        about = f"{error.filename}: " if error.filename else ""
        click.echo(f"taskd: {about}{error.strerror or error}", err=True)
        return 1
    click.echo(
        f"taskd: this is a bug in taskd: {type(error).__name__}: {error}\n"
        f"Set {DEBUG_VARIABLE}=1 to see where, and please report it.",
        err=True,
    )
    return 1


def main() -> None:
    """The console script."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # What tasks are called need not fit the locale.
    args = sys.argv[1:]
    code = run(args)
    if args[:1] in (["start"], ["launcher"]):
        sys.exit(code)
    # Nothing is left to do, and taking the interpreter apart would cost a tenth of the time of `taskd submit`.
    sys.stderr.flush()
    os._exit(code)
