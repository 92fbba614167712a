"""Dialling: each target for ever, all its addresses a moment apart, with growing waits.

A target is an address that the operator named, or the id of a node that discovery has told of or that was met before.
Whoever was never met is dialled seldom and on a budget: anybody on the LAN can name addresses for us to dial.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from random import Random
from typing import Protocol

from taskd.net.connection import Connection, monotonic
from taskd.net.gate import Bucket
from taskd.net.hints import Hints

PORT_DEFAULT = 7710
DIAL_TIMEOUT_S = 3.0
DIAL_STAGGER_S = 0.1  # Before the next address of a node is tried beside the last one.
REDIAL_MIN_S = 0.05
REDIAL_OFTEN_S = 10.0  # After a peer was lost: who restarts is back within seconds, and may have to lead soon.
REDIAL_OFTEN_MAX_S = 0.3
UNMET_REDIAL_MAX_S = 30.0  # A scheduler that starts says so; then it is dialled at once.
UNMET_PER_S, UNMET_BURST = 10.0, 100.0  # Dials of nodes that were never met, in all.


class Home(Protocol):
    """The node that dials."""

    def new_connection(self) -> Connection: ...
    def begun(self, connection: Connection) -> None: ...
    def open_to(self, target: int | str) -> Connection | None: ...


class Dialer:
    """All dialling of one node."""

    def __init__(self, home: Home, hints: Hints, redial_max_s: float, random: Random) -> None:
        self._home = home
        self._hints = hints
        self._redial_max_s = redial_max_s
        self._random = random
        self._unmet = Bucket(UNMET_PER_S, UNMET_BURST, monotonic())
        self._tasks: dict[int | str, asyncio.Task[None]] = {}
        self._wake: dict[int | str, asyncio.Event] = {}

    async def stop(self) -> None:
        """Dial no more."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def start(self, target: int | str) -> None:
        """Dial this target from now on; at once, where it waits for its turn."""
        if target in self._tasks:
            self._wake[target].set()
            return
        self._wake[target] = asyncio.Event()
        task = self._tasks[target] = asyncio.get_running_loop().create_task(self._dial_for_ever(target))
        task.add_done_callback(lambda task: self._forget(target, task))

    def drop(self, target: int) -> None:
        """Dial this target no more."""
        task = self._tasks.get(target)
        if task is not None:
            task.cancel()
            self._forget(target, task)

    def _forget(self, target: int | str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(target) is task:
            del self._tasks[target], self._wake[target]

    async def _dial_for_ever(self, target: int | str) -> None:
        wait_s = 0.0
        missed_since = monotonic()
        wake = self._wake[target]
        while True:
            if wait_s:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s * self._random.uniform(0.7, 1.3)):
                        await wake.wait()
            wake.clear()
            now = monotonic()
            addresses = (target,) if isinstance(target, str) else self._hints.addresses(target, now)
            if not addresses:
                return
            connection = self._home.open_to(target)
            if connection is None and self._may_dial(target, now):
                connection = await self.dial_any(addresses, target if isinstance(target, int) else None)
            if connection is not None:
                await connection.ended
                wait_s, missed_since = REDIAL_MIN_S, monotonic()
                if isinstance(target, int):
                    self._hints.seen(target, missed_since)
            else:
                wait_s = min(max(wait_s * 2, REDIAL_MIN_S), self._wait_max_s(target, monotonic() - missed_since))

    def _may_dial(self, target: int | str, now: float) -> bool:
        return isinstance(target, str) or self._hints.is_met(target) or self._unmet.take(now)

    def _wait_max_s(self, target: int | str, missed_s: float) -> float:
        if missed_s < REDIAL_OFTEN_S:
            return min(REDIAL_OFTEN_MAX_S, self._redial_max_s)
        if isinstance(target, int) and not self._hints.is_met(target):
            return max(UNMET_REDIAL_MAX_S, self._redial_max_s)
        return self._redial_max_s

    async def dial_any(self, addresses: Sequence[str], wanted: int | None) -> Connection | None:
        """A connection to the first address that answers as a peer of ours, and as the node that is wanted, trying them
        a moment apart."""
        attempts: list[asyncio.Task[Connection | None]] = []
        try:
            for address in addresses:
                attempts.append(asyncio.get_running_loop().create_task(self._dial(address, wanted)))
                done, _ = await asyncio.wait(attempts, timeout=DIAL_STAGGER_S, return_when=asyncio.FIRST_COMPLETED)
                for attempt in done:
                    if (connection := attempt.result()) is not None:
                        return connection
            for next_done in asyncio.as_completed(attempts):
                if (connection := await next_done) is not None:
                    return connection
            return None
        finally:
            for attempt in attempts:
                attempt.cancel()
            await asyncio.gather(*attempts, return_exceptions=True)

    async def _dial(self, address: str, wanted: int | None) -> Connection | None:
        connection = self._home.new_connection()
        try:
            host, port = split_address(address)
            async with asyncio.timeout(DIAL_TIMEOUT_S):
                await asyncio.get_running_loop().create_connection(lambda: connection, host, port)
        except (OSError, ValueError, OverflowError):  # Down, silent, or no address at all.
            return None
        connection.address = address
        self._home.begun(connection)
        try:
            await connection.secure()
            await asyncio.wait({connection.ended, connection.greeted}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if connection.peer is None:
                connection.close("another address was quicker")
            raise
        if connection.ended.done() or connection.peer is None:
            return None
        # Another node of ours may be there, whatever was announced: it stays, and the wanted one is looked for.
        return connection if wanted in (None, connection.peer.node_id) else None


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT, [IPv6]:PORT, or either without a port. Raises ValueError."""
    if address.startswith("["):
        host, _, port = address[1:].partition("]")
    elif address.count(":") == 1:
        host, _, port = address.partition(":")
    else:
        host, port = address, ""
    port = port.removeprefix(":")
    return host, int(port) if port else PORT_DEFAULT
