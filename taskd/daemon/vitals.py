"""Whether this daemon does its work: its store, its peers, its socket. That its loop turns, is shown by whoever asks.

A process can be alive and deaf. So what a service manager is told rests on the ways that work comes in: a commit that
is under way ends, connected peers are heard, and a request on the socket is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

# A disk may need that long for a commit when it is very busy; a writer that hangs needs for ever.
COMMIT_S_MAX = 20.0
# Times `peer_timeout_s`, after which the connection would have been closed, if it were read at all.
SILENCE_FACTOR = 3.0
ANSWER_S_MAX = 10.0

_REQUEST = b"GET /healthz HTTP/1.1\r\nHost: taskd\r\nConnection: close\r\n\r\n"


class Vitals:
    """The signs of life of one daemon. `commit_age_s`: since when a commit is under way, 0 where none is; `silence_s`:
    since when the most silent of the connected peers was not heard."""

    def __init__(
        self,
        socket: str,
        commit_age_s: Callable[[], float],
        silence_s: Callable[[], float],
        peer_timeout_s: float,
    ) -> None:
        self._socket = socket
        self._commit_age_s = commit_age_s
        self._silence_s = silence_s
        self._silence_s_max = SILENCE_FACTOR * peer_timeout_s

    async def why_not(self) -> str:
        """What stands still, in words; empty where everything goes on."""
        age_s = self._commit_age_s()
        if age_s > COMMIT_S_MAX:
            return f"a commit is under way for {age_s:.0f} s"
        silence_s = self._silence_s()
        if silence_s > self._silence_s_max:
            return f"a connected peer was not heard for {silence_s:.0f} s"
        if not await self._is_answered():
            return f"the own socket {self._socket} does not answer"
        return ""

    async def _is_answered(self) -> bool:
        """Any answer will do, one of refusal too: it has come all the way."""
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(ANSWER_S_MAX):
                reader, writer = await asyncio.open_unix_connection(self._socket)
                writer.write(_REQUEST)
                return (await reader.read(1024)).startswith(b"HTTP/1.1 ")
        except (OSError, TimeoutError):
            return False
        finally:
            if writer is not None:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
