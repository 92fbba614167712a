"""What this machine can give to tasks: processors, memory, GPUs and labels, found where the settings leave them open.

Control groups count: in a container or under a service's limits, a share of the machine is all there is. Their usual
mount points are assumed.
"""

from __future__ import annotations

import os
import platform
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from taskd.config import WorkerSettings
from taskd.core.task import units
from taskd.protocol.messages import HandlerInfo, Offer

PIDS_DEFAULT = 32_768  # The kernel's own limit where nothing says another.
_NVIDIA = re.compile(r"nvidia\d+")
_V1_MEMORY_UNLIMITED = 1 << 60  # "No limit" is a number near 2**63 there, rounded to pages.


def offer(settings: WorkerSettings, handlers: tuple[HandlerInfo, ...], root: Path = Path("/")) -> Offer:
    """What the worker offers. `root` stands in for the machine's file system in tests."""
    cpus = settings.cpus or usable_cpus(root)
    memory = settings.memory or usable_memory_bytes(root)
    gpus = settings.gpus or gpu_count(root)
    capacity = {"cpus": units(cpus), "memory": memory * 1000, "pids": units(usable_pids(root))}
    if gpus:
        capacity["gpus"] = units(gpus)
    capacity.update((name, units(amount)) for name, amount in settings.resources.items())
    labels = default_labels(root) | settings.labels
    return Offer(settings.slots or max(1, int(cpus)), capacity, labels, settings.types, handlers)


def usable_cpus(root: Path = Path("/")) -> float:
    """The processors that we may use: those we may run on, or the control group's quota where that is less."""
    quotas = [
        quota
        for directory in _groups(root, "cpu")
        if (quota := _quota_v2(directory / "cpu.max") or _quota_v1(directory)) is not None
    ]
    return min([float(len(os.sched_getaffinity(0))), *quotas])


def usable_memory_bytes(root: Path = Path("/")) -> int:
    """The machine's memory, or the control group's limit where that is less."""
    sizes = [
        limit
        for directory in _groups(root, "memory")
        for name in ("memory.max", "memory.limit_in_bytes")
        if (limit := _number(_read(directory / name))) is not None and limit < _V1_MEMORY_UNLIMITED
    ]
    total = re.search(r"^MemTotal:\s+(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE)
    if total is not None:
        sizes.append(int(total[1]) * 1024)
    return min(sizes, default=0)


def usable_pids(root: Path = Path("/")) -> int:
    """How many processes and threads there can be: the machine's limit, or the control group's where that is less."""
    limits = [
        limit
        for path in (root / "proc/sys/kernel/pid_max", *(directory / "pids.max" for directory in _groups(root, "pids")))
        if (limit := _number(_read(path))) is not None
    ]
    return min(limits, default=PIDS_DEFAULT)


def gpu_count(root: Path = Path("/")) -> int:
    """How many devices of NVIDIA's driver there are."""
    try:
        return sum(1 for name in os.listdir(root / "dev") if _NVIDIA.fullmatch(name))
    except OSError:
        return 0


def default_labels(root: Path = Path("/")) -> dict[str, str]:
    """What every worker can be chosen by."""
    release = re.search(r'^ID="?([\w.-]+)"?$', _read(root / "etc/os-release"), re.MULTILINE)
    labels = {
        "host": socket.gethostname(),
        "os": platform.system().lower(),
        "distro": release[1] if release is not None else "",
        "arch": platform.machine(),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }
    return {name: value[:255] for name, value in labels.items() if value}


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The directories of our control group and of those above it: each of them may set a limit. A container may not see
    its own path below the mount point; then what is there is its own."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controllers
            if not mount.is_dir():
                mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        directory = mount / path.strip("/")
        yield directory
        while directory not in (mount, directory.parent):
            directory = directory.parent
            yield directory


def _quota_v2(path: Path) -> float | None:
    """cpu.max: "quota period" in microseconds; "max" where there is none."""
    quota, _, period = _read(path).partition(" ")
    return _share(quota, period)


def _quota_v1(directory: Path) -> float | None:
    """The same in two files; -1 where there is none."""
    return _share(_read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us"))


def _share(quota_text: str, period_text: str) -> float | None:
    quota, period = _number(quota_text), _number(period_text)
    return quota / period if quota and period else None


def _number(text: str) -> int | None:
    """A count; None for "max", -1, or nothing."""
    return int(text) if text.strip().isdecimal() else None


def _read(path: Path) -> str:
    """A small file's text, empty where it cannot be read: what the kernel does not say counts as no limit."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
