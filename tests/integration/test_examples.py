"""The examples do what they say."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cluster import Cluster, cluster

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    settings = {"TASKD_WORKER_HANDLERS": "words", "TASKD_WORKER_HANDLER_PATH": str(EXAMPLES / "handlers")}
    with cluster(tmp_path_factory.mktemp("examples"), 1, env=settings) as made:
        yield made


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    command = [sys.executable, str(EXAMPLES / "microservice" / "handler.py"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
        process.terminate()


def test_the_handlers(made: Cluster, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("the cat and the dog and the bird\n")
    params = {"path": str(text)}
    (count,) = made.head.ok("POST", "/v1/tasks?wait=30", {"type": "count_words", "params": params})["results"]
    assert count["result"] == 8
    (frequent,) = made.head.ok("POST", "/v1/tasks?wait=30", {"type": "frequent_words", "params": params})["results"]
    assert frequent["result"] == {"the": 3, "and": 2, "cat": 1, "dog": 1, "bird": 1}


def test_the_microservice(made: Cluster, service: str) -> None:
    call = {"type": "http", "http": {"url": f"{service}/execute"}, "params": {"text": "some words"}}
    (good,) = made.head.ok("POST", "/v1/tasks?wait=30", call)["results"]
    assert good["result"] == {"length": 10, "sha256": hashlib.sha256(b"some words").hexdigest()}
    (bad,) = made.head.ok("POST", "/v1/tasks?wait=30", {**call, "params": {"txt": "?"}})["results"]
    assert (bad["state"], bad["error"]["type"]) == ("failed", "KeyError")
