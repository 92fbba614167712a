"""Fixtures of the network tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.net.peers import Peers


@pytest.fixture
async def peers() -> AsyncIterator[Peers]:
    made = Peers()
    yield made
    await made.close()
