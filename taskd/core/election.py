"""Who leads: the live scheduler with the lowest node id.

This version has one scheduler that decides and no replication between schedulers, so a scheduler claims leadership
only when it has found nobody leading; one that has followed a leader keeps relaying to it and does not take its place,
because the accepted tasks are on that leader's disk alone.
"""

from __future__ import annotations

from taskd.protocol.messages import NodeInfo, Term

JOIN_S = 0.6  # Long enough to hear of a scheduler on the LAN: discovery takes about 0.1 s, a handshake 0.02 s.
EPOCH_JUMP_MAX = 1 << 20  # A greater jump is damage or malice: following it would use up the numbers.


class Election:
    """One scheduler's view of the schedulers and of who leads."""

    def __init__(self, node: NodeInfo) -> None:
        self.node = node
        self.greatest: Term | None = None  # the greatest term seen, durable or about to be
        self.leading: Term | None = None  # our own term while we lead
        self.followed: tuple[int, Term] | None = None  # another leader and its term
        self._has_followed = False
        self._schedulers: dict[int, NodeInfo] = {}  # connected ones, ourselves not among them
        self._claim_at: float | None = None

    def join(self, now: float) -> None:
        """Start looking for others."""
        self._claim_at = now + JOIN_S

    def peer_up(self, node: NodeInfo) -> None:
        """Another scheduler is connected."""
        if node.node_id != self.node.node_id:
            self._schedulers[node.node_id] = node

    def peer_down(self, node_id: int) -> None:
        self._schedulers.pop(node_id, None)
        if self.followed is not None and self.followed[0] == node_id:
            self.followed = None

    @property
    def standbys(self) -> int:
        """How many other schedulers are connected."""
        return len(self._schedulers)

    def heard(self, sender: int, term: Term | None) -> bool:
        """A scheduler said whom it follows. True where we lead and must step down: the term is greater than ours.

        Raises ValueError for a term that cannot be.
        """
        if term is None:
            if self.followed is not None and self.followed[0] == sender:
                self.followed = None
            return False
        self.learn(term)
        if term.node_id != sender:
            return False  # Hearsay: a leader speaks for itself.
        if self.leading is not None:
            return term.rank() > self.leading.rank()
        self.followed = (sender, term)
        self._has_followed = True
        return False

    def learn(self, term: Term) -> None:
        """A term is in use somewhere. Raises ValueError for one that cannot be."""
        epoch = self.greatest.epoch if self.greatest is not None else 0
        if term.epoch > epoch + EPOCH_JUMP_MAX:
            raise ValueError(f"epoch {term.epoch} is too far above {epoch}")
        if self.greatest is None or term.rank() > self.greatest.rank():
            self.greatest = term

    def may_claim(self, now: float) -> bool:
        """Whether to lead now: nobody else does, we have looked around, and nobody with a lower id is there, unless it
        is we who led last: then the accepted tasks are on our disk, and the others wait for us."""
        led_last = self.greatest is not None and self.greatest.node_id == self.node.node_id
        return (
            self.leading is None
            and self.followed is None
            and not self._has_followed
            and self._claim_at is not None
            and now >= self._claim_at
            and (led_last or not any(node_id < self.node.node_id for node_id in self._schedulers))
        )

    def claim(self) -> Term:
        """Lead: the new term, which must be durable before anything is done in it."""
        epoch = self.greatest.epoch + 1 if self.greatest is not None else 1
        self.leading = self.greatest = Term(epoch, self.node.node_id, self.node.boot)
        return self.leading

    def next_deadline(self, now: float) -> float | None:
        """When may_claim may change by itself: the end of looking around. Later only events can change it."""
        return self._claim_at if self._claim_at is not None and self._claim_at > now else None
