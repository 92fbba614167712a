"""Makes the calls of a handler process, and puts down how each ended.

Whatever a handler raises or returns costs one attempt and nothing else. A plain call takes a few microseconds here;
what is seldom needed is imported where it is needed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import msgspec

from taskd import handler as declaring
from taskd.core.signature import wrong_params
from taskd.core.task import RESULT_BYTES_MAX, ErrorInfo, Outcome, Report, encode
from taskd.handler import Handler, enter, enter_secrets
from taskd.runner.handler_messages import Call
from taskd.runner.handler_output import Printed, Written

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Task

FRAMES_MAX = 100  # Of a traceback: the last ones.
_OWN_FILES = (__file__, declaring.__file__)  # Which call the handler's code.

_encode_result = msgspec.json.Encoder().encode


class Terminated(BaseException):
    """The task was to end: cancelled, or out of time. Raised in whatever the handler was doing."""


class Caller:
    """The handlers of this process, and the one call that is being made."""

    def __init__(self, handlers: dict[str, Handler], problems: list[str], printed: Printed) -> None:
        self.running = 0  # The number of the call while code of the handler's runs.
        self.must_leave = False  # A call was broken off: what it left half done must not meet another.
        self._handlers = handlers
        self._problems = problems
        self._printed = printed
        self._loop: AbstractEventLoop | None = None
        self._task: Task[Any] | None = None
        if any(handler.is_async for handler in handlers.values()):
            self._loop = _new_loop()

    def make(self, call: Call) -> tuple[Outcome, bytes]:
        """Make a call; returns how it ended, and the msgpack of a Report."""
        handler = self._handlers.get(call.type)
        if handler is None:
            return self._failed_to_start(call)
        if call.env or call.cwd or call.secrets:
            return self._make_elsewhere(handler, call)
        return self._make(handler, call)

    def _make(self, handler: Handler, call: Call) -> tuple[Outcome, bytes]:
        enter(call.current)
        self.running = call.number
        try:
            try:
                # This may run code of the user's: what dataclasses do when they are made.
                arguments, keywords = handler.bind(call.params)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                self.running = 0
                return self._failed(ErrorInfo("InvalidParams", wrong_params(error, handler.names)))
            value = handler.function(*arguments, **keywords)
            if isinstance(value, Coroutine):  # Also of a plain function that wraps an async one.
                value = self._wait_for(value)
            self.running = 0
        except BaseException as error:  # SystemExit and KeyboardInterrupt, too, are the handler's affair.
            self.running = 0
            return self._raised(call, error)
        try:
            result = _encode_result(value)
        except Exception as error:  # Whatever an object does when it is looked at.
            problem = f"the handler returned {_kind_of(value)}, which cannot be said in JSON: {_text_of(error)}"
            return self._failed(ErrorInfo(type(error).__name__, problem))
        if len(result) > RESULT_BYTES_MAX:
            problem = f"the handler returned {len(result)} bytes of JSON; {RESULT_BYTES_MAX} are allowed"
            return self._failed(ErrorInfo("ResultTooLarge", problem))
        return Outcome.OK, self._report(result=result)

    def cancel(self, number: int) -> bool:
        """End this call, from another thread, if it is an async one that waits or will wait; whether it is."""
        task, loop = self._task, self._loop
        if task is None or loop is None or self.running != number:
            return False
        loop.call_soon_threadsafe(self._cancel, task)
        return True

    def close(self) -> None:
        """End what async handlers have left on their loop."""
        if self._loop is not None:
            _close_loop(self._loop)
            self._loop = None

    # -- How it ended --------------------------------------------------------------------------------------------------

    def _report(self, *, result: bytes = b"", error: ErrorInfo | None = None, signal: int | None = None) -> bytes:
        written = self._printed.take()
        if written is None:
            return encode(Report(result=result, error=error, signal=signal))
        return encode(report_with(written, result=result, error=error, signal=signal))

    def _failed(self, error: ErrorInfo) -> tuple[Outcome, bytes]:
        return Outcome.EXCEPTION, self._report(error=_bounded(error))

    def _raised(self, call: Call, error: BaseException) -> tuple[Outcome, bytes]:
        traceback = _traceback_of(error)
        if isinstance(error, Terminated):
            self.must_leave = True
            ending = _bounded(ErrorInfo("Terminated", "the handler was told to end while it did this", traceback))
            return Outcome.SIGNAL, self._report(error=ending, signal=int(signal.SIGTERM))
        return self._failed(ErrorInfo(type(error).__name__, _text_of(error), traceback))

    def _failed_to_start(self, call: Call) -> tuple[Outcome, bytes]:
        why = "".join(f"; {problem}" for problem in self._problems)
        error = _bounded(ErrorInfo("NoHandler", f"this process has no handler for {call.type!r}{why}"))
        return Outcome.EXCEPTION, self._report(error=error)

    # -- Seldom needed -------------------------------------------------------------------------------------------------

    def _make_elsewhere(self, handler: Handler, call: Call) -> tuple[Outcome, bytes]:
        """Make a call that brings variables, secrets or a working directory of its own."""
        surroundings = _Surroundings()
        try:
            surroundings.enter(call.env, call.cwd, call.secrets)
        except (OSError, ValueError) as error:
            problem = _bounded(ErrorInfo(type(error).__name__, f"cannot begin in {call.cwd or '.'!r}: {error}"))
            ending = Outcome.SPAWN_FAILED, self._report(error=problem)
        else:
            ending = self._make(handler, call)
        self.must_leave |= not surroundings.leave()
        return ending

    def _wait_for(self, value: Coroutine[Any, Any, Any]) -> Any:
        """The result of what an async handler has returned."""
        if self._loop is None:
            self._loop = _new_loop()
        self._task = self._loop.create_task(_awaited(value))
        try:
            return self._loop.run_until_complete(self._task)
        finally:
            self._task = None
            value.close()  # It may never have begun.

    def _cancel(self, task: Task[Any]) -> None:
        if self._task is task:
            task.cancel()


def report_with(
    written: Written, *, result: bytes = b"", error: ErrorInfo | None = None, signal: int | None = None,
    exit_code: int | None = None,
) -> Report:  # fmt: skip
    """A report with what the call has printed."""
    return Report(
        exit_code=exit_code,
        signal=signal,
        result=result,
        error=error,
        stdout_tail=written.stdout_tail,
        stderr_tail=written.stderr_tail,
        stdout_bytes=written.stdout_bytes,
        stderr_bytes=written.stderr_bytes,
    )


async def _awaited(value: Coroutine[Any, Any, Any]) -> Any:
    return await value  # With a frame of ours above the handler's, so that its traceback can be told from the loop's.


class _Surroundings:
    """The variables, secrets and the working directory of one call, while it runs."""

    def __init__(self) -> None:
        self._home = -1
        self._before: dict[str, str | None] = {}

    def enter(self, env: dict[str, str], cwd: str, secrets: dict[str, str]) -> None:
        """Raises OSError, ValueError; `leave` is called all the same."""
        enter_secrets(secrets)
        self._home = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        for name, value in env.items():
            self._before[name] = os.environ.get(name)
            os.environ[name] = value
        if cwd:
            os.chdir(cwd)

    def leave(self) -> bool:
        """Whether all is as it was before."""
        enter_secrets({})
        for name, value in self._before.items():
            if value is not None:
                os.environ[name] = value
            else:
                os.environ.pop(name, None)
        try:
            os.fchdir(self._home)
            os.close(self._home)
        except OSError:
            return False
        return True


def _new_loop() -> AbstractEventLoop:
    try:
        import uvloop  # noqa: PLC0415  # only for async handlers, and not on every platform

        return uvloop.new_event_loop()
    except ImportError:
        import asyncio  # noqa: PLC0415

        return asyncio.new_event_loop()


def _close_loop(loop: AbstractEventLoop) -> None:
    import asyncio  # noqa: PLC0415

    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def _bounded(error: ErrorInfo) -> ErrorInfo:
    from taskd.runner.base import error_info  # noqa: PLC0415  # with asyncio, which few processes need

    return error_info(encodable(error.type), encodable(error.message), encodable(error.traceback))


def _traceback_of(error: BaseException) -> str:
    """The traceback from the handler's first frame on: what is above it, event loop and all, ends with one of ours."""
    import traceback  # noqa: PLC0415

    frames = frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename in _OWN_FILES:
            frames = frame.tb_next
        frame = frame.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, frames, limit=-FRAMES_MAX))
    except Exception:  # An exception of the user's that cannot say what it is.
        return ""


def encodable(text: str) -> str:
    """Text without the halves of characters that Python makes of file names that are no UTF-8: they cannot be sent."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(the error cannot be shown)"


def _kind_of(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
