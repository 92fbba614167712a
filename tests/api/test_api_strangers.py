"""Who has to go where too many wait, and what daemons that start at once make together."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from taskd.api.https import own_certificate, server_context
from taskd.api.strangers import Strangers


def test_the_loudest_address_loses_the_one_that_waits_longest() -> None:
    strangers: Strangers[str] = Strangers(4)
    for guest in ("b1", "a1", "a2", "a3"):
        assert not strangers.is_full
        strangers.add(guest, guest[0])
    assert strangers.is_full
    assert strangers.show_out() == "a1"
    assert not strangers.is_full
    strangers.remove("a2")
    strangers.remove("a2")
    strangers.add("b2", "b")
    assert strangers.show_out() == "b1"
    assert {strangers.show_out(), strangers.show_out()} == {"a3", "b2"}
    with pytest.raises(ValueError, match="empty"):
        strangers.show_out()


def test_daemons_that_start_at_once_make_one_certificate(tmp_path: Path) -> None:
    for number in range(5):
        directory = tmp_path / str(number)
        begin = threading.Barrier(4)

        def make(directory: Path = directory, begin: threading.Barrier = begin) -> None:
            begin.wait()
            own_certificate(directory)

        makers = [threading.Thread(target=make) for _ in range(4)]
        for maker in makers:
            maker.start()
        for maker in makers:
            maker.join()
        server_context(*own_certificate(directory))  # The key is the certificate's.


def test_a_certificate_whose_key_is_gone_is_made_anew(tmp_path: Path) -> None:
    certificate, key = own_certificate(tmp_path)
    before = certificate.read_text()
    key.unlink()
    server_context(*own_certificate(tmp_path))
    assert certificate.read_text() != before
