"""From rows as they are stored to what users see. JSON that tasks made (params, results) is passed on as it is."""

from __future__ import annotations

import shlex
from typing import Any, cast

import msgspec

from taskd.api.bodies import encode
from taskd.api.service import Service
from taskd.api.types import AttemptView, BackoffRequest, ErrorView, HttpTarget, TaskDetail, TaskResult, TaskView
from taskd.core.effects import Change
from taskd.core.events import NewTask
from taskd.core.task import (
    Attempt,
    ErrorInfo,
    HttpCall,
    Outcome,
    Record,
    Report,
    TaskSpec,
    TaskState,
    deciding_attempt,
    decode_record,
    decode_report,
    decode_spec,
)
from taskd.protocol.messages import TaskRow, id_text

COMMAND_CHARS_MAX = 200

_NO_REPORT = Report()
_WORDS: dict[int, str] = {state: state.word for state in TaskState}
_WAITING_FOR_A_TIME = frozenset({TaskState.SCHEDULED, TaskState.RETRYING})
_read_json = msgspec.json.Decoder(msgspec.Raw).decode


class _ReportHead(msgspec.Struct):
    """The part of a Report that lists show: decoding passes over results and output."""

    exit_code: int | None = None


_NO_HEAD = _ReportHead()
_decode_head = msgspec.msgpack.Decoder(_ReportHead).decode


# -- Lists -------------------------------------------------------------------------------------------------------------


def task_view(row: TaskRow, service: Service) -> TaskView:
    """A task as lists show it."""
    spec, record = decode_spec(row.spec), decode_record(row.record)
    return TaskView(**_common(row, spec, record, service))


def _common(row: TaskRow, spec: TaskSpec, record: Record, service: Service) -> dict[str, Any]:
    last = deciding_attempt(record)
    head = _head(last.report) if last is not None else _NO_HEAD
    return {
        "id": id_text(row.id),
        "type": row.type,
        "name": row.name,
        "state": _WORDS[row.state],
        "queue": row.queue,
        "priority": row.priority,
        "owner": row.owner,
        "submitted": row.submitted_s,
        "changed": row.changed_s,
        "finished": row.finished_s or None,
        "attempt": last.number if last is not None else 0,
        "worker": last.worker if last is not None else None,
        "worker_name": service.node_name(last.worker) if last is not None else None,
        "started": (last.started_s or None) if last is not None else None,
        "exit_code": head.exit_code,
        "reason": record.reason or (last.reason if last is not None else ""),
        "labels": spec.labels,
        "command": command_text(spec),
        "provisional": bool(row.finished_s) and service.is_provisional(row),
    }


def _head(report: bytes) -> _ReportHead:
    if not report:
        return _NO_HEAD
    try:
        return _decode_head(report)
    except msgspec.DecodeError:
        return _NO_HEAD  # Showing the task itself says so (_report).


def command_text(spec: TaskSpec) -> str:
    """What a task runs, in one short line for people."""
    if spec.argv:
        # No more arguments than can be shown: there may be thousands.
        text = shlex.join(argument[:COMMAND_CHARS_MAX] for argument in spec.argv[:COMMAND_CHARS_MAX])
    elif spec.shell:
        text = spec.shell
    elif spec.http is not None:
        text = f"{spec.http.method} {spec.http.url}"
    elif spec.params in (b"", b"{}"):
        text = spec.type
    else:
        text = f"{spec.type} {spec.params[: COMMAND_CHARS_MAX * 4].decode(errors='replace')}"
    text = " ".join(text[: COMMAND_CHARS_MAX * 4].split())
    return text if len(text) <= COMMAND_CHARS_MAX else text[: COMMAND_CHARS_MAX - 1] + "…"


# -- One task ----------------------------------------------------------------------------------------------------------


def task_detail(row: TaskRow, service: Service) -> TaskDetail:
    """A task in full."""
    spec, record = decode_spec(row.spec), decode_record(row.record)
    deciding = deciding_attempt(record)
    report = _report(deciding.report) if deciding is not None else _NO_REPORT
    is_waiting = row.state in _WAITING_FOR_A_TIME
    return TaskDetail(
        **_common(row, spec, record, service),
        **_wishes(spec),
        due=record.due_s if is_waiting and record.due_s else None,
        signal=report.signal,
        error=_error(report.error),
        result=_json(report.result),
        attempts=attempt_views(row.id, record, service),
    )


def planned(task: NewTask, service: Service) -> TaskDetail:
    """A task as it would be taken, had it been submitted."""
    spec = task.spec
    state = TaskState.SCHEDULED if spec.not_before_s > spec.submitted_s else TaskState.QUEUED
    row = TaskRow(
        task.id, state, spec.priority, spec.queue, spec.type, spec.name, spec.owner, spec.submitted_s,
        spec.submitted_s, 0.0, 0, 0, 0, 0, b"", b"",
    )  # fmt: skip
    common = _common(row, spec, Record([], due_s=spec.not_before_s), service)
    common["id"] = ""
    return TaskDetail(**common, **_wishes(spec), due=spec.not_before_s or None)


