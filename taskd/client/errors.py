"""What can go wrong for a client: the daemon's own words, a daemon that is not there, and tasks that did not succeed.

All are TaskdErrors: `message` says what was wrong and what to do. That a wait took too long is Python's TimeoutError.
"""

from __future__ import annotations

from taskd.errors import NoDaemon, ProtocolError, TaskdError

__all__ = [
    "ApiError",
    "ConnectionLost",
    "NoDaemon",
    "ProtocolError",
    "TaskCancelled",
    "TaskError",
    "TaskExpired",
    "TaskFailed",
    "TaskTimedOut",
    "TaskdError",
]


class ApiError(TaskdError):
    """The daemon refused a request. `code` is a stable word, `field` the part of the request that is wrong."""

    def __init__(self, status: int, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message, field=field)
        self.status = status
        self.code = code

    def __reduce__(self) -> tuple[type[ApiError], tuple[int, str, str, str | None]]:
        return type(self), (self.status, self.code, self.message, self.field)


class ConnectionLost(NoDaemon):
    """The daemon closed the connection before it had answered: whether it did what was asked is not known."""


class TaskError(TaskdError):
    """A task ended, but not well. `task_id` is its id, `reason` what the record says about it."""

    code = "task"

    def __init__(self, message: str, task_id: str, reason: str = "") -> None:
        super().__init__(message)
        self.task_id = task_id
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (type(self), self.args, self.__dict__)


class TaskFailed(TaskError):
    """A task failed. For a handler: `error_type`, `error_message` and `traceback` of what it raised, as it was in the
    worker. For a command: `exit_code`, or the `signal` that ended it."""

    code = "task_failed"

    def __init__(
        self,
        message: str,
        task_id: str,
        reason: str = "",
        *,
        error_type: str = "",
        error_message: str = "",
        traceback: str = "",
        exit_code: int | None = None,
        signal: int | None = None,
    ) -> None:
        super().__init__(message, task_id, reason)
        self.error_type = error_type
        self.error_message = error_message
        self.traceback = traceback
        self.exit_code = exit_code
        self.signal = signal
        if traceback:
            self.add_note(f"In the worker:\n{traceback.rstrip()}")


class TaskCancelled(TaskError):
    """A task was cancelled."""

    code = "task_cancelled"


class TaskTimedOut(TaskError):
    """A task ran longer than its `timeout`."""

    code = "task_timed_out"


class TaskExpired(TaskError):
    """A task had not begun when its `deadline` passed."""

    code = "task_expired"


def _restored(cls: type[TaskError], args: tuple[object, ...], state: dict[str, object]) -> TaskError:
    """An error out of a pickle: process pools hand them on."""
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error
