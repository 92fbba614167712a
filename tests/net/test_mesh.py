"""The mesh on loopback with real TLS: who comes in, who does not, and what becomes of connections."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Any

import pytest

from taskd.core.events import Collided, PeerDown
from taskd.errors import ConfigError
from taskd.net import connection as connection_module
from taskd.net import gate as gate_module
from taskd.net import hints as hints_module
from taskd.net.connection import BANNER, Connection
from taskd.net.dialing import split_address
from taskd.net.security import Authority, Credentials, _derive
from taskd.protocol import messages as msg
from taskd.protocol.frames import FrameReader, encode
from taskd.protocol.versions import OLDEST_VERSION
from tests.net.peers import KEY, OTHER_KEY, WAIT_S, Node, Peers, until

TERM = msg.Term(3, 1, 99)


class Stranger:
    """The other end of a connection that the test speaks by hand, with a plain blocking socket."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end

    @classmethod
    async def plain(cls, node: Node) -> Stranger:
        """Plain TCP, after the banner."""
        made = cls(socket.create_connection(("127.0.0.1", node.mesh.port), WAIT_S))
        assert await asyncio.to_thread(made.socket.recv, 100) == BANNER + KEY.fingerprint.encode() + b"\n"
        return made

    @classmethod
    async def tls(cls, node: Node, context: ssl.SSLContext) -> Stranger:
        """TLS with this context. Raises OSError."""
        made = await cls.plain(node)
        try:
            made.socket = await asyncio.to_thread(context.wrap_socket, made.socket)
        except OSError:
            made.close()
            raise
        return made

    @classmethod
    async def worker(cls, node: Node, node_id: int = 66, store_id: bytes = b"") -> Stranger:
        """A worker of the cluster that says hello and then whatever the test wants."""
        info = msg.NodeInfo(node_id, "odd", ("worker",), store_id or os.urandom(16), node_id, "1.0")
        made = await cls.tls(node, Credentials(KEY.worker_key, info).client)
        made.say(encode(msg.Hello(msg.PROTOCOL_VERSION, "home", info)))
        await node.until(lambda: node_id in node.peers)
        return made

    def say(self, data: bytes) -> None:
        self.socket.sendall(data)

    async def end(self) -> bytes:
        """All that comes until the other side closes."""
        return await asyncio.to_thread(read_to_the_end, self.socket)

    def abort(self) -> None:
        """Close as a process that was killed does: with a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self.socket.close()


def read_to_the_end(end: socket.socket) -> bytes:
    parts = []
    try:
        while part := end.recv(1 << 16):
            parts.append(part)
    except TimeoutError:
        raise
    except OSError:  # A reset is an end; so is an alert of TLS.
        pass
    return b"".join(parts)


class FalseScheduler:
    """A server that a worker is led to: its first caller gets `answer`, in a thread."""

    def __init__(self, answer: Callable[[socket.socket], Any]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(WAIT_S)
        self._answer = answer
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._served = asyncio.get_running_loop().run_in_executor(None, self._serve)

    async def served(self) -> None:
        """Until the caller has gone."""
        await self._served

    def _serve(self) -> None:
        with self._listener, self._listener.accept()[0] as end:
            end.settimeout(WAIT_S)
            self._answer(end)


def goodbyes(data: bytes) -> list[str]:
    return [message.reason for message in FrameReader().feed(data) if isinstance(message, msg.Goodbye)]


# -- Good peers --------------------------------------------------------------------------------------------------------


async def test_a_pair_finds_each_other_and_talks(peers: Peers) -> None:
    head = await peers.start(1, "scheduler")
    hand = await peers.start(2, "worker", key=KEY.worker_key, join=[head])
    await head.until_peers(2)
    await hand.until_peers(1)
    assert [up.node for up in head.ups()] == [hand.info]
    assert [up.node for up in hand.ups()] == [head.info]

    sent = [msg.Leading(TERM), msg.Registered(TERM), msg.Cancel(TERM, ())]
    assert all(head.mesh.send(2, message) for message in sent)
    request = msg.Request(1, "root", True, "GET", "/v1/tasks", b"", True)
    assert hand.mesh.send(1, request)
    await hand.until(lambda: len(hand.received) == 3)
    await head.until(lambda: head.calls)
    assert hand.received == sent
    assert head.calls == [(2, request)]
    (view,) = head.mesh.peers()
    assert (view.node_name, view.node) == ("node2", hand.info)
    assert not head.mesh.send(77, msg.Leading(None))


async def test_large_messages_arrive_whole_and_in_order(peers: Peers) -> None:
    head = await peers.start(1, "scheduler")
    hand = await peers.start(2, "worker", key=KEY.worker_key, join=[head])
    await head.until_peers(2)
    parts = [msg.ResponsePart(number, os.urandom(1 << 20), False) for number in range(12)]
    for part in parts:
        head.mesh.send(2, part)
        await head.mesh.drained(2)
    await hand.until(lambda: len(hand.calls) == len(parts))
    assert [message for _, message in hand.calls] == parts


async def test_of_two_schedulers_the_higher_id_dials(peers: Peers) -> None:
    one = await peers.start(1, "scheduler")
    two = await peers.start(2, "scheduler")
    one.mesh.add_hint(2, [two.address])  # Not its part.
    two.mesh.add_hint(1, [one.address])
    await one.until_peers(2)
    await two.until_peers(1)
    assert len(one.ups()) == len(two.ups()) == 1


async def test_the_first_address_that_answers_is_taken(peers: Peers) -> None:
    head = await peers.start(1, "scheduler")
    hand = await peers.start(2, "worker", key=KEY.worker_key)
    hand.mesh.add_hint(1, ["127.0.0.1:1", "no such host:port", "[::1]:1", head.address])
    await hand.until_peers(1)


async def test_clock_offset_and_round_trip_are_known_after_a_moment(peers: Peers) -> None:
    head = await peers.start(1, "scheduler")
    hand = await peers.start(2, "worker", key=KEY.worker_key, join=[head])
    await hand.until_peers(1)

    await until(lambda: hand.mesh.peers()[0].round_trip_s is not None)
    (view,) = hand.mesh.peers()
    assert view.clock_offset_s == pytest.approx(0, abs=5)


# -- Ends --------------------------------------------------------------------------------------------------------------


async def test_goodbye_is_an_orderly_end(peers: Peers) -> None:
    head = await peers.start(1, "scheduler")
    hand = await peers.start(2, "worker", key=KEY.worker_key, join=[head])
    await head.until_peers(2)
    await peers.stop(hand, "the machine is shut down")
    await head.until(head.downs)
    assert head.downs() == [PeerDown(2, "the machine is shut down", True)]


async def test_a_peer_that_restarts_is_dialled_again_and_known_by_its_boot(peers: Peers) -> None:
    head = await peers.start(1, "scheduler")
    port, store_id = head.mesh.port, head.info.store_id
    hand = await peers.start(2, "worker", key=KEY.worker_key, join=[head])
    await hand.until_peers(1)
    await peers.stop(head)
    await hand.until_peers()
    again = await peers.start(1, "scheduler", store_id=store_id, port=port)
    await hand.until_peers(1)
    assert [up.node.boot for up in hand.ups()] == [head.info.boot, again.info.boot]
    assert hand.mesh.counters.reconnects == 1


async def test_a_restarted_worker_replaces_its_dead_connection(peers: Peers) -> None:
    """Its first process is gone, and nobody has told the head: what has just come from it proves nothing."""
    head = await peers.start(1, "scheduler", heartbeat_s=0.5, peer_timeout_s=60)
    store_id = os.urandom(16)
    dead = await Stranger.worker(head, 2, store_id)
    second = await peers.start(2, "worker", key=KEY.worker_key, join=[head], store_id=store_id)
    await head.until(lambda: len(head.ups()) == 2)
    assert head.ups()[1].node == second.info
    assert [down.reason for down in head.downs()] == ["replaced by a newer connection"]
    dead.close()


async def test_a_copied_disk_that_runs_twice_is_recognised(peers: Peers) -> None:
    head = await peers.start(1, "scheduler", heartbeat_s=30, peer_timeout_s=60)
    store_id = os.urandom(16)
    first = await peers.start(2, "worker", key=KEY.worker_key, join=[head], store_id=store_id)
    await head.until_peers(2)
    copy = await peers.start(2, "worker", key=KEY.worker_key, join=[head], store_id=store_id)
    await copy.until(lambda: any(isinstance(event, Collided) and event.is_copy for event in copy.events))
    assert "a copy of the disk of node 2 runs at 127.0.0.1 already" in copy.downs()[-1].reason
    assert [text for level, text, _ in head.lines if level == "error"] == ["a copy of a node's disk runs as well"]
    assert head.downs() == first.downs() == []
    assert [up.node for up in head.ups()] == [first.info]


async def test_two_copies_of_one_scheduler_recognise_each_other(peers: Peers) -> None:
    store_id = os.urandom(16)
    first = await peers.start(1, "scheduler", store_id=store_id)
    copy = await peers.start(1, "scheduler", store_id=store_id)
    copy.mesh.add_twin([first.address])
    for node in (first, copy):
        await node.until(lambda node=node: node.events)
        (event,) = node.events
        assert isinstance(event, Collided)
        assert event.is_copy
        assert "a copy of this node's disk runs already" in event.text(1)


async def test_a_second_connection_of_the_same_start_is_turned_away(peers: Peers) -> None:
    head = await peers.start(1, "scheduler", heartbeat_s=30, peer_timeout_s=60)
    hand = await peers.start(2, "worker", key=KEY.worker_key, join=[head])
    await head.until_peers(2)
    context = hand.mesh.ring.current.client
    second = await Stranger.tls(head, context)
    second.say(encode(msg.Hello(msg.PROTOCOL_VERSION, "home", hand.info)))
    assert goodbyes(await second.end()) == ["there is a connection already"]
    assert head.peers == {2}
    assert head.downs() == []
    second.close()


async def test_a_peer_of_the_version_before_ours_is_served(peers: Peers) -> None:
    head = await peers.start(1, "scheduler", heartbeat_s=30, peer_timeout_s=60)
    info = msg.NodeInfo(66, "old", ("worker",), os.urandom(16), 66, "0.9")
    old = await Stranger.tls(head, Credentials(KEY.worker_key, info).client)
    old.say(encode(msg.Hello(OLDEST_VERSION, "home", info)))
    await head.until_peers(66)
    head.mesh.send(66, msg.Leading(TERM, True, b"\1" * 32))
    await head.mesh.stop("enough")
    received = FrameReader().feed(await old.end())
    assert [it for it in received if isinstance(it, msg.Leading)] == [msg.Leading(TERM, True)], "without its new field"
    assert [it.reason for it in received if isinstance(it, msg.Goodbye)] == ["enough"]
    old.close()


@pytest.mark.parametrize("version", [OLDEST_VERSION - 1, msg.PROTOCOL_VERSION + 2])
async def test_versions_further_apart_are_refused_with_the_reason(peers: Peers, version: int) -> None:
    head = await peers.start(1, "scheduler")
    info = msg.NodeInfo(66, "odd", ("worker",), os.urandom(16), 66, "9.9")
    made = await Stranger.tls(head, Credentials(KEY.worker_key, info).client)
    made.say(encode(msg.Hello(version, "home", info)))
    (reason,) = goodbyes(await made.end())
    assert f"version {version}" in reason
    assert "upgrade taskd" in reason
    assert head.peers == set()
    made.close()


async def test_two_nodes_with_one_id_are_told_apart(peers: Peers) -> None:
    head = await peers.start(1, "scheduler", heartbeat_s=30, peer_timeout_s=60)
    hand = await peers.start(2, "worker", key=KEY.worker_key, join=[head])
    await head.until_peers(2)
    other = await peers.start(2, "worker", key=KEY.worker_key, join=[head])
    await other.until(other.downs)
    assert "node id 2 is taken by node2" in other.downs()[0].reason
    assert ("error", "two nodes have the same id") in [(level, text) for level, text, _ in head.lines]
    assert head.downs() == []
    assert [up.node for up in head.ups()] == [hand.info]


async def test_a_silent_peer_is_given_up(peers: Peers) -> None:
    head = await peers.start(1, "scheduler", heartbeat_s=0.05, peer_timeout_s=0.2)
    odd = await Stranger.worker(head)
    await head.until(head.downs)
    assert head.downs()[0].reason.startswith("silent for")
    assert not head.downs()[0].is_orderly
    odd.close()


async def test_a_peer_that_reads_too_slowly_is_given_up(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "BUFFERED_BYTES_MAX", 4 << 20)
    head = await peers.start(1, "scheduler", peer_timeout_s=60)
    odd = await Stranger.worker(head)
    await head.mesh.drained(66)
    for number in range(40):
        head.mesh.send(66, msg.ResponsePart(number, bytes(1 << 20), False))
        await asyncio.sleep(0)
    await head.until(head.downs)
    assert head.downs() == [PeerDown(66, "reads slower than we send", False)]
    await asyncio.wait_for(head.mesh.drained(66), WAIT_S)
    odd.close()


async def test_whoever_waits_for_a_slow_reader_is_let_go_when_it_goes(peers: Peers) -> None:
    head = await peers.start(1, "scheduler", peer_timeout_s=60)
    odd = await Stranger.worker(head)
    waits: list[asyncio.Task[None]] = []
    while not waits or waits[-1].done():
        head.mesh.send(66, msg.ResponsePart(1, bytes(1 << 20), False))
        await asyncio.sleep(0)
        waits.append(asyncio.create_task(head.mesh.drained(66)))
        await asyncio.sleep(0)
    odd.abort()
    await head.until(head.downs)
    await asyncio.wait_for(waits[-1], WAIT_S)


# -- Strangers ---------------------------------------------------------------------------------------------------------


async def refused(node: Node, reason: str) -> None:
    await node.until(lambda: any(reason in text for text in node.refusals()))
    assert node.events == []


async def test_another_clusters_key_is_refused_on_both_sides(peers: Peers) -> None:
    head = await peers.start(1, "scheduler")
    for key in (OTHER_KEY.worker_key, OTHER_KEY):
        other = await peers.start(2, "worker", key=key, join=[head])
        await other.until(other.refusals)
        assert "cluster key" in other.refusals()[0]
        assert other.events == []
        await peers.stop(other)
    await head.until(head.refusals)
    assert head.events == []


def context_without_certificate() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def test_no_certificate_is_refused(peers: Peers) -> None:
    head = await peers.start(1, "scheduler")
    stranger = await Stranger.tls(head, context_without_certificate())
    stranger.say(encode(msg.Goodbye("hello")))
    await refused(head, "shows no certificate")
    assert await stranger.end() == b""
    stranger.close()


async def test_older_tls_is_refused(peers: Peers) -> None:
    head = await peers.start(1, "scheduler")
    context = context_without_certificate()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await Stranger.tls(head, context)
    await refused(head, "TLS 1.3")


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 500, b"SSH-2.0-OpenSSH\r\n"])
async def test_whoever_speaks_no_tls_is_refused(peers: Peers, data: bytes) -> None:
    head = await peers.start(1, "scheduler")
    stranger = await Stranger.plain(head)
    stranger.say(data)
    await head.until(head.refusals)
    assert head.events == []
    await stranger.end()
    stranger.close()


async def test_a_worker_key_does_not_make_a_scheduler(peers: Peers) -> None:
    """Somebody with a worker's key listens and shows a certificate that says scheduler: nobody believes it."""
    authority = Authority(_derive(KEY.worker_key.secret, b"worker authority"), "worker")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    descriptor = os.memfd_create("certificate")
    os.write(descriptor, authority.issue(f"taskd://{KEY.fingerprint}/scheduler/9"))
    context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    os.close(descriptor)

    def answer(end: socket.socket) -> None:
        end.sendall(BANNER + KEY.fingerprint.encode() + b"\n")
        with contextlib.suppress(OSError), context.wrap_socket(end, server_side=True) as secured:
            read_to_the_end(secured)

    false = FalseScheduler(answer)
    hand = await peers.start(2, "worker", key=KEY.worker_key)
    hand.mesh.add_hint(9, [false.address])
    await refused(hand, "has another cluster key")
    await false.served()


