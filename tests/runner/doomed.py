"""A worker that is going to be killed: runs a task that leaves a daemon, says so, and waits.

python -m tests.runner.doomed DIRECTORY WORKER TASK_ID
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from taskd.core.effects import Begin
from taskd.core.task import TaskSpec
from taskd.protocol.messages import AttemptKey, Term
from taskd.runner.base import Place
from taskd.runner.command import CommandKind
from taskd.runner.output import Output
from taskd.runner.reaper import Reaper


async def main(directory: str, worker: str, task_id: str) -> None:
    output, reaper = Output(Path(directory)), Reaper(worker)
    kind = CommandKind(Place(Path(directory), "", worker), lambda started, ended: None, output, reaper)
    await reaper.open()
    await output.open()
    await kind.open()
    key = AttemptKey(bytes.fromhex(task_id), 1, Term(1, 1, 1), 1)
    script = "(setsid sh -c 'echo daemon; exec sleep 1000' &); echo task; exec sleep 1000"
    kind.start([Begin(key, TaskSpec("command", shell=script))])
    written = b""
    async for part in output.stream(key.task_id, 1, "stdout", follow=True):
        written += part
        if written.count(b"\n") == 2:
            print("ready", flush=True)


asyncio.run(main(*sys.argv[1:]))
