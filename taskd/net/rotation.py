"""Replacing the cluster key of a running node: no connection ends by it whose key still counts, and each is opened with
a key that counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from taskd.errors import ConfigError
from taskd.net.connection import Connection
from taskd.net.keyring import Keys, Ring
from taskd.protocol.messages import NodeInfo

GRACE_CHECK_S = 60.0  # The clock may be set while we wait.
CLOSE_EVERY_S = 0.05  # Connections that an old key has opened, when its time is over.
CLOSE_WITHIN_S = 1.0  # All of them, where an operator has ended its time: it may be stolen.


class Rotation:
    """The keys of one node, and the end of the previous one's time. `on_keys` is told what to seal terms with."""

    def __init__(
        self, keys: Keys, node: NodeInfo, connections: Callable[[], Iterable[Connection]], log: Callable[..., None]
    ) -> None:
        self.ring = Ring(keys, node)
        self.on_keys: Callable[[tuple[bytes, ...]], None] = lambda secrets: None
        self._node = node
        self._connections = connections
        self._log = log
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Be there when the previous key's time is over."""
        self.stop()
        left_s = self.ring.ends_in_s
        if left_s is not None:
            self._timer = asyncio.get_running_loop().call_later(min(left_s, GRACE_CHECK_S), self._check)

    def stop(self) -> None:
        """Wait for nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def change(self, keys: Keys) -> bool:
        """Take what the key file holds now; whether that is something else. Connections stay, but for those of a key
        that counts no more. Raises ConfigError for keys that do not come after one of ours: with them this would be a
        node of another cluster."""
        if keys.text == self.ring.keys.text:
            return False
        if not set(self.ring.fingerprints) & set(keys.lineage):
            raise ConfigError("the key file holds the key of another cluster: it takes a restart to join that")
        had = self.ring.keys.fingerprints  # Those of a time that has just run out included, which nobody has ended yet.
        ring = self.ring = Ring(keys, self._node)
        self.on_keys(ring.seal_secrets)
        if set(had) - set(ring.fingerprints):
            self._end(CLOSE_WITHIN_S)
        self.start()
        return True

    def _check(self) -> None:
        if self.ring.ends_in_s is not None:
            self.start()
        else:
            self.on_keys(self.ring.seal_secrets)
            self._end()

    def _end(self, within_s: float | None = None) -> None:
        """A key counts no more: what it has opened is closed, one after the other and without a goodbye, so that who
        has the new key is back at once, and nothing is lost."""
        valid = self.ring.fingerprints
        old = [connection for connection in self._connections() if connection.fingerprint not in valid]
        self._log("info", "the previous cluster key is accepted no more", connections=len(old))
        pause_s = CLOSE_EVERY_S if within_s is None else min(CLOSE_EVERY_S, within_s / max(1, len(old)))
        for number, connection in enumerate(old):
            asyncio.get_running_loop().call_later(
                number * pause_s, connection.close, "the cluster key has been replaced"
            )
