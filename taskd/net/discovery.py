"""Finding schedulers by mDNS: schedulers announce `_taskd._tcp.local.`, everybody listens.

Nothing that is heard is trusted: it is a hint of addresses to dial, bounded in every way, and where somebody floods the
LAN with announcements, nobody listens for a while. Nothing secret is said, and no failure is fatal: what goes wrong is
reported once and tried again slowly. Of a scheduler that was killed mDNS says nothing for an hour;
the mesh redials by itself, and a restart under the same name and another port is told by the changed record.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from typing import Protocol

import ifaddr
from zeroconf import Error as ZeroconfError
from zeroconf import (
    IPVersion,
    RecordUpdate,
    RecordUpdateListener,
    ServiceBrowser,
    ServiceInfo,
    ServiceStateChange,
    Zeroconf,
)
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from taskd.net.connection import address_text
from taskd.protocol.messages import NodeInfo

SERVICE = "_taskd._tcp.local."
RESCAN_S = 10.0
RETRY_S_MAX = 60.0
RESOLVE_TIMEOUT_MS = 3000
RESOLVING_MAX = 64  # Names that are being asked about: anybody on the LAN can announce as many as they like.
NAMES_MAX = 256  # Announcements that are followed.
ADDRESSES_PER_NAME_MAX = 8
GUARD_S = 1.0
HEARD_PER_S_MAX = 1000  # Records that are new or changed; a LAN full of printers has some hundreds in all.
HEARD_KEPT_MAX = 20_000  # Names of any service that the mDNS library remembers.
# Bridges and tunnels of containers and virtual machines: no other machine of the LAN is behind them.
_NAME = re.compile(r"[0-9a-f]{32}")
_VIRTUAL = re.compile(r"(docker|veth|br-|virbr|vnet|cni|flannel|cali|podman|lxc|lxd|kube|vmnet|vboxnet|tap|zt)")


class Hints(Protocol):
    """Who wants to know where schedulers may be."""

    port: int
    hosts: tuple[str, ...]

    def add_hint(self, node_id: int, addresses: Sequence[str], name: str) -> None: ...
    def remove_hint(self, node_id: int, name: str) -> None: ...
    def add_twin(self, addresses: Sequence[str]) -> None: ...


def lan_addresses(wanted: Sequence[str] = (), adapters: Iterable[ifaddr.Adapter] | None = None) -> list[str]:
    """The addresses to use, of the interfaces named in `wanted`, or of all that lead to other machines; those of the
    loopback interface where there are no others."""
    found: list[str] = []
    loopback: list[str] = []
    for adapter in ifaddr.get_adapters() if adapters is None else adapters:
        for ip in adapter.ips:
            text = ip.ip if isinstance(ip.ip, str) else ip.ip[0]
            address = ipaddress.ip_address(text)
            if wanted:
                if adapter.name in wanted or text in wanted:
                    found.append(text)
            elif address.is_loopback:
                loopback.append(text)
            elif not _VIRTUAL.match(adapter.name) and not (address.version == 6 and address.is_link_local):
                found.append(text)  # A link-local address means nothing without the name of an interface.
    return sorted(set(found or loopback))


def heard_schedulers(addresses: Sequence[str], listen_s: float) -> int:
    """How many schedulers of whatever cluster answer on these addresses within that time. Blocks. Raises OSError."""
    heard: set[str] = set()

    def note(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is not ServiceStateChange.Removed and _NAME.fullmatch(_label(name)) is not None:
            heard.add(name)

    with closing(Zeroconf(interfaces=list(addresses), ip_version=_version(list(addresses)))) as zeroconf:
        ServiceBrowser(zeroconf, SERVICE, handlers=[note])
        time.sleep(listen_s)
    return len(heard)


class Discovery:
    """Announces this node, where it is a scheduler, and tells the mesh of others."""

    def __init__(
        self,
        node: NodeInfo,
        fingerprints: Callable[[], tuple[str, ...]],
        mesh: Hints,
        interfaces: Sequence[str],
        log: Callable[..., None],
    ) -> None:
        self._node = node
        self._fingerprints = fingerprints  # of the cluster keys that count now
        self._mesh = mesh
        self._interfaces = interfaces
        self._log = log
        self._resolving: set[asyncio.Task[None]] = set()
        self._ids_by_name: dict[str, int] = {}
        self._problem = ""

    async def run(self) -> None:
        """Announce and listen, anew whenever the machine's addresses change; until cancelled."""
        retry_s = RESCAN_S
        while True:
            addresses = lan_addresses(self._interfaces)
            try:
                await self._serve(addresses)
                retry_s = RESCAN_S
            except (OSError, ZeroconfError, AssertionError, RuntimeError) as error:
                if str(error) != self._problem:
                    self._problem = str(error)
                    self._log("warning", "mDNS does not work; schedulers named by join are dialled", reason=str(error))
                await asyncio.sleep(retry_s)
                retry_s = min(retry_s * 2, RETRY_S_MAX)

    async def _serve(self, addresses: list[str]) -> None:
        """Until the machine's addresses are others than these."""
        if not addresses:
            raise OSError("no network interface has an address")
        zeroconf = AsyncZeroconf(interfaces=addresses, ip_version=_version(addresses))
        browser: AsyncServiceBrowser | None = None
        try:
            browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE, handlers=[self._on_change])
            if "scheduler" in self._node.roles:
                # Our instance name is unique by itself, so that probing for it would only cost a second.
                await zeroconf.async_register_service(self._record(addresses), cooperating_responders=True)
            if self._problem:
                self._problem = ""
                self._log("info", "mDNS works again")
            await self._until_changed(zeroconf.zeroconf, addresses)
        finally:
            for task in self._resolving:
                task.cancel()
            await asyncio.gather(*self._resolving, return_exceptions=True)
            try:
                if browser is not None:
                    await browser.async_cancel()
                await zeroconf.async_unregister_all_services()
            finally:
                await zeroconf.async_close()

    async def _until_changed(self, zeroconf: Zeroconf, addresses: list[str]) -> None:
        """Until the machine's addresses are others than these, or the cluster key is. Raises OSError where too much is
        heard."""
        heard = _Heard()
        fingerprints = self._fingerprints()
        zeroconf.add_listener(heard, None)
        looked_at = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(GUARD_S)
            if heard.count > HEARD_PER_S_MAX * GUARD_S or len(zeroconf.cache.names()) > HEARD_KEPT_MAX:
                raise OSError("the LAN is flooded with mDNS announcements: none are heard for a while")
            heard.count = 0
            if self._fingerprints() != fingerprints:
                return
            now = asyncio.get_running_loop().time()
            if now - looked_at >= RESCAN_S:
                looked_at = now
                if lan_addresses(self._interfaces) != addresses:
                    self._log("info", "the machine's addresses have changed")
                    return

    def _record(self, addresses: list[str]) -> ServiceInfo:
        name = self._node.store_id.hex()
        properties = {
            "id": str(self._node.node_id),
            "boot": str(self._node.boot),
            "cluster": ",".join(self._fingerprints()),
            "roles": ",".join(self._node.roles),
            "version": self._node.version,
        }
        return ServiceInfo(
            SERVICE, f"{name}.{SERVICE}", port=self._mesh.port, properties=properties,
            server=f"taskd-{name}.local.", parsed_addresses=list(self._mesh.hosts) or addresses,
        )  # fmt: skip

    def _on_change(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed:
            node_id = self._ids_by_name.pop(name, None)
            if node_id is not None:
                self._mesh.remove_hint(node_id, _label(name))
            return
        if _NAME.fullmatch(_label(name)) is None:
            return  # Nodes of ours are named by their store ids.
        if len(self._resolving) >= RESOLVING_MAX or (
            name not in self._ids_by_name and len(self._ids_by_name) >= NAMES_MAX
        ):
            return  # It is heard of again when its record is refreshed.
        task = asyncio.get_running_loop().create_task(self._resolve(zeroconf, name))
        self._resolving.add(task)
        task.add_done_callback(self._resolving.discard)

    async def _resolve(self, zeroconf: Zeroconf, name: str) -> None:
        info = AsyncServiceInfo(SERVICE, name)
        try:
            is_known = await info.async_request(zeroconf, RESOLVE_TIMEOUT_MS)
        except (OSError, ZeroconfError, AssertionError):  # The network has gone: `run` hears of that by itself.
            return
        if not is_known or not info.port:
            return
        clusters = (info.properties.get(b"cluster") or b"").decode(errors="replace").split(",")
        if not set(clusters) & set(self._fingerprints()):
            return
        try:
            node_id = int(info.properties.get(b"id") or b"")
        except ValueError:
            return
        addresses = info.parsed_scoped_addresses(IPVersion.All)[:ADDRESSES_PER_NAME_MAX]
        texts = [address_text(address, info.port) for address in addresses if _can_be_dialled(address)]
        if not 0 < node_id < 1 << 63 or not texts:
            return
        if node_id == self._node.node_id:
            is_ours = _label(name) == self._node.store_id.hex()
            if not is_ours or info.properties.get(b"boot") != str(self._node.boot).encode():
                self._mesh.add_twin(texts)
            return
        before = self._ids_by_name.get(name)
        if before not in (None, node_id):
            self._mesh.remove_hint(before, _label(name))
        self._ids_by_name[name] = node_id
        self._mesh.add_hint(node_id, texts, _label(name))


class _Heard(RecordUpdateListener):
    """Counts what is new or changed of all that is announced on the LAN."""

    def __init__(self) -> None:
        self.count = 0

    def async_update_records(self, zc: Zeroconf, now: float, records: list[RecordUpdate]) -> None:
        self.count += len(records)


def _label(name: str) -> str:
    return name.removesuffix(f".{SERVICE}")


def _can_be_dialled(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    return not (ip.is_unspecified or ip.is_multicast or ip.is_reserved)


def _version(addresses: list[str]) -> IPVersion:
    versions = {ipaddress.ip_address(address).version for address in addresses}
    if versions == {4, 6}:
        return IPVersion.All
    return IPVersion.V4Only if versions == {4} else IPVersion.V6Only
