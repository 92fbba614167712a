"""Says how large the executables are and how long `--version` takes: `python measure.py FILE FOLDER`."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

RUNS = 7


def files(path: Path) -> Iterator[Path]:
    """A file, or all files of a folder."""
    if path.is_file():
        yield path
    else:
        yield from (found for found in path.rglob("*") if found.is_file() and not found.is_symlink())


def version_s(program: Path) -> float:
    """How long `--version` takes, the median of some runs, the first one aside."""
    took = []
    for _ in range(RUNS + 1):
        begun = time.perf_counter()
        subprocess.run([program, "--version"], check=True, stdout=subprocess.DEVNULL)
        took.append(time.perf_counter() - begun)
    return statistics.median(took[1:])


def main() -> None:
    """One line for each."""
    for path in map(Path, sys.argv[1:]):
        program = path.absolute() if path.is_file() else path.absolute() / "taskd"
        size_mib = sum(os.stat(found).st_size for found in files(path)) / (1 << 20)
        print(f"{path}: {size_mib:.1f} MiB, --version in {version_s(program) * 1000:.0f} ms")


if __name__ == "__main__":
    main()
