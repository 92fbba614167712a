"""Control groups, on a tree of plain files that behaves like the kernel's as far as it is used."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from taskd.core.task import Outcome
from taskd.runner.cgroup import Cgroups, Limits, delegated
from tests.runner.stage import Stage

FILES = {
    "cgroup.type": "domain\n",
    "cgroup.procs": "",
    "cgroup.controllers": "cpuset cpu io memory pids\n",
    "cgroup.subtree_control": "",
    "cgroup.events": "populated 0\nfrozen 0\n",
    "cgroup.kill": "",
    "cpu.stat": "usage_usec 2500000\nuser_usec 2000000\n",
    "cpu.max": "max 100000\n",
    "cpu.weight": "",
    "memory.events": "low 0\noom 0\noom_kill 0\n",
    "memory.max": "",
    "memory.oom.group": "",
    "memory.peak": "123456789\n",
    "memory.swap.max": "",
    "pids.max": "",
}


class Kernel:
    """Fills in a new group's files when its directory is made, and removes them with it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.membership = root.parent / "membership"
        self.removed: dict[str, dict[str, str]] = {}
        self._mkdir, self._rmdir = os.mkdir, os.rmdir
        monkeypatch.setattr(os, "mkdir", self.mkdir)
        monkeypatch.setattr(os, "rmdir", self.rmdir)

    def mkdir(self, path: str | Path, mode: int = 0o777) -> None:
        self._mkdir(path, mode)
        if Path(path).is_relative_to(self.root):
            for name, text in FILES.items():
                Path(path, name).write_text(text)

    def rmdir(self, path: str | Path, *, dir_fd: int | None = None) -> None:
        if Path(path).is_relative_to(self.root):
            self.removed[Path(path).name] = {file.name: file.read_text() for file in Path(path).iterdir()}
            for file in Path(path).iterdir():
                file.unlink()
        self._rmdir(path, dir_fd=dir_fd)

    def group(self, path: str) -> Path:
        """A group that is there, with this process in it."""
        os.makedirs(self.root / path, exist_ok=True)
        (self.root / path / "cgroup.procs").write_text(f"{os.getpid()}\n")
        self.membership.write_text(f"12:pids:/x\n0::/{path}\n")
        return self.root / path

    def delegated(self) -> Cgroups | str:
        return delegated(self.root, self.membership)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel(tmp_path / "cgroup", monkeypatch)
    kernel.group("")
    return kernel


def _mark(path: Path) -> None:
    try:
        os.setxattr(path, "user.delegate", b"1")
    except OSError:
        pytest.skip("this file system keeps no attributes")


def test_limits_follow_from_what_a_task_asks_for() -> None:
    assert Limits.of({"memory": (256 << 20) * 1000, "cpus": 1500, "pids": 20_000}) == Limits(256 << 20, 1.5, 20)
    assert Limits.of({"cpus": 500}) == Limits(cpus=0.5)
    assert Limits.of({"gpus": 1000, "cpus": 0}) is None
    assert Limits.of({}) is None


