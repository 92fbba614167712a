"""How taskd starts processes of its own: with Python, or, where it is one self-contained executable, with itself.

Such an executable (packaging/binary) has no interpreter to be called, `sys.executable` is taskd. It takes
`taskd --internal-process PROGRAM ARGUMENT...` in front of its command line, for nobody but itself.

The loader of the executable leaves variables in the environment: where the libraries are that it brought along, and
where it has unpacked itself. For processes of our own they are right, and spare them unpacking everything anew. For
tasks they would be wrong: /bin/ls has no business with our libraries. So they are taken out of the environment at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

INTERNAL_OPTION = "--internal-process"

# What taskd starts of itself; each of these modules has `main(arguments)`.
PROGRAMS = {
    "store": "taskd.store.process",
    "snapshot": "taskd.store.snapshot",
    "handlers": "taskd.runner.handler_process",
}

_LOADER_PREFIX = "_PYI_"
_LIBRARIES = "LD_LIBRARY_PATH"
_LIBRARIES_BEFORE = "LD_LIBRARY_PATH_ORIG"  # What it was before the loader set it.

_PR_SET_PDEATHSIG = 1

# Not by -m: then processes that `multiprocessing` starts for a handler would load this program once more. And the
# directory goes to the end of the path, where nothing that lies beside the package hides a module of Python's own.
_START = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "from importlib import import_module; import_module(sys.argv.pop(1)).main(sys.argv[1:])"
)

_loader_variables: dict[str, str] = {}


def is_self_contained() -> bool:
    """Whether this is the executable that needs no Python on the machine."""
    return bool(getattr(sys, "frozen", False))


def command(program: str, *arguments: object) -> list[str]:
    """The command that starts one of PROGRAMS. The only place that knows how."""
    rest = [str(argument) for argument in arguments]
    if is_self_contained():
        return [sys.executable, INTERNAL_OPTION, program, *rest]
    # -P: nothing is imported from where the daemon happens to stand.
    return [sys.executable, "-P", "-c", _START, str(Path(__file__).parents[1]), PROGRAMS[program], *rest]


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """`base` for such a process: with what the loader of the executable needs, if this is one."""
    return {**base, **_loader_variables}


def parents() -> tuple[int, ...]:
    """The id of the process that started this one. And of the one before, for where the executable had to unpack itself
    (another user's processes do, who cannot read what is unpacked), its loader stands in between."""
    parent = os.getppid()
    if not is_self_contained():
        return (parent,)
    with contextlib.suppress(OSError), open(f"/proc/{parent}/stat", "rb") as file:
        return parent, int(file.read().rpartition(b")")[2].split()[1])
    return (parent,)


def take_loader_variables(environ: MutableMapping[str, str]) -> None:
    """Take what the executable's loader has left in the environment out of it, and keep it for `environment`."""
    for name in [name for name in environ if name.startswith(_LOADER_PREFIX)]:
        _loader_variables[name] = environ.pop(name)
    if _LIBRARIES in environ:
        _loader_variables[_LIBRARIES] = environ.pop(_LIBRARIES)
    if _LIBRARIES_BEFORE in environ:
        environ[_LIBRARIES] = environ.pop(_LIBRARIES_BEFORE)


def stand_in_for_loader(environ: MutableMapping[str, str]) -> None:
    """In the one-file form the loader stays, as our parent, to remove at the end what it has unpacked. It hands signals
    on; but when it is killed we would live on without it, and a service manager asks it for signs of life, not us."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if environ.get("WATCHDOG_PID") == str(os.getppid()):
        environ["WATCHDOG_PID"] = str(os.getpid())


def main() -> None:
    """The entry point of the executable: one of its own programs, or the command line."""
    take_loader_variables(os.environ)
    is_internal = sys.argv[1:2] == [INTERNAL_OPTION]
    if not is_internal and os.path.dirname(sys.executable) != os.path.dirname(_unpacked()):
        stand_in_for_loader(os.environ)
    from importlib import import_module  # noqa: PLC0415  # after the environment is in order
    from multiprocessing import freeze_support, util  # noqa: PLC0415

    util.spawnv_passfds = _spawn  # type: ignore[assignment]  # the same, for keywords that nobody uses
    # As after `python -c`: else such processes would look for a file of that name, and there is none.
    vars(sys.modules["__main__"]).pop("__file__", None)
    freeze_support()  # Processes that handlers start with `multiprocessing` end here.
    if is_internal:
        module = PROGRAMS.get("".join(sys.argv[2:3]))
        if module is None:
            sys.exit(f"taskd: {INTERNAL_OPTION} is for taskd itself")
        import_module(module).main(sys.argv[3:])
    else:
        import_module("taskd.cli.main").main()


def _spawn(path: bytes, args: list[bytes | str], passfds: Sequence[int]) -> int:
    """How `multiprocessing` starts processes: they share what is unpacked here, or would not find their modules."""
    # A duplicate in the same place is inherited; everything else is closed, as ever.
    inherited = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in passfds]
    return os.posix_spawn(path, args, environment(os.environ), file_actions=inherited)


def _unpacked() -> str:
    """Where the loader has put what it brought: beside the executable, or, from one file, in a temporary directory."""
    return str(getattr(sys, "_MEIPASS", ""))
