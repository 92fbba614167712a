"""Keys and TLS of the peer port: one cluster secret, two authorities, certificates that nodes issue to themselves.

    cluster secret ─HKDF─▶ scheduler authority
                   ─HKDF─▶ worker secret ─HKDF─▶ worker authority

A worker's machine holds the worker secret and the scheduler authority's certificate: it can prove that it is a worker
and check that a scheduler is one, but cannot sign a scheduler's certificate. Ed25519 is deterministic, serial numbers
and dates are fixed, so that all nodes derive the same certificates, byte for byte.
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from taskd.errors import ConfigError, Refused
from taskd.private_files import read_private, save_private
from taskd.protocol.messages import NodeInfo, Role

SECRET_BYTES = 32
_SCHEDULER_PREFIX = "taskd-scheduler-key-v1:"
_WORKER_PREFIX = "taskd-worker-key-v1:"
_AUTHORITY_BEGIN = datetime(2020, 1, 1, tzinfo=UTC)
_AUTHORITY_END = datetime(2120, 1, 1, tzinfo=UTC)
# A node issues itself a new certificate at each start; clocks of machines without a battery may be years behind.
_LEAF_DAYS = 3650
# Whoever holds a key of the cluster can sign certificates that OpenSSL likes and that say nonsense all the same.
_CERTIFICATE_ERRORS = (
    x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, x509.InvalidVersion
)  # fmt: skip


def _derive(secret: bytes, purpose: bytes) -> bytes:
    return HKDF(hashes.SHA256(), SECRET_BYTES, b"taskd/v1", purpose).derive(secret)


class Authority:
    """One of the two authorities of a cluster, with its private key."""

    def __init__(self, seed: bytes, role: Role) -> None:
        self.role = role
        self.key = Ed25519PrivateKey.from_private_bytes(seed)
        subject = _authority_name(role)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(self.key.public_key())
            .serial_number(1)
            .not_valid_before(_AUTHORITY_BEGIN)
            .not_valid_after(_AUTHORITY_END)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
            .sign(self.key, None)
        )

    def issue(self, uri: str) -> bytes:
        """A certificate for this URI with its private key, as PEM."""
        key = Ed25519PrivateKey.generate()
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "taskd node")]))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(_AUTHORITY_BEGIN, now - timedelta(days=_LEAF_DAYS)))
            .not_valid_after(now + timedelta(days=_LEAF_DAYS))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .sign(self.key, None)
        )
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return private + certificate.public_bytes(Encoding.PEM)


def _authority_name(role: Role) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"taskd {role} authority")])


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


class WorkerKey:
    """What a worker's machine holds: the worker secret, and the certificate of the scheduler authority (DER)."""

    def __init__(self, secret: bytes, scheduler_certificate: bytes) -> None:
        self.secret = secret
        self.scheduler_certificate = scheduler_certificate

    @property
    def fingerprint(self) -> str:
        """Names the cluster, in public: 16 hexadecimal digits."""
        return hashlib.sha256(self.scheduler_certificate).hexdigest()[:16]

    @property
    def text(self) -> str:
        """To be pasted; secret."""
        return _WORKER_PREFIX + _base64(self.secret + self.scheduler_certificate)

    def save(self, path: Path, force: bool = False) -> None:
        """Write the key file. Raises ConfigError where another key is there and not `force`."""
        save_private(path, self.text, force)


class SchedulerKey:
    """The cluster secret: whoever holds it can be any node."""

    def __init__(self, secret: bytes) -> None:
        self.secret = secret

    @classmethod
    def generate(cls) -> SchedulerKey:
        """A new cluster."""
        return cls(secrets.token_bytes(SECRET_BYTES))

    @property
    def authority(self) -> Authority:
        """Signs schedulers."""
        return Authority(_derive(self.secret, b"scheduler authority"), "scheduler")

    @property
    def worker_key(self) -> WorkerKey:
        """The key for machines that only work."""
        certificate = self.authority.certificate.public_bytes(Encoding.DER)
        return WorkerKey(_derive(self.secret, b"worker secret"), certificate)

    @property
    def seal_secret(self) -> bytes:
        """What schedulers seal their terms with; no worker has it."""
        return _derive(self.secret, b"term seal")

    @property
    def fingerprint(self) -> str:
        """Names the cluster, in public: 16 hexadecimal digits."""
        return self.worker_key.fingerprint

    @property
    def text(self) -> str:
        """To be pasted; secret."""
        return _SCHEDULER_PREFIX + _base64(self.secret)

    def save(self, path: Path, force: bool = False) -> None:
        """Write the key file. Raises ConfigError where another key is there and not `force`."""
        save_private(path, self.text, force)


