"""Makes hostile frames: real messages of every kind, taken apart, changed in their structure, and put together."""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec

from taskd.protocol import messages as msg
from taskd.protocol.frames import encode
from tests.protocol.samples import ONE_OF_EACH

NUMBERS = (
    0, 1, -1, 2, 127, 128, 255, 256, 1 << 16, 1 << 20, (1 << 31) - 1, 1 << 32, (1 << 47), (1 << 48) - 1, 1 << 48,
    (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63),
)  # fmt: skip
FLOATS = (0.0, -0.0, 1e308, -1e308, float("inf"), float("-inf"), float("nan"), 5e-324, 1.7e9)
TEXTS = ("", "x", "\x00", "\u202e", "x" * 255, "x" * 256, "../" * 20, "\ud83d".encode("utf-16", "surrogatepass").hex())
BYTES = (b"", b"\x00", bytes(15), bytes(16), bytes(17), b"\xff" * 16, b"\xc1", b"\x93\xc4", bytes(3000))


class Mutator:
    """One source of hostile messages, drawn from one number. `words` are values that mean something to who hears them:
    terms, ids and keys that are in use. A gentle one changes little: most of what it makes is understood."""

    def __init__(
        self, random: Random, samples: tuple[msg.Message, ...] = ONE_OF_EACH, *, is_gentle: bool = False
    ) -> None:
        self.random = random
        self.words: list[Any] = []
        self._is_gentle = is_gentle
        self._trees = [msgspec.msgpack.decode(encode(message)[4:]) for message in samples]

    def message(self) -> Any:
        """A message as a tree: a list of a name and fields, mostly of the right form."""
        random = self.random
        tree = _copy(random.choice(self._trees))
        for _ in range(random.choice((1, 1, 2, 3, 4) if self._is_gentle else (0, 1, 1, 1, 2, 2, 3, 8))):
            tree = self._change(tree)
        return tree

    def frame(self) -> bytes:
        """A message as bytes, now and then damaged as such."""
        random = self.random
        body = bytearray(msgspec.msgpack.encode(self.message()))
        size = len(body)
        if not self._is_gentle and random.random() < 0.15:
            for _ in range(random.randint(1, 4)):
                self._damage(body)
            size = len(body)
        if not self._is_gentle and random.random() < 0.03:
            size = random.choice((0, 1, size + 1, max(size - 1, 0), 16 << 20, (16 << 20) + 1, (1 << 32) - 1))
        return size.to_bytes(4, "big") + bytes(body)

    def _damage(self, body: bytearray) -> None:
        random = self.random
        place = random.randrange(len(body) + 1)
        kind = random.randrange(4)
        if kind == 0 and body:
            body[place % len(body)] ^= 1 << random.randrange(8)
        elif kind == 1:
            body[place:place] = random.randbytes(random.randint(1, 6))
        elif kind == 2:
            del body[place : place + random.randint(1, 8)]
        else:
            body[place:place] = random.choice((b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\x91" * 600))

    def _change(self, tree: Any) -> Any:
        """The same tree with one place changed."""
        random = self.random
        path: list[tuple[list[Any], int]] = []
        here = tree
        while isinstance(here, list) and here and (len(path) < 1 or random.random() < 0.75):
            place = random.randrange(len(here))
            path.append((here, place))
            here = here[place]
        if not path:
            return tree
        parent, place = path[-1]
        if place == 0 and len(path) == 1 and self._is_gentle:
            return tree
        kind = random.randrange(60 if self._is_gentle else 8)
        if kind <= 3 or kind >= 8:
            parent[place] = self._other(parent[place])
        elif kind == 4:
            parent.insert(place, _copy(parent[place]))
        elif kind == 5:
            del parent[place]
        elif kind == 6:
            parent[place] = self._piece()
        else:
            parent[place] = [_copy(parent[place])] * random.choice((0, 1, 2, 50))
        return tree

    def _other(self, value: Any) -> Any:
        """Another value of the same kind, or one that is in use."""
        random = self.random
        if self.words and random.random() < 0.6:
            alike = [word for word in random.sample(self.words, min(8, len(self.words))) if type(word) is type(value)]
            if isinstance(value, list):
                alike = [word for word in alike if len(word) == len(value)]
            if alike:
                return _copy(alike[0])
        if isinstance(value, bool) or value is None:
            return random.choice((True, False, None, 0))
        if isinstance(value, int):
            number = random.choice((random.choice(NUMBERS), value + 1, value - 1))
            return max(-(1 << 63), min(number, (1 << 64) - 1))
        if isinstance(value, float):
            return random.choice(FLOATS)
        if isinstance(value, str):
            return random.choice(TEXTS)
        if isinstance(value, bytes):
            return random.choice(BYTES)
        return [] if self._is_gentle else self._piece()

    def _piece(self) -> Any:
        """A part of some other message, or a value out of place."""
        random = self.random
        if random.random() < 0.3:
            return random.choice((*NUMBERS[:8], *TEXTS[:3], None, [], {}, {"a": 1}, b"x", 1.5, [[[]]]))
        here = random.choice(self._trees)
        while isinstance(here, list) and here and random.random() < 0.8:
            here = random.choice(here)
        return _copy(here)


def _copy(tree: Any) -> Any:
    return [_copy(item) for item in tree] if isinstance(tree, list) else tree
