"""Where nodes came from, over a restart."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from pathlib import Path

import pytest

from taskd.daemon import addresses as addresses_module
from taskd.daemon.addresses import Addresses
from taskd.net.connection import monotonic
from taskd.net.gate import KNOWN_S, SOURCES_MAX, STRANGERS_BURST, Gate


def loaded(path: Path) -> Gate:
    """The gate of the next process."""
    gate = Gate(monotonic())
    Addresses(path, gate, ()).load()
    return gate


async def stopped(addresses: Addresses) -> None:
    """Kept until the daemon stops."""
    keeping = asyncio.create_task(addresses.keep())
    await asyncio.sleep(0)
    keeping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await keeping


async def test_a_scheduler_that_restarts_in_a_flood_lets_its_workers_in(tmp_path: Path) -> None:
    path = tmp_path / "addresses.json"
    gate = loaded(path)
    gate.greeted("10.0.0.7", monotonic())
    gate.greeted("10.0.0.8", monotonic() - KNOWN_S - 1.0)
    gate.greeted("10.0.0.9", monotonic() - KNOWN_S - 1.0)
    await stopped(Addresses(path, gate, ["10.0.0.9"]))  # It came long ago, and has stayed since.
    assert path.stat().st_mode & 0o777 == 0o600

    now = monotonic()
    gate = loaded(path)
    for number in range(2 * int(STRANGERS_BURST)):
        gate.admit(f"10.1.{number >> 8}.{number & 255}", now)
    assert gate.admit("10.0.0.7", now) == gate.admit("10.0.0.9", now) == ""
    assert "strangers" in gate.admit("10.0.0.8", now)


async def test_it_is_written_while_the_daemon_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses_module, "SAVE_EVERY_S", 0.0)
    is_saved = asyncio.Event()
    loop = asyncio.get_running_loop()
    really = addresses_module.save_private

    def save(path: Path, text: str, force: bool) -> None:
        really(path, text, force)
        loop.call_soon_threadsafe(is_saved.set)

    monkeypatch.setattr(addresses_module, "save_private", save)
    gate = Gate(monotonic())
    gate.greeted("10.0.0.7", monotonic())
    keeping = asyncio.create_task(Addresses(tmp_path / "addresses.json", gate, ()).keep())
    async with asyncio.timeout(20):
        await is_saved.wait()
    assert list(json.loads((tmp_path / "addresses.json").read_text())) == ["10.0.0.7"]
    keeping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await keeping


def test_what_was_long_ago_or_is_too_much_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "addresses.json"
    now_s = time.time()
    kept = {"10.0.0.1": now_s - KNOWN_S - 10.0, "10.0.0.2": now_s + 1e6}  # The clock was set back meanwhile.
    kept |= {f"10.1.{number >> 8}.{number & 255}": now_s - number / 100 for number in range(SOURCES_MAX + 100)}
    path.write_text(json.dumps(kept))
    path.chmod(0o600)
    known = loaded(path).known(monotonic())
    assert len(known) == SOURCES_MAX
    assert "10.0.0.1" not in known
    assert known["10.0.0.2"] < 60.0
    assert "10.1.0.0" in known
    assert "10.1.16.99" not in known, "the latest are kept"


@pytest.mark.parametrize("text", ["", "no", "[]", '{"a": "b"}', '{"a": null}', "\xff"])
def test_a_file_that_is_none_is_said_and_done_without(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "addresses.json"
    path.write_text(text, encoding="latin-1")
    path.chmod(0o600)
    with caplog.at_level(logging.INFO, "taskd"):
        assert loaded(path).known(monotonic()) == {}
    assert [it.message for it in caplog.records] == ["addresses that nodes came from are not known any more"]


async def test_a_disk_that_takes_nothing_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "addresses.json").mkdir()
    with caplog.at_level(logging.INFO, "taskd"):
        await stopped(Addresses(tmp_path / "addresses.json", Gate(monotonic()), ["10.0.0.1"]))
    assert [it.message for it in caplog.records] == ["addresses that nodes came from cannot be kept"]
