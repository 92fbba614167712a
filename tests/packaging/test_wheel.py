"""The wheel and the source distribution: nothing is missing in them, and what is installed from them runs."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from taskd.version import VERSION
from tests.integration.cluster import LOOPBACK, Daemon

ROOT = Path(__file__).parents[2]
DATA_SUFFIXES = {".sql", ".typed", ".service", ".conf", ".toml", ".socket", ".timer", ".html", ".js", ".css", ".svg"}


def run(*command: object) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, and the source distribution that it was built from; by the files that git has, as a release is."""
    directory = tmp_path_factory.mktemp("built")
    source = directory / "source"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    for name in filter(None, listed):
        if not (ROOT / name).exists() and not (ROOT / name).is_symlink():
            continue  # Removed, and not committed yet.
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        else:
            target.write_bytes((ROOT / name).read_bytes())
    code = "import sys; from setuptools import build_meta as b; print(b.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(directory)], cwd=source, capture_output=True, check=True)
    sdist = next(directory.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(directory / "unpacked", filter="data")
    unpacked = next((directory / "unpacked").iterdir())
    code = code.replace("build_sdist", "build_wheel")
    subprocess.run([sys.executable, "-c", code, str(directory)], cwd=unpacked, capture_output=True, check=True)
    return next(directory.glob("*.whl")), sdist


def packaged() -> set[str]:
    """All files of the package that are code or data."""
    found = (path for path in (ROOT / "taskd").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in found if path.suffix in DATA_SUFFIXES | {".py"}}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no checkout of git")
def test_nothing_is_missing_and_it_runs(built: tuple[Path, Path], tmp_path: Path) -> None:
    wheel, sdist = built
    with zipfile.ZipFile(wheel) as archive:
        assert packaged() - set(archive.namelist()) == set()
        assert not any(archive.getinfo(name).file_size == 0 for name in packaged() if name.endswith(".toml"))
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert packaged() | {"LICENSE", "README.md", "pyproject.toml"} <= names

    # Its dependencies are those of this interpreter; itself comes from the wheel alone.
    place = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", place)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = place / "bin" / "python"
    where = subprocess.run(
        [python, "-P", "-c", "import taskd; print(taskd.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(packages))

    node = Daemon(tmp_path / "node", tmp_path / "key", "scheduler,worker", env={**LOOPBACK, "TASKD_NETWORK_MDNS": "0"})
    node._command = [str(python), "-P", "-m", "taskd", *node._command[3:]]
    node.start()
    try:
        view = node.ok("GET", "/v1/cluster")
        assert view["version"] == VERSION
        results = node.wait(node.submit({"type": "command", "argv": ["true"]}))
        assert [result["state"] for result in results.values()] == ["succeeded"]
    finally:
        assert node.stop() == 0
