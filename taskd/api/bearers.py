"""Who asks over HTTPS: whoever holds a token, as the user that the token was made for. Nobody else gets any answer but
that he has none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from taskd.api.service import Caller
from taskd.errors import ConfigError, Overloaded, Unauthorized
from taskd.tokens import Token, TokenFile, digest

GUESSES_BURST = 20.0  # Wrong tokens of one address; right ones are always heard.
GUESSES_PER_S = 1.0
ADDRESSES_KEPT = 1024
TOKEN_CHARS_MAX = 200
COMPLAIN_S = 60.0


class Bearers:
    """Recognises tokens. A change of their file counts from the next request on; while it cannot be read, none does.
    `complain` is told of what an operator should know, each thing at most once a minute."""

    def __init__(self, path: Path, complain: Callable[[str], None]) -> None:
        self._file = TokenFile(path)
        self._complain = complain
        self._version: tuple[int, int, int] | None = None
        self._tokens: dict[str, Token] = {}
        self._guesses: dict[str, tuple[float, float]] = {}  # by address: how many more, and when that was so
        self._complained: dict[str, float] = {}

    def authenticate(self, authorization: str | None, address: str) -> tuple[Caller, str]:
        """Who makes a request with this Authorization header, and what the audit calls him. Raises Unauthorized, and
        Overloaded where too many wrong ones came from the address lately."""
        token, why = self._find(authorization)
        if token is not None:
            caller = Caller(token.user, token.role == "admin", may_change=token.role != "read-only")
            return caller, f"token {token.name} from {address}"
        if not self._may_guess(address):
            self._say(f"too many requests without a valid token: address={address}")
            raise Overloaded("too many requests without a valid token; try again later")
        if authorization is not None:
            self._say(f"a request without a valid token was refused: address={address}")
        raise Unauthorized(why)

    def is_accepted(self, authorization: str | None) -> bool:
        """Whether that header still says who asks: an answer may take longer than its token lives."""
        return self._find(authorization)[0] is not None

    def _find(self, authorization: str | None) -> tuple[Token | None, str]:
        """The token that a header carries or, where it carries none that counts, why."""
        scheme, _, secret = (authorization or "").partition(" ")
        secret = secret.strip()
        if scheme.lower() != "bearer" or not 0 < len(secret) <= TOKEN_CHARS_MAX:
            return None, "send a token made with `taskd token create`, as the header `Authorization: Bearer ...`"
        self._refresh()
        # Looked up by its digest: how long that takes tells nothing of the token.
        token = self._tokens.get(digest(secret))
        if token is None:
            return None, "the token is not known here, or was revoked"
        if token.is_over(time.time()):
            return None, "the token has expired"
        return token, ""

    def _refresh(self) -> None:
        try:
            found = os.stat(self._file.path)
            version = (found.st_ino, found.st_mtime_ns, found.st_size)
        except OSError:
            version = (0, 0, 0)
        if version == self._version:
            return
        try:
            self._tokens = {token.sha256: token for token in self._file.load()}
        except ConfigError as error:
            self._tokens = {}
            self._say(f"no token is accepted: {error.message}")
            return  # And looked at again with the next request.
        self._version = version

    def _may_guess(self, address: str) -> bool:
        now = time.monotonic()
        left, at = self._guesses.pop(address, (GUESSES_BURST, now))
        left = min(GUESSES_BURST, left + (now - at) * GUESSES_PER_S)
        if len(self._guesses) >= ADDRESSES_KEPT:
            del self._guesses[next(iter(self._guesses))]  # The one that has been quiet for longest.
        self._guesses[address] = (max(0.0, left - 1.0), now)
        return left >= 1.0

    def _say(self, what: str) -> None:
        now = time.monotonic()
        if self._complained.get(what, 0.0) <= now:
            if len(self._complained) >= ADDRESSES_KEPT:
                self._complained.clear()
            self._complained[what] = now + COMPLAIN_S
            self._complain(what)
