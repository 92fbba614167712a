"""taskd submit: one task from the command line, or many from a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import click

from taskd.cli.output import note, plural, print_json, short, warn
from taskd.cli.parameters import Document, Pair
from taskd.cli.session import Session, talks
from taskd.cli.silence import warn_of_no_place
from taskd.cli.submission import chunks, encode, refusal, task_options
from taskd.client import calls
from taskd.client.errors import ApiError
from taskd.errors import TaskdError

PATIENCE_S = 10.0  # A submission carries its ids, so that sending it again is safe.

Json = dict[str, Any]


@click.command(
    "submit",
    context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False},
    epilog="""\b
Examples:
  taskd submit --cpus 4 --retries 3 -- make -j4 world
  taskd submit --shell 'zcat big.gz | wc -l'
  taskd submit --type resize --params '{"path": "a.jpg", "width": 640}'
  taskd submit --http http://10.0.0.7/sum --params @numbers.json
  generate-tasks | taskd submit --from-json - --queue bulk --wait

The command runs on whichever worker has room; nothing of this directory goes with it.""",
)
@click.argument("command", nargs=-1, metavar="[--] [CMD]...")
@click.option("--shell", metavar="LINE", help="A line for the shell instead of a command.")
@click.option("--type", "task_type", metavar="TYPE", help="The type of a handler instead of a command.")
@click.option("--params", type=Document(), metavar="JSON", help="Its parameters: JSON, @FILE, or - for the input.")
@click.option("--http", "url", metavar="URL", help="A service to call instead of a command.")
@click.option("--http-method", metavar="METHOD", help="How to call it, POST unless told otherwise.")
@click.option("--http-header", multiple=True, type=Pair(), help="A header for it.")
@click.option(
    "--from-json", "source", metavar="FILE", help="Many tasks, as the API has them: a JSON list, or a line each."
)
@task_options
@click.option(
    "--wait",
    is_flag=True,
    help="Wait for the end, and print what a handler or service returned; the exit code is the task's, or 1 if one of "
    "many failed.",
)
@click.option("--dry-run", is_flag=True, help="Check everything and show what would be submitted.")
@click.option("--json", "as_json", is_flag=True, help="Print the daemon's answer.")
@click.option("-q", "--quiet", is_flag=True, help="Print the ids alone.")
@talks
def submit(
    session: Session,
    *,
    command: tuple[str, ...],
    options: Json,
    source: str | None,
    wait: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **work: Any,
) -> int:
    """Submit a task, or many, and print their ids."""
    session.transport.patience_s = PATIENCE_S
    tasks = None if source is None else _from_file(source, options)
    task = what_to_do(command, is_bulk=tasks is not None, **work)
    if dry_run:
        return _show_plan(session, [{**task, **options}] if tasks is None else list(tasks))
    accepted = _submit_one(session, {**task, **options}) if tasks is None else _submit_many(session, tasks)
    if not (as_json or quiet):
        session.be_patient(0.0)  # It is accepted: what else there is to say is worth no delay.
        if accepted["durability"] == "local":
            _warn_of_missing_copy(session)
        warn_of_no_place(session, accepted["ids"][0])
    if wait:
        has_result = task.get("type") is not None and not quiet
        return _wait(session, accepted["ids"], as_json=as_json, quiet=quiet, has_result=has_result)
    if as_json:
        print_json(accepted)
    else:
        _print_ids(accepted["ids"], quiet)
    return 0


def what_to_do(
    command: tuple[str, ...],
    *,
    is_bulk: bool = False,
    ways: str = "one of --shell, --type, --http, --from-json",
    shell: str | None = None,
    task_type: str | None = None,
    params: Any = None,
    url: str | None = None,
    http_method: str | None = None,
    http_header: tuple[tuple[str, str], ...] = (),
) -> Json:
    """The part of a task that says what it does. Raises UsageError unless exactly one thing is said;
    `ways` are those that the command has beside one."""
    said = [name for name, value in (
        ("a command", command), ("--shell", shell), ("--type", task_type), ("--http", url), ("--from-json", is_bulk)
    ) if value]  # fmt: skip
    if len(said) != 1:
        problem = " and ".join(said) + " do not go together" if said else "say what to run"
        raise click.UsageError(f"{problem}: give a command behind --, or {ways}")
    if params is not None and not (task_type or url):
        raise click.UsageError("--params goes with --type or --http")
    if (http_method or http_header) and not url:
        raise click.UsageError("--http-method and --http-header go with --http")
    task: Json = {} if params is None else {"params": params}
    if command:
        task["argv"] = list(command)
    elif shell:
        task["shell"] = shell
    elif task_type:
        task["type"] = task_type
    elif url:
        target: Json = {"url": url}
        if http_method:
            target["method"] = http_method.upper()
        if http_header:
            target["headers"] = dict(http_header)
        task.update(type="http", http=target)
    return task


def _submit_one(session: Session, task: Json) -> Json:
    try:
        accepted: Json = session.ask(calls.submit(encode(task)))
    except ApiError as error:
        raise refusal(error) from None
    return accepted


def _submit_many(session: Session, tasks: Iterator[Json]) -> Json:
    """All tasks, in as few requests as their size permits; what was taken when one is refused is said."""
    accepted: Json = {"ids": [], "durability": "replicated", "existing": 0}
    try:
        for _, body in chunks(tasks):
            try:
                answer = session.ask(calls.submit(body))
            except ApiError as error:
                raise refusal(error, len(accepted["ids"])) from None
            accepted["ids"] += answer["ids"]
            accepted["existing"] += answer["existing"]
            if answer["durability"] == "local":
                accepted["durability"] = "local"
    except BaseException:
        if accepted["ids"]:
            warn(f"the first {plural(len(accepted['ids']), 'task')} were submitted, the others not")
        raise
    if not accepted["ids"]:
        raise click.UsageError("--from-json: there are no tasks in it")
    return accepted


def _from_file(source: str, options: Json) -> Iterator[Json]:
    """The tasks of a file, each with the options of the command line where it has none of its own."""
    try:
        yield from _from_text(source, options)
    except UnicodeDecodeError as error:
        raise click.UsageError(f"--from-json: {source} is not UTF-8 text: {error}") from None


def _from_text(source: str, options: Json) -> Iterator[Json]:
    with click.open_file(source, encoding="utf-8") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        if start == "[":
            yield from _from_list(start + file.read(), options)
            return
        line = start + file.readline()
        number = 1
        while line:
            if line.strip():
                yield _task_of(_parsed(line, f"line {number}"), options, f"line {number}")
            line = file.readline()
            number += 1


def _from_list(text: str, options: Json) -> Iterator[Json]:
    for number, item in enumerate(_parsed(text, "the list"), 1):
        yield _task_of(item, options, f"task {number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"--from-json: {where} is not JSON: {error}") from None


def _task_of(item: Any, options: Json, where: str) -> Json:
    if not isinstance(item, dict):
        raise click.UsageError(f"--from-json: {where} is no task: a task is a JSON object")
    return {**options, **item}


def _warn_of_missing_copy(session: Session) -> None:
    """Say that the tasks are on one disk, where that is not how the cluster is meant to be."""
    try:
        replicas = session.ask(calls.cluster())["replicas"]
    except TaskdError:
        return
    if len(replicas) > 1:
        warn("accepted on one disk alone, as no standby is in sync: see `taskd cluster status`")


def _show_plan(session: Session, tasks: list[Json]) -> int:
    try:
        plan = session.ask(calls.plan(json.dumps(tasks).encode()))
    except ApiError as error:
        raise refusal(error) from None
    print_json(plan["tasks"] if len(tasks) > 1 else plan["tasks"][0])
    return 0


def _print_ids(ids: list[str], quiet: bool) -> None:
    if len(ids) > 1 and not quiet and sys.stdout.isatty():
        click.echo(f"submitted {plural(len(ids), 'task')}")
        note("wait for them: taskd submit --wait; list them: taskd list")
        return
    for task_id in ids:
        click.echo(task_id)
    if len(ids) == 1 and not quiet:
        note(f"follow it: taskd logs -f {short(ids[0])}")


def _wait(session: Session, ids: list[str], *, as_json: bool, quiet: bool, has_result: bool) -> int:
    """Wait for all of them. Of one that returns something (`has_result`) that is printed below its id."""
    from taskd.cli.waiting import Waiting

    if not as_json:
        for task_id in ids:
            click.echo(task_id)
        sys.stdout.flush()
    waiting = Waiting(session, ids, is_quiet=quiet)
    waiting.run()
    if as_json:
        waiting.print_json()
    elif has_result:
        waiting.print_result()
    return waiting.exit_code
