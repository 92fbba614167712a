"""Short words for what nodes hear, say and do: for traces and transcripts that people read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from taskd.core.task import Outcome, TaskState
from taskd.protocol import messages as msg

IDS_SHOWN_MAX = 6


def brief(thing: Any) -> str:
    """One event, effect, message or value in a line."""
    match thing:
        case msg.Term(epoch, node_id, boot):
            return f"e{epoch}.s{node_id}.{boot % 0x1000:03x}"
        case msg.Dot(term, lsn):
            return f"{brief(term)}:{lsn}"
        case msg.AttemptKey(task_id, number, term, lsn):
            return f"{brief(task_id)}#{number}@{brief(term)}:{lsn}"
        case msg.TaskRow():
            return f"{brief(thing.id)}={TaskState(thing.state).word}@{brief(thing.dot)}"
        case msg.NodeRow(node_id, _, _, drain_reason, _):
            return f"node {node_id}" + ("" if drain_reason is None else " drained")
        case msg.NodeInfo(node_id, name, _, _, boot, _):
            return f"{name}.{boot % 0x1000:03x}" if name else str(node_id)
        case msg.AttemptEnded(key, outcome, _, _, _):
            return f"{brief(key)} {Outcome(outcome).word}"
        case msg.AttemptStarted(key, _):
            return brief(key)
        case msg.Assignment(key, _):
            return brief(key)
        case bytes():
            return thing.hex()[-4:] if len(thing) == 16 else f"{len(thing)} bytes"
        case list() | tuple():
            return _several(thing)
        case None | str() | int() | float() | bool():
            return f"{thing:.3f}" if isinstance(thing, float) else str(thing)
    if hasattr(thing, "__struct_fields__"):
        return _fields(thing)
    return repr(thing)


def _several(things: Iterable[Any]) -> str:
    items = list(things)
    shown = ", ".join(brief(item) for item in items[:IDS_SHOWN_MAX])
    return f"[{shown}{', …' if len(items) > IDS_SHOWN_MAX else ''}]"


def _fields(thing: Any) -> str:
    """The name, and what is not empty; a NewTask or Begin by its name alone."""
    name = type(thing).__name__
    if name in ("NewTask", "Begin"):
        return brief(thing.id if name == "NewTask" else thing.key)
    values = []
    for field in thing.__struct_fields__:
        value = getattr(thing, field)
        if value is None or (value in ([], (), "", b"") and not isinstance(value, bool)):
            continue
        if field == "fields":
            value = [f"{key}={brief(it)}" for key, it in value.items()]
        values.append(f"{field}={brief(value)}")
    return f"{name}({', '.join(values)})"