async def test_a_worker_that_claims_to_be_a_scheduler_is_not_taken_in(peers: Peers) -> None:
    head = await peers.start(1, "scheduler")
    info = msg.NodeInfo(9, "false", ("worker",), bytes(16), 1, "1.0")
    context = Credentials(KEY.worker_key, info).client
    authority = Authority(_derive(KEY.worker_key.secret, b"worker authority"), "worker")
    descriptor = os.memfd_create("certificate")
    os.write(descriptor, authority.issue(f"taskd://{KEY.fingerprint}/scheduler/9"))
    context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    os.close(descriptor)
    stranger = await Stranger.tls(head, context)
    await refused(head, "poses as a scheduler with a worker's key")
    assert await stranger.end() == b""
    stranger.close()


async def test_what_is_put_in_before_tls_is_never_read_as_the_peers_word(peers: Peers) -> None:
    """Somebody on the line adds a hello to the banner, in plain text, and would hand the rest through."""
    head = await peers.start(1, "scheduler")
    hand = await peers.start(2, "worker", key=KEY.worker_key)
    injected = encode(msg.Hello(msg.PROTOCOL_VERSION, "home", head.info)) + encode(msg.Registered(TERM))
    connection = Connection(hand.mesh, hand.mesh, is_dialled=True)
    await asyncio.get_running_loop().create_connection(lambda: connection, "127.0.0.1", head.mesh.port)
    securing = asyncio.create_task(connection.secure())
    connection.data_received(BANNER + KEY.fingerprint.encode() + b"\n")
    connection.data_received(injected)  # In the same turn of the loop, before TLS has begun.
    await securing
    assert connection.ended.done()
    assert hand.refusals() == ["does not wait for its turn, as a node of ours would"]
    assert hand.events == head.events == []


