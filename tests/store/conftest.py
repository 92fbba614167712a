"""Every kind of store, opened as often as a test likes and closed behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from taskd.store.base import Store
from taskd.store.sqlite import SQLiteStore

OpenStore = Callable[[], Store]

STORES: dict[str, Callable[[Path], Store]] = {
    "sqlite": lambda directory: SQLiteStore.open(directory / "taskd.db"),
}


@pytest.fixture(params=STORES)
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenStore]:
    """Opens the same database with every call."""
    opened: list[Store] = []

    def open_one() -> Store:
        store = STORES[request.param](tmp_path)
        opened.append(store)
        return store

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: OpenStore) -> Store:
    return open_store()
