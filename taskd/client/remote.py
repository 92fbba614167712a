"""A daemon on another machine, over HTTPS: where it is, how it is known, and the token that says who asks. All three
stand in one file that `taskd token create` writes.
"""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from taskd.client.call import trouble_connecting
from taskd.client.errors import NoDaemon
from taskd.errors import ConfigError
from taskd.private_files import read_private

_KEYS = frozenset({"url", "token", "fingerprint"})
_DIGITS = frozenset("0123456789abcdef")


class Remote:
    """One daemon. Its certificate is the one whose SHA-256 the file names or, where it names none, one that this
    machine's authorities vouch for; before that is known, nothing is sent."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read an access file. Raises ConfigError."""
        fields = _read(Path(path))
        parts = urlsplit(fields["url"])
        try:
            port = parts.port or 443
        except ValueError:
            port = 0
        if parts.scheme != "https" or not parts.hostname or not port or parts.path not in ("", "/") or parts.query:
            raise ConfigError(f"{path}: url is not of the form https://HOST:PORT")
        self.host, self.port = parts.hostname, port
        self.url = f"https://{parts.netloc}"
        self._fingerprint = fields.get("fingerprint", "").lower().replace(":", "")
        if self._fingerprint and (len(self._fingerprint) != 64 or not _DIGITS.issuperset(self._fingerprint)):
            raise ConfigError(f"{path}: fingerprint is not a SHA-256 in hexadecimal")
        token = fields["token"]
        if not token.isascii() or not token.isprintable() or " " in token:
            raise ConfigError(f"{path}: the token has characters that no token has")
        self.header = f"Authorization: Bearer {token}\r\n"
        self.context = ssl.create_default_context()
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        if self._fingerprint:  # It is this very certificate, whoever signed it and whatever it is called.
            self.context.check_hostname = False
            self.context.verify_mode = ssl.CERT_NONE

    def connect(self, timeout_s: float) -> ssl.SSLSocket:
        """A connection whose other end is known. Raises NoDaemon, TimeoutError."""
        try:
            plain = socket.create_connection((self.host, self.port), timeout_s)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = self.context.wrap_socket(plain, server_hostname=self.host)
        except TimeoutError:
            raise
        except OSError as error:
            raise self.missing(error) from None
        try:
            self.check(connection.getpeercert(binary_form=True))
        except BaseException:
            connection.close()
            raise
        return connection

    def missing(self, error: OSError) -> NoDaemon | OSError:
        """What to say of an error while connecting."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return NoDaemon(
                f"the certificate of {self.url} cannot be trusted ({error.verify_message}): name its fingerprint"
            )
        reason = error.strerror or str(error) or "the connection was closed"
        return trouble_connecting(error, NoDaemon(f"no daemon answers at {self.url} ({reason})"))

    def check(self, certificate: bytes | None) -> None:
        """Whether this certificate (DER) is the daemon's, where we know it. Raises NoDaemon."""
        if self._fingerprint and hashlib.sha256(certificate or b"").hexdigest() != self._fingerprint:
            raise NoDaemon(
                f"whoever answers at {self.url} is not the daemon that the token is for: its certificate is another "
                "one. Where the daemon was given a new one, have its operator say the new fingerprint"
            )


def _read(path: Path) -> Mapping[str, str]:
    text = read_private(path)
    if text is None:
        raise ConfigError(f"there is no access file {path}; `taskd token create` writes one")
    try:
        fields: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
    for name in ("url", "token"):
        if not isinstance(fields.get(name), str) or not fields[name]:
            raise ConfigError(f"{path} names no {name}; `taskd token create` writes such a file")
    unknown = sorted(set(fields) - _KEYS)
    if unknown or not all(isinstance(value, str) for value in fields.values()):
        raise ConfigError(f"{path} holds more than url, token and fingerprint, each a text: {', '.join(unknown)}")
    return fields
