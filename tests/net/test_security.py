"""Keys, key files, and who is believed to be what."""

from __future__ import annotations

import os
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from taskd.errors import ConfigError, Refused
from taskd.net.security import Authority, Credentials, SchedulerKey, WorkerKey, _derive, load_key, parse_key
from taskd.protocol.messages import NodeInfo

KEY = SchedulerKey(bytes(range(32)))
SCHEDULER = NodeInfo(1, "head", ("scheduler",), b"s" * 16, 1, "1.0")
WORKER = NodeInfo(2, "hand", ("worker",), b"w" * 16, 2, "1.0")
BOTH = NodeInfo(3, "both", ("scheduler", "worker"), b"b" * 16, 3, "1.0")


def worker_authority(key: WorkerKey) -> Authority:
    """What every machine with a worker key can make."""
    return Authority(_derive(key.secret, b"worker authority"), "worker")


def der(pem: bytes) -> bytes:
    return x509.load_pem_x509_certificate(pem[pem.index(b"-----BEGIN CERT") :]).public_bytes(Encoding.DER)


# -- Texts -------------------------------------------------------------------------------------------------------------


def test_key_texts_come_back_as_the_same_keys() -> None:
    key = parse_key(f"  {KEY.text}\n")
    assert isinstance(key, SchedulerKey)
    assert key.secret == KEY.secret
    worker_key = parse_key(KEY.worker_key.text)
    assert isinstance(worker_key, WorkerKey)
    assert worker_key.secret == KEY.worker_key.secret
    assert worker_key.scheduler_certificate == KEY.worker_key.scheduler_certificate
    assert worker_key.fingerprint == KEY.fingerprint == key.fingerprint
    assert "\n" not in worker_key.text


def test_two_clusters_share_nothing() -> None:
    other = SchedulerKey.generate()
    assert other.fingerprint != KEY.fingerprint
    assert other.worker_key.secret != KEY.worker_key.secret


def test_the_worker_key_does_not_hold_the_secret() -> None:
    assert KEY.secret not in KEY.worker_key.secret + KEY.worker_key.scheduler_certificate
    assert _derive(KEY.secret, b"scheduler authority") not in KEY.worker_key.secret


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        KEY.text[:-1],
        KEY.text + "AAAA",
        KEY.text.replace("v1", "v2"),
        "taskd-scheduler-key-v1:",
        "taskd-scheduler-key-v1:ü",
        "taskd-worker-key-v1:",
        KEY.worker_key.text[:60],
        KEY.worker_key.text.replace("worker", "scheduler"),
        KEY.text.replace("scheduler", "worker"),
    ],
)
def test_what_is_no_key_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ConfigError, match="no cluster key") as caught:
        parse_key(text)
    secret = text.partition(":")[2]
    assert not secret or secret not in caught.value.message


def test_authorities_are_the_same_on_every_node_byte_for_byte() -> None:
    again = SchedulerKey(KEY.secret)
    assert KEY.worker_key.scheduler_certificate == again.worker_key.scheduler_certificate
    mine, theirs = worker_authority(KEY.worker_key), worker_authority(again.worker_key)
    assert mine.certificate.public_bytes(Encoding.DER) == theirs.certificate.public_bytes(Encoding.DER)
    # Held for ever: whoever changes how keys are derived cuts every existing cluster in two.
    assert KEY.fingerprint == "eaed92f3a79fa9bd"


# -- Files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [KEY, KEY.worker_key], ids=["scheduler", "worker"])
def test_a_key_file_is_private_and_comes_back(tmp_path: Path, key: SchedulerKey | WorkerKey) -> None:
    path = tmp_path / "etc" / "cluster.key"
    before = os.umask(0)
    try:
        key.save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    loaded = load_key(path)
    assert loaded is not None
    assert loaded.text == key.text
    assert list(path.parent.iterdir()) == [path]


def test_no_file_is_no_key(tmp_path: Path) -> None:
    assert load_key(tmp_path / "cluster.key") is None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_file_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "cluster.key"
    KEY.save(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_key(path)


def test_a_file_that_holds_no_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    path.write_bytes(b"\xff\xfe")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"cluster\.key"):
        load_key(path)
    path.write_text("nothing")
    with pytest.raises(ConfigError, match=r"cluster\.key: this is no cluster key"):
        load_key(path)


