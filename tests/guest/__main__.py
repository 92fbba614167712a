"""Boots a Linux guest in QEMU, runs tests/guest/inside.py in it as root, and shows what they say.

Needs qemu-system-x86_64 (`apt install qemu-system-x86`), busybox-static, and a kernel: TASKD_GUEST_KERNEL, one of this
machine's in /boot, or Debian's cloud kernel, which is fetched with apt-get. The guest has no disk and no network: all
of it is one archive, made of this Python, taskd and the tests. It takes half a minute where there is no KVM.
"""

from __future__ import annotations

import gzip
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".guest"
TIMEOUT_S = 600
MEMORY_MIB = 1024
ACCELERATOR = "tcg"  # Software, which works anywhere; TASKD_GUEST_ACCELERATOR=kvm is quicker where it works.
SKIPPED = 77  # Said by exit code: it cannot be done here.
# What the tests and taskd's runners import; the rest of what developing needs would only make the archive large.
PACKAGES = ("msgspec", "click", "pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pytest_asyncio", "pygments",
            "typing_extensions.py", "uvloop", "py.py")  # fmt: skip
UNNEEDED = ("test", "idlelib", "tkinter", "lib2to3", "ensurepip", "turtledemo", "site-packages")
# Names of every kind that a Debian has and tests use.
USERS = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"
GROUPS = "root:x:0:\nnogroup:x:65534:\n"

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /var && ln -s /tmp /var/tmp
ln -s /proc/self/fd /dev/fd; ln -s /proc/self/fd/1 /dev/stdout; ln -s /proc/self/fd/2 /dev/stderr
export PATH=/bin HOME=/root PYTHONDONTWRITEBYTECODE=1
cd /taskd
{python} -P -c 'import sys; sys.path.append("/taskd"); from tests.guest.inside import main; main()'
echo "{mark} $?"
poweroff -f
"""
_ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|c)")  # What firmware clears the screen with.
MARK = "THE GUEST'S TESTS ENDED WITH"


class Impossible(Exception):
    """Why there can be no guest here."""


def main() -> int:
    """Build, boot, show. Returns the tests' exit code, SKIPPED where it is impossible."""
    try:
        qemu = _program("qemu-system-x86_64", "qemu-system-x86")
        busybox = _program("busybox", "busybox-static")
        kernel = _kernel()
    except Impossible as error:
        print(f"skipped: {error}")
        return SKIPPED
    with tempfile.TemporaryDirectory(prefix="taskd-guest-") as directory:
        archive = _archive(Path(directory), busybox)
        print(f"guest: {kernel.name}, {archive.stat().st_size >> 20} MiB", flush=True)
        return _boot(qemu, kernel, archive)


def _program(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise Impossible(f"there is no {name}: apt install {package}")
    return found


def _kernel() -> Path:
    """Raises Impossible."""
    if platform.machine() != "x86_64":
        raise Impossible(f"this machine is {platform.machine()}, the guest is x86_64")
    wanted = os.environ.get("TASKD_GUEST_KERNEL")
    if wanted:
        return Path(wanted)
    found = [*sorted(Path("/boot").glob("vmlinuz-*")), *sorted(CACHE.glob("*/boot/vmlinuz-*"))]
    if found:
        return found[-1]
    CACHE.mkdir(exist_ok=True)
    try:
        described = _output("apt-cache", "depends", "linux-image-cloud-amd64")
        package = re.search(r"Depends: (linux-image-\S+)", described)
        if package is None:
            raise Impossible("apt knows no linux-image-cloud-amd64: give a kernel in TASKD_GUEST_KERNEL")
        _output("apt-get", "download", package[1], directory=CACHE)
        (deb,) = CACHE.glob("linux-image-*.deb")
        _output("dpkg-deb", "-x", str(deb), str(CACHE / "kernel"))
        deb.unlink()
    except (OSError, subprocess.CalledProcessError) as error:
        raise Impossible(f"no kernel can be fetched ({error}): give one in TASKD_GUEST_KERNEL") from None
    return next(CACHE.glob("*/boot/vmlinuz-*"))


def _output(*command: str, directory: Path | None = None) -> str:
    return subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True, timeout=300).stdout


# -- The archive -------------------------------------------------------------------------------------------------------


