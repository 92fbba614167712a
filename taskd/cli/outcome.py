"""How a task ended, told to people and to shells."""

from __future__ import annotations

import signal
from typing import Any

from taskd.cli.output import clean, short

TIMED_OUT = 124  # as the command timeout has it

Json = dict[str, Any]


def exit_code_of(result: Json) -> int:
    """The exit code that stands for a result: the task's own where it has one, 128 + N for signal N."""
    if result["state"] == "succeeded":
        return 0
    if result["state"] == "timed_out":
        return TIMED_OUT
    if result["exit_code"]:
        return int(result["exit_code"])
    if result["signal"]:
        return 128 + int(result["signal"])
    return 1


def text_of(result: Json) -> str:
    """In a few words what came of a task, without its id: "exit code 7", "ValueError: no luck"."""
    state, error, reason = result["state"], result.get("error"), result.get("reason")
    if state == "succeeded":
        return "succeeded"
    if state == "timed_out":
        return "ran longer than its timeout"
    if state == "expired":
        return "had not begun by its deadline"
    if state == "cancelled":
        return "was cancelled" + (f": {reason}" if reason else "")
    if reason:  # Why it is not tried again; what ended its last attempt was not the cause.
        return clean(reason)
    if error and error.get("type"):
        message = clean(error.get("message") or "", "\n\t")
        return f"{clean(error['type'])}: {message}" if message else clean(error["type"])
    if result["signal"]:
        return f"ended by signal {signal_text(result['signal'])}"
    if result["exit_code"]:
        return f"exit code {result['exit_code']}"
    return str(state).replace("_", " ")


def sentence(result: Json) -> str:
    """The same with the task's id."""
    return f"task {short(result['id'])}: {text_of(result)}"


def signal_text(number: int) -> str:
    """ "9 (SIGKILL)"."""
    try:
        return f"{number} ({signal.Signals(number).name})"
    except ValueError:
        return str(number)
