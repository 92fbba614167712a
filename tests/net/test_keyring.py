"""Replacing the cluster key: who talks with whom meanwhile, and who no longer does."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from taskd.errors import ConfigError
from taskd.net.keyring import Keys, Ring, describe, load_keys, parse_keys
from taskd.net.security import SchedulerKey
from tests.net.peers import KEY, OTHER_KEY, WAIT_S, Node, Peers

OLD, NEW = KEY, OTHER_KEY


def both(left_s: float = 3600.0) -> Keys:
    return Keys(NEW, OLD, time.time() + left_s)


# -- The file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [Keys(OLD), Keys(NEW, OLD, 2e9), Keys(NEW, OLD, 2e9).of_workers()])
def test_what_a_file_holds_comes_back(tmp_path: Path, keys: Keys) -> None:
    path = tmp_path / "cluster.key"
    keys.save(path)
    found = load_keys(path)
    assert found is not None
    assert found.text == keys.text
    assert found.until_s == keys.until_s
    lines = describe(path, 1e9)
    assert not any(secret in line for line in lines for secret in keys.text.split() if len(secret) > 30)
    assert keys.current.fingerprint in lines[0]
    assert len(lines) == 1 + (keys.previous is not None)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no cluster key"),
        (f"{NEW.text}\n{OLD.text}", "nothing else"),
        (f"{NEW.text}\nprevious until 2026-01-01 {OLD.text}\n{OLD.text}", "nothing else"),
        (f"{NEW.text}\nprevious until 2026-01-01", "nothing else"),
        (f"{NEW.text}\nprevious until whenever {OLD.text}", "cannot be read"),
        (f"{NEW.text}\nprevious until 2026-01-01 {OLD.text[:-2]}", "no cluster key"),
        (f"{NEW.text}\nprevious until 2026-01-01 {OLD.worker_key.text}", "same kind"),
    ],
)
def test_what_is_no_key_file_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_keys(text)


def test_the_previous_key_counts_until_its_time() -> None:
    keys = Keys(NEW, OLD, 1000.0)
    assert keys.valid(999.9) == (NEW, OLD)
    assert keys.valid(1000.0) == (NEW,)


# -- Who talks with whom -----------------------------------------------------------------------------------------------

HEADS = {"old": Keys(OLD), "both": both(), "new": Keys(NEW)}


@pytest.mark.parametrize("head_has", HEADS)
@pytest.mark.parametrize("hand_has", HEADS)
@pytest.mark.parametrize("role", ["worker", "scheduler"])
async def test_who_has_which_key_talks_with_whom(peers: Peers, head_has: str, hand_has: str, role: str) -> None:
    head = await peers.start(1, "scheduler", key=HEADS[head_has])
    keys = HEADS[hand_has] if role == "scheduler" else HEADS[hand_has].of_workers()
    hand = await peers.start(2, role, key=keys, join=[head])
    if {head_has, hand_has} == {"old", "new"}:
        await hand.until(hand.refusals)
        assert "has another cluster key" in hand.refusals()[0]
        assert head.events == hand.events == []
        return
    await head.until_peers(2)
    await hand.until_peers(1)
    expected = OLD if "old" in (head_has, hand_has) else NEW
    assert {peer.fingerprint for peer in (*head.mesh.peers(), *hand.mesh.peers())} == {expected.fingerprint}


async def test_a_reload_drops_no_connection_and_the_end_of_the_grace_only_renews_them(peers: Peers) -> None:
    head = await peers.start(1, "scheduler", key=OLD)
    hand = await peers.start(2, "worker", key=OLD.worker_key, join=[head])
    late = await peers.start(3, "worker", key=OLD.worker_key, join=[head])
    await head.until_peers(2, 3)
    secrets: list[tuple[bytes, ...]] = []
    head.mesh.rotation.on_keys = secrets.append
    keys = both(2.0)
    assert head.mesh.rotation.change(keys)
    assert not head.mesh.rotation.change(keys)
    assert hand.mesh.rotation.change(keys.of_workers())
    assert head.downs() == hand.downs() == late.downs() == []

    await head.until(lambda: head.peers == {2} and len(head.ups()) == 3)
    assert [peer.fingerprint for peer in head.mesh.peers()] == [NEW.fingerprint]
    assert not any(down.is_orderly for down in head.downs()), "a worker that leaves in good order loses its tasks"
    assert secrets == [(NEW.seal_secret, OLD.seal_secret), (NEW.seal_secret,)]
    await late.until(lambda: any("another cluster key" in text for text in late.refusals()))


async def test_a_key_of_another_cluster_is_not_taken_by_a_reload(peers: Peers) -> None:
    head = await peers.start(1, "scheduler", key=OLD)
    with pytest.raises(ConfigError, match="another cluster"):
        head.mesh.rotation.change(Keys(NEW))
    assert head.mesh.ring.fingerprints == (OLD.fingerprint,)


async def test_after_the_grace_the_old_key_opens_nothing_even_for_who_does_not_ask(peers: Peers) -> None:
    """Somebody with the old key passes over what the banner says."""
    head = await peers.start(1, "scheduler", key=Keys(NEW, OLD, time.time() - 1.0))
    thief = Node(2, "worker", key=OLD.worker_key, join=[head])
    thief.mesh.ring.to_dial = lambda offered: thief.mesh.ring.current  # type: ignore[method-assign]
    await thief.mesh.start()
    await head.until(head.refusals)
    assert head.events == thief.events == []
    await thief.mesh.stop("over")


async def test_a_handshake_that_outlasts_the_grace_opens_nothing() -> None:
    now = [1000.0]
    head = Node(1, "scheduler", key=OLD)
    ring = Ring(Keys(NEW, OLD, 1001.0), head.info, lambda: now[0])
    context = ring._all[1].server
    assert context is not None
    assert ring.of(context).fingerprint == OLD.fingerprint
    now[0] = 1001.0
    with pytest.raises(Exception, match="time is over"):
        ring.of(context)
    assert ring.seal_secrets == (NEW.seal_secret,)
    assert ring.ends_in_s is None
    async with asyncio.timeout(WAIT_S):
        await head.mesh.stop("over")


def test_workers_seal_nothing() -> None:
    assert not hasattr(OLD.worker_key, "seal_secret")
    assert isinstance(SchedulerKey.generate().seal_secret, bytes)
