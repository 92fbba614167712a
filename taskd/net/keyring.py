"""The cluster key in its file, and while it is being replaced: the current one, and the previous one for a grace time.

    taskd-scheduler-key-v1:…
    previous until 2026-01-31T12:00:00Z taskd-scheduler-key-v1:…
    replaces 0123456789abcdef fedcba9876543210

While both are accepted, nodes that have the new key and nodes that have only the old one go on talking: whoever accepts
a connection says in plain text which keys it takes, by their public fingerprints, and the dialling side takes the first
of its own that is among them. Keys that are accepted no more stay in the file by their fingerprints alone, so that a
daemon that still runs with one of them sees that the file is of its own cluster.
"""

from __future__ import annotations

import re
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
_REPLACES = "replaces "
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")
REPLACED_MAX = 8  # The latest ones: so many changes may a daemon miss before it takes a restart.
_SNI = ".taskd"  # The name that is asked for in a handshake is a fingerprint and this.


class Keys(Struct, frozen=True):
    """What a key file holds. `until_s`: up to when the previous key is accepted, UTC. `replaced`: fingerprints of keys
    that this cluster had before these and that open nothing any more, the latest first."""

    current: Key
    previous: Key | None = None
    until_s: float = 0.0
    replaced: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """To be pasted; secret. One line, and one more each while the key is being replaced and once it has been."""
        lines = [self.current.text]
        if self.previous is not None:
            lines.append(f"{_PREVIOUS}{format_instant(self.until_s)} {self.previous.text}")
        if self.replaced:
            lines.append(_REPLACES + " ".join(self.replaced))
        return "\n".join(lines)

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Of the keys that are here, the current one first."""
        return tuple(key.fingerprint for key in (self.current, self.previous) if key is not None)

    @property
    def lineage(self) -> tuple[str, ...]:
        """The fingerprints of all keys that this cluster is known to have had, the current one first."""
        return (*self.fingerprints, *self.replaced)

    def followed_by(self, key: Key, until_s: float | None) -> Keys:
        """The keys after these: `key`, and beside it the current one up to `until_s`; None: that one opens nothing
        from now on."""
        if until_s is None:
            return Keys(key, replaced=self.lineage[:REPLACED_MAX])
        return Keys(key, self.current, until_s, self.lineage[1:][:REPLACED_MAX])

    def without_previous(self) -> Keys:
        """The current key alone."""
        return Keys(self.current, replaced=self.lineage[1:][:REPLACED_MAX])

    def valid(self, now_s: float) -> tuple[Key, ...]:
        """The keys that count at this time, the current one first."""
        if self.previous is not None and now_s < self.until_s:
            return (self.current, self.previous)
        return (self.current,)

    def of_workers(self) -> Keys:
        """The same for machines that only work."""
        previous = self.previous
        old = _of_workers(previous) if previous is not None else None
        return Keys(_of_workers(self.current), old, self.until_s, self.replaced)

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write the key file. Raises ConfigError where something else is there and not `force`."""
        save_private(path, self.text, force)


def _of_workers(key: Key) -> Key:
    return key.worker_key if isinstance(key, SchedulerKey) else key


def parse_keys(text: str) -> Keys:
    """What a key file or another machine says. Raises ConfigError."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    current = parse_key(lines[0] if lines else "")
    rest = lines[1:]
    replaced = _parse_replaced(rest.pop()) if rest and rest[-1].startswith(_REPLACES) else ()
    if not rest:
        return Keys(current, replaced=replaced)
    until, _, previous = rest[0].removeprefix(_PREVIOUS).partition(" ")
    if len(rest) > 1 or not rest[0].startswith(_PREVIOUS) or not previous:
        raise ConfigError(
            f'after the cluster key there may be a line "{_PREVIOUS}TIME KEY", then one "{_REPLACES}FINGERPRINT …", '
            "and nothing else"
        )
    try:
        until_s = instant_s(until, 0.0)
    except ValueError as error:
        raise ConfigError(f"the time until which the previous key is accepted cannot be read: {error}") from None
    found = parse_key(previous)
    if isinstance(found, SchedulerKey) != isinstance(current, SchedulerKey):
        raise ConfigError("the current and the previous key must be of the same kind")
    return Keys(current, found, until_s, replaced)


def _parse_replaced(line: str) -> tuple[str, ...]:
    replaced = tuple(line.removeprefix(_REPLACES).split())
    if len(replaced) > REPLACED_MAX or not all(_FINGERPRINT.fullmatch(it) for it in replaced):
        raise ConfigError(f"after {_REPLACES.strip()!r} there are at most {REPLACED_MAX} fingerprints of earlier keys")
    return replaced


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
