"""Proofs of terms: what only a scheduler can make, and a worker can pass on.

A worker knows which leaders it has obeyed, and must be able to tell a stale leader so: it may be the only one that has
met the greater term. But whoever holds a worker key could name terms that never were. So each leader seals its term
with a secret of the schedulers, workers keep the seal beside the term, and schedulers believe a worker what is sealed.
"""

from __future__ import annotations

import hmac
from hashlib import blake2b

from taskd.protocol.messages import Term

SEAL_BYTES = 16


class Seal:
    """Seals terms with the first of these secrets, and knows the seals of all: of the key that is, and of one that is
    being replaced. Each secret has at most 64 bytes."""

    def __init__(self, *secrets: bytes) -> None:
        self._secrets = secrets

    def of(self, term: Term) -> bytes:
        """The proof that a scheduler leads, or led, in this term."""
        return _sealed(term, self._secrets[0])

    def holds(self, term: Term, proof: bytes) -> bool:
        """Whether a scheduler has made this proof."""
        return any(hmac.compare_digest(_sealed(term, secret), proof) for secret in self._secrets)


def _sealed(term: Term, secret: bytes) -> bytes:
    words = b"".join(number.to_bytes(8, "big") for number in (term.epoch, term.node_id, term.boot))
    return blake2b(words, digest_size=SEAL_BYTES, key=secret, person=b"taskd term").digest()
