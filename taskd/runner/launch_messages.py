"""What a worker and its launcher say to each other, on a stream socket: frames of a four-byte length and msgpack.

The worker begins with Prepare and hears Prepared. Then it sends Launch, with open files beside its first byte, and
Signal; it hears Progress. Both are of one installation, so there are no versions. When the worker closes the stream,
the launcher ends all that it has started for it.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from taskd.protocol.messages import AttemptEnded, AttemptKey, AttemptStarted

DESCRIPTORS_MAX = 8  # Beside one frame.


class Frame(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=str.lower):
    """One message."""


class Prepare(Frame, frozen=True):
    """The first word: for which worker, with which variables, and how tasks are held to what they ask for."""

    worker: str
    socket: str
    environment: dict[str, str]  # what every process gets, before its own variables
    cpus_are_shared: bool
    has_memory_rlimit: bool
    user: str  # whom the worker expects tasks to run as; empty: whoever it is


class Prepared(Frame, frozen=True):
    """The answer: the launcher's process, the task user, why there are no control groups, what was left and ended."""

    pid: int
    user: str
    no_groups_because: str
    killed: int
    alive: tuple[int, ...]


class Refused(Frame, frozen=True):
    """The answer of a launcher that cannot serve: the socket is closed then."""

    reason: str


class Launch(Frame, frozen=True):
    """Start a process. `spec` is the msgpack of a core.task.TaskSpec. Its stdout and stderr come as open files; of a
    handler process more of them, whose numbers and the launcher's process id are appended to its argv."""

    key: AttemptKey
    spec: bytes
    is_handler: bool
    descriptors: int


class Signal(Frame, frozen=True):
    """TERM for its process group, or KILL for all that it has started."""

    key: AttemptKey
    is_kill: bool


class Progress(Frame, frozen=True):
    """Attempts that began a moment ago, and attempts that have ended with all that they had started."""

    started: tuple[AttemptStarted, ...]
    ended: tuple[AttemptEnded, ...]


encode = msgspec.msgpack.Encoder().encode
decode_to_launcher = msgspec.msgpack.Decoder(Prepare | Launch | Signal).decode
decode_to_worker = msgspec.msgpack.Decoder(Prepared | Refused | Progress).decode
