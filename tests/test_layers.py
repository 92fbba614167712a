"""The architecture as a test: who may import whom, and how long a module may be. It reads the code, it runs none."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "taskd"

# What modules of the package may import of the package, by the start of the name; `taskd` alone is what stands at its
# top. Everybody may import from their own package.
COMMON = ("taskd.errors", "taskd.private_files", "taskd.values", "taskd.version")
WORLD = (
    *COMMON,
    "taskd.config",
    "taskd.core.backlog",
    "taskd.core.task",
    "taskd.core.events",
    "taskd.core.effects",
    "taskd.protocol.messages",
)
ALLOWED: dict[str, tuple[str, ...]] = {
    "taskd.protocol": ("taskd.errors",),
    "taskd.core": ("taskd.errors", "taskd.protocol.messages"),
    "taskd.net": (*COMMON, "taskd.protocol", "taskd.core.events"),
    "taskd.store": (*WORLD, "taskd.store.base", "taskd.failpoints", "taskd.interpreter"),
    # Its processes load what the user's modules do, and say of wrong params what the leader says.
    "taskd.runner": (*WORLD, "taskd.handler", "taskd.core.signature", "taskd.interpreter"),
    "taskd.api": (*WORLD, "taskd.store.base", "taskd.core.constraints", "taskd.tokens"),
    "taskd.daemon": ("taskd",),
    "taskd.client": (*COMMON, "taskd.paths"),
    "taskd.cli": (*COMMON, "taskd.paths", "taskd.client", "taskd.service", "taskd.backup_file", "taskd.tokens"),
    "taskd.service": ("taskd.errors",),
    # The modules at the top.
    "taskd": ("taskd.errors",),
    "taskd.__init__": ("taskd.client", "taskd.handler", "taskd.version", "taskd.errors"),
    "taskd.__main__": ("taskd.cli",),
    "taskd.handler": ("taskd.values",),
    "taskd.config": ("taskd.errors", "taskd.paths", "taskd.rules", "taskd.sources"),
    "taskd.sources": ("taskd.errors", "taskd.rules"),
    "taskd.rules": ("taskd.values",),
    "taskd.tokens": ("taskd.errors", "taskd.private_files"),
}

# Imports beyond these: who, what, and why. Only inside functions or for types, so that no other command pays for them.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("taskd.cli", "taskd.daemon.main"): "`taskd start` becomes the daemon",
    ("taskd.cli", "taskd.daemon.launcher"): "`taskd launcher` becomes the launcher",
    (
        "taskd.cli",
        "taskd.config",
    ): "`taskd config check` and `taskd start` read the settings, `taskd key` their key file",
    ("taskd.cli", "taskd.api.https"): "`taskd token` says which certificate the daemon shows, without a daemon",
    ("taskd.cli", "taskd.daemon.restore"): "`taskd restore` puts a state directory in place, without a daemon",
    ("taskd.cli", "taskd.net.security"): "`taskd key` shows and imports keys, without a daemon",
    ("taskd.cli", "taskd.net.keyring"): "`taskd key` replaces keys, without a daemon",
    ("taskd.cli", "taskd.net.discovery"): "`taskd doctor` says which addresses mDNS would use, without a daemon",
}

# The core and the protocol get time, chance and the world as arguments.
IMPURE = frozenset({
    "asyncio", "concurrent", "datetime", "logging", "multiprocessing", "os", "pathlib", "random", "secrets",
    "selectors", "signal", "socket", "ssl", "subprocess", "tempfile", "threading", "time", "uuid", "uvloop",
})  # fmt: skip
PURE_NAMES = frozenset({("random", "Random")})  # as a type: the generator itself is handed in

LINES_MAX = 400
LONGER: dict[str, str] = {
    "taskd.protocol.messages": "one class a message and no code: the catalogue of the protocol is read as one",
}


class Import:
    """One imported module or name: `taskd.core.task.Task` for `from taskd.core.task import Task`."""

    def __init__(self, module: str, line: int, is_lazy: bool, is_typing: bool) -> None:
        self.module = module
        self.line = line
        self.is_lazy = is_lazy  # inside a function
        self.is_typing = is_typing  # below `if TYPE_CHECKING`


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(source: str) -> Iterator[Import]:
    """All imports of a module, wherever they stand."""
    yield from _walk(ast.parse(source), is_lazy=False, is_typing=False)


def _walk(node: ast.AST, is_lazy: bool, is_typing: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, is_lazy, is_typing)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative imports hide where something comes from"
            for alias in child.names:
                yield Import(f"{child.module}.{alias.name}", child.lineno, is_lazy, is_typing)
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            is_guard = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from _walk(child, is_lazy or is_function, is_typing or is_guard)


def layer_of(module: str) -> str:
    """The key of ALLOWED that counts for a module: its own name, its package, or `taskd` for one at the top."""
    if module in ALLOWED and module != "taskd":
        return module
    package = ".".join(module.split(".")[:2])
    return package if (PACKAGE.parent / package.replace(".", "/")).is_dir() else "taskd"


def is_below(name: str, start: str) -> bool:
    return name == start or name.startswith(start + ".")


def breaches(module: str, source: str) -> list[str]:
    """What a module imports and may not."""
    layer = layer_of(module)
    allowed = ALLOWED[layer]
    found = []
    for it in imports(source):
        if not is_below(it.module, "taskd"):
            continue
        if layer.count(".") == 1 and (PACKAGE / layer.split(".")[1]).is_dir() and is_below(it.module, layer):
            continue
        if any(is_below(it.module, start) for start in allowed):
            continue
        if (it.is_lazy or it.is_typing) and any(layer == who and is_below(it.module, what) for who, what in EXCEPTIONS):
            continue
        found.append(f"{module}:{it.line} may not import {it.module}")
    return found


def impurities(module: str, source: str) -> list[str]:
    """What a pure module imports of the outside world."""
    return [
        f"{module}:{it.line} may not import {it.module}"
        for it in imports(source)
        if it.module.split(".")[0] in IMPURE and tuple(it.module.split(".")) not in PURE_NAMES
    ]


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path):
    assert breaches(name_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.parent.name in ("core", "protocol")], ids=name_of
)  # fmt: skip
def test_the_core_and_the_protocol_are_pure(path):
    assert impurities(name_of(path), path.read_text()) == []


def test_there_are_modules_to_look_at():
    assert {path.parent.name for path in MODULES} >= {"core", "protocol", "daemon", "net", "store", "runner", "api"}
    assert set(ALLOWED) >= {layer_of(name_of(path)) for path in MODULES}


def test_every_exception_is_used():
    used = {
        (layer_of(name_of(path)), what)
        for path in MODULES
        for it in imports(path.read_text())
        for _, what in EXCEPTIONS
        if it.is_lazy and is_below(it.module, what)
    }
    assert set(EXCEPTIONS) <= used


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_are_short_or_say_why_not(path):
    name = name_of(path)
    count = len(path.read_text().splitlines())
    if name in LONGER:
        assert count > LINES_MAX, f"{name} is short again: take it out of the table"
    else:
        assert count <= LINES_MAX, f"{name} has {count} lines: split it by subject, or give the reason in the table"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("taskd.core.node", "import asyncio"),
        ("taskd.core.node", "def f():\n    from time import monotonic"),
        ("taskd.core.node", "import random"),
        ("taskd.core.node", "from random import random"),
        ("taskd.core.node", "import os.path"),
        ("taskd.protocol.frames", "import taskd.core.task, uuid"),
    ],
)
def test_an_impure_import_is_found(module, source):
    assert impurities(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("taskd.core.node", "from taskd.protocol import frames"),
        ("taskd.core.node", "from taskd.store.base import Store"),
        ("taskd.protocol.frames", "from taskd.core.task import Task"),
        ("taskd.net.mesh", "from taskd.core.task import Task"),
        ("taskd.net.mesh", "from taskd.daemon.logs import log"),
        ("taskd.store.sqlite", "from taskd.core.node import Node"),
        ("taskd.store.sqlite", "def f():\n    from taskd import net"),
        ("taskd.runner.command", "from taskd.store.base import Store"),
        ("taskd.api.app", "import taskd.store.sqlite"),
        ("taskd.client.sync", "from taskd.config import load"),
        ("taskd.cli.submit", "def f():\n    from taskd.daemon import shell"),
        ("taskd.cli.start", "from taskd.daemon.main import run"),
        ("taskd.values", "from taskd.core.task import Task"),
        ("taskd.config", "from taskd.core.task import Task"),
    ],
)
def test_a_wrong_direction_is_found(module, source):
    assert breaches(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("taskd.core.retry", "from random import Random"),
        ("taskd.core.node", "from taskd.core.worker import Worker\nfrom taskd.protocol import messages as msg"),
        ("taskd.net.mesh", "from taskd.protocol.frames import Decoder\nfrom taskd.core import events as ev"),
        ("taskd.api.app", "from taskd.store.base import Store\nfrom taskd.api import tasks"),
        ("taskd.cli.start", "def f():\n    from taskd.daemon.main import run"),
        ("taskd.cli.keys", "if TYPE_CHECKING:\n    from taskd.net.security import Key"),
        ("taskd.daemon.main", "from taskd.net import mesh\nfrom taskd.runner.runner import Runner"),
    ],
)
def test_the_right_direction_is_allowed(module, source):
    assert breaches(module, source) == []
    assert not module.startswith("taskd.core") or impurities(module, source) == []
