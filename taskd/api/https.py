"""The listener for HTTPS: TLS 1.3 and nothing older, a bound on handshakes under way, and a certificate of our own
where the operator gives none.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from taskd.api.strangers import Strangers
from taskd.errors import AlreadyRunning, ConfigError
from taskd.private_files import directory_lock, read_private, save_private

BACKLOG = 128
HANDSHAKE_S = 5.0
SHUTDOWN_S = 2.0
HANDSHAKES_MAX = 256  # As many as one client may open at once: a burst of its calls is no attack.
PAUSE_S = 0.002  # For handshakes to be done, where they are that many, before one is given up for the next.
TROUBLE_PAUSE_S = 0.5  # When this process may open no more files, or has no memory.
CERTIFICATE_NAME, KEY_NAME = "api.crt", "api.key"
_VALID = timedelta(days=3650)


class TlsListener:
    """One address. `protocol` makes what a connection speaks once its handshake is done."""

    def __init__(self, listener: socket.socket, context: ssl.SSLContext, protocol: Callable[[], asyncio.Protocol]):
        self._listener = listener
        self._context = context
        self._protocol = protocol
        self._shaking: Strangers[asyncio.Task[None]] = Strangers(HANDSHAKES_MAX)
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.get_running_loop().create_task(self._accept())

    @property
    def address(self) -> str:
        """Where it listens, as HOST:PORT."""
        host, port = self._listener.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def close(self) -> None:
        """Accept nothing more, and give up handshakes. Connections stay."""
        for task in (self._accepting, *self._tasks):
            task.cancel()

    async def wait_closed(self) -> None:
        """Until that is so."""
        await asyncio.gather(self._accepting, *self._tasks, return_exceptions=True)
        self._listener.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if self._shaking.is_full:
                await asyncio.sleep(PAUSE_S)
                if self._shaking.is_full:
                    self._shaking.show_out().cancel()
            try:
                end, address = await loop.sock_accept(self._listener)
            except OSError:
                await asyncio.sleep(TROUBLE_PAUSE_S)
                continue
            task = loop.create_task(self._open(end))
            self._shaking.add(task, plain_host(address[0]))
            self._tasks.add(task)
            task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._shaking.remove(task)
        self._tasks.discard(task)

    async def _open(self, end: socket.socket) -> None:
        """Shake hands. Whoever cannot is gone without a word: scanners and broken clients would fill the log."""
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._protocol, end, ssl=self._context, ssl_handshake_timeout=HANDSHAKE_S,
                ssl_shutdown_timeout=SHUTDOWN_S,
            )  # fmt: skip
        except (OSError, TimeoutError):  # ssl.SSLError is an OSError.
            end.close()
        except asyncio.CancelledError:
            end.close()
            raise


def open_listener(address: str) -> socket.socket:
    """A listening socket at HOST:PORT, for all addresses where HOST is empty. Raises AlreadyRunning where another
    process has that port, ConfigError."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        if not host and socket.has_dualstack_ipv6():
            made = socket.create_server(
                ("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG
            )  # fmt: skip
        else:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            made = socket.create_server((host, int(port)), family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AlreadyRunning(f"another process listens at {address}") from None
        raise ConfigError(f"[api] listen: cannot listen at {address}: {error.strerror or error}") from None
    made.setblocking(False)
    return made


def is_free(address: str) -> bool:
    """Whether a process could listen at HOST:PORT now."""
    try:
        open_listener(address).close()
    except (AlreadyRunning, ConfigError):
        return False
    return True


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.3 with this certificate, both in PEM. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"the certificate {certificate} with the key {key} cannot be used: {error.strerror or error}"
        ) from None
    return context


def fingerprint_of(certificate: Path) -> str:
    """SHA-256 of the first certificate in a file, in hexadecimal: what clients can pin. Raises ConfigError."""
    try:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(_first(certificate.read_text()))).hexdigest()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{certificate} is no certificate: {error}") from None


def _first(pem: str) -> str:
    end = "-----END CERTIFICATE-----"
    before, found, _ = pem.partition(end)
    return (before + found).strip()


def own_certificate(directory: Path) -> tuple[Path, Path]:
    """The files of the certificate and the key that this node made for itself; made now where there are none. The key
    is private, the certificate is not. Raises ConfigError."""
    certificate, key = directory / CERTIFICATE_NAME, directory / KEY_NAME
    with directory_lock(directory):  # The daemons of one machine start at once, and share the two.
        if read_private(key) is None or not certificate.exists():
            certificate_pem, key_pem = _made(socket.gethostname())
            certificate.unlink(missing_ok=True)  # Or a stop between the two leaves one beside a key that is not its.
            save_private(key, key_pem, force=True)
            save_private(certificate, certificate_pem, force=True, mode=0o644)
    return certificate, key


def _made(host: str) -> tuple[str, str]:
    """A certificate for this machine that signs itself, and its key. P-256: browsers take no Ed25519."""
    from cryptography import x509  # noqa: PLC0415  # most daemons listen at their socket only
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415
    from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
        Encoding,
        NoEncryption,
        PrivateFormat,
    )
    from cryptography.x509.oid import NameOID  # noqa: PLC0415

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"taskd on {host}"[:64])])
    now = datetime.now(UTC)
    names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
    with suppress(ValueError):  # A host's name need not be one of the DNS.
        names.append(x509.DNSName(host))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + _VALID)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, SHA256())
    )
    key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return certificate.public_bytes(Encoding.PEM).decode(), key_pem.decode()


def plain_host(host: str) -> str:
    """An address as people write it: an IPv4 address that came through an IPv6 socket without its prefix."""
    return host.removeprefix("::ffff:")