async def test_a_server_of_something_else_is_no_scheduler(peers: Peers) -> None:
    def answer(end: socket.socket) -> None:
        end.sendall(b"220 mail.example.org ESMTP\r\n")
        read_to_the_end(end)

    false = FalseScheduler(answer)
    hand = await peers.start(2, "worker", key=KEY.worker_key)
    hand.mesh.add_hint(1, [false.address])
    await refused(hand, "is no taskd scheduler")
    await false.served()


async def test_a_silent_stranger_is_not_waited_for(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "HANDSHAKE_TIMEOUT_S", 0.1)
    head = await peers.start(1, "scheduler")
    stranger = await Stranger.plain(head)
    await refused(head, "did not finish the handshake in time")
    assert await stranger.end() == b""
    stranger.close()


async def test_a_member_that_says_no_hello_is_not_waited_for(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskd.protocol.session.HELLO_TIMEOUT_S", 0.1)
    head = await peers.start(1, "scheduler")
    info = msg.NodeInfo(2, "mute", ("worker",), bytes(16), 1, "1.0")
    stranger = await Stranger.tls(head, Credentials(KEY.worker_key, info).client)
    data = await stranger.end()
    assert [type(message) for message in FrameReader().feed(data)] == [msg.Hello]
    assert head.events == []
    stranger.close()


WRONG: dict[str, bytes] = {
    "a scheduler's message": encode(msg.Cancel(TERM, ())),
    "a leader's claim": encode(msg.Claim(TERM, ())),
    "a frame too large": (0xFFFFFFF0).to_bytes(4, "big"),
    "an empty frame": bytes(4),
    "no message": b"\x00\x00\x00\x01\xc1",
    "a second hello": encode(msg.Hello(1, "home", msg.NodeInfo(66, "odd", ("worker",), bytes(16), 1, "1.0"))),
}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG)
async def test_a_member_that_breaks_the_rules_goes_and_nobody_else(peers: Peers, data: bytes) -> None:
    head = await peers.start(1, "scheduler")
    hand = await peers.start(2, "worker", key=KEY.worker_key, join=[head])
    await head.until_peers(2)
    odd = await Stranger.worker(head)
    odd.say(encode(msg.Started(())) + data)
    await head.until(head.downs)
    (down,) = head.downs()
    assert (down.node_id, down.is_orderly) == (66, False)
    assert head.received == []  # Not even what came before it in the same bytes: its sender has gone wrong.
    (said,) = goodbyes(await odd.end())
    assert said == f"refused: {down.reason}"
    assert head.refusals() == [down.reason]
    assert head.peers == {2}
    hand.mesh.send(1, msg.Started(()))
    await head.until(lambda: head.received == [msg.Started(())])
    odd.close()


