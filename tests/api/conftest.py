"""What tests of the API share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.fakes import FakeService


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def path() -> Iterator[Path]:
    """Where a socket can be: pytest's own directories are too deep for a socket's address."""
    directory = Path(tempfile.mkdtemp(prefix="taskd-"))
    yield directory / "taskd.sock"
    shutil.rmtree(directory)
