"""Which versions of the protocol we speak, and how we speak to a peer of the one before ours. Pure.

A node serves the version before its own, so that a cluster can be upgraded node by node. Of two nodes the newer one
adapts: it is the one that knows both. What a new version may do is little, and that keeps this short:

- add fields at the end of messages, with defaults that mean what the message meant without them. To an older peer they
  are left out, and what comes from it has the defaults;
- allow more, or less, of what nobody sends.

`Hello`, and `Goodbye` up to its reason, stay the same for ever: they are said before a side knows the other's version.
"""

from __future__ import annotations

from collections.abc import Callable

from taskd.errors import Refused
from taskd.protocol import frames
from taskd.protocol.messages import PROTOCOL_VERSION, Goodbye, Leading, Message, Register

OLDEST_VERSION = PROTOCOL_VERSION - 1
NEWEST_VERSION = PROTOCOL_VERSION + 1  # Which serves us, as we serve the one before ours.

# By the version that added them: how many fields at the end of a message. Entries older than PROTOCOL_VERSION go.
ADDED_FIELDS: dict[int, dict[type[Message], int]] = {
    2: {Goodbye: 1, Leading: 1, Register: 1},  # is_copy, proof, proof
}

Encode = Callable[[Message], bytes]


def common_version(theirs: int) -> int:
    """The version to speak with a peer of this one. Raises Refused, with who is to be upgraded."""
    if theirs < OLDEST_VERSION:
        raise Refused(
            f"speaks version {theirs} of the protocol, and we serve {OLDEST_VERSION} and newer: upgrade taskd there"
        )
    if theirs > NEWEST_VERSION:
        raise Refused(f"speaks version {theirs} of the protocol, and we know {PROTOCOL_VERSION}: upgrade taskd here")
    return min(theirs, PROTOCOL_VERSION)


def encoder(version: int) -> Encode:
    """Makes frames for a peer with whom this version is spoken, PROTOCOL_VERSION or OLDEST_VERSION."""
    return frames.encode if version == PROTOCOL_VERSION else encode_for_older


def encode_for_older(message: Message) -> bytes:
    """The frame of a message as the version before ours has it. Raises ProtocolError where it would be too large."""
    surplus = ADDED_FIELDS[PROTOCOL_VERSION].get(type(message), 0)
    return frames.encode_without(message, surplus) if surplus else frames.encode(message)
