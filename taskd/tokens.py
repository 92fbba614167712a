"""Tokens for the API over HTTPS: who holds one is the user that it was made for. The daemon has a file with what it
needs to recognise them, and nothing to make them from: the SHA-256 of each, which for 256 random bits cannot be turned
round.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from taskd.errors import ConfigError, NotFound
from taskd.private_files import directory_lock, read_private, save_private

Role = Literal["user", "admin", "read-only"]

PREFIX = "taskd_"  # So that tools that look for leaked secrets, and people, know one.
SECRET_BYTES = 32
TOKENS_MAX = 1000


class Token(Struct, frozen=True):
    """One token. `user` owns the tasks submitted with it; `expires_s` is UTC, 0 for never; `sha256` is hexadecimal."""

    name: str
    user: str
    role: Role
    made_s: float
    expires_s: float
    sha256: str

    def is_over(self, now_s: float) -> bool:
        """Whether it has expired."""
        return bool(self.expires_s) and self.expires_s <= now_s


_decode = msgspec.json.Decoder(list[Token]).decode


def digest(secret: str) -> str:
    """By what a token is recognised."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


class TokenFile:
    """The tokens of one daemon. Changes are whole or not at all, and come one after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> list[Token]:
        """All tokens, in the order in which they were made. Raises ConfigError."""
        text = read_private(self.path)
        if text is None:
            return []
        try:
            return _decode(text)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{self.path} is no file of tokens: {error}") from None

    def make(self, name: str, user: str, role: Role, now_s: float, expires_s: float) -> str:
        """Make a token; returns its secret, which is written nowhere. Raises ConfigError, also where the name is taken
        by one that has not expired."""
        secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
        with directory_lock(self.path.parent):
            tokens = [token for token in self.load() if not token.is_over(now_s)]
            if any(token.name == name for token in tokens):
                raise ConfigError(f"there is a token {name!r} already: revoke it first, or choose another name")
            if len(tokens) >= TOKENS_MAX:
                raise ConfigError(f"there are {TOKENS_MAX} tokens already: revoke some")
            self._save([*tokens, Token(name, user, role, now_s, expires_s, digest(secret))])
        return secret

    def revoke(self, name: str) -> None:
        """Forget a token. Raises NotFound, ConfigError."""
        with directory_lock(self.path.parent):
            tokens = self.load()
            left = [token for token in tokens if token.name != name]
            if len(left) == len(tokens):
                known = ", ".join(token.name for token in tokens) or "none"
                raise NotFound(f"there is no token {name!r}; there are: {known}")
            self._save(left)

    def _save(self, tokens: list[Token]) -> None:
        save_private(self.path, msgspec.json.format(msgspec.json.encode(tokens)).decode(), force=True)
