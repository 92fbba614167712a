"""The cluster key of a running daemon, read again."""

from __future__ import annotations

from pathlib import Path

from taskd.daemon.logs import log
from taskd.errors import ConfigError
from taskd.net.keyring import load_keys
from taskd.net.mesh import Mesh
from taskd.net.security import SchedulerKey


def reload_keys(path: Path, mesh: Mesh) -> None:
    """Take over what the key file holds now, if this node can go on with it. No connection ends whose key still
    counts."""
    try:
        keys = load_keys(path)
        if keys is None:
            raise ConfigError(f"there is no key in {path} any more")
        if "scheduler" in mesh.node.roles and not isinstance(keys.current, SchedulerKey):
            raise ConfigError(f"{path} holds a worker key: a scheduler needs the scheduler key of the cluster")
        is_new = mesh.rotation.change(keys)
    except ConfigError as error:
        log("error", "the cluster key is not taken; the old one stays", reason=error.message)
        return
    if is_new:
        log(
            "info",
            "cluster key read again",
            cluster=keys.current.fingerprint,
            accepted=",".join(mesh.ring.fingerprints),
        )
