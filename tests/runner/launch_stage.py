"""Commands on the stage as another user: a real launcher, in a process of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from taskd.runner.base import base_environment
from taskd.runner.launch_messages import Prepare
from taskd.runner.launched import LauncherSettings, Launches
from taskd.runner.launched_command import LaunchedCommandKind
from taskd.runner.output import Output
from taskd.runner.task_user import TaskUser
from tests.runner.stage import Stage

USER = "nobody"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it becomes another user")


@contextmanager
def open_directory() -> Iterator[Path]:
    """A directory that other users can pass through: pytest's own are private."""
    path = Path(tempfile.mkdtemp(prefix="taskd-test-", dir="/var/tmp"))  # removed below
    path.chmod(0o711)
    try:
        yield path
    finally:
        shutil.rmtree(path)


class LaunchStage(Stage):
    """A stage whose commands a launcher starts: its own child, or one that listens on `socket`."""

    def __init__(self, directory: Path, *, socket: str = "", user: str = USER, **settings: Any) -> None:
        super().__init__(directory, **settings)
        self.output = Output(directory, self.output.stream_bytes_max, is_for_others=True)
        prepare = Prepare(self.place.worker, self.place.socket, base_environment(), False, True, user)
        self.launches = Launches(LauncherSettings(prepare, socket, user, directory / "tasks"), self.reaper)
        self.kind = LaunchedCommandKind(self.on_progress, self.output, self.launches)

    async def __aenter__(self) -> LaunchStage:
        await self.reaper.open()
        await self.output.open()
        await self.launches.open()
        await self.kind.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kind.close()
        await self.launches.close()
        await self.output.close()
        await self.reaper.close()

    @property
    def launcher_pid(self) -> int:
        """The process of a launcher that is our child."""
        assert self.launches._process is not None
        return self.launches._process.pid


def user() -> TaskUser:
    return TaskUser.named(USER)
