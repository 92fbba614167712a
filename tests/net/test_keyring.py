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


@pytest.mark.parametrize(
    "keys",
    [
        Keys(OLD),
        Keys(NEW, OLD, 2e9),
        Keys(NEW, OLD, 2e9).of_workers(),
        Keys(OLD).followed_by(NEW, None),
        Keys(OLD).followed_by(NEW, None).of_workers(),
        Keys(OLD, replaced=("0" * 16, "f" * 16)).followed_by(NEW, 2e9),
    ],
)
def test_what_a_file_holds_comes_back(tmp_path: Path, keys: Keys) -> None:
    path = tmp_path / "cluster.key"
    keys.save(path)
    found = load_keys(path)
    assert found is not None
    assert found.text == keys.text
    assert found.lineage == keys.lineage
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
        (f"{NEW.text}\nreplaces {OLD.text}", "fingerprints of earlier keys"),
        (f"{NEW.text}\nreplaces " + " ".join(["0" * 16] * 9), "at most 8 fingerprints"),
        (f"{NEW.text}\nreplaces {'0' * 16}\nprevious until 2026-01-01 {OLD.text}", "nothing else"),
    ],
)
def test_what_is_no_key_file_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_keys(text)


def test_the_previous_key_counts_until_its_time() -> None:
    keys = Keys(NEW, OLD, 1000.0)
    assert keys.valid(999.9) == (NEW, OLD)
    assert keys.valid(1000.0) == (NEW,)


def test_a_file_knows_the_keys_before_it_and_keeps_none_of_them() -> None:
    keys = Keys(OLD).followed_by(NEW, 2e9).without_previous()
    assert keys.lineage == (NEW.fingerprint, OLD.fingerprint)
    assert keys.valid(0.0) == (NEW,)
    assert OLD.text not in keys.text
    assert OLD.worker_key.text not in keys.text
    for _ in range(20):
        keys = keys.followed_by(SchedulerKey.generate(), None)
    assert len(keys.replaced) == 8
    assert parse_keys(keys.text).lineage == keys.lineage


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


@pytest.mark.parametrize(
    "keys", [Keys(OLD).followed_by(NEW, None), both().without_previous(), Keys(NEW, OLD, time.time() - 1.0)],
    ids=["without a grace", "with a grace that was ended", "with a grace that is over"],
)  # fmt: skip
async def test_a_key_without_a_grace_counts_from_the_reload_on(peers: Peers, keys: Keys) -> None:
    head = await peers.start(1, "scheduler", key=OLD)
    hand = await peers.start(2, "worker", key=OLD.worker_key, join=[head])
    thieves = [await peers.start(node_id, "worker", key=OLD.worker_key, join=[head]) for node_id in (3, 4)]
    await head.until_peers(2, 3, 4)
    secrets: list[tuple[bytes, ...]] = []
    head.mesh.rotation.on_keys = secrets.append
    assert head.mesh.rotation.change(keys)
    assert hand.mesh.rotation.change(keys.of_workers())
    for thief in thieves:
        await thief.until(lambda thief=thief: any("another cluster key" in text for text in thief.refusals()))
    await head.until(lambda: head.peers == {2} and len(head.ups()) == 4)
    assert [peer.fingerprint for peer in head.mesh.peers()] == [NEW.fingerprint]
    assert secrets == [(NEW.seal_secret,)]
    assert not any(down.is_orderly for down in head.downs()), "a worker that leaves in good order loses its tasks"
    with pytest.raises(ConfigError, match="another cluster"):
        head.mesh.rotation.change(Keys(OLD))  # The file of before is none of ours any more.


async def test_somebody_who_waits_with_a_hello_does_not_outlast_his_key(peers: Peers) -> None:
    """Its handshake was right when it came."""
    head = await peers.start(1, "scheduler", key=OLD)
    hand = Node(2, "worker", key=OLD.worker_key, join=[head])
    hand.mesh.connection_open = lambda connection: None  # type: ignore[method-assign]
    await hand.mesh.start()
    await head.until_peers(2)
    (connection,) = head.mesh._connections()
    head.mesh._open.clear()
    head.mesh._half_open[connection] = None
    head.mesh.rotation.change(Keys(OLD).followed_by(NEW, None))
    await hand.until(lambda: any("another cluster key" in text for text in hand.refusals()))
    await hand.mesh.stop("over")


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
