"""Where schedulers may be: what mDNS says, and where they were met. Pure: names and addresses in, addresses out.

Anybody on the LAN can announce anything in anybody's name. So what is heard only ever adds to where a node was really
met, each name has its own addresses, and of all that strangers say only the latest is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

UNMET_MAX = 64  # Nodes that were announced and never met.
MET_MAX = 1000
NAMES_MAX = 4  # Announcements of one node id.
ADDRESSES_MAX = 16  # Of one announcement.
MET_S = 600.0  # A node is looked for so long after it was last met, though nobody announces it any more.


class _Hint:
    """What is known of one node id."""

    __slots__ = ("met_at", "met_name", "met_where", "named")

    def __init__(self) -> None:
        self.named: OrderedDict[str, tuple[str, ...]] = OrderedDict()  # by announcement, the oldest first
        self.met_at: float | None = None
        self.met_name = ""  # what this very node announces itself as
        self.met_where = ""


class Hints:
    """Hints by node id."""

    def __init__(self) -> None:
        self._met: OrderedDict[int, _Hint] = OrderedDict()
        self._unmet: OrderedDict[int, _Hint] = OrderedDict()

    def add(self, node_id: int, name: str, addresses: Sequence[str]) -> int | None:
        """A node is announced under this name. Of unknown nodes the latest are kept; returns one that goes."""
        dropped: int | None = None
        hint = self._met.get(node_id)
        if hint is None:
            hint = self._unmet.pop(node_id, None) or _Hint()
            self._unmet[node_id] = hint
            if len(self._unmet) > UNMET_MAX:
                dropped, _ = self._unmet.popitem(last=False)
        hint.named.pop(name, None)
        hint.named[name] = tuple(addresses[:ADDRESSES_MAX])
        if len(hint.named) > NAMES_MAX:
            del hint.named[next(other for other in hint.named if other != hint.met_name)]
        return dropped

    def remove(self, node_id: int, name: str) -> None:
        """An announcement was taken back: anybody can do that, too."""
        hint = self._met.get(node_id) or self._unmet.get(node_id)
        if hint is not None:
            hint.named.pop(name, None)
            if not hint.named:
                self._unmet.pop(node_id, None)

    def met(self, node_id: int, name: str, address: str, now: float) -> None:
        """A node was dialled at this address, and showed that it is the one; `name` is what it announces itself as."""
        hint = self._met.pop(node_id, None) or self._unmet.pop(node_id, None) or _Hint()
        self._met[node_id] = hint
        hint.met_at, hint.met_name, hint.met_where = now, name, address
        if len(self._met) > MET_MAX:
            self._met.popitem(last=False)

    def seen(self, node_id: int, now: float) -> None:
        """A node that was met has just gone."""
        hint = self._met.get(node_id)
        if hint is not None:
            hint.met_at = now

    def is_met(self, node_id: int) -> bool:
        """Whether this node has ever been reached."""
        return node_id in self._met

    def addresses(self, node_id: int, now: float) -> tuple[str, ...]:
        """Where to look for a node: where it was met, then what it says itself, then the rest. Empty: look no more."""
        hint = self._met.get(node_id) or self._unmet.get(node_id)
        if hint is None or (not hint.named and (hint.met_at is None or now - hint.met_at > MET_S)):
            return ()
        found = dict.fromkeys([hint.met_where] if hint.met_where else [])
        found.update(dict.fromkeys(hint.named.get(hint.met_name, ())))
        for addresses in reversed(hint.named.values()):
            found.update(dict.fromkeys(addresses))
        return tuple(found)
