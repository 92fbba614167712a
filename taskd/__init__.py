"""taskd turns the machines of a LAN into one dependable task service.

`from taskd import task, TaskHandler, Client, AsyncClient`: each is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from taskd.version import VERSION

if TYPE_CHECKING:
    from taskd.client import AsyncClient, Client
    from taskd.handler import TaskHandler, current, task

__version__ = VERSION
__all__ = ["AsyncClient", "Client", "TaskHandler", "__version__", "current", "task"]

_HOMES = {
    "AsyncClient": "taskd.client",
    "Client": "taskd.client",
    "TaskHandler": "taskd.handler",
    "current": "taskd.handler",
    "task": "taskd.handler",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'taskd' has no attribute {name!r}")
    return getattr(import_module(home), name)
