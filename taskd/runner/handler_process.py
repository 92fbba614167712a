"""A process that runs Python handlers: reads calls in batches, makes them one after the other, reports in batches.

Two sockets lead to the worker. The main thread reads calls from the first and makes them. A second thread listens on
the other: it gives back calls that have not begun, when another process idles, and cancels async ones. A third one
sees to it that results do not wait behind a slow call.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Coroutine
from typing import Any

import msgspec

from taskd import handler as declared
from taskd.core.task import OUTPUT_TAIL_BYTES, RESULT_BYTES_MAX, Outcome, Report, encode
from taskd.protocol.messages import HandlerInfo
from taskd.runner.base import error_info
from taskd.runner.handler_messages import (
    HEAD_BYTES,
    Call,
    CallEnded,
    Calls,
    CancelCall,
    Ready,
    Setup,
    TakeBack,
    TakenBack,
    ToControl,
    ToProcess,
)
from taskd.runner.handler_results import HELD_S, Results

_PR_SET_PDEATHSIG = 1
_NOT_THE_HANDLERS = (__name__, "asyncio.")  # modules whose frames begin every traceback

_encode_json = msgspec.json.Encoder().encode
_to_process: msgspec.msgpack.Decoder[Setup | Calls] = msgspec.msgpack.Decoder(ToProcess)
_to_control: msgspec.msgpack.Decoder[TakeBack | CancelCall] = msgspec.msgpack.Decoder(ToControl)


class _Closed(Exception):
    """The worker is gone."""


class _Channel:
    """Blocking frames on a socket."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)  # It came through exec; what handlers start is not to have it.
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(True)
        self._sending = threading.Lock()

    def receive(self) -> bytes:
        """The body of the next frame. Raises _Closed."""
        size = int.from_bytes(self._exactly(HEAD_BYTES), "big")
        return self._exactly(size)

    def has_more(self) -> bool:
        """Whether something is there to be read."""
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def send(self, message: Any) -> None:
        """Send a frame whole. Raises _Closed."""
        body = encode(message)
        try:
            with self._sending:
                self._socket.sendall(len(body).to_bytes(HEAD_BYTES, "big") + body)
        except OSError:
            raise _Closed from None

    def _exactly(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size:
            try:
                part = self._socket.recv(size)
            except OSError:
                raise _Closed from None
            if not part:
                raise _Closed
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class _Printed:
    """What handlers write to stdout and stderr, whether through Python or not: two files in memory, emptied after each
    call that wrote something."""

    def __init__(self) -> None:
        for descriptor in (1, 2):
            file = os.memfd_create("output", os.MFD_CLOEXEC)
            os.dup2(file, descriptor)  # Inheritable, so that programs a handler starts write there too.
            os.close(file)
        # Whatever buffers Python had made for the old descriptors was line-wise or none.
        sys.stdout = os.fdopen(1, "w", buffering=8192, errors="replace", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, errors="replace", closefd=False)

    def take(self) -> tuple[bytes, int, bytes, int]:
        """Tail and size of both streams since the last call."""
        with contextlib.suppress(Exception):  # A handler may have closed or replaced them.
            sys.stdout.flush()
            sys.stderr.flush()
        return (*self._take(1), *self._take(2))

    @staticmethod
    def _take(descriptor: int) -> tuple[bytes, int]:
        try:
            size = os.lseek(descriptor, 0, os.SEEK_CUR)
            if not size:
                return b"", 0
            start = max(0, size - OUTPUT_TAIL_BYTES)
            tail = os.pread(descriptor, size - start, start)
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
        except OSError:
            return b"", 0
        return tail, size


class HandlerProcess:
    """The process's life."""

    def __init__(self, calls_descriptor: int, control_descriptor: int, results_descriptor: int) -> None:
        self._channel = _Channel(calls_descriptor)
        self._control = _Channel(control_descriptor)
        self._results = Results(results_descriptor, self._channel.send)
        self._handlers: dict[str, declared.Handler] = {}
        self._waiting: deque[Call] = deque()
        self._reading = threading.Lock()
        self._is_busy = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: tuple[int, asyncio.Task[Any]] | None = None
        self._cancelled = 0  # the call that was last to be cancelled: it may not have begun by then
        self._printed = _Printed()

    def run(self) -> None:
        """Until the worker closes its end."""
        try:
            self._set_up()
            for target in (self._obey, self._keep_flushing):
                threading.Thread(target=target, daemon=True).start()
            while True:
                self._read_calls()
                self._is_busy.set()
                while True:
                    try:
                        call = self._waiting.popleft()
                    except IndexError:  # The other thread takes from it, too.
                        break
                    self._results.add(self._make(call))
                self._is_busy.clear()
                self._results.flush()
        except _Closed:
            return

    def _set_up(self) -> None:
        setup = _to_process.decode(self._channel.receive())
        assert isinstance(setup, Setup)
        sys.path[:0] = setup.path
        self._handlers, problems = declared.load(setup.modules)
        infos = tuple(
            HandlerInfo(it.type, it.schema, it.summary, it.version, it.retries, it.timeout_s)
            for _, it in sorted(self._handlers.items())
        )
        is_async = tuple(it.type for it in self._handlers.values() if it.is_async)
        self._printed.take()
        self._channel.send(Ready(infos, is_async, tuple(problems)))

    def _read_calls(self) -> None:
        with self._reading:
            message = _to_process.decode(self._channel.receive())
        assert isinstance(message, Calls)
        self._waiting.extend(message.calls)

    # -- Calls ---------------------------------------------------------------------------------------------------------

    def _make(self, call: Call) -> CallEnded:
        started_s = time.time()
        outcome, report = self._result(call)
        out_tail, out_bytes, err_tail, err_bytes = self._printed.take()
        if out_bytes or err_bytes:
            report = Report(
                result=report.result, error=report.error, stdout_tail=out_tail, stdout_bytes=out_bytes,
                stderr_tail=err_tail, stderr_bytes=err_bytes,
            )  # fmt: skip
        return CallEnded(call.number, outcome, started_s, time.time(), encode(report))

    def _result(self, call: Call) -> tuple[Outcome, Report]:
        found = self._handlers.get(call.type)
        if found is None:
            return _failed("NoHandler", f"this worker has no handler {call.type!r}")
        token = declared._current.set(declared.Current(call.task_id, call.attempt, call.fence))
        try:
            try:
                arguments, keywords = found.bind(call.params)
            except msgspec.DecodeError as error:
                return _failed("InvalidParams", str(error))
            value = found.function(*arguments, **keywords)
            if isinstance(value, Coroutine):  # Also of a plain function that wraps an async one.
                value = self._await(call.number, value)
            result = b"null" if value is None else _encode_json(value)
        except BaseException as error:  # SystemExit and KeyboardInterrupt cost one attempt, no more
            return _failed(type(error).__name__, _text(error), _traceback(error))
        finally:
            declared._current.reset(token)
        if len(result) > RESULT_BYTES_MAX:
            return _failed("ResultTooLarge", f"the result has {len(result)} bytes, of at most {RESULT_BYTES_MAX}")
        return Outcome.OK, Report(result=result)

    def _await(self, number: int, work: Any) -> Any:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
        task = self._loop.create_task(work)
        self._running = (number, task)
        if self._cancelled == number:
            task.cancel()
        try:
            return self._loop.run_until_complete(task)
        finally:
            self._running = None

    # -- The other threads ---------------------------------------------------------------------------------------------

    def _obey(self) -> None:
        with contextlib.suppress(_Closed):
            while True:
                message = _to_control.decode(self._control.receive())
                if isinstance(message, CancelCall):
                    self._cancelled = message.number
                    running = self._running
                    if running is not None and running[0] == message.number and self._loop is not None:
                        self._loop.call_soon_threadsafe(running[1].cancel)
                else:
                    self._give_back()

    def _give_back(self) -> None:
        # While the main thread waits for calls it holds the lock, and there is nothing to give back.
        if self._reading.acquire(blocking=False):
            try:
                while self._channel.has_more():
                    message = _to_process.decode(self._channel.receive())
                    assert isinstance(message, Calls)
                    self._waiting.extend(message.calls)
            finally:
                self._reading.release()
        numbers: list[int] = []
        with contextlib.suppress(IndexError):
            while True:
                numbers.append(self._waiting.pop().number)
        self._channel.send(TakenBack(numbers))

    def _keep_flushing(self) -> None:
        with contextlib.suppress(_Closed):
            while True:
                self._is_busy.wait()
                time.sleep(HELD_S)
                self._results.flush_held()


def _failed(type: str, message: str, traceback: str = "") -> tuple[Outcome, Report]:
    return Outcome.EXCEPTION, Report(error=error_info(_encodable(type), _encodable(message), _encodable(traceback)))


def _encodable(text: str) -> str:
    """Text without the halves of characters that Python makes of file names which are no UTF-8."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a handler's own exception class may fail at anything
        return "(the error cannot be shown)"


def _traceback(error: BaseException) -> str:
    """The part of the traceback that is the handler's."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals.get("__name__", "").startswith(_NOT_THE_HANDLERS):
        frames = frames.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, frames))
    except Exception:
        return ""


def main(arguments: list[str]) -> None:
    """The program: its descriptors, and the id of the process that must be its parent."""
    *descriptors, parent = map(int, arguments)
    # Handlers must not outlive their worker: nobody would take their results.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    HandlerProcess(*descriptors).run()
    os._exit(0)  # Threads of handlers that do not end must not keep the process.


if __name__ == "__main__":
    main(sys.argv[1:])