def test_root_of_a_container_is_ours(kernel: Kernel) -> None:
    cgroups = kernel.delegated()
    assert isinstance(cgroups, Cgroups)
    assert cgroups.controllers == {"cpu", "memory", "pids"}
    assert (kernel.root / "daemon" / "cgroup.procs").read_text() == str(os.getpid())
    assert (kernel.root / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"


def test_delegated_unit_is_ours_and_cleared(kernel: Kernel) -> None:
    unit = kernel.group("system.slice/taskd.service")
    assert "is not delegated" in str(kernel.delegated())
    _mark(unit)
    os.mkdir(unit / "attempt-old")
    cgroups = kernel.delegated()
    assert isinstance(cgroups, Cgroups)
    assert cgroups.path == unit
    assert kernel.removed["attempt-old"]["cgroup.kill"] == "1"


def test_daemon_that_was_started_anew_finds_its_unit(kernel: Kernel) -> None:
    unit = kernel.group("system.slice/taskd.service")
    _mark(unit)
    kernel.group("system.slice/taskd.service/daemon")
    cgroups = kernel.delegated()
    assert isinstance(cgroups, Cgroups)
    assert cgroups.path == unit


def test_what_is_not_ours_is_left_alone(kernel: Kernel, tmp_path: Path) -> None:
    before = sorted(kernel.root.rglob("*"))
    (kernel.root / "cgroup.procs").write_text(f"{os.getpid()}\n1\n")
    assert "shared with other processes" in str(kernel.delegated())
    (kernel.root / "cgroup.procs").write_text("")
    (kernel.root / "cgroup.controllers").write_text("cpuset io\n")
    assert "none of the controllers" in str(kernel.delegated())
    (kernel.root / "cgroup.type").unlink()
    assert "the root of the machine's" in str(kernel.delegated())
    (kernel.root / "cgroup.controllers").unlink()
    assert "no cgroup v2" in str(kernel.delegated())
    kernel.membership.write_text("12:pids:/x\n")
    assert "no cgroup v2" in str(kernel.delegated())
    assert "no control groups" in str(delegated(kernel.root, tmp_path / "none"))
    assert not set(kernel.root.rglob("*")) - set(before)


async def test_limited_task_joins_its_group(kernel: Kernel, tmp_path: Path) -> None:
    cgroups = kernel.delegated()
    assert isinstance(cgroups, Cgroups)
    async with Stage(tmp_path, cgroups=cgroups) as stage:
        resources = {"memory": (64 << 20) * 1000, "cpus": 2000, "pids": 10_000}
        key = stage.start("sh", "-c", "echo $0 $1; exit 5", "zero", "one two", resources=resources)
        end = await stage.end_of(key)
        assert (end.outcome, end.report.exit_code, end.stdout) == (Outcome.EXIT_NONZERO, 5, "zero one two\n")
        assert (end.report.cpu_s, end.report.memory_peak_bytes) == (2.5, 123456789)
        files = kernel.removed[f"attempt-{key.task_id.hex()}-1"]
        assert files["cgroup.procs"] == "0\n", "the task moves itself"
        limits = {name: files[name] for name in ("memory.max", "memory.swap.max", "memory.oom.group")}
        assert limits == {"memory.max": str(64 << 20), "memory.swap.max": "0", "memory.oom.group": "1"}
        assert (files["cpu.weight"], files["cpu.max"], files["pids.max"]) == ("200", "200000 100000", "10")
        kernel.removed.clear()
        assert (await stage.run("true")).outcome is Outcome.OK
        assert kernel.removed == {}, "who asks for nothing gets no group"


async def test_idle_processors_are_shared_where_that_is_wished(kernel: Kernel) -> None:
    cgroups = delegated(kernel.root, kernel.membership, cpus_are_shared=True)
    assert isinstance(cgroups, Cgroups)
    group = cgroups.make("x", Limits(cpus=0.001))
    assert (group.path / "cpu.weight").read_text() == "1"
    assert (group.path / "cpu.max").read_text() == "max 100000\n"
    strict = Cgroups(kernel.root, cgroups.controllers).make("y", Limits(cpus=0.001))
    assert (strict.path / "cpu.max").read_text() == "1000 100000", "the least that the kernel takes"


async def test_oom_kill_in_a_group_is_told(kernel: Kernel, tmp_path: Path) -> None:
    async with Stage(tmp_path, cgroups=Cgroups(kernel.root, frozenset({"memory"}))) as stage:
        script = f"cd {kernel.root}/attempt-*; echo 'oom_kill 1' > memory.events; kill -KILL $$"
        end = await stage.run(shell=script, resources={"memory": 1 << 30})
        assert end.outcome is Outcome.OOM


async def test_kill_and_end_are_the_groups(kernel: Kernel, tmp_path: Path) -> None:
    async with Stage(tmp_path, cgroups=Cgroups(kernel.root, frozenset({"cpu"}))) as stage:
        key = stage.start("sleep", "1000", resources={"cpus": 1000})
        await stage.start_of(key)
        name = f"attempt-{key.task_id.hex()}-1"
        events = kernel.root / name / "cgroup.events"
        events.write_text("populated 1\n")
        stage.kind.kill(key)
        assert (kernel.root / name / "cgroup.kill").read_text() == "1"
        other = await stage.run("true")
        assert key not in stage.ended, "its group is not empty yet"
        assert other.outcome is Outcome.OK
        events.write_text("populated 0\n")
        assert (await stage.end_of(key)).outcome is Outcome.SIGNAL
        assert name in kernel.removed


async def test_limited_task_that_cannot_start_says_why(kernel: Kernel, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("no program")
    resources = {"cpus": 1000}
    async with Stage(tmp_path, cgroups=Cgroups(kernel.root, frozenset({"cpu"}))) as stage:
        missing = await stage.run("no-such-program", resources=resources)
        forbidden = await stage.run("./plain", cwd=str(tmp_path), resources=resources)
        nowhere = await stage.run("true", cwd="/no/such/dir", resources=resources)
        assert {missing.outcome, forbidden.outcome, nowhere.outcome} == {Outcome.SPAWN_FAILED}
        assert "no program 'no-such-program'" in missing.error.message
        assert "Permission denied" in forbidden.error.message
        assert "cannot enter the working directory" in nowhere.error.message
        assert len(kernel.removed) == 3
        shutil.rmtree(kernel.root)
        assert (await stage.run("true", resources=resources)).outcome is Outcome.SPAWN_FAILED


_MOUNTS = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")]
_REAL = next((path for path in _MOUNTS if (path / "cgroup.controllers").exists()), None)


@pytest.mark.skipif(_REAL is None or os.geteuid() != 0, reason="needs root and a mounted cgroup v2")
async def test_real_group_takes_even_untraceable_strays(tmp_path: Path) -> None:
    assert _REAL is not None
    own = _REAL / f"taskd-test-{os.getpid()}"
    own.mkdir()
    try:
        async with Stage(tmp_path, cgroups=Cgroups(own, frozenset())) as stage:
            daemon = "env -i setsid sh -c 'echo up > up; exec sleep 1000'"
            script = f"mkfifo up; {daemon} & read line < up; cat /proc/self/cgroup; exit 3"
            key = stage.start(shell=script, resources={"cpus": 1000})
            end = await stage.end_of(key)
            assert (end.outcome, end.report.exit_code) == (Outcome.EXIT_NONZERO, 3)
            assert f"0::/{own.name}/attempt-{key.task_id.hex()}-1" in end.stdout.split()
            assert end.report.error is None
            assert stage.reaper.strays() == {}
            running = stage.start("sleep", "1000", resources={"cpus": 1000})
            await stage.start_of(running)
            stage.kind.kill(running)
            assert (await stage.end_of(running)).outcome is Outcome.SIGNAL
        assert [path for path in own.iterdir() if path.is_dir()] == []
    finally:
        own.rmdir()
