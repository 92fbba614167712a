"""What strangers, stolen worker keys and confused schedulers can do at the peer port of a real daemon.

Each row: what is tried, and what has to come of it. After each table: the same process, the same reign, memory below
its cap, no bug in the log, one line for each source, and work goes on."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from taskd.net.keyring import Keys, load_keys
from taskd.net.security import SchedulerKey
from taskd.protocol import messages as msg
from taskd.protocol.frames import encode
from tests.attacks.intruder import Intruder, open_context, own_address, show
from tests.integration.cluster import Cluster, free_port
from tests.protocol.samples import ONE_OF_EACH

RSS_KIB_MAX = 512 << 10
STAYS, CLOSED = "stays", "closed"
ALONE = {"TASKD_NETWORK_MDNS": "false"}
BIG = (1 << 63) - 1


class Target:
    """A scheduler with a worker, and its keys."""

    def __init__(self, directory: Path) -> None:
        self.cluster = Cluster(directory)
        self.port = free_port()
        self.head = self.cluster.add("head", "scheduler", "--listen", f"127.0.0.1:{self.port}", env=ALONE).start()
        self.hand = self.cluster.add("hand", "worker", "--join", f"127.0.0.1:{self.port}", env=ALONE).start()
        self.cluster.wait_for_workers(1)
        keys = load_keys(self.cluster.key)
        assert isinstance(keys, Keys)
        assert isinstance(keys.current, SchedulerKey)
        self.key = keys.current
        assert self.head.process is not None
        self.pid = self.head.process.pid
        view = self.head.ok("GET", "/v1/cluster")
        self.epoch, self.node_id = view["term"], view["node_id"]

    @property
    def worker(self) -> Intruder:
        """Somebody with a worker key, taken in."""
        return Intruder.greeted(self.port, self.key.worker_key, somebody())

    @property
    def scheduler(self) -> Intruder:
        """Somebody with the scheduler key, taken in; its id is above that of the leader."""
        return Intruder.greeted(self.port, self.key, somebody("scheduler", node_id=BIG - 1))

    def check(self) -> None:
        """Nothing has come of it."""
        assert self.head.process is not None
        assert self.head.process.poll() is None
        assert self.head.process.pid == self.pid
        view = self.head.ok("GET", "/v1/cluster")
        assert (view["term"], view["leader"]) == (self.epoch, self.node_id)
        (result,) = self.head.ok("POST", "/v1/tasks?wait=30", {"argv": ["true"]})["results"]
        assert result["state"] == "succeeded"
        log = self.head.log.read_text()
        assert "Traceback" not in log
        assert "a bug" not in log
        sources = [
            line.split("address=")[1].split()[0].rpartition(":")[0]
            for line in log.splitlines()
            if "peer refused" in line
        ]
        nodes = [source for source in set(sources) if sources.count(source) > 2]
        assert not nodes, f"more than a line for an address and a node there: {nodes}"
        peak = next(line for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if "VmHWM" in line)
        assert int(peak.split()[1]) < RSS_KIB_MAX


def somebody(*roles: msg.Role, node_id: int = 666, store_id: bytes = b"") -> msg.NodeInfo:
    return msg.NodeInfo(node_id, "somebody", roles or ("worker",), store_id or os.urandom(16), 7, "1.0")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    made = Target(tmp_path_factory.mktemp("attacked"))
    try:
        yield made
    finally:
        made.cluster.close()


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    yield
    while Intruder.made:
        Intruder.made.pop().close()


# -- Without a key -----------------------------------------------------------------------------------------------------


def plain(*data: bytes) -> Callable[[Target], str]:
    """Bytes after the banner."""

    def attack(target: Target) -> str:
        made = Intruder.after_banner(target.port)
        for part in data:
            made.say(part)
        return made.end()

    return attack


def tls(
    prepare: Callable[[ssl.SSLContext, Target], object], name: str | None = "{cluster}.taskd"
) -> Callable[[Target], str]:
    """A handshake with something odd, and a hello after it."""

    def attack(target: Target) -> str:
        context = open_context()
        prepare(context, target)
        made = Intruder.after_banner(target.port)
        wanted = name.format(cluster=target.key.fingerprint) if name is not None else None
        try:
            made.socket = context.wrap_socket(made.socket, server_hostname=wanted)
        except OSError:
            return CLOSED
        made.say(msg.Hello(msg.PROTOCOL_VERSION, "default", somebody()))
        return made.end()

    return attack


def many(count: int, *data: bytes) -> Callable[[Target], str]:
    """Many connections of one address at once, held; then one more that behaves like a node of another cluster."""

    def attack(target: Target) -> str:
        source, held = own_address(), []
        try:
            for _ in range(count):
                made = Intruder(target.port, source)
                for part in data:
                    made.say(part)
                held.append(made)
            assert target.worker.answers(), "a node is kept away"
            return held[0].end()
        finally:
            for made in held:
                made.close()

    return attack


def gone(how: str) -> Callable[[Target], str]:
    def attack(target: Target) -> str:
        for _ in range(20):
            made = Intruder(target.port, own_address())
            getattr(made, how)()
        return CLOSED

    return attack


OTHER = SchedulerKey(bytes(range(32)))
WORKER_URI = "taskd://{cluster}/worker/666"


def shows(key: SchedulerKey, uri: str) -> Callable[[ssl.SSLContext, Target], object]:
    return lambda context, target: show(context, key.authority.issue(uri.format(cluster=target.key.fingerprint)))


def old_tls(context: ssl.SSLContext, target: Target) -> None:
    context.maximum_version = ssl.TLSVersion.TLSv1_2


def _nothing(context: ssl.SSLContext, target: Target) -> None:
    pass


CLIENT_HELLO = bytes.fromhex("16030100fa010000f60303") + bytes(200)
WITHOUT_KEY: dict[str, Callable[[Target], str]] = {
    "http": plain(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    "http/2": plain(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "ssh": plain(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "smtp": plain(b"EHLO x\r\n"),
    "zeros": plain(bytes(5000)),
    "ones": plain(b"\xff" * 5000),
    "noise": plain(bytes((index * 7919) % 251 for index in range(20_000))),
    "a hello in plain text": plain(encode(msg.Hello(1, "default", somebody()))),
    "every message in plain text": plain(*map(encode, ONE_OF_EACH)),
    "the banner sent back": plain(b"taskd1 0123456789abcdef\n"),
    "a record of TLS that is no handshake": plain(bytes.fromhex("1703030010") + bytes(16)),
    "an alert": plain(bytes.fromhex("15030300020228")),
    "a heartbeat that asks for 64 KiB": plain(bytes.fromhex("1803020003014000")),
    "a ClientHello with a wrong length": plain(bytes.fromhex("1603010200010001fc0303") + b"\x00" * 600),
    "a ClientHello of zeros": plain(CLIENT_HELLO + bytes(100)),
    "a record larger than TLS has": plain(bytes.fromhex("160301ffff") + bytes(65535)),
    "ssl 2": plain(bytes.fromhex("802e0100020015000000100100800200800300800400800500800600400700c0080080") + bytes(20)),
    "no certificate": tls(_nothing),
    "tls 1.2": tls(old_tls),
    "a worker of another cluster": tls(shows(OTHER, WORKER_URI)),
    "a scheduler of another cluster that says it is of this one": tls(shows(OTHER, "taskd://{cluster}/scheduler/1")),
    "a certificate without meaning": tls(shows(OTHER, "https://example.org/")),
    "asks for another key": tls(shows(OTHER, WORKER_URI), "0123456789abcdef.taskd"),
    "asks for another name": tls(shows(OTHER, WORKER_URI), "localhost"),
    "asks for the longest name": tls(_nothing, ".".join(["x" * 60] * 4)),
    "asks for no name": tls(_nothing, None),
    "goes at once, twenty times": gone("close"),
    "resets at once, twenty times": gone("reset"),
    "holds forty connections and says nothing": many(40),
    "holds forty half handshakes": many(40, CLIENT_HELLO[:50]),
}


@pytest.mark.parametrize("attack", WITHOUT_KEY.values(), ids=WITHOUT_KEY)
def test_without_a_key_nobody_gets_anywhere(target: Target, attack: Callable[[Target], str]) -> None:
    assert attack(target) == CLOSED


def test_strangers_have_done_no_harm(target: Target) -> None:
    target.check()
    assert len(target.head.ok("GET", "/v1/nodes")["nodes"]) == 2, "a node that never was"


# -- With a stolen worker key ------------------------------------------------------------------------------------------

TERM = msg.Term(1, 1, 1)
KEYS = tuple(msg.AttemptKey(index.to_bytes(16, "big"), 1, TERM, 1) for index in range(2000))
OFFER = msg.Offer(0, {}, {}, ())
NODE = somebody()


def hello(info: msg.NodeInfo, cluster: str = "default", version: int = msg.PROTOCOL_VERSION, uri: str = "") -> Any:
    """A greeting that is not right."""

    def attack(target: Target, key: Any) -> str:
        made = Intruder.with_key(target.port, key, NODE, uri)
        made.say(msg.Hello(version, cluster, info))
        return made.end()

    return attack


def first(*things: msg.Message | bytes) -> Any:
    """Something in the place of a greeting."""

    def attack(target: Target, key: Any) -> str:
        made = Intruder.with_key(target.port, key, NODE)
        made.say(*things)
        return made.end()

    return attack


def as_worker(*things: msg.Message | bytes) -> Any:
    """Things after a good greeting: how it ends, or STAYS."""

    def attack(target: Target, key: Any) -> str:
        return outcome(target.worker, things)

    return attack


def outcome(made: Intruder, things: tuple[msg.Message | bytes, ...]) -> str:
    """How it ends, or STAYS: what comes with the first ping may still be refused after that was answered."""
    made.say(*things)
    for number in (424242, 424243):
        made.say(msg.Ping(number, 0.0))
        said = made.until_pong(number)
        if said is not None:
            return said
    return STAYS


def its_id(target: Target, key: Any) -> str:
    """The node id of the leader itself."""
    info = somebody(node_id=target.node_id)
    made = Intruder.with_key(target.port, target.key.worker_key, info)
    made.say(msg.Hello(msg.PROTOCOL_VERSION, "default", info))
    return made.end()


def a_workers_id(target: Target, key: Any) -> str:
    """The node id of a worker that is there."""
    nodes = target.head.ok("GET", "/v1/nodes")["nodes"]
    node_id = next(
        node["node_id"]
        for node in nodes
        if "worker" in node["roles"] and node["state"] == "up" and node["name"] == "hand"
    )
    made = Intruder.greeted(target.port, target.key.worker_key, somebody(node_id=node_id))
    return made.end()


def labels(count: int) -> msg.Message:
    return msg.Offering(msg.Offer(0, {}, {str(index): "" for index in range(count)}, ()))


def ended(outcome: int, *keys: msg.AttemptKey) -> msg.Message:
    return msg.Finished(tuple(msg.AttemptEnded(key, outcome, 1.0, 2.0, b"\xc1") for key in keys))


def asks(call: int, method: str, target: str, body: bytes = b"", last: bool = True) -> msg.Message:
    return msg.Request(call, "root", True, method, target, body, last)


def answered(method: str, target: str) -> Any:
    """A request in the name of an administrator: the status of its answer, as text."""

    def attack(aim: Target, key: Any) -> str:
        made = aim.worker
        made.say(asks(1, method, target))
        response: msg.Response = made.hear(msg.Response)
        return str(response.status)

    return attack


def many_bodies(target: Target, key: Any) -> str:
    """Five nodes, none of which is, send bodies without an end that come to more than all may together."""
    made = [Intruder.greeted(target.port, key, somebody(node_id=700 + index)) for index in range(5)]
    for it in made:
        it.say(asks(1, "POST", "/v1/tasks", last=False))
    for _ in range(60):
        for it in made:  # In turn: who is silent for long is taken for lost, and what it sent with it.
            it.say(msg.RequestPart(1, bytes(1 << 20), False))
    statuses = set()
    for it in made:
        it.say(asks(2, "BREW", "/"))
        while (response := it.hear(msg.Response)).call != 2:
            statuses.add(response.status)
    return ",".join(map(str, sorted(statuses)))


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


WITH_WORKER_KEY: dict[str, tuple[Any, str]] = {
    f"sends {type(message).__name__}": (as_worker(message), f"a worker may not send {type(message).__name__}")
    for message in ONE_OF_EACH
    if "worker" not in msg.MAY_SEND[type(message)]
} | {
    "a certificate that says scheduler": (hello(NODE, uri="taskd://{cluster}/scheduler/666"), CLOSED),
    "a certificate that says both": (hello(NODE, uri="taskd://{cluster}/scheduler,worker/666"), CLOSED),
    "a certificate of another cluster": (hello(NODE, uri="taskd://0123456789abcdef/worker/666"), CLOSED),
    "a certificate with a node id of words": (hello(NODE, uri="taskd://{cluster}/worker/../1"), CLOSED),
    "says that it is a scheduler": (hello(somebody("scheduler")), "and its certificate says"),
    "says that it is another node": (hello(somebody(node_id=5)), "says it is node 5"),
    "says another cluster": (hello(NODE, cluster="x" * 255), "belongs to the cluster"),
    "says a version to come": (hello(NODE, version=BIG), "of the protocol"),
    "has the id of the leader": (its_id, "has our node id"),
    "has the id of a worker": (a_workers_id, "is taken by hand"),
    "says no hello first": (first(msg.Ping(1, 1.0)), "the first message must be Hello"),
    "says 16 MiB before its hello": (first((16 << 20).to_bytes(4, "big"), bytes(1 << 16)), "is not allowed"),
    "says hello twice": (as_worker(msg.Hello(1, "default", NODE)), "a second Hello"),
    "a frame of nothing": (as_worker(bytes(4)), "frame of 0 bytes"),
    "a frame of 4 GiB": (as_worker(b"\xff\xff\xff\xff"), "is not allowed"),
    "no msgpack": (as_worker(frame(b"\xc1")), "not a message"),
    "a pickle": (as_worker(frame(b"\x80\x04\x95cposix\nsystem\n(S'id'\ntR.")), "not a message"),
    "nested a million deep": (as_worker(frame(b"\x91" * 1_000_000)), "not a message"),
    "an array of 4 G": (as_worker(frame(b"\x92\xa8finished\xdd\xff\xff\xff\xff")), "not a message"),
    "no time": (as_worker(msg.Ping(1, float("nan"))), STAYS),
    "a pong to no ping": (as_worker(msg.Pong(BIG, float("inf"))), STAYS),
    "names a term above all": (as_worker(msg.Register(OFFER, (), (), msg.Term(1 << 20, 1, 1), b"x" * 16)), STAYS),
    "names a term that cannot be": (as_worker(msg.Register(OFFER, (), (), msg.Term((1 << 48) - 1, 1, 1))), STAYS),
    "follows a term above all": (as_worker(msg.Leading(msg.Term(1 << 20, 666, 7), True, b"x" * 16)), STAYS),
    "follows a leader that is none": (as_worker(msg.Leading(msg.Term(2, 5, 7))), STAYS),
    "would lead": (as_worker(msg.Leading(None, True)), STAYS),
    "says that the leader's id is taken": (as_worker(msg.Goodbye("go away", "somebody", True)), CLOSED),
    "ends what it was never given": (as_worker(ended(0, *KEYS)), STAYS),
    "an outcome that does not exist": (as_worker(msg.Register(OFFER, (), (), None), ended(255, KEYS[0])), STAYS),
    "times that are none": (as_worker(msg.Started((msg.AttemptStarted(KEYS[0], float("nan")),))), "not a message"),
    "holds what nobody gave": (as_worker(msg.Register(OFFER, KEYS, KEYS, None), msg.Inventory(BIG, KEYS)), STAYS),
    "offers a million slots": (as_worker(msg.Offering(msg.Offer(1_000_000, {}, {}, ()))), STAYS),
    "offers a thousand and one labels": (as_worker(labels(1001)), "not a message"),
    "a name of 300 letters": (as_worker(msg.Offering(msg.Offer(0, {}, {}, ("x" * 300,)))), "not a message"),
    "registers a thousand times": (as_worker(*[msg.Register(OFFER, (), (), None)] * 1000), "Register in a second"),
    "pings ten thousand times": (as_worker(*[msg.Ping(1, 1.0)] * 10_000), "Ping in a second"),
    "follows somebody else a thousand times": (as_worker(*[msg.Leading(None)] * 1000), "Leading in a second"),
    "a part of no request": (as_worker(msg.RequestPart(1, b"x" * 1000, True)), STAYS),
    "an answer to no request": (
        as_worker(msg.Response(1, 200, "", b"x", True), msg.ResponsePart(1, b"x", True)),
        STAYS,
    ),
    "takes what was not given": (as_worker(msg.Taken(1, BIG), msg.Abandon(1, True), msg.Abandon(2, False)), STAYS),
    "asks for what is not there": (as_worker(asks(1, "GET", "/v1/../../etc/passwd")), STAYS),
    "asks for a backup": (answered("GET", "/v1/backup"), "403"),
    "asks for the figures": (answered("GET", "/metrics"), "403"),
    "asks whether it is ready": (answered("GET", "/readyz"), "403"),
    "asks how the cluster is, as nodes do": (answered("GET", "/v1/cluster?own=1"), "200"),
    "asks in a way that is none": (as_worker(asks(1, "BREW", "\x00", b"\xff")), STAYS),
    "begins two thousand requests": (
        as_worker(*[asks(index, "POST", "/v1/tasks", last=False) for index in range(2000)]),
        STAYS,
    ),
    "sends 80 MiB as one request": (
        as_worker(asks(1, "POST", "/v1/tasks", last=False), *[msg.RequestPart(1, bytes(1 << 20), False)] * 80),
        STAYS,
    ),
    "sends 300 MiB as the bodies of five nodes": (many_bodies, "429"),
}  # fmt: skip


@pytest.mark.parametrize(("attack", "expected"), WITH_WORKER_KEY.values(), ids=WITH_WORKER_KEY)
def test_a_stolen_worker_key_makes_no_more_than_a_worker(target: Target, attack: Any, expected: str) -> None:
    said = attack(target, target.key.worker_key)
    assert (said if expected in (STAYS, CLOSED) else said and expected in said and expected) == expected, said


def test_whoever_had_the_worker_key_has_done_no_harm(target: Target) -> None:
    target.check()


# -- With the scheduler key, and nonsense ------------------------------------------------------------------------------


def as_scheduler(*things: msg.Message | bytes) -> Any:
    def attack(target: Target) -> str:
        term = msg.Term(target.epoch, target.node_id, 1)
        filled = [it(term) if callable(it) else it for it in things]
        return outcome(target.scheduler, tuple(filled))

    return attack


ABSURD = msg.Term((1 << 48) - 1, BIG - 1, 7)
ROW = next(it for it in ONE_OF_EACH if isinstance(it, msg.Page)).rows[0]
DOT = msg.Dot(TERM, BIG)
NEVER = msg.NodeRow(1, "", (), None, float("nan"))
WITH_SCHEDULER_KEY: dict[str, tuple[Any, str]] = {
    f"sends {type(message).__name__}": (as_scheduler(message), f"a scheduler may not send {type(message).__name__}")
    for message in ONE_OF_EACH
    if "scheduler" not in msg.MAY_SEND[type(message)]
} | {
    "leads in a term that cannot be": (as_scheduler(msg.Leading(ABSURD, True)), STAYS),
    "leads in a term of long ago": (as_scheduler(msg.Leading(msg.Term(0, BIG - 1, 7), True)), STAYS),
    "claims with an epoch that cannot be": (as_scheduler(msg.Claim(ABSURD, ())), STAYS),
    "claims with an epoch of long ago": (as_scheduler(msg.Claim(msg.Term(0, BIG - 1, 7), ())), STAYS),
    "claims in another's name": (as_scheduler(msg.Claim(msg.Term(5, 3, 7), ())), "in another's name"),
    "denies with a term that cannot be": (as_scheduler(msg.Denied(TERM, ABSURD, ABSURD)), STAYS),
    "denies what nobody claims": (as_scheduler(msg.Denied(TERM, None, None)), STAYS),
    "attaches to a leader that is none": (as_scheduler(msg.Attach(ABSURD, (DOT,), True)), STAYS),
    "wants what it may not": (as_scheduler(msg.Wanted(TERM, ())), STAYS),
    "takes pages that were not sent": (as_scheduler(msg.PageTaken(TERM, BIG)), STAYS),
    "a page that nobody asked for": (as_scheduler(msg.Page(TERM, 1, (), (), (DOT,), True)), STAYS),
    "a page of rows that cannot be": (as_scheduler(msg.Page(TERM, 1, (ROW,), (), (), True)), "cannot be read"),
    "commits of a leader that is none": (as_scheduler(msg.Replicate(TERM, BIG, (), (), (), (), True)), STAYS),
    "commits of rows that cannot be": (as_scheduler(msg.Replicate(TERM, 1, (ROW,), (), (), (), True)), "be read"),
    "nodes seen at no time": (as_scheduler(msg.Page(TERM, 1, (), (NEVER,), (), True)), "no number"),
    "has copies of what never was": (as_scheduler(msg.Replicated(TERM, BIG)), STAYS),
    "hands over what it has not": (as_scheduler(msg.HandOver(TERM, BIG)), STAYS),
    "takes a leader in that it does not follow": (as_scheduler(msg.Registered(ABSURD)), STAYS),
    "runs tasks at a scheduler": (as_scheduler(msg.Run(TERM, (msg.Assignment(KEYS[0], b"\xc1"),))), STAYS),
    "cancels what nobody runs": (as_scheduler(msg.Cancel(TERM, KEYS), msg.Recall(TERM, KEYS)), STAYS),
    "acknowledges what nobody sent": (as_scheduler(msg.Acknowledged(TERM, KEYS)), STAYS),
    "claims a hundred times": (as_scheduler(*[msg.Claim(msg.Term(0, BIG - 1, 7), ())] * 100), "Claim in a second"),
    "attaches a hundred times": (as_scheduler(*[msg.Attach(ABSURD, ())] * 100), "Attach in a second"),
    "says that an id is taken": (as_scheduler(msg.Goodbye("go away", "somebody", True)), CLOSED),
    "no msgpack": (as_scheduler(frame(b"\xc1")), "not a message"),
    "goes in the middle of a frame": (as_scheduler((1000).to_bytes(4, "big") + b"\x93"), CLOSED),
}  # fmt: skip


@pytest.mark.parametrize(("attack", "expected"), WITH_SCHEDULER_KEY.values(), ids=WITH_SCHEDULER_KEY)
def test_a_confused_scheduler_confuses_nobody(target: Target, attack: Any, expected: str) -> None:
    said = attack(target)
    assert (said if expected in (STAYS, CLOSED) else said and expected in said and expected) == expected, said


def test_a_confused_scheduler_has_done_no_harm(target: Target) -> None:
    target.check()


def test_each_table_is_long_enough() -> None:
    assert min(map(len, (WITHOUT_KEY, WITH_WORKER_KEY, WITH_SCHEDULER_KEY))) >= 25
