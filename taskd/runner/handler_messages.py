"""What a worker and its handler processes say to each other: length-prefixed msgpack over a socket pair."""

from __future__ import annotations

from msgspec import Struct

from taskd.protocol.messages import HandlerInfo

HEAD_BYTES = 4


class Setup(Struct, array_like=True, frozen=True, tag="setup"):
    """First word to a process: what to import, and from where."""

    modules: tuple[str, ...]
    path: tuple[str, ...]


class Ready(Struct, array_like=True, frozen=True, tag="ready"):
    """Its answer: what it can run, which of these are async, and what could not be imported, in words."""

    handlers: tuple[HandlerInfo, ...]
    is_async: tuple[str, ...]
    problems: tuple[str, ...]


class Call(Struct, array_like=True, frozen=True, gc=False):
    """One call of a handler."""

    number: int
    type: str
    params: bytes
    task_id: str
    attempt: int
    fence: str


class Calls(Struct, array_like=True, frozen=True, tag="calls"):
    """Calls to make, one after the other."""

    calls: list[Call]


class CallEnded(Struct, array_like=True, frozen=True, gc=False):
    """How a call ended; `report` is the msgpack of a core.task.Report."""

    number: int
    outcome: int
    started_s: float
    ended_s: float
    report: bytes


class Ended(Struct, array_like=True, frozen=True, tag="ended"):
    """Calls that ended, in the order they were made."""

    calls: list[CallEnded]


class TakeBack(Struct, array_like=True, frozen=True, tag="take_back"):
    """Give back all calls that have not begun."""


class TakenBack(Struct, array_like=True, frozen=True, tag="taken_back"):
    """These have not begun and never will here."""

    numbers: list[int]


class CancelCall(Struct, array_like=True, frozen=True, tag="cancel"):
    """Cancel this call of an async handler, if it runs."""

    number: int


ToProcess = Setup | Calls
ToControl = TakeBack | CancelCall
FromProcess = Ready | Ended | TakenBack
