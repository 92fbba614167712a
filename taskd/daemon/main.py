"""One daemon from start to end: opens the worlds in order, joins them to the node, and closes them in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import Any

from taskd.api.app import serve
from taskd.api.budgets import Budgets
from taskd.api.dispatch import dispatch, error_response
from taskd.api.service import ApiRequest, ApiResponse
from taskd.config import Config, changes, key_path
from taskd.config import load as load_config
from taskd.core import events as ev
from taskd.core.node import Node
from taskd.core.seal import Seal
from taskd.core.settings import SchedulerSettings
from taskd.daemon import logs
from taskd.daemon.addresses import Addresses
from taskd.daemon.audit import AuditLog
from taskd.daemon.backups import Backups
from taskd.daemon.calls import CallMessage, Calls
from taskd.daemon.https import Https
from taskd.daemon.hub import Hub
from taskd.daemon.ids import NO_ID
from taskd.daemon.keys import reload_keys
from taskd.daemon.logs import log
from taskd.daemon.manager import Manager
from taskd.daemon.metrics import text_source
from taskd.daemon.notify import Notifier
from taskd.daemon.outputs import PREFIX, answer_output
from taskd.daemon.service import DaemonService
from taskd.daemon.shell import Shell
from taskd.daemon.state import StateDirectory, choose_socket, identify
from taskd.daemon.vitals import Vitals
from taskd.daemon.work import Work
from taskd.errors import ConfigError, TaskdError
from taskd.net.discovery import Discovery
from taskd.net.keyring import Keys, load_keys
from taskd.net.mesh import Mesh
from taskd.net.security import SchedulerKey
from taskd.protocol.messages import NodeInfo, Role
from taskd.store.base import Store
from taskd.store.journal import Journal
from taskd.store.sqlite import SQLiteStore
from taskd.version import VERSION

KEY_POLL_S = 0.2
WRONG_SETTINGS = 2  # As for a wrong call: trying again is of no use, and a service manager is told not to.
# New objects between two looks for garbage in cycles, of which there is little; the default is 700. Tasks on their way
# would be looked at again and again, which took an eighth of the leader's time.
GARBAGE_THRESHOLD = 50_000
STOP_MARGIN_S = 10.0  # Beyond the grace of running tasks; then the process ends whatever is missing.


def run(roles: tuple[Role, ...], config_path: Path | None, overrides: dict[str, object]) -> int:
    """Run a daemon until it is told to stop. Returns the exit code of the process."""
    try:
        config = load_config(config_path, os.environ, overrides)
    except TaskdError as error:
        print(f"taskd: {error.message}", file=sys.stderr)  # noqa: T201  # the log may not be set up yet
        return WRONG_SETTINGS
    faulthandler.enable()  # A manager whose patience ends sends ABRT: what we did then is worth knowing.
    try:
        logs.set_up(config.node.log_level, config.node.log_format, os.environ)
        gc.freeze()  # What was imported stays.
        gc.set_threshold(GARBAGE_THRESHOLD)
        daemon = Daemon(roles, config, lambda: load_config(config_path, os.environ, overrides))
        try:
            return _run(daemon.run)
        except BaseExceptionGroup as group:
            raise _first_known(group) or group from None
    except TaskdError as error:
        print(f"taskd: {error.message}", file=sys.stderr)  # noqa: T201  # the log may not be set up yet
        return 1


def _first_known(group: BaseExceptionGroup[BaseException]) -> TaskdError | None:
    """What ended the daemon, where it was nothing but errors that can be told in words."""
    known, unknown = group.split(TaskdError)
    while isinstance(known, BaseExceptionGroup):
        known = known.exceptions[0]  # type: ignore[assignment]  # a leaf at last
    return known if unknown is None and isinstance(known, TaskdError) else None


def _run(main: Callable[[], Coroutine[Any, Any, int]]) -> int:
    try:
        import uvloop  # noqa: PLC0415  # not on every platform
    except ImportError:
        return asyncio.run(main())
    return uvloop.run(main())


class Daemon:
    """One process: its roles, its settings, and how it reads them again."""

    def __init__(self, roles: tuple[Role, ...], config: Config, reload: Callable[[], Config]) -> None:
        self._roles = roles
        self._config = config
        self._reload_config = reload
        self._notifier = Notifier(os.environ)
        self._is_founder = False  # this process has made the cluster's key
        self._stop_wanted = asyncio.Event()
        self._reload_wanted = asyncio.Event()
        self._reloaded: list[Callable[[], None]] = []  # what else a reload does

    async def run(self) -> int:
        """Open everything, serve, and close everything. Returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop_wanted.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload_wanted.set)
        async with AsyncExitStack() as stack:
            config = self._config
            state = StateDirectory.opened(config.node, self._roles)
            stack.callback(state.close)
            keys = await self._keys()
            if keys is None:
                return 0
            return await self._serve(stack, state, keys)

    @property
    def _key_path(self) -> Path:
        return key_path(self._config)

    async def _keys(self) -> Keys | None:
        """The cluster key: made by the first scheduler, awaited by a worker. None: told to stop meanwhile."""
        path = self._key_path
        keys = load_keys(path)
        if keys is None and "scheduler" in self._roles:
            made = SchedulerKey.generate()
            try:
                made.save(path)
            except ConfigError:
                keys = load_keys(path)  # Another first scheduler was quicker: its keys is ours.
                if keys is None:
                    raise
            else:
                self._is_founder = True
                log("info", "a new cluster key was made", path=str(path), cluster=made.fingerprint)
                return Keys(made)
        if keys is None:
            log("warning", "waiting for the cluster key: bring it with `taskd key import`", path=str(path))
            self._notifier.status(f"waiting for the cluster key: bring it with `taskd key import` ({path})")
        while keys is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop_wanted.wait(), KEY_POLL_S)
                return None
            keys = load_keys(path)
        if "scheduler" in self._roles and not isinstance(keys.current, SchedulerKey):
            raise ConfigError(f"{path} holds a worker key: a scheduler needs the scheduler key of the cluster")
        return keys

    async def _serve(self, stack: AsyncExitStack, state: StateDirectory, keys: Keys) -> int:
        config, roles = self._config, self._roles
        identity = identify(state, config.node.id, time.time())
        place = choose_socket(config.node, roles)
        stack.callback(place.close)
        store: SQLiteStore | None = None
        if "scheduler" in roles:
            store = SQLiteStore.open(state.of("scheduler") / "taskd.db")
            stack.callback(store.close)
        store_id = store.store_id if store is not None else bytes.fromhex(identity.store_id)
        name = config.node.name or socket.gethostname()
        info = NodeInfo(identity.node_id, name, roles, store_id, secrets.randbits(63), VERSION)

        work: Work | None = None
        journal: Journal | None = None
        if "worker" in roles:
            directory = state.of("worker")
            journal = Journal.open(directory / "journal")
            stack.callback(journal.close)
            if (damage := journal.damage) is not None:
                log("error", "the journal is damaged", moved_to=damage.moved_to, size_bytes=damage.size_bytes)
            work = Work(directory, store_id, place.path, config.worker)
            await work.open(stack)
        shell = self._shell(stack, info, store, journal, work)

        group = await stack.enter_async_context(asyncio.TaskGroup())
        running: list[asyncio.Task[None]] = []
        stack.callback(lambda: [task.cancel() for task in running])
        calls = Calls(lambda request: self._answer(service, work, request), group)
        mesh = self._mesh(info, keys, shell, calls)
        shell.mesh = calls.mesh = mesh
        if store is not None:
            store.on_lost = shell.store_lost  # Without waiting for a commit that would fail.
        read_output = work.read_output if work is not None else None
        metrics = text_source(shell, lambda: mesh.counters.reconnects, mesh.peers)
        service = DaemonService(
            shell, calls, config.node.cluster, mesh.peers, read_output, metrics, config.scheduler.free_disk_min_bytes,
            None if store is None else Backups(store, info, config.node.cluster, config.scheduler.free_disk_min_bytes),
            self._audit(stack, state), str(state.path.absolute()),
        )  # fmt: skip

        if store is not None:
            shell.tell(store.load())
        if journal is not None:
            shell.tell(journal.load())
        running.append(group.create_task(shell.run()))
        addresses = self._addresses(state, mesh)
        await mesh.start()
        stack.push_async_callback(mesh.stop, "stopping")
        running += [group.create_task(chore) for chore in self._chores(info, work, mesh, addresses)]
        if (rest := await self._open_api(stack, service, place.path)) is not None:
            running.append(group.create_task(rest))
        manager = self._manager(service, shell, mesh, place.path)
        log("info", "started", node=info.node_id, name=name, roles=",".join(roles), socket=place.path, version=VERSION)
        running += (
            group.create_task(manager.run()),
            group.create_task(self._reload_when_wanted(shell, work, mesh, manager)),
        )
        return await self._until_stopped(shell, manager)

    # -- The pieces ----------------------------------------------------------------------------------------------------

    def _shell(
        self, stack: AsyncExitStack, info: NodeInfo, store: Store | None, journal: Journal | None, work: Work | None
    ) -> Shell:
        settings = _scheduler_settings(self._config) if store is not None else None
        offer = work.offer(self._config.worker) if work is not None else None
        hub = Hub()
        stack.callback(hub.close)
        random = Random()  # noqa: S311  # jitter, no secret
        node = Node(info, random, settings, offer, is_founder=self._is_founder)
        newest_id = store.newest_id() if store is not None else NO_ID
        shell = Shell(node, hub, store, journal, newest_id, stall_s=self._config.network.peer_timeout_s / 2)
        stack.callback(shell.close)
        if work is not None:
            shell.runner = work.runner
            work.on_progress = shell.progressed
        return shell

    def _audit(self, stack: AsyncExitStack, state: StateDirectory) -> AuditLog:
        audit = AuditLog(state.main / "audit.log", self._config.api.audit_bytes_max)
        stack.callback(audit.close)
        self._reloaded.append(audit.reopen)
        return audit

    async def _open_api(
        self, stack: AsyncExitStack, service: DaemonService, socket_path: str
    ) -> Coroutine[Any, Any, None] | None:
        """Answer clients; returns what has still to be done for that."""
        api = self._config.api
        budgets = Budgets(api.requests_per_s_max)
        local = await serve(
            service, Path(socket_path), api.socket_mode, api.socket_group, body_bytes_max=api.body_bytes_max,
            budgets=budgets,
        )  # fmt: skip
        stack.push_async_callback(local.close)
        if api.listen:
            https = Https(service, self._config, budgets)
            stack.push_async_callback(https.close)
            if not https.open():
                return https.keep_trying()
        return None

    def _mesh(self, info: NodeInfo, keys: Keys, shell: Shell, calls: Calls) -> Mesh:
        network = self._config.network

        def on_event(event: ev.PeerUp | ev.PeerDown | ev.Received | ev.Collided) -> None:
            if isinstance(event, ev.PeerDown):
                calls.peer_down(event.node_id)
            shell.tell(event)

        def on_call(node_id: int, message: CallMessage) -> None:
            calls.on_message(node_id, message)

        mesh = Mesh(
            node=info,
            cluster=self._config.node.cluster,
            key=keys,
            listen=network.listen,
            join=network.join,
            heartbeat_s=network.heartbeat_s,
            peer_timeout_s=network.peer_timeout_s,
            redial_max_s=network.redial_max_s,
            random=Random(),  # noqa: S311  # jitter, no secret
            on_event=on_event,
            on_call=on_call,
            log=log,
        )
        if (scheduler := shell.node.scheduler) is not None:
            scheduler.seal = Seal(*mesh.ring.seal_secrets)
            mesh.rotation.on_keys = lambda secrets: shell.tell(ev.KeysChanged(secrets))
        return mesh

    def _addresses(self, state: StateDirectory, mesh: Mesh) -> Addresses | None:
        """Where nodes came from before this process, where it is one that they come to."""
        if "scheduler" not in self._roles:
            return None
        addresses = Addresses(state.of("scheduler") / "addresses.json", mesh.gate, mesh.peer_hosts)
        addresses.load()
        return addresses

    def _chores(
        self, info: NodeInfo, work: Work | None, mesh: Mesh, addresses: Addresses | None
    ) -> Iterator[Coroutine[Any, Any, None]]:
        """What is done beside everything else, until cancelled."""
        if work is not None:
            yield work.keep_tidy()
        if addresses is not None:
            yield addresses.keep()
        if (discovery := self._discovery(info, mesh)) is not None:
            yield discovery.run()

    def _discovery(self, info: NodeInfo, mesh: Mesh) -> Discovery | None:
        network = self._config.network
        if not network.mdns:
            return None
        return Discovery(info, lambda: mesh.ring.fingerprints, mesh, network.interfaces, log)

    def _manager(self, service: DaemonService, shell: Shell, mesh: Mesh, socket_path: str) -> Manager:
        vitals = Vitals(socket_path, shell.commit_age_s, mesh.silence_s, self._config.network.peer_timeout_s)
        return Manager(self._notifier, service, vitals, shell.node.worker)

    async def _answer(self, service: DaemonService, work: Work | None, request: ApiRequest) -> ApiResponse:
        """Answer a call from another node: a relayed request where we lead, or a leader's request for output."""
        if not request.path.startswith(PREFIX):
            return await dispatch(request, service, is_relayed=True)
        try:
            return answer_output(request, work.read_output if work is not None else None)
        except TaskdError as error:
            return error_response(error)

    # -- While it runs -------------------------------------------------------------------------------------------------

    async def _until_stopped(self, shell: Shell, manager: Manager) -> int:
        """Until the node ends or somebody wants us to; then stop in good order. Returns the exit code."""
        stop = asyncio.ensure_future(self._stop_wanted.wait())
        either: set[asyncio.Future[Any]] = {stop, shell.exited}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
        if not shell.exited.done():
            grace_s = self._config.worker.stop_grace_s
            manager.stopping(grace_s + 2 * STOP_MARGIN_S)
            log("info", "stopping")
            shell.stop(grace_s)
            try:
                async with asyncio.timeout(grace_s + STOP_MARGIN_S):
                    await asyncio.shield(shell.exited)
            except TimeoutError:
                log("error", "tasks would not end in time")
                return 1
        shell.hub.close()  # Whoever waits for tasks gets an answer before the socket closes.
        status, reason = shell.exited.result()
        log("error" if status else "info", "stopped", reason=reason)
        return status

    async def _reload_when_wanted(self, shell: Shell, work: Work | None, mesh: Mesh, manager: Manager) -> None:
        """SIGHUP: take over what settings can change while running, name those that cannot; until cancelled."""
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted.clear()
            manager.reloading()
            for reopen in self._reloaded:
                reopen()
            reload_keys(self._key_path, mesh)
            try:
                config = self._reload_config()
            except TaskdError as error:
                log("error", "the configuration is not valid; the old one stays", reason=error.message)
            else:
                # Against what the process was started with: a key that waits for a restart goes on waiting.
                reloaded, waiting = changes(self._config, config)
                logs.set_level(config.node.log_level)
                if shell.node.scheduler is not None:
                    shell.tell(ev.SettingsChanged(_scheduler_settings(config)))
                if work is not None:
                    shell.tell(ev.OfferChanged(work.offer(config.worker)))
                log("info", "configuration read again", changed=",".join(reloaded), needs_restart=",".join(waiting))
            manager.reloaded()


def _scheduler_settings(config: Config) -> SchedulerSettings:
    wanted = config.scheduler
    names = [name for name in SchedulerSettings.__struct_fields__ if hasattr(wanted, name)]
    return SchedulerSettings(
        **{name: getattr(wanted, name) for name in names}, finished_age_max_s=wanted.finished_age_max
    )