def _archive(directory: Path, busybox: str) -> Path:
    root = directory / "root"
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "root", "taskd"):
        (root / name).mkdir(parents=True)
    shutil.copy(busybox, root / "bin/busybox")
    (root / "etc/passwd").write_text(USERS)
    (root / "etc/group").write_text(GROUPS)
    python = _add_python(root)
    for name in ("taskd", "tests"):
        shutil.copytree(ROOT / name, root / "taskd" / name, ignore=shutil.ignore_patterns(*UNNEEDED), symlinks=True)
    init = root / "init"
    init.write_text(INIT.format(python=python, mark=MARK))
    init.chmod(0o755)
    archive = directory / "initramfs.gz"
    with gzip.open(archive, "wb", compresslevel=1) as file:
        for part in _cpio(root):
            file.write(part)
    return archive


def _add_python(root: Path) -> str:
    """This Python at the places where it looks for itself, with what it links to; returns its path."""
    python = Path(sys.executable).resolve()
    standard = Path(sysconfig.get_path("stdlib"))
    packages = Path(sysconfig.get_path("purelib"))
    _copy(python, root)
    shutil.copytree(
        standard, _inside(root, standard), ignore=shutil.ignore_patterns(*UNNEEDED, "config-*", "*.a"), symlinks=True
    )
    target = _inside(root, standard) / "site-packages"
    target.mkdir(exist_ok=True)
    for name in PACKAGES:
        source = packages / name
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True)
        elif source.exists():
            shutil.copy(source, target / name)
    for metadata in packages.glob("pytest*.dist-info"):  # By which pytest finds its plugins.
        if not metadata.name.startswith(("pytest_xdist", "pytest_timeout")):
            shutil.copytree(metadata, target / metadata.name)
    (target / "taskd.pth").write_text("/taskd\n")
    libraries = {python, *_inside(root, standard).rglob("*.so*")}
    for library in libraries:
        for needed in re.findall(r"(?:=> )?(/\S+) \(0x", _output("ldd", str(library))):
            if not _inside(root, Path(needed)).exists():
                _copy(Path(needed), root)
    return str(python)


def _copy(path: Path, root: Path) -> None:
    target = _inside(root, path)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)
    # The task user runs programs, too.
    for directory in target.relative_to(root).parents:
        (root / directory).chmod(0o755)


def _inside(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


def _cpio(root: Path) -> Iterator[bytes]:
    """The tree in the form that the kernel unpacks (newc)."""
    for number, path in enumerate([root, *sorted(root.rglob("*"))], 1):
        status = path.lstat()
        content = b""
        if stat.S_ISLNK(status.st_mode):
            content = os.fsencode(os.readlink(path))
        elif stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        name = os.fsencode(path.relative_to(root)) + b"\0"
        # With its time: compiled modules are believed where that of the source is right.
        yield _padded(_head(number, status.st_mode, int(status.st_mtime), len(content), len(name)) + name)
        yield _padded(content)
    yield _padded(_head(0, 0, 0, 0, 11) + b"TRAILER!!!\0")


def _head(number: int, mode: int, mtime_s: int, size: int, name_size: int) -> bytes:
    fields = (number, mode, 0, 0, 1, mtime_s, size, 0, 0, 0, 0, name_size, 0)
    return b"070701" + b"".join(b"%08X" % field for field in fields)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


# -- The guest ---------------------------------------------------------------------------------------------------------


def _boot(qemu: str, kernel: Path, archive: Path) -> int:
    accelerator = os.environ.get("TASKD_GUEST_ACCELERATOR", ACCELERATOR)
    command = [
        qemu, "-accel", accelerator, "-cpu", "max", "-m", str(MEMORY_MIB), "-smp", "2", "-nographic", "-no-reboot",
        "-nodefaults", "-serial", "stdio", "-kernel", str(kernel), "-initrd", str(archive),
        "-append", "console=ttyS0 quiet loglevel=3 panic=-1",
    ]  # fmt: skip
    code = 1
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as guest:
        killer = _kill_later(guest)
        assert guest.stdout is not None
        for raw in guest.stdout:
            line = _ESCAPE.sub("", raw.decode(errors="replace")).rstrip()
            if line.startswith(MARK):
                code = int(line.split()[-1])
            else:
                print(line, flush=True)
        killer.cancel()
    if code and guest.returncode:
        print(f"the guest ended with {guest.returncode}")
    return code


def _kill_later(guest: subprocess.Popen[bytes]) -> Timer:
    timer = Timer(TIMEOUT_S, guest.kill)
    timer.daemon = True
    timer.start()
    return timer


if __name__ == "__main__":
    sys.exit(main())
