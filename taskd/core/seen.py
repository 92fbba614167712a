"""How much of each term's commits somebody holds: the greatest lsn up to which nothing is missing."""

from __future__ import annotations

from collections.abc import Iterable

from taskd.protocol.messages import Dot, Term


class Seen:
    """Term -> greatest contiguous lsn."""

    __slots__ = ("_lsns",)

    def __init__(self, dots: Iterable[Dot] = ()) -> None:
        self._lsns: dict[Term, int] = {}
        for dot in dots:
            self.advance(dot)

    def lsn_of(self, term: Term) -> int:
        return self._lsns.get(term, 0)

    def covers(self, dot: Dot) -> bool:
        return dot.lsn <= self._lsns.get(dot.term, 0)

    def covers_all(self, other: Seen) -> bool:
        return all(lsn <= self._lsns.get(term, 0) for term, lsn in other._lsns.items())

    def advance(self, dot: Dot) -> None:
        if dot.lsn > self._lsns.get(dot.term, 0):
            self._lsns[dot.term] = dot.lsn

    def join(self, other: Seen) -> None:
        for dot in other.dots():
            self.advance(dot)

    def dots(self) -> tuple[Dot, ...]:
        return tuple(sorted((Dot(term, lsn) for term, lsn in self._lsns.items()), key=Dot.rank))

    def copy(self) -> Seen:
        return Seen(self.dots())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seen) and self._lsns == other._lsns

    def __repr__(self) -> str:
        return f"Seen({list(self.dots())})"

    __hash__ = None  # type: ignore[assignment]
