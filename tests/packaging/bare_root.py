"""A root directory with nothing in it but the C library and zlib, for programs that claim to need nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.integration.cluster import Daemon

# What every Debian has: glibc, and zlib, which dpkg itself needs.
LIBRARIES = ("libz.so.1", "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libutil.so.1")
CAPTURED = {"capture_output": True, "text": True}
CHROOT = shutil.which("chroot") or "/usr/sbin/chroot"
LOADERS = ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1")


class BareRoot:
    """A directory that becomes `/` of the programs run in it. Needs root: for chroot, and to mount /proc."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in ("tmp", "proc", "dev/shm", "work", "lib64", "usr/bin"):
            (path / name).mkdir(parents=True)
        (path / "tmp").chmod(0o1777)
        for number, name in ((3, "null"), (9, "urandom")):
            os.mknod(path / "dev" / name, 0o20666, os.makedev(1, number))
        for loader in filter(os.path.exists, LOADERS):
            self._add(Path(loader).resolve(), loader)
        listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout.splitlines()
        for name in LIBRARIES:
            found = next(line.split(" => ")[1] for line in listed if line.split()[0] == name)
            self._add(Path(found).resolve(), found)
        subprocess.run(["mount", "-t", "proc", "proc", path / "proc"], check=True)

    def _add(self, source: Path, inside: str) -> None:
        target = self.path / inside.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)

    def command(self, *args: str) -> list[str]:
        """`taskd ARGS` inside."""
        return [CHROOT, str(self.path), "/usr/bin/taskd", *args]

    def taskd(self, *args: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command of taskd inside, to its end."""
        env = {"HOME": "/work", "TASKD_SOCKET": "/work/node/taskd.sock", "PATH": "/usr/bin"}
        return subprocess.run(self.command(*args), env=env, check=False, timeout=timeout_s, **CAPTURED)

    def close(self) -> None:
        subprocess.run(["umount", self.path / "proc"], check=True)


class BareDaemon(Daemon):
    """A daemon of both roles inside, asked over its socket from outside."""

    def __init__(self, root: BareRoot, config: dict[str, str]) -> None:
        env = {"TASKD_NETWORK_INTERFACES": "lo", "TASKD_NETWORK_MDNS": "false", "PATH": "/usr/bin", **config}
        home = root.path / "work" / "node"
        super().__init__(home, root.path / "work" / "cluster.key", "scheduler,worker", env=env)
        self._env = env
        self._command = root.command(
            "start", "--role", "scheduler,worker", "--name", "bare", "--state-dir", "/work/node",
            "--key-file", "/work/cluster.key", "--listen", "127.0.0.1:0",
        )  # fmt: skip
