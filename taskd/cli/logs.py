"""taskd logs: what a task wrote, or writes."""

from __future__ import annotations

import click

from taskd.cli.following import BOTH, Follower, Printer, raw_option
from taskd.cli.selection import id_argument
from taskd.cli.session import Session, talks
from taskd.cli.silence import Silence
from taskd.cli.waiting import whole_ids
from taskd.client import calls
from taskd.client.call import TIMEOUT_S


@click.command(
    "logs",
    epilog="""\b
Examples:
  taskd logs -f last
  taskd logs 5b3f2a1c --stderr
  taskd logs 5b3f2a1c --attempt 1 > first-try.log

What the task wrote to stdout goes to stdout, and to stderr what it wrote there. A terminal gets text and colours; other
control characters are shown as \\x1b, unless you say --raw. Files and pipes always get the exact bytes.""",
)
@id_argument
@click.option("-f", "--follow", is_flag=True, help="Go on until the task has ended, over all its attempts.")
@click.option("--stdout", "stream", flag_value="stdout", help="Only what it wrote to stdout.")
@click.option("--stderr", "stream", flag_value="stderr", help="Only what it wrote to stderr.")
@click.option("--attempt", type=click.IntRange(min=1), metavar="N", help="Of this attempt instead of the newest.")
@raw_option
@talks
def logs(
    session: Session, *, task_id: str, follow: bool, stream: str | None, attempt: int | None, is_raw: bool
) -> None:
    """Print what a task wrote."""
    streams = (stream,) if stream else BOTH
    printer = Printer(is_raw=is_raw)
    if follow:
        session.be_patient()
        (whole_id,) = whole_ids(session, [task_id])  # What `last` means may change meanwhile.
        waiting = Silence(session, whole_id)
        Follower(session, whole_id, printer, streams=streams, attempt=attempt, on_silence=waiting.tell).run()
        return
    for name in streams:
        with session.transport.open(calls.output(task_id, name, attempt=attempt)) as answer:
            while data := answer.read(TIMEOUT_S):
                printer.write(name, data)
    printer.end()