def _wishes(spec: TaskSpec) -> dict[str, Any]:
    backoff, http = spec.backoff, spec.http
    return {
        "argv": list(spec.argv),
        "shell": spec.shell,
        "http": None if http is None else _target(http),
        "params": _json(spec.params),
        "env": spec.env,
        "secrets": spec.secrets,
        "cwd": spec.cwd,
        "resources": {name: amount / 1000 for name, amount in spec.resources.items()},
        "constraints": list(spec.constraints),
        "not_before": spec.not_before_s or None,
        "deadline": spec.deadline_s or None,
        "timeout": spec.timeout_s,
        "grace": spec.grace_s,
        "retries": spec.retries,
        "backoff": BackoffRequest(backoff.initial_s, backoff.factor, backoff.max_s, backoff.jitter),
        "on_lost": spec.on_lost,
        "retry_of": id_text(spec.retry_of) if spec.retry_of else None,
    }


def _target(http: HttpCall) -> HttpTarget:
    return HttpTarget(http.url, cast(Any, http.method), http.headers, http.expect_status)


def attempt_views(task_id: bytes, record: Record, service: Service) -> list[AttemptView]:
    """All attempts of a task."""
    return [_attempt_view(task_id, attempt, service) for attempt in record.attempts]


def _attempt_view(task_id: bytes, attempt: Attempt, service: Service) -> AttemptView:
    report = _report(attempt.report)
    return AttemptView(
        number=attempt.number,
        worker=attempt.worker,
        worker_name=service.node_name(attempt.worker),
        dispatched=attempt.dispatched_s,
        started=attempt.started_s or None,
        ended=attempt.ended_s or None,
        outcome=None if attempt.outcome is None else Outcome(attempt.outcome).word,
        fence=attempt.key(task_id).fence,
        exit_code=report.exit_code,
        signal=report.signal,
        error=_error(report.error),
        reason=attempt.reason,
        stdout_tail=report.stdout_tail.decode(errors="replace"),
        stderr_tail=report.stderr_tail.decode(errors="replace"),
        stdout_bytes=report.stdout_bytes,
        stderr_bytes=report.stderr_bytes,
        memory_peak_bytes=report.memory_peak_bytes,
        cpu_s=report.cpu_s,
    )


# -- Results -----------------------------------------------------------------------------------------------------------


def result_of_change(change: Change) -> TaskResult:
    """How a task ended, from what was announced of it."""
    return _result(change.id, change.state, change.report, change.reason, change.attempt)


def result_of_row(row: TaskRow) -> TaskResult:
    """How a task ended, or how it stands, from its row."""
    record = decode_record(row.record)
    last = deciding_attempt(record)
    if last is None:
        return _result(row.id, row.state, b"", record.reason, 0)
    return _result(row.id, row.state, last.report, record.reason or last.reason, last.number)


def cause_of(result: TaskResult) -> str:
    """Why a task ended as it did, in a few words; empty where its state says it."""
    if result.state == "failed" and result.reason:
        return result.reason  # Why it is not tried again; what ended its last attempt was not the cause.
    if result.error is not None:
        return f"{result.error.type}: {result.error.message}".rstrip(": ")
    if result.signal and result.state == "failed":
        return f"signal {result.signal}"
    if result.exit_code:
        return f"exit code {result.exit_code}"
    return result.reason


def _result(task_id: bytes, state: int, report_bytes: bytes, reason: str, attempts: int) -> TaskResult:
    report = _report(report_bytes)
    return TaskResult(
        id_text(task_id), _WORDS[state], _json(report.result), report.exit_code, report.signal,
        _error(report.error), reason, attempts,
    )  # fmt: skip


def _report(report: bytes) -> Report:
    if not report:
        return _NO_REPORT
    try:
        return decode_report(report)
    except msgspec.DecodeError as error:
        # Workers make these, and a newer one may make them otherwise: the rest of the task is still worth showing.
        return Report(error=ErrorInfo("UnreadableReport", f"this node cannot read the worker's report: {error}"))


def _error(error: ErrorInfo | None) -> ErrorView | None:
    return None if error is None else ErrorView(error.type, error.message, error.traceback)


def _json(text: bytes) -> msgspec.Raw | None:
    if not text:
        return None
    try:
        if not text.isascii():
            text.decode()
        return _read_json(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # It must not break the answer that it is part of.
        return msgspec.Raw(encode(text.decode(errors="replace")))
