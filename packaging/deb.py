"""Makes the Debian package: the program as a folder that needs no Python, units, users, settings, man pages and
completions.

    python packaging/deb.py --program dist/taskd-folder --output dist

The same sources give the same bytes: times are those of SOURCE_DATE_EPOCH, where that is set.
"""

from __future__ import annotations

import argparse
import gzip
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from taskd.service.files import CONFIG, PROGRAM, files, settings_file
from taskd.version import VERSION

HERE = Path(__file__).parent
ROOT = HERE.parent
COMPLETIONS = {
    "bash": "usr/share/bash-completion/completions/taskd",
    "zsh": "usr/share/zsh/vendor-completions/_taskd",
    "fish": "usr/share/fish/vendor_completions.d/taskd.fish",
}
CONTROL = """\
Package: taskd
Version: {version}
Architecture: {architecture}
Maintainer: The taskd developers <taskd@localhost>
Section: admin
Priority: optional
Depends: libc6 (>= {glibc}), systemd (>= 247)
Recommends: iproute2
Installed-Size: {size_kib}
Description: task service for the machines of a LAN
 taskd runs commands, Python handlers and HTTP calls on the machines of a
 local network. Schedulers and workers find each other, keep every task
 durably, and need no broker and no database server.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the Debian package of taskd.")
    parser.add_argument("--program", type=Path, required=True, help="the folder with the executable `taskd`")
    parser.add_argument("--output", type=Path, default=Path("dist"), help="where the package is put")
    parser.add_argument("--compression", default="xz", choices=["xz", "none"], help="none is quick, and large")
    options = parser.parse_args()
    executable = options.program / "taskd"
    if not os.access(executable, os.X_OK):
        sys.exit(f"deb.py: there is no program {executable}: `make binary` makes it")
    sys.stdout.write(f"{build(options.program, options.output, options.compression)}\n")


def build(program: Path, output: Path, compression: str) -> Path:
    """Make the package from a program's folder; returns its path."""
    architecture = _said("dpkg", "--print-architecture").strip()
    version = debian_version(VERSION)
    output.mkdir(parents=True, exist_ok=True)
    package = output / f"taskd_{version}_{architecture}.deb"
    with tempfile.TemporaryDirectory(prefix="taskd-deb-") as place:
        tree = Path(place) / "tree"
        tree.mkdir(mode=0o755)
        _fill(tree, program)
        _control(tree, version, architecture)
        command = ["dpkg-deb", "--root-owner-group", f"-Z{compression}", "--build", str(tree), str(package)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return package


def debian_version(version: str) -> str:
    """Python's form in Debian's: a pre-release comes before the release."""
    return re.sub(r"\.?(dev|a|b|rc)(\d+)", r"~\1\2", version)


def _fill(tree: Path, program: Path) -> None:
    shutil.copytree(program, tree / "usr/lib/taskd", symlinks=True)
    link = tree / PROGRAM.lstrip("/")
    link.parent.mkdir(parents=True)
    link.symlink_to("../lib/taskd/taskd")
    for file in (*files([PROGRAM], is_package=True), settings_file()):
        _write(tree / file.path, file.text)
    for shell, path in COMPLETIONS.items():
        _write(tree / path, _said(str(program / "taskd"), "completion", shell))
    manuals = tree / "usr/share/man/man1"
    subprocess.run([sys.executable, str(HERE / "manpages.py"), str(manuals)], check=True)
    for page in manuals.iterdir():
        _compress(page)
    documents = tree / "usr/share/doc/taskd"
    _write(documents / "copyright", (HERE / "debian/copyright").read_text())
    _write(documents / "changelog", (ROOT / "CHANGELOG.md").read_text())
    _compress(documents / "changelog")
    for directory, _, names in os.walk(tree):
        os.chmod(directory, 0o755)  # everybody may read programs and manuals
        for name in names:
            path = Path(directory, name)
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


def _control(tree: Path, version: str, architecture: str) -> None:
    size_kib = sum(-(-path.lstat().st_size // 1024) for path in tree.rglob("*"))
    glibc = platform.libc_ver()[1] or "2.36"  # What it was linked against here is the least that it runs on.
    directory = tree / "DEBIAN"
    fields = {"version": version, "architecture": architecture, "glibc": glibc, "size_kib": size_kib}
    _write(directory / "control", CONTROL.format(**fields))
    _write(directory / "conffiles", f"/{CONFIG}\n")
    for script in ("postinst", "prerm", "postrm"):
        _write(directory / script, (HERE / "debian" / script).read_text())
        (directory / script).chmod(0o755)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o644)


def _compress(path: Path) -> None:
    """In place, without a time or a name in it."""
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    path.unlink()


def _said(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
