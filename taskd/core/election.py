"""Who leads: the live scheduler with the lowest node id, where no leader is heard of any more.

The low id says who should lead; terms say what is valid: every reign has its own, greater than all before it.
This file knows who is there and what they say; claim.py carries a claim through.
"""

from __future__ import annotations

from collections.abc import Iterator

from taskd.protocol.messages import Leading, NodeInfo, Term

JOIN_S = 0.6  # Long enough to hear of a scheduler on the LAN: discovery takes about 0.1 s, a handshake 0.02 s.
# After the connection to a leader broke: a redial takes 0.05 s and more. If it comes through, the leader is not dead.
LOST_WAIT_S = 0.15
DENIED_WAIT_S = 0.2
GRANT_S = 60.0  # Who claims, and neither leads nor takes any rows for so long, is waited for no more.
SPEAK_WAIT_S = 2.0  # Who is connected and does not say whom it follows is not waited for any longer.
EPOCH_MAX = 1 << 32  # That anybody believes who has never heard of any: a change of leaders a second for 136 years.
EPOCH_JUMP_MAX = 1 << 20  # A greater jump is damage or malice: following it would use up the numbers.
EPOCH_TOP = 1 << 47  # Half of what fits into a message, so that there is always a term above.


def is_absurd(epoch: int, known: int | None) -> bool:
    """Whether an epoch cannot be, where `known` is the greatest one known; None: none is."""
    return epoch > (EPOCH_MAX if known is None else min(known + EPOCH_JUMP_MAX, EPOCH_TOP))


class _Peer:
    """A connected node, and what it said last."""

    __slots__ = ("has_spoken", "info", "may_lead", "says", "speaks_until")

    def __init__(self, info: NodeInfo, now: float) -> None:
        self.info = info
        self.speaks_until = now + SPEAK_WAIT_S
        self.has_spoken = False
        self.says: Term | None = None  # whom it follows
        self.may_lead = False

    @property
    def is_scheduler(self) -> bool:
        return "scheduler" in self.info.roles


