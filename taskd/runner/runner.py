"""All runners of a worker behind one face: gives each attempt to its kind, by the type of its task."""

from __future__ import annotations

from contextlib import AsyncExitStack

from taskd.core.effects import Begin
from taskd.core.task import ErrorInfo
from taskd.protocol.messages import AttemptKey
from taskd.runner.base import Kind, OnProgress, Progress, not_started
from taskd.runner.launched import Launches
from taskd.runner.output import Output
from taskd.runner.reaper import Leftovers, Reaper
from taskd.runner.secrets import Secrets


class Runner:
    """Runs attempts: `command` and `http` tasks by their own kinds, every other type by the handlers.

    The kinds were made with the same `on_progress`, and with `output`, `reaper` and `launches` where they use them."""

    def __init__(
        self,
        output: Output,
        reaper: Reaper,
        command: Kind,
        http: Kind,
        handlers: Kind,
        *,
        on_progress: OnProgress,
        secrets: Secrets,
        launches: Launches | None = None,
    ) -> None:
        self._refused = Progress(on_progress)
        self._secrets = secrets
        self._output = output
        self._launches = launches
        self._reaper = reaper
        self._by_type = {"command": command, "http": http}
        self._handlers = handlers
        self._kinds = (command, http, handlers)
        self._opened = AsyncExitStack()

    async def open(self) -> Leftovers:
        """End what an earlier daemon of this worker left running, and get ready. Raises OSError, and
        ConfigError where tasks cannot be started as they should be."""
        async with AsyncExitStack() as opened:
            leftovers = await self._reaper.open()
            opened.push_async_callback(self._reaper.close)
            opened.callback(self._refused.close)
            await self._output.open()
            opened.push_async_callback(self._output.close)
            if self._launches is not None:
                await self._launches.open()
                opened.push_async_callback(self._launches.close)
            for kind in self._kinds:
                await kind.open()
                opened.push_async_callback(kind.close)
            self._opened = opened.pop_all()
        return leftovers

    def start(self, begins: list[Begin]) -> None:
        """Start these attempts; each will be heard of as ended, exactly once."""
        by_kind: dict[Kind, list[Begin]] = {}
        for begin in begins:
            if begin.spec.secrets:
                known = self._secrets.into(begin)
                if isinstance(known, ErrorInfo):
                    self._refused.ended(not_started(begin.key, known))
                    continue
                begin = known  # noqa: PLW2901  # the same attempt
            by_kind.setdefault(self._by_type.get(begin.spec.type, self._handlers), []).append(begin)
        for kind, its_begins in by_kind.items():
            kind.start(its_begins)

    def terminate(self, key: AttemptKey) -> None:
        """Ask an attempt to end. One that does not run is passed over."""
        for kind in self._kinds:  # Only one knows it: cheaper than to remember for each attempt which.
            kind.terminate(key)

    def kill(self, key: AttemptKey) -> None:
        """End an attempt by force. One that does not run is passed over."""
        for kind in self._kinds:
            kind.kill(key)

    async def close(self) -> None:
        """End by force what still runs, tell of it, and let go of everything."""
        await self._opened.aclose()
