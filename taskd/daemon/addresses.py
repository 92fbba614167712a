"""The addresses that nodes came from lately, kept over a restart: a scheduler that is started in a flood of strangers
tells its workers from them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from taskd.daemon.logs import log
from taskd.errors import ConfigError
from taskd.net.connection import monotonic
from taskd.net.gate import Gate
from taskd.private_files import read_private, save_private

SAVE_EVERY_S = 30.0  # Who came after the last time is a stranger once more, if this process is killed.

_decode = msgspec.json.Decoder(dict[str, float]).decode


class Addresses:
    """What the gate knows, in a file: for each address the UTC at which a node was there last. `here` are those from
    which nodes are connected now."""

    def __init__(self, path: Path, gate: Gate, here: Iterable[str]) -> None:
        self._path = path
        self._gate = gate
        self._here = here
        self._saved = b""

    def load(self) -> None:
        """Have the gate know what an earlier process knew. Never raises: without it, all are strangers at first."""
        try:
            text = read_private(self._path)
            kept = _decode(text) if text is not None else {}
        except (ConfigError, msgspec.DecodeError) as error:
            log("warning", "addresses that nodes came from are not known any more", path=self._path, reason=str(error))
            return
        now_s = time.time()
        self._gate.remember({host: max(0.0, now_s - seen_s) for host, seen_s in kept.items()}, monotonic())

    async def keep(self) -> None:
        """Write them down from time to time; until cancelled, and then once more."""
        try:
            while True:
                await asyncio.sleep(SAVE_EVERY_S)
                text = self._text()
                await asyncio.to_thread(self._save, text)
        finally:
            self._save(self._text())

    def _text(self) -> bytes:
        now, now_s = monotonic(), time.time()
        for host in list(self._here):
            self._gate.saw(host, now)
        return msgspec.json.encode({host: round(now_s - ago_s) for host, ago_s in self._gate.known(now).items()})

    def _save(self, text: bytes) -> None:
        if text == self._saved:
            return
        try:
            save_private(self._path, text.decode(), force=True)
        except ConfigError as error:
            log("warning", "addresses that nodes came from cannot be kept", reason=error.message)
        else:
            self._saved = text
