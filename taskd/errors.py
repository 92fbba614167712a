"""Every error that a user or another node can be shown: a stable code, an HTTP status, and a text that says what to do.

The docstring of a class is its default text. `field` names the part of the request that is wrong, where one is.
"""

from __future__ import annotations


class TaskdError(Exception):
    """Something went wrong inside taskd."""

    code: str = "internal"
    status: int = 500

    def __init__(self, message: str | None = None, *, field: str | None = None) -> None:
        self.message = message if message is not None else " ".join((type(self).__doc__ or "").split())
        self.field = field
        super().__init__(self.message)


class InvalidRequest(TaskdError):
    """The request is not valid."""

    code, status = "invalid", 400


class Unauthorized(TaskdError):
    """Nobody is answered here without a token."""

    code, status = "unauthorized", 401


class Forbidden(TaskdError):
    """You may not do this: it takes a member of the group taskd-admin, or a token with the role admin."""

    code, status = "forbidden", 403


class NotFound(TaskdError):
    """There is no such thing."""

    code, status = "not_found", 404


class MethodNotAllowed(TaskdError):
    """This path does not take this method."""

    code, status = "method_not_allowed", 405


class Ambiguous(TaskdError):
    """More than one task ends in these characters; give more of the id."""

    code, status = "ambiguous", 409


class Conflict(TaskdError):
    """The state of the task does not allow this."""

    code, status = "conflict", 409


class TooSlow(TaskdError):
    """The rest of the request did not come in time."""

    code, status = "too_slow", 408


class TooLarge(TaskdError):
    """The request is larger than the limit."""

    code, status = "too_large", 413


class Overloaded(TaskdError):
    """Too much is waiting already; try again later."""

    code, status = "overloaded", 429


class RateLimited(TaskdError):
    """You make more requests a second than one user may here; submit many tasks in one request, and slow down."""

    code, status = "rate_limited", 429


class NoLeader(TaskdError):
    """No scheduler leads at the moment; try again in a few seconds, and see `taskd cluster status`."""

    code, status = "no_leader", 503


class Unavailable(TaskdError):
    """This part of the cluster does not answer at the moment."""

    code, status = "unavailable", 503


class Stopping(Unavailable):
    """This daemon is stopping; ask again."""


class DiskFull(TaskdError):
    """The scheduler's disk is nearly full: no new tasks are taken until space is free again."""

    code, status = "disk_full", 507


class NoDaemon(TaskdError):
    """No taskd daemon answers on this machine; start one with `taskd start --role scheduler,worker`."""

    code, status = "no_daemon", 503


class ConfigError(TaskdError):
    """The configuration is not valid."""

    code = "config"


class AlreadyRunning(TaskdError):
    """Another daemon already uses this state directory."""

    code = "already_running"


class StoreError(TaskdError):
    """The database could not be read or written."""

    code = "store"


class ProtocolError(TaskdError):
    """The peer does not keep to the protocol."""

    code = "protocol"


class Refused(TaskdError):
    """The peer was refused."""

    code = "refused"
