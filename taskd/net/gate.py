"""Who may begin a handshake on the peer port. Pure: addresses and `now` in, a word out.

A TLS handshake costs milliseconds of CPU, and whoever reaches the port can ask for one. So every address has a budget
of handshakes that come to nothing, and all strangers together have one; what is above that is closed before anything
is read. One that ends in a good hello costs nothing: many workers of one machine may come at once. An address from
which a node of ours came lately has a budget of its own, so that a flood from elsewhere keeps no peer out.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict

HALF_OPEN_MAX = 128  # Accepted connections that have not said hello yet, in all.
HALF_OPEN_PER_SOURCE_MAX = 32
STRANGERS_PER_S, STRANGERS_BURST = 40.0, 160.0  # Handshakes of all unknown addresses together: about a tenth of a CPU.
SOURCE_PER_S, SOURCE_BURST = 10.0, 40.0  # Of one unknown address.
KNOWN_PER_S, KNOWN_BURST = 20.0, 100.0  # Of one address that a node of ours came from.
GREETED_PER_S, GREETED_BURST = 50.0, 2000.0  # Good hellos of one address that are given back.
KNOWN_S = 86_400.0  # An address counts as a node's for so long after one was last seen there.
SOURCES_MAX = 4096  # Addresses that are remembered, of each kind.
IPV6_PREFIX = 64  # Of what one machine can have as many addresses as it likes in.


class Bucket:
    """A token bucket: full at first, filled at a steady rate."""

    __slots__ = ("_at", "_burst", "_left", "_rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = self._left = burst
        self._at = now

    def has(self, now: float) -> bool:
        """Whether a token is there."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        return self._left >= 1.0

    def take(self, now: float) -> bool:
        """Take a token, where one is there."""
        if not self.has(now):
            return False
        self._left -= 1.0
        return True

    def put_back(self) -> None:
        """Give a token back."""
        self._left = min(self._burst, self._left + 1.0)


class Gate:
    """The budgets of one listening node."""

    def __init__(self, now: float) -> None:
        self._all_strangers = Bucket(STRANGERS_PER_S, STRANGERS_BURST, now)
        self._sources: OrderedDict[str, Bucket] = OrderedDict()  # of strangers; the longest unused first
        self._hosts: OrderedDict[str, Bucket] = OrderedDict()  # of known addresses
        self._known: OrderedDict[str, float] = OrderedDict()  # address: when a node was last seen there
        self._greeted: OrderedDict[str, Bucket] = OrderedDict()

    def admit(self, host: str, now: float) -> str:
        """Take a handshake from an address's budget; why not, or nothing where it may begin."""
        is_known = self.is_known(host, now)
        if is_known:
            bucket = _bucket(self._hosts, host, KNOWN_PER_S, KNOWN_BURST, now)
        else:
            bucket = _bucket(self._sources, source_of(host), SOURCE_PER_S, SOURCE_BURST, now)
        if not bucket.has(now):
            return "begins too many handshakes"
        if not is_known and not self._all_strangers.take(now):
            return "comes while too many strangers begin handshakes"
        bucket.take(now)
        return ""

    def greeted(self, host: str, now: float) -> None:
        """A handshake from there ended in a good hello."""
        was_known = self.is_known(host, now)
        if _bucket(self._greeted, host, GREETED_PER_S, GREETED_BURST, now).take(now):
            bucket = self._hosts.get(host) if was_known else self._sources.get(source_of(host))
            if bucket is not None:
                bucket.put_back()
            if not was_known:
                self._all_strangers.put_back()
        self.saw(host, now)

    def saw(self, host: str, now: float) -> None:
        """A node of ours is there."""
        self._known[host] = now
        self._known.move_to_end(host)
        if len(self._known) > SOURCES_MAX:
            self._known.popitem(last=False)

    def known(self, now: float) -> dict[str, float]:
        """Where nodes of ours came from lately, and how many seconds ago; the longest ago first."""
        return {host: now - came_at for host, came_at in self._known.items() if now - came_at < KNOWN_S}

    def remember(self, known: dict[str, float], now: float) -> None:
        """Know again what `known` said in an earlier process, before anybody comes."""
        for host, ago_s in sorted(known.items(), key=lambda one: -one[1]):
            self.saw(host, now - ago_s)

    def is_known(self, host: str, now: float) -> bool:
        """Whether a node of ours came from there lately."""
        came_at = self._known.get(host)
        return came_at is not None and now - came_at < KNOWN_S


def _bucket(buckets: OrderedDict[str, Bucket], source: str, rate: float, burst: float, now: float) -> Bucket:
    bucket = buckets.get(source)
    if bucket is None:
        if len(buckets) >= SOURCES_MAX:
            buckets.popitem(last=False)  # It was unused for longest, and so is full again, or all strangers wait.
        bucket = buckets[source] = Bucket(rate, burst, now)
    else:
        buckets.move_to_end(source)
    return bucket


def source_of(host: str) -> str:
    """What counts as one source: an IPv4 address, or the IPv6 network that one machine can fill."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 4:
        return host
    return str(ipaddress.IPv6Network((int(address) >> IPV6_PREFIX << IPV6_PREFIX, IPV6_PREFIX)))