async def test_another_cluster_on_the_same_key_is_refused_with_words(peers: Peers) -> None:
    head = await peers.start(1, "scheduler")
    hand = await peers.start(2, "worker", key=KEY.worker_key, cluster="away", join=[head])
    await refused(head, "belongs to the cluster 'away', we to 'home'")
    await hand.until(hand.refusals)
    assert hand.events == []


async def test_a_refusal_is_logged_once(peers: Peers) -> None:
    head = await peers.start(1, "scheduler")
    for _ in range(5):
        stranger = await Stranger.plain(head)
        stranger.say(b"\x00" * 500)
        await stranger.end()
        stranger.close()
    await until(lambda: head.mesh.refusals.count == 5)
    assert len(head.refusals()) == 1


async def test_strangers_push_out_their_own_and_keep_nobody_away(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "HALF_OPEN_PER_SOURCE_MAX", 3)
    head = await peers.start(1, "scheduler")
    strangers = [await Stranger.plain(head) for _ in range(5)]
    await refused(head, "too many connections without a hello")
    assert await strangers[0].end() == b""
    assert await strangers[1].end() == b""
    hand = await peers.start(2, "worker", key=KEY.worker_key, join=[head])
    await head.until_peers(2)
    await hand.until_peers(1)
    for stranger in strangers:
        stranger.close()


