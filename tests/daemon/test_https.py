"""The second daemon of a machine waits for the port of HTTPS, whatever it finds when it is free."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any, cast

import pytest

from taskd.api.budgets import Budgets
from taskd.api.https import CERTIFICATE_NAME
from taskd.api.service import Service
from taskd.config import load
from taskd.daemon import https as https_module
from taskd.daemon.https import Https

WAIT_S = 20.0  # Never reached, unless something is broken.


async def test_a_broken_certificate_is_said_once_and_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: asyncio.Queue[str] = asyncio.Queue()
    tries: asyncio.Queue[None] = asyncio.Queue()

    def log(level: str, text: str, **fields: Any) -> None:
        lines.put_nowait(f"{text}: {fields['reason']}")

    monkeypatch.setattr(https_module, "log", log)
    monkeypatch.setattr(https_module, "RETRY_S", 0.001)
    other = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{other.getsockname()[1]}"
    (tmp_path / "taskd.toml").write_text(f'[node]\nkey_file = "{tmp_path}/key"\n[api]\nlisten = ["{address}"]\n')
    config = load(tmp_path / "taskd.toml", {}, {})
    https = Https(cast("Service", None), config, Budgets(config.api.requests_per_s_max))
    assert not https.open()
    assert "until the port is free" in await lines.get()

    certificate = tmp_path / CERTIFICATE_NAME
    good = certificate.read_bytes()
    certificate.write_bytes(good[:100])  # Half written.
    really = https.open
    monkeypatch.setattr(https, "open", lambda: (tries.put_nowait(None), really())[1])
    waiting = asyncio.create_task(https.keep_trying())
    other.close()
    async with asyncio.timeout(WAIT_S):
        for _ in range(3):
            await tries.get()
        assert str(certificate) in await lines.get()
        assert not waiting.done()
        certificate.write_bytes(good)
        await waiting
    assert lines.empty(), "the same trouble is not said again"
    with pytest.raises(OSError, match="in use"):
        socket.create_server(("127.0.0.1", int(address.rpartition(":")[2])))
    await https.close()
