"""A module that ends its process as long as a file exists; TASKD_SOCKET tells where."""

import os

from taskd import task

if os.path.exists(os.environ["TASKD_SOCKET"] + ".bad"):
    os._exit(9)


@task
def mood() -> str:
    return "good"


@task
def crash() -> None:
    os._exit(1)
