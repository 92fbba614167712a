"""The cluster key in its file, and while it is being replaced: the current one, and the previous one for a grace time.

    taskd-scheduler-key-v1:…
    previous until 2026-01-31T12:00:00Z taskd-scheduler-key-v1:…

While both are accepted, nodes that have the new key and nodes that have only the old one go on talking: whoever accepts
a connection says in plain text which keys it takes, by their public fingerprints, and the dialling side takes the first
of its own that is among them.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from taskd.errors import ConfigError, Refused
from taskd.net.security import Credentials, Key, SchedulerKey, parse_key
from taskd.private_files import read_private, save_private
from taskd.protocol.messages import NodeInfo
from taskd.values import format_instant, instant_s

_PREVIOUS = "previous until "
_SNI = ".taskd"  # The name that is asked for in a handshake is a fingerprint and this.


class Keys(Struct, frozen=True):
    """What a key file holds. `until_s`: up to when the previous key is accepted, UTC."""

    current: Key
    previous: Key | None = None
    until_s: float = 0.0

    @property
    def text(self) -> str:
        """To be pasted; secret. One line, or two while the key is being replaced."""
        if self.previous is None:
            return self.current.text
        return f"{self.current.text}\n{_PREVIOUS}{format_instant(self.until_s)} {self.previous.text}"

    def valid(self, now_s: float) -> tuple[Key, ...]:
        """The keys that count at this time, the current one first."""
        if self.previous is not None and now_s < self.until_s:
            return (self.current, self.previous)
        return (self.current,)

    def of_workers(self) -> Keys:
        """The same for machines that only work."""
        previous = self.previous
        return Keys(_of_workers(self.current), _of_workers(previous) if previous is not None else None, self.until_s)

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write the key file. Raises ConfigError where something else is there and not `force`."""
        save_private(path, self.text, force)


def _of_workers(key: Key) -> Key:
    return key.worker_key if isinstance(key, SchedulerKey) else key


def parse_keys(text: str) -> Keys:
    """What a key file or another machine says. Raises ConfigError."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    current = parse_key(lines[0] if lines else "")
    if len(lines) == 1:
        return Keys(current)
    until, _, previous = lines[1].removeprefix(_PREVIOUS).partition(" ")
    if len(lines) > 2 or not lines[1].startswith(_PREVIOUS) or not previous:
        raise ConfigError(f'after the cluster key there may be one line, "{_PREVIOUS}TIME KEY", and nothing else')
    try:
        until_s = instant_s(until, 0.0)
    except ValueError as error:
        raise ConfigError(f"the time until which the previous key is accepted cannot be read: {error}") from None
    found = parse_key(previous)
    if isinstance(found, SchedulerKey) != isinstance(current, SchedulerKey):
        raise ConfigError("the current and the previous key must be of the same kind")
    return Keys(current, found, until_s)


def load_keys(path: Path) -> Keys | None:
    """The keys in a file; None where there is no file. Raises ConfigError, also where others could read it."""
    text = read_private(path)
    if text is None:
        return None
    try:
        return parse_keys(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from None


class Ring:
    """TLS of one node, with each of its keys."""

    def __init__(self, keys: Keys, node: NodeInfo, utc: Callable[[], float] = time.time) -> None:
        self.keys = keys
        self._utc = utc
        both = (keys.current,) if keys.previous is None else (keys.current, keys.previous)
        self._all = tuple(Credentials(key, node) for key in both)
        for credentials in self._all:
            if credentials.server is not None:
                credentials.server.sni_callback = self._choose_server

    @property
    def current(self) -> Credentials:
        """With the current key."""
        return self._all[0]

    @property
    def _valid(self) -> tuple[Credentials, ...]:
        return self._all[: len(self.keys.valid(self._utc()))]

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Of the keys that count now, the current one first."""
        return tuple(credentials.fingerprint for credentials in self._valid)

    @property
    def seal_secrets(self) -> tuple[bytes, ...]:
        """What terms are sealed with: the current one first; none at a worker."""
        return tuple(key.seal_secret for key in self.keys.valid(self._utc()) if isinstance(key, SchedulerKey))

    @property
    def ends_in_s(self) -> float | None:
        """For how long the previous key is still accepted; None: there is none."""
        if self.keys.previous is None:
            return None
        left_s = self.keys.until_s - self._utc()
        return left_s if left_s > 0 else None

    def to_dial(self, offered: tuple[str, ...]) -> Credentials:
        """The first of our keys that the other side accepts. Raises Refused."""
        for credentials in self._valid:
            if credentials.fingerprint in offered:
                return credentials
        raise Refused("has another cluster key")

    def of(self, context: ssl.SSLContext) -> Credentials:
        """Whose context this is. Raises Refused where that key counts no more."""
        for credentials in self._valid:
            if context in (credentials.client, credentials.server):
                return credentials
        raise Refused("uses a cluster key whose time is over")

    def _choose_server(self, tls: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> int | None:
        """In a handshake: answer with the key that the other side asks for."""
        for credentials in self._valid:
            if name == server_name(credentials) and credentials.server is not None:
                tls.context = credentials.server
                return None
        # Whoever names none is no node of ours, and gets no further with any of them.
        return None if name is None else ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME


def server_name(credentials: Credentials) -> str:
    """What a dialling node asks for: its key, by the fingerprint."""
    return credentials.fingerprint + _SNI


def describe(path: Path, now_s: float) -> list[str]:
    """What a key file holds, in lines for people, without any secret. Raises ConfigError."""
    keys = load_keys(path)
    if keys is None:
        return []
    kind = "scheduler" if isinstance(keys.current, SchedulerKey) else "worker"
    lines = [f"{kind} key of cluster {keys.current.fingerprint}"]
    if keys.previous is not None:
        until = format_instant(keys.until_s)
        is_over = now_s >= keys.until_s
        lines.append(
            f"previous key {keys.previous.fingerprint}, "
            + (f"over since {until}" if is_over else f"accepted until {until}")
        )
    return lines