Key = SchedulerKey | WorkerKey


def parse_key(text: str) -> Key:
    """A key from its text. Raises ConfigError."""
    text = text.strip()
    try:
        if text.startswith(_SCHEDULER_PREFIX):
            raw = base64.urlsafe_b64decode(_padded(text.removeprefix(_SCHEDULER_PREFIX)))
            if len(raw) == SECRET_BYTES:
                return SchedulerKey(raw)
        elif text.startswith(_WORKER_PREFIX):
            raw = base64.urlsafe_b64decode(_padded(text.removeprefix(_WORKER_PREFIX)))
            x509.load_der_x509_certificate(raw[SECRET_BYTES:])
            return WorkerKey(raw[:SECRET_BYTES], raw[SECRET_BYTES:])
    except ValueError:
        pass
    raise ConfigError(
        f"this is no cluster key: one begins with {_SCHEDULER_PREFIX} or {_WORKER_PREFIX} and is one line"
    )


def load_key(path: Path) -> Key | None:
    """The current key in a file; None where there is no file. Raises ConfigError, also where others could read it."""
    text = read_private(path)
    if text is None:
        return None
    try:
        return parse_key(text.strip().partition("\n")[0])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from None


def _base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _padded(text: str) -> str:
    return text + "=" * (-len(text) % 4)


class Credentials:
    """TLS of one node for the life of its process."""

    def __init__(self, key: Key, node: NodeInfo) -> None:
        self.fingerprint = key.fingerprint
        is_scheduler = isinstance(key, SchedulerKey)
        roles = ",".join(node.roles)
        uri = f"taskd://{self.fingerprint}/{roles}/{node.node_id}"
        if "scheduler" in node.roles and not is_scheduler:
            raise ConfigError("a scheduler needs the scheduler key of the cluster; this is a worker key")
        worker_key = key.worker_key if isinstance(key, SchedulerKey) else key
        worker_authority = Authority(_derive(worker_key.secret, b"worker authority"), "worker")
        trusted = worker_key.scheduler_certificate
        if isinstance(key, SchedulerKey) and "scheduler" in node.roles:
            pem = key.authority.issue(uri)
            # A worker never listens and a scheduler dials schedulers only: workers are believed where we accept.
            self.server: ssl.SSLContext | None = _context(
                ssl.PROTOCOL_TLS_SERVER, pem, [trusted, worker_authority.certificate.public_bytes(Encoding.DER)]
            )
        else:
            pem = worker_authority.issue(uri)
            self.server = None
        self.client = _context(ssl.PROTOCOL_TLS_CLIENT, pem, [trusted])

    def identify(self, peer_certificate: bytes | None) -> tuple[int, tuple[Role, ...]]:
        """The node id and roles of a peer whose certificate (DER) OpenSSL has verified against our authorities.

        The chain was built by the issuer's name and checked with that authority's key, so that the issuer's name can
        be believed: a worker's authority cannot put the scheduler authority's name on what it signs, for the signature
        would not hold. Raises Refused.
        """
        if peer_certificate is None:
            raise Refused("shows no certificate")
        try:
            certificate = x509.load_der_x509_certificate(peer_certificate)
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
            scheme, fingerprint, roles_text, id_text = uri.replace("://", "/").split("/")
            roles = tuple(roles_text.split(","))
            node_id = int(id_text)
        except (ValueError, *_CERTIFICATE_ERRORS):
            raise Refused("shows a certificate that names no node") from None
        if scheme != "taskd" or fingerprint != self.fingerprint:
            raise Refused("shows a certificate of another cluster")
        if not roles or not set(roles) <= {"scheduler", "worker"}:
            raise Refused("shows a certificate with roles that do not exist")
        if certificate.issuer != _authority_name("scheduler") and roles != ("worker",):
            raise Refused("poses as a scheduler with a worker's key")
        return node_id, roles  # type: ignore[return-value]  # checked above


def _context(protocol: int, pem: bytes, authorities: list[bytes]) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # Nodes are known by the id in their certificate, not by addresses.
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    for authority in authorities:
        context.load_verify_locations(cadata=authority)
    # The loader takes a path only; a memory file keeps the private key off every disk.
    descriptor = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # Connections last for days: resumption saves nothing.
    return context
