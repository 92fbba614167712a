"""Peers of the version before ours: what they are sent is what they know, and what they send is understood."""

from __future__ import annotations

import msgspec
import pytest
from msgspec import Struct

from taskd.errors import Refused
from taskd.protocol import messages as msg
from taskd.protocol.frames import encode
from taskd.protocol.versions import (
    ADDED_FIELDS,
    NEWEST_VERSION,
    OLDEST_VERSION,
    PROTOCOL_VERSION,
    common_version,
    encode_for_older,
    encoder,
)
from tests.protocol.samples import ONE_OF_EACH

HEAD_BYTES = 4


# The messages of version 1 that have changed since, as they stood there: closed, as all are.
class Old(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=str.lower):
    pass


class Goodbye(Old, frozen=True):
    reason: msg.Text
    taken_by: msg.Name = ""


class Leading(Old, frozen=True):
    term: msg.Term | None
    may_lead: bool = False


class Register(Old, frozen=True):
    offer: msg.Offer
    held: tuple[msg.AttemptKey, ...]
    unacknowledged: tuple[msg.AttemptKey, ...]
    term: msg.Term | None


OLD = {kind.__name__: kind for kind in (Goodbye, Leading, Register)}


@pytest.mark.parametrize("message", ONE_OF_EACH, ids=lambda it: type(it).__name__)
def test_an_older_peer_is_sent_what_it_knows(message):
    body = encode_for_older(message)[HEAD_BYTES:]
    kind = OLD.get(type(message).__name__, type(message))
    found = msgspec.msgpack.decode(body, type=kind)
    assert all(getattr(found, name) == getattr(message, name) for name in kind.__struct_fields__)


def test_an_older_peer_would_not_take_what_is_new():
    with pytest.raises(msgspec.ValidationError, match="length"):
        msgspec.msgpack.decode(encode(msg.Goodbye("bye", "", True))[HEAD_BYTES:], type=Goodbye)


@pytest.mark.parametrize("kind", ADDED_FIELDS[PROTOCOL_VERSION], ids=lambda it: it.__name__)
def test_what_an_older_peer_sends_means_what_it_meant(kind):
    """Fields are added at the end, and have defaults: so what lacks them can be read."""
    added = kind.__struct_fields__[-ADDED_FIELDS[PROTOCOL_VERSION][kind] :]
    (sample,) = (it for it in ONE_OF_EACH if type(it) is kind)
    body = encode_for_older(sample)[HEAD_BYTES:]
    found = msgspec.msgpack.decode(body, type=kind)
    defaults = dict(
        zip(kind.__struct_fields__[-len(kind.__struct_defaults__) :], kind.__struct_defaults__, strict=True)
    )
    assert {name: getattr(found, name) for name in added} == {name: defaults[name] for name in added}


def test_hello_never_changes():
    """A version that cannot be told cannot be refused with a reason."""
    assert msg.Hello.__struct_fields__ == ("version", "cluster", "node")
    assert msg.Hello not in ADDED_FIELDS[PROTOCOL_VERSION]
    assert msg.NodeInfo.__struct_fields__ == ("node_id", "name", "roles", "store_id", "boot", "version")
    assert msg.Goodbye.__struct_fields__[0] == "reason"


def test_the_newer_one_adapts():
    assert common_version(OLDEST_VERSION) == OLDEST_VERSION
    assert common_version(PROTOCOL_VERSION) == common_version(NEWEST_VERSION) == PROTOCOL_VERSION
    assert encoder(PROTOCOL_VERSION) is encode
    assert encoder(OLDEST_VERSION) is encode_for_older


@pytest.mark.parametrize(
    ("version", "where"), [(OLDEST_VERSION - 1, "there"), (0, "there"), (NEWEST_VERSION + 1, "here")]
)
def test_others_are_told_who_is_to_be_upgraded(version, where):
    with pytest.raises(Refused, match=f"upgrade taskd {where}"):
        common_version(version)