class Election:
    """One scheduler's view of the others and of who leads."""

    def __init__(self, node: NodeInfo) -> None:
        self.node = node
        self.greatest: Term | None = None  # the greatest term seen, durable or about to be
        self.leading: Term | None = None  # our own term while we decide
        self.followed: Term | None = None  # of the leader that we are connected to
        self.granted: Term | None = None  # whose claim we answered; it has not begun to lead yet
        self._granted_until = 0.0
        self.is_claiming = False
        self._peers: dict[int, _Peer] = {}
        self._joined_at: float | None = None  # until then we only look around
        self._wait_until = 0.0  # a leader may come back, or whoever denied us may go on

    # -- Time ----------------------------------------------------------------------------------------------------------

    def join(self, now: float, wait_s: float = JOIN_S) -> None:
        """Look for others first: after a start, and after standing still."""
        self._joined_at = now + wait_s

    def found_data(self, now: float) -> None:
        """We hold what a leader held: an empty disk is no reason to wait any more."""
        self._joined_at = now if self._joined_at is None else min(self._joined_at, now)

    def next_deadline(self, now: float) -> float | None:
        """When may_claim may change by itself. Later only events can change it."""
        due = [time for time in (self._joined_at, self._wait_until) if time is not None and time > now]
        if self.granted is not None and self._granted_until > now:
            due.append(self._granted_until)
        due += [peer.speaks_until for peer in self._peers.values() if not peer.has_spoken and peer.speaks_until > now]
        return min(due, default=None)

    # -- Others --------------------------------------------------------------------------------------------------------

    def peer_up(self, node: NodeInfo, now: float) -> None:
        """A node is connected."""
        if node.node_id != self.node.node_id:
            self._peers[node.node_id] = _Peer(node, now)

    def peer_down(self, node_id: int, now: float, is_orderly: bool) -> None:
        """A connection is gone. A leader that is gone without a word may be back in a moment."""
        self._peers.pop(node_id, None)
        for term in (self.followed, self.granted):
            if term is not None and term.node_id == node_id and not is_orderly:
                self._wait_until = max(self._wait_until, now + LOST_WAIT_S)
        self._forget(node_id)

    def _forget(self, node_id: int) -> None:
        if self.followed is not None and self.followed.node_id == node_id:
            self.followed = None
        if self.granted is not None and self.granted.node_id == node_id:
            self.granted = None

    def schedulers(self) -> Iterator[NodeInfo]:
        """The other schedulers that are connected, lowest id first."""
        return (self._peers[node_id].info for node_id in sorted(self._peers) if self._peers[node_id].is_scheduler)

    def may_lead(self, node_id: int) -> bool:
        """Whether a connected node says that it would lead if it were the lowest."""
        peer = self._peers.get(node_id)
        return peer is not None and peer.may_lead

    def heard(self, sender: int, message: Leading, *, is_proven: bool) -> None:
        """A node said whom it follows. A worker's word counts where its leader's seal proves it. Raises ValueError for
        a term that cannot be, or is not proven: then it has said nothing."""
        peer = self._peers.get(sender)
        if peer is None:
            return
        term = message.term
        # Whatever is wrong with it, it is not waited for.
        peer.has_spoken, peer.says, peer.may_lead = True, None, message.may_lead
        if term is not None:
            if not is_proven and not peer.is_scheduler:
                raise ValueError(f"a worker follows term {term.epoch}, and shows no seal of it")
            self.learn(term)
        peer.says = term
        if not peer.is_scheduler:
            return
        if term is None or term.node_id != sender:
            self._forget(sender)
        elif self.greatest is not None and term.rank() >= self.greatest.rank():
            self.followed, self.granted = term, None

    def learn(self, term: Term) -> None:
        """A scheduler has named a term, itself or through a worker. Raises ValueError for one that cannot be. Who has
        never heard of any believes it, however long the others have been at it."""
        known = self.greatest.epoch if self.greatest is not None else None
        if is_absurd(term.epoch, known):
            raise ValueError(f"epoch {term.epoch} is too far above {known or 0}")
        if self.greatest is None or term.rank() > self.greatest.rank():
            self.greatest = term
            if self.followed is not None and term.rank() > self.followed.rank():
                self.followed = None

    def grant(self, term: Term, now: float) -> None:
        """Wait for who claims under this term; told again while it takes rows."""
        self.followed, self.granted, self._granted_until = None, term, now + GRANT_S

    def is_stale(self, term: Term) -> bool:
        """Whether a greater term is known."""
        return self.greatest is not None and term.rank() < self.greatest.rank()

    # -- We ------------------------------------------------------------------------------------------------------------

    @property
    def standing(self) -> Term | None:
        """What to tell others: the term of whom we follow."""
        return self.leading if self.leading is not None else self.followed

    def is_ready(self, now: float) -> bool:
        """Whether we have looked around for long enough."""
        return self._joined_at is not None and now >= self._joined_at

    def may_claim(self, now: float) -> bool:
        """Whether to claim now: nobody leads, nobody hears a leader, and nobody lower would."""
        if self.leading is not None or self.is_claiming or self.followed is not None:
            return False
        if self.granted is not None and now < self._granted_until:
            return False
        if not self.is_ready(now) or now < self._wait_until:
            return False
        return all(not self._is_in_the_way(peer, now) for peer in self._peers.values())

    def _is_in_the_way(self, peer: _Peer, now: float) -> bool:
        if not peer.has_spoken:
            return now < peer.speaks_until  # It is about to say whom it follows.
        if peer.says is not None and peer.says.node_id != self.node.node_id:
            return True
        return peer.is_scheduler and peer.may_lead and peer.info.node_id < self.node.node_id

    def why_not(self, now: float) -> str:
        """Why nobody leads, as far as we can tell: for people."""
        if self._joined_at is not None and self._joined_at - now > JOIN_S:
            left_s = self._joined_at - now
            why = "this scheduler's disk is empty or was restored"
            return f"{why}: it leads in {left_s:.0f} s unless it finds one that has tasks"
        if not self.is_ready(now):
            return "no scheduler leads yet: they are still looking for each other"
        for peer in self._peers.values():
            if peer.says is not None and peer.says.node_id != self.node.node_id:
                return f"{peer.info.name} hears a leader (node {peer.says.node_id}) that is out of our reach"
        return "no scheduler leads: they are about to agree on one"

    def next_term(self) -> Term:
        """A term of our own above all that were seen."""
        epoch = self.greatest.epoch + 1 if self.greatest is not None else 1
        self.greatest = Term(epoch, self.node.node_id, self.node.boot)
        return self.greatest

    def denied(self, now: float) -> None:
        """Our claim was not granted: try again a little later."""
        self._wait_until = max(self._wait_until, now + DENIED_WAIT_S)
