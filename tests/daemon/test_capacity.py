"""What a machine offers: found in the files of a kernel, with control groups, or set."""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path

import pytest

from taskd.config import Config, WorkerSettings, load
from taskd.core.constraints import matches, parse
from taskd.daemon.capacity import default_labels, gpu_count, offer, usable_cpus, usable_memory_bytes, usable_pids
from taskd.protocol.messages import HandlerInfo

MIB = 1 << 20
AFFINITY = len(os.sched_getaffinity(0))


@pytest.fixture
def machine(tmp_path: Path):
    """Makes a root with these files in it."""

    def machine(files: dict[str, str] | None = None) -> Path:
        for name, text in {"proc/meminfo": "MemTotal:       1048576 kB\nMemFree: 1 kB\n", **(files or {})}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return machine


def test_a_plain_machine_offers_all_of_it(machine):
    root = machine({"proc/self/cgroup": "0::/user.slice\n", "sys/fs/cgroup/user.slice/cpu.max": "max 100000\n"})
    assert usable_cpus(root) == AFFINITY
    assert usable_memory_bytes(root) == 1024 * MIB


def test_the_tightest_group_above_us_counts(machine):
    root = machine(
        {
            "proc/self/cgroup": "0::/system.slice/taskd.service/daemon\n",
            "sys/fs/cgroup/system.slice/cpu.max": "25000 100000\n",
            "sys/fs/cgroup/system.slice/memory.max": f"{512 * MIB}\n",
            "sys/fs/cgroup/system.slice/taskd.service/cpu.max": "50000 100000\n",
            "sys/fs/cgroup/system.slice/taskd.service/memory.max": f"{256 * MIB}\n",
            "sys/fs/cgroup/system.slice/taskd.service/daemon/memory.max": "max\n",
        }
    )
    assert usable_cpus(root) == 0.25
    assert usable_memory_bytes(root) == 256 * MIB


def test_a_container_that_cannot_see_its_path_finds_its_limits_at_the_top(machine):
    root = machine(
        {
            "proc/self/cgroup": "0::/docker/abc\n",
            "sys/fs/cgroup/cpu.max": "50000 100000\n",
            "sys/fs/cgroup/memory.max": f"{64 * MIB}\n",
        }
    )
    assert usable_cpus(root) == 0.5
    assert usable_memory_bytes(root) == 64 * MIB


def test_version_1_groups_count_too(machine):
    root = machine(
        {
            "proc/self/cgroup": "9:name=systemd:/\n4:memory:/box\n2:cpu,cpuacct:/box\n1:freezer:/x\n0::/\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "75000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{128 * MIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        }
    )
    assert usable_cpus(root) == 0.75
    assert usable_memory_bytes(root) == 128 * MIB


def test_files_that_make_no_sense_set_no_limit(machine):
    root = machine(
        {
            "proc/self/cgroup": "0::/a\nrubbish\n",
            "sys/fs/cgroup/a/cpu.max": "\n",
            "sys/fs/cgroup/cpu.max": "100000 0\n",
            "sys/fs/cgroup/a/memory.max": "much\n",
        }
    )
    assert usable_cpus(root) == AFFINITY
    assert usable_memory_bytes(root) == 1024 * MIB


def test_no_limit_is_no_size(machine):
    root = machine(
        {
            "proc/self/cgroup": "4:memory:/\n",
            "proc/meminfo": "",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        }
    )
    assert usable_memory_bytes(root) == 0


def test_gpus_are_counted_by_their_devices(machine):
    root = machine({"dev/nvidia0": "", "dev/nvidia1": "", "dev/nvidiactl": "", "dev/nvidia-uvm": "", "dev/null": ""})
    assert gpu_count(root) == 2
    assert offer(WorkerSettings(), (), root).capacity["gpus"] == 2000
    assert gpu_count(root / "nowhere") == 0


def test_every_worker_has_labels_to_be_chosen_by(machine):
    labels = default_labels(machine({"etc/os-release": 'NAME="Debian"\nVERSION_ID="12"\nID=debian\n'}))
    assert labels["host"] == socket.gethostname()
    assert (labels["os"], labels["distro"], labels["arch"]) == ("linux", "debian", platform.machine())
    assert matches(parse(f"python={labels['python']}"), labels)


def test_processes_are_limited_by_the_machine_and_by_the_group(machine):
    files = {"proc/self/cgroup": "0::/box\n", "proc/sys/kernel/pid_max": "4194304\n"}
    assert usable_pids(machine(files)) == 4194304
    assert usable_pids(machine({**files, "sys/fs/cgroup/box/pids.max": "500\n"})) == 500
    assert usable_pids(machine({**files, "sys/fs/cgroup/box/pids.max": "max\n"})) == 4194304
    settings = load(Path("/dev/null"), {}, {"worker.resources": {"pids": 50}}).worker
    assert offer(settings, (), machine(files)).capacity["pids"] == 50_000, "the operator's word counts"


def test_an_unknown_distribution_has_no_label(machine):
    assert "distro" not in default_labels(machine())


def test_what_is_found_becomes_the_offer(machine):
    root = machine({"proc/self/cgroup": "0::/\n"})
    handler = HandlerInfo("resize", b"{}")
    found = offer(Config().worker, (handler,), root)
    assert found.slots == AFFINITY
    assert found.capacity == {"cpus": AFFINITY * 1000, "memory": 1024 * MIB * 1000, "pids": 32_768_000}
    assert found.types == ("command", "http")
    assert found.handlers == (handler,)


def test_what_is_set_counts_over_what_is_found(machine):
    settings = load(
        Path("/dev/null"),
        {},
        {
            "worker.cpus": 2.5, "worker.memory": "2GiB", "worker.gpus": 0.5, "worker.resources": {"tape": 2},
            "worker.labels": {"room": "b12", "host": "other"}, "worker.types": ["http"],
        },
    ).worker  # fmt: skip
    found = offer(settings, (), machine({"dev/nvidia0": ""}))
    assert found.slots == 2  # one for each whole cpu
    pids = 32_768_000
    assert found.capacity == {"cpus": 2500, "memory": (2 << 30) * 1000, "pids": pids, "gpus": 500, "tape": 2000}
    assert (found.labels["room"], found.labels["host"]) == ("b12", "other")
    assert found.types == ("http",)
    assert offer(WorkerSettings(slots=7), (), machine()).slots == 7


def test_half_a_processor_is_still_one_slot(machine):
    assert offer(WorkerSettings(cpus=0.5), (), machine()).slots == 1


def test_this_machine_has_something_to_offer():
    found = offer(WorkerSettings(), ())
    assert found.slots >= 1
    assert 0 < found.capacity["cpus"] <= AFFINITY * 1000
    assert found.capacity["memory"] > 0
