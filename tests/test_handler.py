"""Declaring handlers: what becomes of hints and defaults, what is refused, and modules that do not load."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import pytest

from taskd import handler as handler_module
from taskd.handler import Handler, HandlerError, TaskHandler, current, load, task


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Handler]:
    """An empty registry, and no classes of other tests."""
    fresh: dict[str, Handler] = {}
    monkeypatch.setattr(handler_module, "_registry", fresh)
    known = set(handler_module._subclasses(TaskHandler))
    real = handler_module._subclasses
    monkeypatch.setattr(handler_module, "_subclasses", lambda kind: [it for it in real(kind) if it not in known])
    return fresh


def declared(function: Callable[..., Any], takes_params: bool = False) -> Handler:
    return Handler("it", function, takes_params=takes_params)


def called(handler: Handler, params: Any) -> Any:
    arguments, keywords = handler.bind(json.dumps(params).encode())
    return handler.function(*arguments, **keywords)


def refused(handler: Handler, params: Any) -> str:
    with pytest.raises(msgspec.ValidationError) as caught:
        handler.bind(json.dumps(params).encode())
    return str(caught.value)


# -- Functions ---------------------------------------------------------------------------------------------------------


def resize(path: str, width: int = 640, *, modes: tuple[str, ...] = ()) -> Any:
    """Make it smaller.

    And more.
    """
    return path, width, modes


def test_hints_and_defaults_are_the_schema() -> None:
    handler = declared(resize)
    assert called(handler, {"path": "a"}) == ("a", 640, ())
    assert called(handler, {"path": "a", "width": 3, "modes": ["x"]}) == ("a", 3, ("x",))
    assert "path" in refused(handler, {})
    assert "width" in refused(handler, {"path": "a", "width": "wide"})
    assert "depth" in refused(handler, {"path": "a", "depth": 3})
    assert "object" in refused(handler, [1])
    schema = json.loads(handler.schema)["$defs"]["Params"]
    assert (schema["required"], set(schema["properties"])) == (["path"], {"path", "width", "modes"})
    assert handler.summary == "Make it smaller."
    assert (handler.is_async, handler.retries, handler.timeout_s) == (False, 0, 0.0)


def test_no_params_are_an_empty_object() -> None:
    handler = declared(lambda: "called")
    assert handler.function(*handler.bind(b"")[0]) == "called"
    assert "surplus" in refused(handler, {"surplus": 1})


def test_a_default_is_the_functions_own_object() -> None:
    shared: list[int] = []

    def gather(number: int, into: list[int] = shared) -> list[int]:
        into.append(number)
        return into

    assert called(declared(gather), {"number": 1}) is shared


def test_surplus_params_go_where_there_is_room_for_them() -> None:
    def free(known: int, **rest: Any) -> Any:
        return known, rest

    handler = declared(free)
    assert called(handler, {"known": 1, "other": [2]}) == (1, {"other": [2]})
    assert called(handler, {"known": 1}) == (1, {})
    assert "known" in refused(handler, {"other": 1})


def test_positional_only_is_refused() -> None:
    with pytest.raises(HandlerError, match="'first' cannot be positional only"):
        declared(lambda first, /: first)
    with pytest.raises(HandlerError, match="'rest'"):
        declared(lambda *rest: rest)


def test_hints_that_json_cannot_hold_accept_anything() -> None:
    def odd(stream: Callable[[], int], missing: NoSuchName, either: int | complex, fine: int) -> Any:  # type: ignore[name-defined]  # noqa: F821
        return stream, missing, either, fine

    assert called(declared(odd), {"stream": 1, "missing": 2, "either": "3", "fine": "4"}) == (1, 2, "3", "4")

    def partly(stream: Callable[[], int], fine: int) -> Any:
        return stream, fine

    handler = declared(partly)
    assert called(handler, {"stream": "anything", "fine": 4}) == ("anything", 4)
    assert "fine" in refused(handler, {"stream": 1, "fine": "four"})


class Size(msgspec.Struct):
    width: Annotated[int, msgspec.Meta(ge=1)]


@dataclasses.dataclass
class Picture:
    path: str
    sizes: list[Size]


def test_rich_hints_are_made_of_json() -> None:
    def work(picture: Picture, mode: Literal["fast", "good"] = "fast") -> Any:
        return picture, mode

    handler = declared(work)
    picture, mode = called(handler, {"picture": {"path": "a", "sizes": [{"width": 2}]}})
    assert (picture, mode) == (Picture("a", [Size(2)]), "fast")
    assert "$.picture.sizes[0].width" in refused(handler, {"picture": {"path": "a", "sizes": [{"width": 0}]}})
    assert "mode" in refused(handler, {"picture": {"path": "a", "sizes": []}, "mode": "slow"})


def test_a_schema_too_large_to_advertise_is_checked_by_the_worker_alone() -> None:
    kind = Literal[tuple(f"a rather long word number {number}" for number in range(3000))]  # type: ignore[valid-type]

    def choose(word: str) -> str:
        return word

    choose.__annotations__["word"] = kind
    handler = declared(choose)
    assert handler.schema == b"{}"
    assert "word" in refused(handler, {"word": "short"})


# -- The decorator -----------------------------------------------------------------------------------------------------


def test_the_decorator_leaves_the_function_as_it_is(registry: dict[str, Handler]) -> None:
    @task("sum", retries=3, timeout="1m30s")
    def add(left: int, right: int) -> int:
        return left + right

    @task
    def bare() -> None: ...

    @task()
    async def named_by_itself() -> None: ...

    assert add(1, 2) == 3
    assert add.task_type == "sum"  # type: ignore[attr-defined]
    assert set(registry) == {"sum", "bare", "named_by_itself"}
    assert (registry["sum"].retries, registry["sum"].timeout_s) == (3, 90.0)
    assert registry["named_by_itself"].is_async


@pytest.mark.parametrize(
    "options",
    [{"retries": -1}, {"retries": 10_001}, {"retries": 1.5}, {"retries": "3"}, {"timeout": -1}, {"timeout": "soon"},
     {"timeout": float("nan")}, {"timeout": float("inf")}, {"timeout": None}],
    ids=str,
)  # fmt: skip
def test_impossible_options_are_refused_where_they_are_written(options: dict[str, Any]) -> None:
    with pytest.raises(HandlerError, match="it: "):
        task("it", **options)(lambda: None)


@pytest.mark.parametrize("name", ["command", "http", "x" * 256])
def test_names_that_no_handler_can_have(name: str) -> None:
    with pytest.raises(HandlerError, match="cannot be the type"):
        task(name)(lambda: None)


def test_two_handlers_of_one_type_are_refused_and_the_first_stays(registry: dict[str, Handler]) -> None:
    task("same")(resize)
    with pytest.raises(HandlerError, match="two handlers are of type 'same'"):
        task("same")(lambda: None)
    task("same")(resize)  # The same one again: its module was imported under two names.
    assert registry["same"].function is resize


def test_two_functions_of_one_name_in_two_files_are_two(tmp_path: Path) -> None:
    for name in ("one_of_two", "two_of_two"):
        (tmp_path / f"{name}.py").write_text("from taskd import task\n@task('same')\ndef run(): ...\n")
    _, problems = load_from(tmp_path, "one_of_two", "two_of_two")
    assert problems == ["module two_of_two: HandlerError: two handlers are of type 'same'"]


def test_there_is_no_current_attempt_outside_of_one() -> None:
    with pytest.raises(LookupError):
        current()


# -- Classes and modules -----------------------------------------------------------------------------------------------


class Params(TypedDict):
    number: int


def test_classes_are_handlers() -> None:
    class Base(TaskHandler):
        def execute(self, params: Params) -> Any:
            """Double it."""
            return params["number"] * 2

    class Double(Base):
        type = "double"
        retries = 2
        timeout = "5m"

    class Loose(TaskHandler):
        type = "loose"

        async def execute(self, params):  # type: ignore[no-untyped-def]
            return params

    handlers, problems = load([])
    assert problems == []
    assert set(handlers) == {"double", "loose"}
    assert called(handlers["double"], {"number": 4}) == 8
    assert (handlers["double"].retries, handlers["double"].timeout_s) == (2, 300.0)
    assert "number" in refused(handlers["double"], {"number": "four"})
    assert handlers["loose"].schema == b"{}"
    assert handlers["loose"].bind(b"[1]") == (([1],), {})
    assert handlers["loose"].is_async
    assert "Loose" in TaskHandler.__subclasses__()[-1].__qualname__


def test_a_class_that_cannot_be_made_is_a_problem_of_its_own() -> None:
    class Bad(TaskHandler):
        type = "bad"

        def __init__(self) -> None:
            raise OSError("no such device")

    class Good(TaskHandler):
        type = "good"

    handlers, problems = load([])
    assert set(handlers) == {"good"}
    (problem,) = problems
    assert problem.endswith("Bad: OSError: no such device")
    assert Bad.type != Good.type


def load_from(directory: Path, *modules: str) -> tuple[dict[str, Handler], list[str]]:
    sys.path.insert(0, str(directory))
    try:
        return load(modules)
    finally:
        sys.path.remove(str(directory))
        for name in modules:
            sys.modules.pop(name, None)


def test_a_module_that_fails_half_way_offers_nothing(tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text(
        "from taskd import TaskHandler, task\n"
        "@task('half')\ndef half(): return LATER\n"
        "class Half(TaskHandler):\n    type = 'half_class'\n"
        "raise ImportError('no driver')\nLATER = 1\n"
    )
    (tmp_path / "whole.py").write_text("from taskd import task\n@task\ndef whole(): ...\n")
    handlers, problems = load_from(tmp_path, "half", "no_such_module", "whole")
    assert set(handlers) == {"whole"}
    assert problems == [
        "module half: ImportError: no driver",
        "module no_such_module: ModuleNotFoundError: No module named 'no_such_module'",
    ]


def test_decorated_functions_keep_their_hints() -> None:
    @functools.wraps(resize)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        return resize(*arguments, **keywords)

    assert "width" in refused(declared(wrapper), {"path": "a", "width": "wide"})
