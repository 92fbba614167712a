"""A module with a handler that cannot be loaded whole."""

from taskd import task


@task
def half() -> None:
    raise AssertionError("never offered")


import no_such_module_anywhere  # noqa: E402, F401
