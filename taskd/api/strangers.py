"""Whoever has come in and not shown yet who he is: a bounded number. Where they are too many, the one goes that has
been here for longest, of the address that has sent most. So a crowd that only waits keeps nobody out but itself.
"""

from __future__ import annotations

from typing import Generic, TypeVar

Guest = TypeVar("Guest")


class Strangers(Generic[Guest]):
    """Up to `at_most` of them, 1 or more."""

    def __init__(self, at_most: int) -> None:
        self._at_most = at_most
        self._addresses: dict[Guest, str] = {}
        self._by_address: dict[str, dict[Guest, None]] = {}  # in the order in which they came

    @property
    def is_full(self) -> bool:
        """Whether one more would be too many."""
        return len(self._addresses) >= self._at_most

    def add(self, guest: Guest, address: str) -> None:
        """One more has come in."""
        self._addresses[guest] = address
        self._by_address.setdefault(address, {})[guest] = None

    def remove(self, guest: Guest) -> None:
        """He is gone, or known now. Any number of times."""
        address = self._addresses.pop(guest, None)
        if address is not None:
            there = self._by_address[address]
            del there[guest]
            if not there:
                del self._by_address[address]

    def show_out(self) -> Guest:
        """Who has to go: removed, and for the caller to tell. Raises ValueError where there is nobody."""
        loudest = max(self._by_address, key=lambda address: len(self._by_address[address]))
        guest = next(iter(self._by_address[loudest]))
        self.remove(guest)
        return guest