async def test_stopping_closes_strangers_too(peers: Peers) -> None:
    head = await peers.start(1, "scheduler")
    stranger = await Stranger.plain(head)
    await peers.stop(head)
    assert await stranger.end() == b""
    stranger.close()


# -- Hints and addresses -----------------------------------------------------------------------------------------------


async def test_hints_are_bounded(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hints_module, "UNMET_MAX", 2)
    hand = await peers.start(9, "worker", key=KEY.worker_key)
    before = len(asyncio.all_tasks())
    for node_id in range(1, 6):
        hand.mesh.add_hint(node_id, ["127.0.0.1:1"])
    await until(lambda: len(asyncio.all_tasks()) <= before + 2 * 2)  # Each may be dialling.


async def test_an_address_in_use_is_told(peers: Peers) -> None:
    head = await peers.start(1, "scheduler")
    with pytest.raises(ConfigError, match=f"cannot listen on {head.address}"):
        await peers.start(2, "scheduler", port=head.mesh.port)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("host:1", ("host", 1)),
        ("host", ("host", 7710)),
        ("10.0.0.1:80", ("10.0.0.1", 80)),
        ("[fe80::1%eth0]:80", ("fe80::1%eth0", 80)),
        ("[::1]", ("::1", 7710)),
        ("::1", ("::1", 7710)),
        ("*:80", ("*", 80)),
    ],
)
def test_addresses(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts
