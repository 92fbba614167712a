"""What the benchmark's workers run."""

from __future__ import annotations

from taskd import task


@task("noop")
def noop() -> None:
    """Nothing: what is measured is everything around it."""
