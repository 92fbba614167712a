"""Handlers that do their worst, for test_handlers.py."""

# ruff: noqa
from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import socket
import sys
import threading
import time
import typing

from taskd import task


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class Endless(Exception):
    def __str__(self) -> str:
        return "x" * (32 << 20)


@task("attack")
def attack(name: str) -> typing.Any:
    return globals()[f"do_{name}"]()


def do_nothing():
    return 1


def do_raises_words_it_has_not():
    raise Unprintable()


def do_raises_words_without_end():
    raise Endless()


def do_raises_control_characters():
    raise ValueError("\x1b[2J\x00\r\n2026 info leading")


def do_raises_surrogates():
    raise ValueError("\ud800\udfff")


def do_raises_system_exit():
    raise SystemExit(0)


def do_raises_keyboard_interrupt():
    raise KeyboardInterrupt()


def do_raises_generator_exit():
    raise GeneratorExit()


def do_raises_memory_error():
    raise MemoryError()


def do_raises_a_group():
    raise ExceptionGroup("g", [ValueError(n) for n in range(1000)])


def do_raises_in_a_circle():
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    raise one


def do_recurses():
    return do_recurses()


def do_returns_itself():
    it: list = []
    it.append(it)
    return it


def do_returns_deep():
    it: list = []
    for _ in range(100_000):
        it = [it]
    return it


def do_returns_no_json():
    return object()


def do_returns_a_set():
    return {1, 2}


def do_returns_bytes():
    return b"\xff"


def do_returns_not_a_number():
    return float("nan")


def do_returns_a_huge_number():
    return 10**5000


def do_returns_surrogates():
    return "\ud800"


def do_returns_keys_of_numbers():
    return {1: 2, None: 3}


def do_returns_8_mib():
    return "x" * (8 << 20)


def do_exits():
    os._exit(0)


def do_kills_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def do_breaks_its_memory():
    ctypes.string_at(0)


def do_aborts():
    os.abort()


def do_closes_everything():
    os.closerange(3, 4096)
    return 1


def do_writes_into_every_descriptor():
    for number in range(3, 256):
        try:
            os.write(number, b"\xff" * 100)
        except OSError:
            pass
    return 1


def do_prints_16_mib():
    sys.stdout.write("x" * (16 << 20))
    return 1


def do_prints_control_characters():
    print("\x1b[2J\x1b]0;x\x07\x00")
    return 1


def do_leaves_a_thread():
    threading.Thread(target=time.sleep, args=(600,)).start()
    return 1


def do_forks_and_both_return():
    os.fork()
    return 1


def do_ignores_signals():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    return 1


def do_stops_the_collector():
    gc.disable()
    sys.setrecursionlimit(10)
    return 1


def do_takes_imports_away():
    sys.modules.clear()
    return 1


def do_has_no_descriptors():
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    return 1
