"""A Debian machine that boots a real systemd: a root made by debootstrap, kept in a cache, run by systemd-nspawn.

Each machine is the same root under an overlay in memory, with a network of its own that has nothing but `lo`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

SUITE = "bookworm"
PACKAGES = "systemd,systemd-sysv,dbus"
TOOLS = ("debootstrap", "systemd-nspawn", "nsenter")
MAKE_TIMEOUT_S = 900
BOOT_TIMEOUT_S = 120.0
COMMAND_TIMEOUT_S = 120.0


def why_impossible() -> str:
    """Why no machine can be booted here; empty where one can."""
    if os.geteuid() != 0:
        return "booting a machine takes root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"there is no {', '.join(missing)}: apt install debootstrap systemd-container"
    if not Path("/run").is_dir() or shutil.which("dpkg-deb") is None:
        return "there is no dpkg-deb"
    return ""


def cache() -> Path:
    """Where roots are kept between runs."""
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(home, "taskd-tests") if home else Path("/var/cache/taskd-tests")


def debian_root() -> Path | str:
    """The root of a fresh Debian with systemd, made where it is not there yet; or in words why there is none."""
    root = cache() / f"{SUITE}-systemd"
    if root.exists():
        return root
    making = root.with_name(f"{root.name}.{os.getpid()}")
    making.parent.mkdir(parents=True, exist_ok=True)
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(making)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MAKE_TIMEOUT_S, check=False)
        if done.returncode:
            return f"debootstrap failed: {(done.stdout + done.stderr)[-400:]}"
        try:
            making.rename(root)
        except OSError:  # Another run was quicker.
            if not root.exists():
                raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return root


class Machine:
    """One booted machine."""

    def __init__(self, root: Path, shared: Path) -> None:
        """`shared`: a directory that the machine sees as /mnt, and cannot write to."""
        self._log = shared.parent / "machine.log"
        command = [
            "systemd-nspawn", "--quiet", "--boot", f"--directory={root}", "--volatile=overlay", "--private-network",
            "--register=no", "--keep-unit", "--console=pipe", f"--machine=taskd-test-{os.getpid()}",
            f"--bind-ro={shared}:/mnt", "--link-journal=no",
        ]  # fmt: skip
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            )  # fmt: skip
        try:
            self._init = self._find_init()
            self._wait_for_boot()
        except BaseException:
            self.kill()
            raise

    def run(self, command: str, check: bool = True) -> str:
        """What a shell command prints there, errors too."""
        done = self._shell(command)
        assert done.returncode == 0 or not check, f"{command}: {done.returncode}\n{done.stdout}"
        return done.stdout.strip()

    def fails(self, command: str) -> str:
        """What a command prints that has to fail."""
        done = self._shell(command)
        assert done.returncode != 0, f"{command} did not fail\n{done.stdout}"
        return done.stdout.strip()

    def until(self, command: str, timeout_s: float = 60.0) -> str:
        """Ask again and again until a command succeeds."""
        end = time.monotonic() + timeout_s
        while True:
            done = self._shell(command)
            if done.returncode == 0:
                return done.stdout.strip()
            assert time.monotonic() < end, f"{command}: {done.stdout}"
            time.sleep(0.1)

    def power_off(self) -> None:
        """In good order, with TERM as nspawn has it; by force where that takes too long."""
        if self._process.poll() is None:
            with open(os.devnull, "wb") as null:
                subprocess.run(
                    ["nsenter", "-t", str(self._init), "-a", "-r", "-w", "--", "systemctl", "poweroff"],
                    stdin=subprocess.DEVNULL, stdout=null, stderr=null, timeout=COMMAND_TIMEOUT_S, check=False,
                )  # fmt: skip
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Everything in it dies with its first process."""
        self._process.kill()
        self._process.wait(60)

    def _shell(self, command: str) -> subprocess.CompletedProcess[str]:
        inside = ["nsenter", "-t", str(self._init), "-a", "-r", "-w", "--", "/bin/sh", "-c", command]
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "SYSTEMD_PAGER": ""}
        return subprocess.run(
            inside, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=COMMAND_TIMEOUT_S, env=environment, check=False,
        )  # fmt: skip

    def _find_init(self) -> int:
        """The process that is systemd there. Before it there is a child for a moment that has nspawn's name."""
        end = time.monotonic() + BOOT_TIMEOUT_S
        while time.monotonic() < end:
            assert self._process.poll() is None, f"systemd-nspawn ended:\n{self._log.read_text()}"
            try:
                children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
                for child in children:
                    if Path(f"/proc/{child}/comm").read_text().strip() in ("systemd", "init"):
                        return int(child)
            except OSError:
                pass
            time.sleep(0.02)
        raise AssertionError(f"systemd did not start:\n{self._log.read_text()}")

    def _wait_for_boot(self) -> None:
        end = time.monotonic() + BOOT_TIMEOUT_S
        while self._shell("systemctl is-system-running").stdout.strip() not in ("running", "degraded"):
            assert self._process.poll() is None, f"systemd-nspawn ended:\n{self._log.read_text()}"
            assert time.monotonic() < end, f"it does not come up:\n{self._log.read_text()}"
            time.sleep(0.05)
