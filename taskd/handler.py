"""Handlers: Python functions and classes that workers run. Their type hints are the schema of their params.

@task("resize", retries=3, timeout="1m")
def resize(path: str, width: int = 640) -> dict: ...

class Resize(TaskHandler):
    type = "resize"
    def execute(self, params: dict): ...
"""

from __future__ import annotations

import contextvars
import importlib
import importlib.metadata
import inspect
import sys
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, TypeVar, overload

import msgspec

from taskd.values import duration_s

ENTRY_POINTS = "taskd.handlers"
SCHEMA_BYTES_MAX = 1 << 16  # Of what is advertised; beyond, params are checked by the worker alone.
RETRIES_MAX = 10_000
TIMEOUT_S_MAX = 10 * 366 * 86400.0
Function = TypeVar("Function", bound=Callable[..., Any])


class HandlerError(Exception):
    """A handler is declared in a way that cannot work."""


class Current(msgspec.Struct, frozen=True):
    """The attempt that runs, as TASKD_TASK_ID, TASKD_ATTEMPT and TASKD_FENCE in their environment tell commands."""

    task_id: str
    attempt: int
    fence: str

    def secret(self, name: str) -> str:
        """The secret that the task has under this name: in no variable, and not shown with this object. Raises
        LookupError where the task names none so."""
        try:
            return _secrets.get()[name]
        except KeyError:
            raise LookupError(f"the task has no secret {name!r}: name it in its `secrets`") from None


_running: contextvars.ContextVar[Callable[[], Current]] = contextvars.ContextVar("taskd_running")
_secrets: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar("taskd_secrets", default={})  # noqa: B039  # never changed
enter_secrets = _secrets.set  # The same, for calls that have some.
enter = _running.set  # For handler processes: who can tell of the call that runs from now on. Few calls ask.


def current() -> Current:
    """The attempt on whose behalf this code runs. Raises LookupError outside of a task, and in a thread that a handler
    has started, unless by `contextvars.copy_context().run`."""
    try:
        ask = _running.get()
    except LookupError:
        raise LookupError("no task runs here; in a thread of your own call current() before it starts") from None
    return ask()


class TaskHandler:
    """The task interface as a class: set `type`, and write `execute`. One instance serves all calls of its process.

    `retries` and `timeout` (seconds, or text such as "10m"; 0: none) hold for tasks that are submitted without their
    own. `execute` may be `async`. The type hint of `params` (a dict, a TypedDict, a dataclass, a msgspec Struct) says
    what is accepted; without one, any JSON value is.
    """

    type: ClassVar[str]
    retries: ClassVar[int] = 0
    timeout: ClassVar[float | str] = 0

    def execute(self, params: Any) -> Any:
        """Do the work; what is returned must be JSON."""
        raise NotImplementedError


