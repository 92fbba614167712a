"""Clusters of real daemons for the tests of this directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cluster import Cluster, cluster


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One scheduler and two workers for tests that leave them as they found them."""
    with cluster(tmp_path_factory.mktemp("shared"), 2, env=HANDLERS) as made:
        yield made


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Cluster]:
    """A directory for a cluster that a test builds and breaks."""
    made = Cluster(tmp_path)
    try:
        yield made
    finally:
        made.close()


HANDLERS = {
    "TASKD_WORKER_HANDLERS": "handlers_for_tests",
    "TASKD_WORKER_HANDLER_PATH": str(Path(__file__).parent),
    "TASKD_WORKER_SLOTS": "2",
}
