"""How much of each term's commits somebody holds: the greatest lsn up to which nothing is missing.

A version vector over terms instead of nodes (Parker et al., "Detection of Mutual Inconsistency in Distributed Systems",
IEEE TSE 1983): what it covers is known here, or was known and has been removed since.
"""

from __future__ import annotations

from collections.abc import Iterable

from taskd.protocol.messages import Dot, Term


class Seen:
    """Term -> greatest contiguous lsn, from 1; 0 where nothing of the term is held. It only grows."""

    __slots__ = ("_lsns",)

    def __init__(self, dots: Iterable[Dot] = ()) -> None:
        self._lsns: dict[Term, int] = {}
        for dot in dots:
            self.advance(dot)

    def lsn_of(self, term: Term) -> int:
        """Up to which commit of this term nothing is missing."""
        return self._lsns.get(term, 0)

    def covers(self, dot: Dot) -> bool:
        """Whether this commit is among what is held."""
        return dot.lsn <= self._lsns.get(dot.term, 0)

    def covers_all(self, other: Seen) -> bool:
        """Whether everything that the other holds is held."""
        return all(lsn <= self._lsns.get(term, 0) for term, lsn in other._lsns.items())

    def advance(self, dot: Dot) -> None:
        """Everything of its term up to this commit is held."""
        if dot.lsn > self._lsns.get(dot.term, 0):
            self._lsns[dot.term] = dot.lsn

    def dots(self) -> tuple[Dot, ...]:
        """The greatest commit of each term, oldest term first: what travels and is stored."""
        return tuple(sorted((Dot(term, lsn) for term, lsn in self._lsns.items()), key=Dot.rank))

    def copy(self) -> Seen:
        """The same, to be advanced apart."""
        return Seen(self.dots())

    def __repr__(self) -> str:
        return f"Seen({list(self.dots())})"
