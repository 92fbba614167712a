"""The Python client: Client, AsyncClient, and the errors they raise. Loaded when first used, for the shell's sake."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taskd.client.async_client import AsyncClient, AsyncHandle
    from taskd.client.client import Client
    from taskd.client.errors import (
        ApiError,
        ConnectionLost,
        NoDaemon,
        TaskCancelled,
        TaskError,
        TaskExpired,
        TaskFailed,
        TaskTimedOut,
    )
    from taskd.client.handle import Handle
    from taskd.client.submission import Options
    from taskd.client.views import Result

_HOMES = {
    "ApiError": "errors",
    "AsyncClient": "async_client",
    "AsyncHandle": "async_client",
    "Client": "client",
    "ConnectionLost": "errors",
    "Handle": "handle",
    "NoDaemon": "errors",
    "Options": "submission",
    "Result": "views",
    "TaskCancelled": "errors",
    "TaskError": "errors",
    "TaskExpired": "errors",
    "TaskFailed": "errors",
    "TaskTimedOut": "errors",
}

__all__ = [
    "ApiError",
    "AsyncClient",
    "AsyncHandle",
    "Client",
    "ConnectionLost",
    "Handle",
    "NoDaemon",
    "Options",
    "Result",
    "TaskCancelled",
    "TaskError",
    "TaskExpired",
    "TaskFailed",
    "TaskTimedOut",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