def test_another_key_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    KEY.save(path)
    KEY.save(path)  # The same one again is no harm.
    other = SchedulerKey.generate()
    with pytest.raises(ConfigError, match="another key already"):
        other.save(path)
    assert path.read_text().strip() == KEY.text
    other.save(path, force=True)
    assert path.read_text().strip() == other.text
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        KEY.save(tmp_path / "file" / "cluster.key")


def test_of_first_schedulers_at_the_same_moment_one_makes_the_key(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    keys = [SchedulerKey.generate() for _ in range(8)]
    barrier = threading.Barrier(len(keys))
    won: list[SchedulerKey] = []

    def first(key: SchedulerKey) -> None:
        barrier.wait()
        try:
            key.save(path)
        except ConfigError:
            return
        won.append(key)

    threads = [threading.Thread(target=first, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = won
    loaded = load_key(path)
    assert loaded is not None
    assert loaded.text == winner.text
    assert list(tmp_path.iterdir()) == [path]


# -- Who is believed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", [SCHEDULER, BOTH], ids=["scheduler", "both"])
def test_a_worker_key_makes_no_scheduler(node: NodeInfo) -> None:
    with pytest.raises(ConfigError, match="needs the scheduler key"):
        Credentials(KEY.worker_key, node)


@pytest.mark.parametrize("key", [KEY, KEY.worker_key], ids=["scheduler key", "worker key"])
def test_a_worker_never_listens(key: SchedulerKey | WorkerKey) -> None:
    assert Credentials(key, WORKER).server is None


@pytest.mark.parametrize("roles", [("scheduler",), ("worker",), ("scheduler", "worker")], ids=",".join)
def test_a_certificate_says_id_and_roles(roles: tuple[str, ...]) -> None:
    authority = KEY.authority if "scheduler" in roles else worker_authority(KEY.worker_key)
    certificate = authority.issue(f"taskd://{KEY.fingerprint}/{','.join(roles)}/42")
    assert Credentials(KEY, SCHEDULER).identify(der(certificate)) == (42, roles)


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("taskd://{fingerprint}/scheduler/2", "poses as a scheduler"),
        ("taskd://{fingerprint}/worker,scheduler/2", "poses as a scheduler"),
        ("taskd://{fingerprint}/worker,worker/2", "poses as a scheduler"),
        ("taskd://{fingerprint}/king/2", "roles that do not exist"),
        ("taskd://{fingerprint}//2", "roles that do not exist"),
        ("taskd://0123456789abcdef/worker/2", "another cluster"),
        ("https://{fingerprint}/worker/2", "another cluster"),
        ("taskd://{fingerprint}/worker/two", "names no node"),
        ("taskd://{fingerprint}/worker", "names no node"),
        ("taskd://{fingerprint}/worker/2/3", "names no node"),
    ],
)
def test_what_a_worker_key_can_sign_and_is_not_believed(uri: str, complaint: str) -> None:
    certificate = worker_authority(KEY.worker_key).issue(uri.format(fingerprint=KEY.fingerprint))
    with pytest.raises(Refused, match=complaint):
        Credentials(KEY, SCHEDULER).identify(der(certificate))


def forged(extensions: list[x509.ExtensionType]) -> bytes:
    """A certificate of the worker authority with other contents than ours."""
    authority = worker_authority(KEY.worker_key)
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "node")]))
        .issuer_name(authority.certificate.subject)
        .public_key(Ed25519PrivateKey.generate().public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
    )
    for extension in extensions:
        made = made.add_extension(extension, critical=False)
    return made.sign(authority.key, None).public_bytes(Encoding.DER)


WORKER_URI = x509.UniformResourceIdentifier(f"taskd://{KEY.fingerprint}/worker/2")


@pytest.mark.parametrize(
    "extensions",
    [
        [],
        [x509.SubjectAlternativeName([x509.DNSName("worker")])],
        [x509.SubjectAlternativeName([WORKER_URI, WORKER_URI])],
        [x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, b"\x00garbage")],
        [x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, b"\x30\x05\xa3\x03\x01\x02\x03")],
    ],
    ids=["nothing", "no URI", "two", "garbage", "an odd kind of name"],
)
def test_odd_certificates_are_refused_and_break_nothing(extensions: list[x509.ExtensionType]) -> None:
    with pytest.raises(Refused, match="names no node"):
        Credentials(KEY, SCHEDULER).identify(forged(extensions))


def test_no_certificate_and_garbage_are_refused() -> None:
    with pytest.raises(Refused, match="no certificate"):
        Credentials(KEY, SCHEDULER).identify(None)
    with pytest.raises(Refused, match="names no node"):
        Credentials(KEY, SCHEDULER).identify(b"garbage")
