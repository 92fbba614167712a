"""Tells the service manager how we are (sd_notify): ready, reloading, stopping, alive. Without one, nothing happens."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping

SEND_TIMEOUT_S = 1.0  # The manager reads at once, or it is in trouble itself and must not hold us up.
STATUS_CHARS_MAX = 200


class Notifier:
    """The way to the service manager that the environment names; to nobody where it names none."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self.watchdog_s = _watchdog_s(environ) if self._address else None

    @property
    def is_heard(self) -> bool:
        """Whether there is a manager."""
        return self._address is not None

    def ready(self, status: str) -> bool:
        """We serve."""
        return self._send("READY=1", _status(status))

    def reloading(self) -> bool:
        """We read our configuration again; `ready` says when that is done."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000  # Which the manager asks for since version 253.
        return self._send("RELOADING=1", f"MONOTONIC_USEC={now_us}")

    def stopping(self, status: str, within_s: float | None = None) -> bool:
        """We stop, in good order, and may need so long for it; None: as long as the manager gives everybody."""
        more = [] if within_s is None else [f"EXTEND_TIMEOUT_USEC={round(within_s * 1e6)}"]
        return self._send("STOPPING=1", *more, _status(status))

    def status(self, status: str) -> bool:
        """What we do at the moment, for people."""
        return self._send(_status(status))

    def watchdog(self) -> bool:
        """We are alive. To be said at least every `watchdog_s` seconds, where that is not None."""
        return self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> bool:
        """Whether it was sent. Never raises: our work does not depend on who watches it."""
        if self._address is None:
            return False
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.settimeout(SEND_TIMEOUT_S)
            channel.connect(self._address)
            channel.sendall("\n".join(lines).encode())
            return True
        return False


def _address(name: str) -> str | None:
    """The address of a socket: a path, or with @ in front a name in the abstract space. Others we do not speak."""
    if name.startswith("@"):
        return "\0" + name[1:]
    return name if name.startswith("/") else None


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    """How often to say that we live: half the time after which we are taken for dead. None: nobody asks."""
    try:
        period_us = int(environ.get("WATCHDOG_USEC", ""))
        is_ours = int(environ.get("WATCHDOG_PID", os.getpid())) == os.getpid()
    except ValueError:
        return None
    return period_us / 2e6 if is_ours and period_us > 0 else None


def _status(text: str) -> str:
    """One line, so that it cannot say anything else to the manager."""
    return "STATUS=" + "".join(char if char.isprintable() else " " for char in text)[:STATUS_CHARS_MAX]
