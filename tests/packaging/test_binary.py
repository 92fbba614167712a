"""The self-contained executable, in a root directory without Python: nothing there but the C library and zlib.

Building takes most of a minute, so the tests take what `make binary` has built, which .ci/run does before them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskd.version import VERSION
from tests.integration.cluster import eventually
from tests.packaging.bare_root import BareDaemon, BareRoot

ROOT = Path(__file__).parents[2]
FILE, FOLDER = ROOT / "dist" / "taskd", ROOT / "dist" / "taskd-folder"

HANDLERS = """
import multiprocessing, os, sqlite3, ssl, sys, zoneinfo
import xml.etree.ElementTree as tree
from taskd import task

@task("describe")
def describe(name: str) -> dict:
    root = tree.fromstring("<a><b/></a>")
    two = sqlite3.connect(":memory:").execute("SELECT 1 + 1").fetchone()[0]
    return {"hello": name, "uid": os.getuid(), "two": two, "tag": root[0].tag, "names": sorted(os.environ)}

def square(number: int) -> int:
    return number * number

@task("squares")
def squares(numbers: list[int]) -> list[int]:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        return pool.map(square, numbers)
"""


TASKS_UID = 4242


def with_handlers(root: BareRoot) -> dict[str, str]:
    """The settings of a worker with HANDLERS, which are put there."""
    modules = root.path / "work" / "modules"
    modules.mkdir()
    (modules / "mine.py").write_text(HANDLERS)
    return {"TASKD_WORKER_HANDLERS": "mine", "TASKD_WORKER_HANDLER_PATH": "/work/modules"}


def why_not() -> str:
    """Why the tests cannot run here; empty where they can."""
    if not (FILE.exists() and FOLDER.exists()):
        return "there is no dist/taskd: make binary"
    newest = max(path.stat().st_mtime for path in (ROOT / "taskd").rglob("*") if path.suffix in (".py", ".sql"))
    if FILE.stat().st_mtime < newest:
        return "dist/taskd is older than the code: make binary"
    if sys.platform != "linux" or os.geteuid() != 0:
        return "changing the root directory needs root"
    return ""


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture(params=["file", "folder"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BareRoot]:
    """A bare root with the executable in it."""
    bare = BareRoot(tmp_path / "root")
    try:
        program = bare.path / "usr/bin/taskd"
        if request.param == "file":
            shutil.copy2(FILE, program)
        else:
            shutil.copytree(FOLDER, bare.path / "opt", symlinks=True)
            program.symlink_to("/opt/taskd")
        yield bare
    finally:
        bare.close()


def test_it_does_everything_without_python(root):
    assert root.taskd("--version").stdout == f"taskd {VERSION}\n"
    daemon = BareDaemon(root, with_handlers(root))
    try:
        daemon.start()
        unpacked = sorted(os.listdir(root.path / "tmp"))
        assert len(unpacked) <= 1  # Its own processes use what it has unpacked itself.

        submitted = root.taskd("submit", "-q", "--", "/usr/bin/taskd", "--version")
        assert submitted.returncode == 0, submitted.stderr
        assert daemon.wait([submitted.stdout.strip()])[submitted.stdout.strip()]["state"] == "succeeded"
        ran = root.taskd("run", "--", "/usr/bin/taskd", "--version")
        assert (ran.returncode, ran.stdout) == (0, f"taskd {VERSION}\n"), ran.stderr
        assert root.taskd("run", "--", "/usr/bin/taskd", "nonsense").returncode == 2

        described = root.taskd("submit", "--type", "describe", "--params", '{"name": "Ada"}', "--wait", "--json")
        assert described.returncode == 0, described.stderr + daemon.log.read_text()
        result = json.loads(described.stdout)["result"]
        assert (result["hello"], result["two"], result["tag"]) == ("Ada", 2, "b")
        assert not [name for name in result["names"] if name.startswith(("LD_", "_PYI"))]

        squared = root.taskd("submit", "--type", "squares", "--params", '{"numbers": [1, 2, 3]}', "--wait", "--json")
        assert squared.returncode == 0, squared.stderr
        assert json.loads(squared.stdout)["result"] == [1, 4, 9]
    finally:
        assert daemon.stop() == 0
    assert os.listdir(root.path / "tmp") == []


@pytest.mark.parametrize("root", ["file"], indirect=True)
def test_another_users_handlers_run_and_a_killed_loader_takes_its_daemon_along(root):
    """That user cannot read what root has unpacked: its processes unpack themselves, below a loader of their own."""
    (root.path / "etc").mkdir()
    (root.path / "etc/passwd").write_text(f"root:x:0:0::/:/bin/sh\ntasks:x:{TASKS_UID}:{TASKS_UID}::/tmp:/bin/sh\n")
    (root.path / "etc/group").write_text(f"root:x:0:\ntasks:x:{TASKS_UID}:\n")
    daemon = BareDaemon(root, {**with_handlers(root), "TASKD_WORKER_TASK_USER": "tasks"})
    daemon.start()
    described = root.taskd("submit", "--type", "describe", "--params", '{"name": "Ada"}', "--wait", "--json")
    assert described.returncode == 0, described.stderr + daemon.log.read_text()
    assert json.loads(described.stdout)["result"]["uid"] == TASKS_UID
    assert daemon.process is not None
    children = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children").read_text().split()
    assert len(children) == 1
    os.kill(daemon.process.pid, signal.SIGKILL)
    daemon.wait_exit()
    eventually(lambda: not Path(f"/proc/{children[0]}").exists())
    assert "stopped" in daemon.log.read_text()
