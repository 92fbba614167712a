"""taskd explain: why a task is waiting, or how it ended."""

from __future__ import annotations

import click

from taskd.cli.output import clean, instant_text, plural, print_json, print_table, short, state_text
from taskd.cli.selection import id_argument
from taskd.cli.session import Session, talks
from taskd.client import calls


@click.command("explain", epilog="\b\nExample:\n  taskd explain last")
@id_argument
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON; `reason` is one of a fixed set of words.")
@talks
def explain(session: Session, task_id: str, as_json: bool) -> None:
    """Explain why a task is waiting, and what each node lacks for it."""
    why = session.ask(calls.explain(task_id))
    if as_json:
        print_json(why)
        return
    text = clean(why["text"])
    if why["reason"] == "Ended":
        click.echo(f"task {short(why['id'])} {text.removeprefix('it ')}")
    else:
        click.echo(f"task {short(why['id'])} is {state_text(why['state'])}: {text} ({why['reason']})")
    if why["position"]:
        click.echo(f"{plural(why['position'], 'task')} {'comes' if why['position'] == 1 else 'come'} first")
    if why["until"] is not None:
        click.echo(f"until {instant_text(why['until'])}")
    if why["nodes"]:
        rows = [[fit["name"], _fit_text(fit), fit["why"]] for fit in why["nodes"]]
        print_table(["NODE", "COULD RUN IT", "NOW"], rows, flexible="NOW")
        if all(fit["ever"] is False for fit in why["nodes"]):
            click.echo("No node could ever run it: change the task, or add a node that can.")


def _fit_text(fit: dict[str, object]) -> str:
    if fit["fits"]:
        return click.style("now", fg="green")
    if fit["ever"] is None:
        return "not known"
    if not fit["ever"]:
        return click.style("never", fg="red")
    return click.style("when free" if fit.get("connected", True) else "when back", fg="yellow")