class Handler:
    """A declared handler, ready to be called with params as JSON text."""

    def __init__(
        self,
        type: str,
        function: Callable[..., Any],
        *,
        takes_params: bool,
        retries: int = 0,
        timeout: float | str = 0,
    ) -> None:
        """Raises HandlerError."""
        self.type = type
        self.function = function
        self.retries = _retries(type, retries)
        self.timeout_s = _timeout_s(type, timeout)
        self.is_async = inspect.iscoroutinefunction(function)
        self.summary = _summary(function)
        self.version = _version_of(function)
        self._names: tuple[str, ...] = ()
        self._takes_extra = False
        self._takes_params = takes_params
        kind = self._params_type() if takes_params else self._keywords_type()
        schema = msgspec.json.encode(msgspec.json.schema(kind)) if kind is not Any else b"{}"
        self.schema = schema if len(schema) <= SCHEMA_BYTES_MAX else b"{}"
        self._decoder = msgspec.json.Decoder(kind)

    @property
    def names(self) -> tuple[str, ...] | None:
        """The params that it knows; None where it may take others."""
        return None if self._takes_params or self._takes_extra else self._names

    def bind(self, params: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for the function. Raises msgspec.ValidationError, which names the place, where they do not fit."""
        value = self._decoder.decode(params or b"{}")
        if self._takes_params:
            return (value,), {}
        if self._takes_extra:
            extra = msgspec.json.decode(params or b"{}")
            return (), {**extra, **{name: getattr(value, name) for name in self._names}}
        return (), {name: getattr(value, name) for name in self._names}

    def _params_type(self) -> Any:
        hints = _hints(self.function)
        hints.pop("return", None)
        (name,) = list(inspect.signature(self.function).parameters)[:1] or [""]
        kind = hints.get(name, Any)
        return kind if _is_supported(kind) else Any

    def _keywords_type(self) -> Any:
        hints = _hints(self.function)
        fields: list[Any] = []
        for name, parameter in inspect.signature(self.function).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                self._takes_extra = True
                continue
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
                raise HandlerError(f"{self.type}: params have names, so that {name!r} cannot be positional only")
            kind = hints.get(name, Any)
            kind = kind if _is_supported(kind) else Any
            if parameter.default is parameter.empty:
                fields.append((name, kind))
            else:
                fields.append((name, kind, msgspec.field(default_factory=partial(_same, parameter.default))))
        self._names = tuple(field[0] for field in fields)
        fields.sort(key=len)
        return msgspec.defstruct("Params", fields, forbid_unknown_fields=not self._takes_extra)


def _retries(type: str, retries: int) -> int:
    if not isinstance(retries, int) or not 0 <= retries <= RETRIES_MAX:
        raise HandlerError(f"{type}: retries are a number from 0 to {RETRIES_MAX}, not {retries!r}")
    return retries


def _timeout_s(type: str, timeout: float | str) -> float:
    try:
        seconds = duration_s(timeout) if isinstance(timeout, str) else float(timeout)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds <= TIMEOUT_S_MAX:
        raise HandlerError(f'{type}: a timeout is seconds or text such as "10m", not {timeout!r}')
    return seconds


def _same(value: Any) -> Any:
    return value  # A default is the function's own object, as in a plain call.


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError):
        return {}  # Hints that cannot be resolved: anything is accepted.


def _is_supported(kind: Any) -> bool:
    try:
        msgspec.json.Decoder(kind)
        msgspec.json.schema(kind)
    except TypeError:
        return False
    return True


def _summary(target: Any) -> str:
    """The first line of its docstring."""
    return (target.__doc__ or "").strip().partition("\n")[0][:4096]


def _version_of(function: Callable[..., Any]) -> str:
    """The version of the module or distribution that a handler comes from, as far as it says."""
    module = inspect.getmodule(function)
    package = (module.__name__ if module is not None else "").partition(".")[0]
    version = getattr(module, "__version__", None)
    if version is None and package:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = ""
    return str(version or "")[:255]


_registry: dict[str, Handler] = {}


def register(handler: Handler) -> None:
    """Offer a handler. Raises HandlerError where another one has its type."""
    other = _registry.get(handler.type)
    if other is not None and _origin(other.function) != _origin(handler.function):
        raise HandlerError(f"two handlers are of type {handler.type!r}")
    if not handler.type or len(handler.type) > 255 or handler.type in ("command", "http"):
        raise HandlerError(f"{handler.type!r} cannot be the type of a handler")
    _registry[handler.type] = handler


def _origin(function: Callable[..., Any]) -> tuple[str, str]:
    """Where a function was written: the same, should its module be imported twice, under two names."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return getattr(code, "co_filename", ""), getattr(function, "__qualname__", repr(function))


@overload
def task(type: Function, /) -> Function: ...
@overload
def task(
    type: str | None = None, /, *, retries: int = 0, timeout: float | str = 0
) -> Callable[[Function], Function]: ...


def task(type: Any = None, /, *, retries: int = 0, timeout: float | str = 0) -> Any:
    """Declare a function, sync or async, to be a handler of `type` (by default its own name). It stays callable.

    `retries` and `timeout` (seconds, or text such as "10m"; 0: none) hold for tasks that are submitted without their
    own. Raises HandlerError."""
    if callable(type):
        return task(None)(type)

    def declare(function: Function) -> Function:
        name = type or function.__name__
        register(Handler(name, function, takes_params=False, retries=retries, timeout=timeout))
        function.task_type = name  # type: ignore[attr-defined]  # clients submit by function
        return function

    return declare


def load(
    modules: Iterable[str], skipped: Collection[str] = (), entering: Callable[[str], object] = lambda step: None
) -> tuple[dict[str, Handler], list[str]]:
    """Import modules and the entry points of installed packages; returns all handlers by type, and what went wrong, in
    words: a module that cannot be imported takes only its own handlers away. Each step ("module a.b") is told to
    `entering` before it is taken; those `skipped` are not: they took the process down before."""
    problems: list[str] = []
    steps: list[tuple[str, Callable[[], object]]] = [
        (f"module {name}", partial(importlib.import_module, name)) for name in modules
    ]
    entries = sorted(importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda it: (it.name, it.value))
    steps += [(f"entry point {entry.name}", entry.load) for entry in entries]
    for step, take in steps:
        _take(step, take, skipped, entering, problems)
    for kind in _subclasses(TaskHandler):
        if "type" in vars(kind) and _is_imported(kind):
            _take(f"class {kind.__qualname__}", partial(_register_class, kind), skipped, entering, problems)
    return {name: it for name, it in _registry.items() if _is_imported(it.function)}, problems


def _take(
    step: str,
    take: Callable[[], object],
    skipped: Collection[str],
    entering: Callable[[str], object],
    problems: list[str],
) -> None:
    if step in skipped:
        return
    entering(step)
    try:
        take()
    except BaseException as error:  # It may raise anything, SystemExit included.
        problems.append(f"{step}: {error.__class__.__name__}: {error}")


def _register_class(kind: type[TaskHandler]) -> None:
    handler = Handler(kind.type, kind().execute, takes_params=True, retries=kind.retries, timeout=kind.timeout)
    handler.summary = _summary(kind) or handler.summary
    register(handler)


def _is_imported(declared: Any) -> bool:
    """Whether its module is there to its end: what one that failed had declared until then may miss what it needs."""
    return getattr(declared, "__module__", None) in sys.modules


def _subclasses(kind: type[Any]) -> list[type[Any]]:
    found: list[type[Any]] = []
    for subclass in kind.__subclasses__():
        found += [subclass, *_subclasses(subclass)]
    return found
