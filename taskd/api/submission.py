"""From what a client asks for to what the cluster runs: every check of a submission, and the TaskSpec it becomes.

Thousands of tasks come in one request, so a field that is not set costs a look and no more: a plain handler task takes
about three microseconds here, and its params are never decoded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec

from taskd.api.bodies import decode
from taskd.api.ids import parse_own_id
from taskd.api.service import HandlerDefaults, ParamsCheck, Service
from taskd.api.types import BackoffRequest, HttpTarget, Submission
from taskd.core.constraints import is_label_key, parse
from taskd.core.events import NewTask
from taskd.core.task import PARAMS_BYTES_MAX, Backoff, HttpCall, TaskSpec, encode, units
from taskd.errors import InvalidRequest, TaskdError, TooLarge
from taskd.values import duration_s, instant_s, size_bytes

TASKS_MAX = 100_000  # Of one request.
ARGUMENT_BYTES_MAX = (128 << 10) - 1  # Linux takes no longer single argument or variable (MAX_ARG_STRLEN).
ARGUMENTS_BYTES_MAX = 1 << 20  # Of a command and its variables together: half of what Linux allows by default.
SPEC_BYTES_MAX = 4 << 20  # So that any task fits into a frame several times over.

_NAMES_KEPT = 4096
_NAME = re.compile(r"[^\s,\x00-\x1f\x7f](?:[^,\x00-\x1f\x7f]*[^\s,\x00-\x1f\x7f])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_SECRET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")
# What belongs to the connection and not to the call.
_HEADERS_OF_OURS = frozenset({"connection", "content-length", "expect", "host", "te", "trailer", "transfer-encoding"})
_METHODS_WITHOUT_BODY = frozenset({"GET", "DELETE"})
_NO_PARAMS = b"{}"

_BUILT_IN = frozenset({"command", "http"})
_NO_DEFAULTS = HandlerDefaults()
_UNSET = msgspec.UNSET
_PLAIN = Submission()
_PLAIN_GRACE, _PLAIN_BACKOFF = _PLAIN.grace, _PLAIN.backoff
# The very objects of the defaults: only those are left out where a spec is encoded.
_DEFAULT = TaskSpec(type="")
NO_TIME_S, _GRACE_S, _BACKOFF = _DEFAULT.timeout_s, _DEFAULT.grace_s, _DEFAULT.backoff

_one = msgspec.json.Decoder(Submission)
_many = msgspec.json.Decoder(list[Submission])
_count = msgspec.json.Decoder(list[msgspec.Raw])


def read_submissions(body: bytes) -> tuple[list[Submission], bool]:
    """The tasks in a body, and whether they came as a list. Raises InvalidRequest, TooLarge."""
    if not body.lstrip(b" \t\r\n").startswith(b"["):
        return [decode(_one, body)], False
    # Each task has at least one brace: only where there are very many is it worth counting before decoding.
    if body.count(b"{") > TASKS_MAX and len(decode(_count, body)) > TASKS_MAX:
        raise TooLarge(f"one request takes at most {TASKS_MAX} tasks")
    submissions = decode(_many, body)
    if not submissions:
        raise InvalidRequest("the list of tasks is empty")
    return submissions, True


def new_tasks(
    submissions: list[Submission], is_list: bool, owner: str, service: Service, id_of: Callable[[int], bytes]
) -> list[NewTask]:
    """Check all tasks and give them their final form; `id_of` names the one at a place that brings no id of its own.
    Raises InvalidRequest and TooLarge with the field that is wrong."""
    now_s = service.now_s()
    tasks = []
    own_ids: dict[bytes, int] = {}
    kinds: dict[str, tuple[HandlerDefaults, ParamsCheck | None]] = dict.fromkeys(_BUILT_IN, (_NO_DEFAULTS, None))
    place = 0
    try:
        for place, submission in enumerate(submissions):
            kind = kinds.get(submission.type)
            if kind is None:
                kind = service.handler_defaults(submission.type), service.params_check(submission.type)
                kinds[submission.type] = kind
            spec = _spec(submission, owner, now_s, kind[0])
            if kind[1] is not None:
                kind[1](spec.params)
            if submission.id:
                task_id = parse_own_id(submission.id, now_s, "id")
                if own_ids.setdefault(task_id, place) != place:
                    raise InvalidRequest(f"the task at [{own_ids[task_id]}] has the same id", field="id")
            else:
                task_id = id_of(place)
            spec_bytes = encode(spec)
            if len(spec_bytes) > SPEC_BYTES_MAX:
                raise TooLarge(f"the task takes {len(spec_bytes)} bytes; {SPEC_BYTES_MAX} are allowed")
            tasks.append(NewTask(task_id, spec, spec_bytes))
    except TaskdError as error:
        if is_list:
            error.field = f"[{place}].{error.field}" if error.field else f"[{place}]"
        raise
    return tasks


def _spec(task: Submission, owner: str, now_s: float, defaults: HandlerDefaults) -> TaskSpec:
    kind = task.type
    params = b""
    http = None
    if kind == "command":
        _check_command(task)
    else:
        if task.argv or task.shell:
            wrong = "argv" if task.argv else "shell"
            raise InvalidRequest(f"a task of type {kind!r} has no command; use type `command`", field=wrong)
        params = bytes(task.params) or _NO_PARAMS
        if len(params) > PARAMS_BYTES_MAX:
            raise TooLarge(f"the params take {len(params)} bytes; {PARAMS_BYTES_MAX} are allowed", field="params")
        if kind == "http":
            http = _http(task)
            if http.method in _METHODS_WITHOUT_BODY:
                params = b""
        elif task.http is not None:
            raise InvalidRequest("only a task of type `http` takes this", field="http")
    if kind not in _names:
        _check_name(kind, "type")
    if task.queue not in _names:
        _check_name(task.queue, "queue")
    not_before_s = _not_before_s(task, now_s) if task.delay or task.at else NO_TIME_S
    # By position, for names cost five times as much: in the order of TaskSpec.
    return TaskSpec(
        kind,
        task.name if not task.name or task.name.isprintable() else _unprintable("name"),
        task.queue,
        task.priority,
        owner,
        now_s,
        task.argv,
        task.shell,
        http,
        params,
        _env(task) if task.env else task.env,
        _cwd(task.cwd) if task.cwd else "",
        _resources(task) if task.cpus or task.memory or task.gpus or task.resources else {},
        _constraints(task.constraints) if task.constraints else (),
        not_before_s,
        _deadline_s(task, now_s, not_before_s) if task.deadline else NO_TIME_S,
        _timeout_s(task.timeout, defaults) if task.timeout is not _UNSET or defaults.timeout_s else NO_TIME_S,
        _GRACE_S if task.grace is _PLAIN_GRACE else _seconds(task.grace, "grace"),
        defaults.retries if task.retries is _UNSET else task.retries,
        _BACKOFF if task.backoff is _PLAIN_BACKOFF else _backoff(task.backoff),
        task.on_lost,
        _labels(task) if task.labels else task.labels,
        secrets=_secrets(task) if task.secrets else task.secrets,
    )


# -- What to run -------------------------------------------------------------------------------------------------------


def _check_command(task: Submission) -> None:
    argv, shell = task.argv, task.shell
    if not argv and not shell:
        raise InvalidRequest("a command needs `argv` or `shell`", field="argv")
    if argv and shell:
        raise InvalidRequest("give either `argv` or `shell`, not both", field="shell")
    if task.http is not None:
        raise InvalidRequest("only a task of type `http` takes this", field="http")
    if bytes(task.params):
        raise InvalidRequest("a command takes no params; use `argv` or `env`", field="params")
    if argv and not argv[0]:
        raise InvalidRequest("the program's name is empty", field="argv[0]")
    what = "argv" if argv else "shell"
    _check_strings(argv or (shell,), what, ARGUMENTS_BYTES_MAX - _bytes_of_env(task))


def _check_strings(strings: tuple[str, ...], field: str, bytes_max: int) -> None:
    """No NUL, none too long, not too much together."""
    joined = "\0".join(strings)
    if joined.count("\0") >= len(strings):
        raise InvalidRequest("a NUL character cannot be passed to a program", field=field)
    size = len(joined.encode())
    if size > bytes_max:
        raise TooLarge(f"command and environment take more than {ARGUMENTS_BYTES_MAX} bytes", field=field)
    if size > ARGUMENT_BYTES_MAX:
        longest = max(len(string.encode()) for string in strings)
        if longest > ARGUMENT_BYTES_MAX:
            raise TooLarge(f"one of the strings takes {longest} bytes; {ARGUMENT_BYTES_MAX} are allowed", field=field)


def _bytes_of_env(task: Submission) -> int:
    return sum(len(name.encode()) + len(value.encode()) + 2 for name, value in task.env.items())


def _env(task: Submission) -> dict[str, str]:
    for name, value in task.env.items():
        if not name or "=" in name or "\0" in name:
            raise InvalidRequest(f"{name!r} cannot be the name of an environment variable", field="env")
        if "\0" in value:
            raise InvalidRequest("a NUL character cannot be passed to a program", field=f"env.{name}")
        if len(name.encode()) + len(value.encode()) + 1 > ARGUMENT_BYTES_MAX:
            raise TooLarge(f"a variable takes at most {ARGUMENT_BYTES_MAX} bytes", field=f"env.{name}")
    if _bytes_of_env(task) > ARGUMENTS_BYTES_MAX:
        raise TooLarge(f"the environment takes more than {ARGUMENTS_BYTES_MAX} bytes", field="env")
    return task.env


def _secrets(task: Submission) -> dict[str, str]:
    for variable, name in task.secrets.items():
        if _VARIABLE.fullmatch(variable) is None or variable in task.env or variable.startswith("TASKD_"):
            problem = "is set in `env` too" if variable in task.env else "cannot be the variable of a secret"
            raise InvalidRequest(f"{variable!r} {problem}", field="secrets")
        if _SECRET.fullmatch(name) is None:
            problem = "cannot be the name of a secret: letters, digits, dots, hyphens, underscores"
            raise InvalidRequest(f"{name!r} {problem}", field=f"secrets.{variable}")
    return task.secrets


def _cwd(cwd: str) -> str:
    if not cwd.startswith("/"):
        raise InvalidRequest("give an absolute path: it is one on the worker", field="cwd")
    if "\0" in cwd:
        raise InvalidRequest("a NUL character cannot be part of a path", field="cwd")
    return cwd


def _http(task: Submission) -> HttpCall:
    target = task.http
    if target is None:
        raise InvalidRequest("a task of type `http` needs the call: at least its url", field="http")
    if task.env or task.cwd:
        raise InvalidRequest("an http task runs no program", field="env" if task.env else "cwd")
    _check_url(target)
    if target.method in _METHODS_WITHOUT_BODY and bytes(task.params):
        raise InvalidRequest(f"a {target.method} call has no body to carry params", field="params")
    for name, value in target.headers.items():
        if _HEADER_NAME.fullmatch(name) is None:
            raise InvalidRequest(f"{name!r} cannot be the name of a header", field="http.headers")
        if name.lower() in _HEADERS_OF_OURS:
            raise InvalidRequest("taskd sets this header itself", field=f"http.headers.{name}")
        if _HEADER_VALUE.fullmatch(value) is None:
            raise InvalidRequest("a header is one line of printable text", field=f"http.headers.{name}")
    return HttpCall(target.url, target.method, target.headers, target.expect_status)


def _check_url(target: HttpTarget) -> None:
    url = target.url
    try:
        parts = urlsplit(url)
        is_good = bool(parts.hostname) and parts.port != 0 and url.isprintable() and " " not in url
    except ValueError:
        is_good = False
    if not is_good:
        raise InvalidRequest(f"{url!r} is not the URL of a service", field="http.url")


# -- Where -------------------------------------------------------------------------------------------------------------


def _resources(task: Submission) -> dict[str, int]:
    resources: dict[str, int] = {}
    if task.cpus:
        resources["cpus"] = _amount(task.cpus, "cpus")
    if task.memory:
        size = task.memory if isinstance(task.memory, int) else _size(task.memory)
        if size:
            resources["memory"] = size * 1000
    if task.gpus:
        resources["gpus"] = _amount(task.gpus, "gpus")
    for name, amount in task.resources.items():
        if name in ("cpus", "memory", "gpus"):
            raise InvalidRequest(f"{name} has a field of its own", field=f"resources.{name}")
        if not is_label_key(name):
            raise InvalidRequest(f"{name!r} cannot be the name of a resource", field="resources")
        if amount:
            resources[name] = _amount(amount, f"resources.{name}")
    return resources


def _amount(amount: float, field: str) -> int:
    thousandths = units(amount)
    if not thousandths:
        raise InvalidRequest("less than a thousandth cannot be asked for", field=field)
    return thousandths


def _size(text: str) -> int:
    try:
        return size_bytes(text)
    except ValueError as error:
        raise InvalidRequest(str(error), field="memory") from None


def _constraints(texts: tuple[str, ...]) -> tuple[str, ...]:
    constraints = []
    for place, text in enumerate(texts):
        try:
            constraints.append(parse(text).text)
        except ValueError as error:
            raise InvalidRequest(str(error), field=f"constraints[{place}]") from None
    return tuple(constraints)


# -- When --------------------------------------------------------------------------------------------------------------


def _seconds(value: float | str, field: str) -> float:
    if not isinstance(value, str):
        return value
    try:
        return duration_s(value) or NO_TIME_S
    except ValueError as error:
        raise InvalidRequest(str(error), field=field) from None


def _not_before_s(task: Submission, now_s: float) -> float:
    if not task.at:
        delay_s = _seconds(task.delay, "delay")
        return now_s + delay_s if delay_s else NO_TIME_S
    if task.delay:
        raise InvalidRequest("give either `delay` or `at`, not both", field="at")
    if not isinstance(task.at, str):
        return task.at
    try:
        return instant_s(task.at, now_s)
    except ValueError as error:
        raise InvalidRequest(str(error), field="at") from None


def _deadline_s(task: Submission, now_s: float, not_before_s: float) -> float:
    deadline_s = _seconds(task.deadline, "deadline")
    if not deadline_s:
        return NO_TIME_S
    if now_s + deadline_s <= not_before_s:
        raise InvalidRequest("the deadline passes before the task may begin", field="deadline")
    return now_s + deadline_s


def _timeout_s(timeout: float | str | msgspec.UnsetType, defaults: HandlerDefaults) -> float:
    if timeout is _UNSET:
        return defaults.timeout_s or NO_TIME_S
    return _seconds(timeout, "timeout") if timeout else NO_TIME_S


def _backoff(backoff: BackoffRequest) -> Backoff:
    return Backoff(
        _seconds(backoff.initial, "backoff.initial"), backoff.factor, _seconds(backoff.max, "backoff.max"),
        backoff.jitter,
    )  # fmt: skip


# -- Names -------------------------------------------------------------------------------------------------------------

_names: set[str] = set()  # Types and queues that were found good: thousands of tasks share a few.


def _check_name(name: str, field: str) -> None:
    if _NAME.fullmatch(name) is None or not name.isprintable():
        raise InvalidRequest(f"{name!r}: printable characters without commas are allowed", field=field)
    if len(_names) >= _NAMES_KEPT:
        _names.clear()
    _names.add(name)


def _labels(task: Submission) -> dict[str, str]:
    for name, value in task.labels.items():
        if not is_label_key(name):
            raise InvalidRequest(f"{name!r} cannot be a label: letters, digits and ._/- are allowed", field="labels")
        if not value.isprintable():
            _unprintable(f"labels.{name}")
    return task.labels


def _unprintable(field: str) -> str:
    raise InvalidRequest("printable characters are allowed, in one line", field=field)
