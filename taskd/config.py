"""Settings: defaults < /etc/taskd/taskd.toml < TASKD_* < flags. Every key, its type, its default and its bounds.

Each field below is one key: its rule, then one line that says what for. The errors, config/taskd.toml and
docs/configuration.md say the same (tests see to it). Values are held ready for use: sizes in bytes, durations in
seconds, paths absolute, addresses with a port.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import msgspec
from msgspec import Struct

from taskd import paths
from taskd.rules import (
    Address,
    Duration,
    FileMode,
    FilePath,
    ListOf,
    Number,
    Size,
    Switch,
    TableOf,
    Text,
    Whole,
    Word,
)
from taskd.sources import Setting, Sources

PORT_DEFAULT = 7710
API_PORT_DEFAULT = 7711
TOKENS_NAME = "tokens.json"
_DAY_S = 86400.0
_PIB = 1 << 50
_AMOUNT = Number(0, 1_000_000)
_NODE_NAME = Text(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", "up to 63 letters, digits, dots, hyphens, underscores")
_LABEL_NAME = Text(
    r"[A-Za-z0-9_][A-Za-z0-9_.\-/]{0,62}", "up to 63 letters, digits, dots, slashes, hyphens, underscores"
)
_LABEL = Text(r"[^\x00-\x1f\x7f]{0,255}", "text of at most 255 characters on one line")
_VARIABLE = Text(
    r"(?!LD_|PYTHON|TASKD_|BASH_ENV|ENV$)[A-Za-z_][A-Za-z0-9_]{0,254}\*?",
    "the name of a variable, or the beginning of names and a *; none of LD_*, PYTHON*, TASKD_*, ENV, BASH_ENV",
)
_MODULE = Text(r"[^\W\d]\w*(\.[^\W\d]\w*)*", "the name of a Python module such as myapp.tasks")


class NodeSettings(Struct, frozen=True):
    """[node] Who this node is, and where it keeps its things."""

    name: Annotated[
        str, Text("|" + _NODE_NAME.form, _NODE_NAME.what), "What people see this node called. Empty: the host's name."
    ] = ""
    id: Annotated[
        int,
        Whole(0, (1 << 63) - 1),
        "The live scheduler with the lowest id leads. 0: made at the first start, so that the oldest one leads.",
    ] = 0
    cluster: Annotated[str, _NODE_NAME, "Only nodes of the same cluster talk, so one LAN can hold several."] = "default"
    state_dir: Annotated[
        str,
        FilePath(),
        "Where tasks and outputs are kept. Empty: /var/lib/taskd as root, else the user's state folder.",
    ] = ""
    socket: Annotated[
        str, FilePath(), "Where local clients ask. Empty: in state_dir where that is set, else the usual run directory."
    ] = ""
    key_file: Annotated[
        str, FilePath(), "The cluster key; whoever can read it can join. Empty: cluster.key beside taskd.toml."
    ] = ""
    key_grace: Annotated[
        float,
        Duration(0, 366 * _DAY_S),
        "How long the previous cluster key is still accepted after `taskd key rotate`.",
    ] = _DAY_S
    log_level: Annotated[
        str, Word(("debug", "info", "warning", "error")), "The least level that is logged; debug is for finding faults."
    ] = "info"
    log_format: Annotated[
        str,
        Word(("auto", "text", "json")),
        "text for people, json for programs; auto is text, without the time in a journal, which has its own.",
    ] = "auto"


class NetworkSettings(Struct, frozen=True):
    """[network] How nodes find each other and know that they live."""

    listen: Annotated[
        tuple[str, ...],
        ListOf(Address(PORT_DEFAULT, is_listen=True)),
        "Where a scheduler takes peers. Empty: all addresses, port 7710 or, where that is taken, any free one.",
    ] = ()
    join: Annotated[
        tuple[str, ...],
        ListOf(Address(PORT_DEFAULT), most=256),
        "Schedulers to dial beside those found by mDNS: for other subnets, and LANs without multicast.",
    ] = ()
    mdns: Annotated[bool, Switch(), "Announce and find schedulers on the LAN; nothing found there is trusted."] = True
    interfaces: Annotated[
        tuple[str, ...],
        ListOf(Text(r"[A-Za-z0-9_.:%@-]{1,64}", "the name or address of a network interface")),
        "Interfaces for mDNS. Empty: all real ones, without the bridges of containers and virtual machines.",
    ] = ()
    heartbeat_s: Annotated[
        float,
        Number(0.05, 60, "seconds"),
        "How often peers show that they are alive. The more often, the sooner a loss is noticed.",
    ] = 0.5
    peer_timeout_s: Annotated[
        float, Number(0.2, 600, "seconds"), "A peer silent for this long is gone. Several heartbeats: one may be late."
    ] = 2.5
    redial_max_s: Annotated[
        float,
        Number(0.1, 600, "seconds"),
        "The longest wait between two attempts to reach a peer that does not answer.",
    ] = 3.0


class SchedulerSettings(Struct, frozen=True):
    """[scheduler] How tasks are kept and handed out."""

    queued_max: Annotated[
        int, Whole(1, 1_000_000_000), "Unfinished tasks beyond this are refused (429), so that the disk does not fill."
    ] = 10_000_000
    worker_grace_s: Annotated[
        float,
        Number(0, 86400, "seconds"),
        "After this a lost worker's tasks go to others; it may reconnect until then.",
    ] = 5.0
    restart_grace_s: Annotated[
        float,
        Number(0, 86400, "seconds"),
        "How long running tasks wait for their workers to report them after a restart or a change of leaders.",
    ] = 10.0
    prefetch_s: Annotated[
        float,
        Number(0, 10, "seconds"),
        "Work kept waiting at each worker, so that no slot idles while a result travels.",
    ] = 0.05
    prefetch_max: Annotated[
        int,
        Whole(1, 10_000),
        "At most this many tasks wait for each slot, however short they are: they may have to be taken back.",
    ] = 512
    crash_limit: Annotated[
        int, Whole(1, 10_000), "A task fails after losing its worker this many times: it may be what kills them."
    ] = 3
    min_replicas: Annotated[
        int, Whole(0, 1), "1: new tasks are refused (503) while no standby keeps a copy of them. 0: they are taken."
    ] = 0
    standby_grace_s: Annotated[
        float,
        Number(0.1, 60, "seconds"),
        "How long answers wait for the last standby when it is gone; after that they say that there is no copy.",
    ] = 2.5
    hand_over_after_s: Annotated[
        float,
        Number(0, 3600, "seconds"),
        "A scheduler with a lower id leads again after being well for this long; doubled each time it goes away.",
    ] = 10.0
    empty_wait_s: Annotated[
        float,
        Number(0, 3600, "seconds"),
        "How long a scheduler with an empty disk looks for one that has tasks before it leads.",
    ] = 10.0
    finished_age_max: Annotated[
        float, Duration(0, 3660 * _DAY_S), "Finished tasks are removed after this: seven days. 0: never."
    ] = 7 * _DAY_S
    free_disk_min_bytes: Annotated[
        int, Size(0, _PIB), "With less than this free on the disk no new tasks are taken; results still are."
    ] = 256 << 20


class WorkerSettings(Struct, frozen=True):
    """[worker] What this machine gives to tasks."""

    slots: Annotated[int, Whole(0, 10_000), "Tasks run at once. 0: one for each whole cpu below."] = 0
    cpus: Annotated[float, _AMOUNT, "CPUs shared out to tasks. 0: those that taskd itself may use."] = 0.0
    memory: Annotated[
        int, Size(0, _PIB), "Memory shared out to tasks. 0: the machine's, or its control group's where that is less."
    ] = 0
    gpus: Annotated[
        float, _AMOUNT, "GPUs shared out to tasks. 0: as many as there are devices /dev/nvidia0 and up."
    ] = 0.0
    resources: Annotated[
        dict[str, float],
        TableOf(_AMOUNT, _LABEL_NAME, reserved=("cpus", "memory", "gpus")),
        "Resources of your own that tasks can ask for, such as licences or tape drives, and how many there are.",
    ] = {}
    labels: Annotated[
        dict[str, str],
        TableOf(_LABEL, _LABEL_NAME),
        "What tasks can choose workers by, beside the labels host, os, distro, arch and python that every worker has.",
    ] = {}
    types: Annotated[
        tuple[str, ...],
        ListOf(Word(("command", "http"))),
        "Built-in types of tasks taken here. Leave command out, and only handlers and services run.",
    ] = ("command", "http")
    handlers: Annotated[
        tuple[str, ...],
        ListOf(_MODULE, most=256),
        "Python modules whose @task functions are offered beside installed ones.",
    ] = ()
    handler_path: Annotated[
        tuple[str, ...], ListOf(FilePath()), "Directories where handler processes look for modules first."
    ] = ()
    handler_processes: Annotated[int, Whole(0, 10_000), "Processes that run Python handlers. 0: as many as slots."] = 0
    handler_calls_max: Annotated[
        int,
        Whole(1, 1_000_000_000),
        "Calls after which a handler process is replaced, so that small leaks never add up.",
    ] = 100_000
    handler_memory_max: Annotated[
        int, Size(0, _PIB), "A handler process above this is replaced after its call. 0: no limit."
    ] = 1 << 30
    environment: Annotated[
        tuple[str, ...],
        ListOf(_VARIABLE),
        "Variables that tasks inherit from taskd's own environment; a task's own come on top.",
    ] = ("PATH", "HOME", "LANG", "LC_*", "TZ", "USER", "LOGNAME", "SHELL")
    cpu_limit: Annotated[
        str,
        Word(("quota", "share")),
        "quota: a task never gets more than the cpus that it asks for. share: more while others leave them idle.",
    ] = "quota"
    memory_rlimit: Annotated[
        bool,
        Switch(),
        "Without control groups, each process of a task may have as much data as the task asks for memory.",
    ] = True
    task_user: Annotated[
        str,
        Text(r"|[A-Za-z_][A-Za-z0-9_.-]{0,31}", "the name of a user"),
        "Commands and handlers run as this user, started by a launcher. Empty: as the user that taskd runs as.",
    ] = ""
    launcher: Annotated[
        str,
        FilePath(),
        "The socket of a launcher that runs as a service. Empty: a worker that is root starts its own for task_user.",
    ] = ""
    task_processes_max: Annotated[
        int, Whole(1, 4_000_000), "All tasks of task_user together have at most this many processes and threads."
    ] = 16_384
    secrets_dir: Annotated[
        str,
        FilePath(),
        "Files with the secrets that tasks may name, readable by nobody else. Empty: secrets beside taskd.toml.",
    ] = ""
    output_age_max: Annotated[
        float,
        Duration(60, 3660 * _DAY_S),
        "How long what tasks wrote is kept after their end; its tail stays recorded.",
    ] = 7 * _DAY_S
    output_bytes_max: Annotated[
        int, Size(1 << 20, _PIB), "All that tasks wrote, together; above it the oldest is removed first."
    ] = 10 << 30
    output_stream_bytes_max: Annotated[
        int,
        Size(1 << 16, _PIB),
        "Of one stream of one attempt; beyond this the oldest bytes are dropped, and readers are told how many.",
    ] = 1 << 30
    stop_grace_s: Annotated[
        float, Number(0, 86400, "seconds"), "How long running tasks get between TERM and KILL when this worker stops."
    ] = 10.0


class ApiSettings(Struct, frozen=True):
    """[api] The local socket, and HTTPS for other machines."""

    socket_mode: Annotated[
        int, FileMode(), "Who may connect; what a caller may do then depends on who it is."
    ] = 0o660  # fmt: skip
    socket_group: Annotated[
        str, Text(r"|[A-Za-z_][A-Za-z0-9_.-]{0,31}", "the name of a group"), "The socket's group, where it exists."
    ] = "taskd"
    body_bytes_max: Annotated[
        int, Size(1 << 16, 64 << 20), "A larger request is refused (413): it is held in memory while it is read."
    ] = 16 << 20
    requests_per_s_max: Annotated[
        int,
        Whole(0, 1_000_000),
        "Of one user who is no administrator, in the long run; more are refused (429). 0: any number.",
    ] = 1000
    audit_bytes_max: Annotated[
        int,
        Size(0, 1 << 40),
        "Who changed what goes to audit.log and, where that gets larger, one older file; 0: only to the log.",
    ] = 64 << 20
    listen: Annotated[
        tuple[str, ...],
        ListOf(Address(API_PORT_DEFAULT, is_listen=True)),
        "Where the API is served over HTTPS, to whoever has a token (`taskd token create`). Empty: nowhere.",
    ] = ()
    certificate: Annotated[
        str,
        FilePath(),
        "The certificate for HTTPS and those above it, in PEM. Empty: one that the node makes and signs itself.",
    ] = ""
    certificate_key: Annotated[str, FilePath(), "The certificate's private key, in PEM."] = ""
    tokens_file: Annotated[str, FilePath(), "The digests of the tokens. Empty: tokens.json beside the cluster key."] = (
        ""
    )


class Config(Struct, frozen=True):
    """All settings of one daemon."""

    node: NodeSettings = NodeSettings()
    network: NetworkSettings = NetworkSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    worker: WorkerSettings = WorkerSettings()
    api: ApiSettings = ApiSettings()


def _settings() -> dict[str, Setting]:
    found = {}
    for section in Config.__struct_fields__:
        struct = type(getattr(Config(), section))
        hints = get_type_hints(struct, include_extras=True)
        for field in msgspec.structs.fields(struct):
            _, rule, why = get_args(hints[field.name])
            found[f"{section}.{field.name}"] = Setting(rule, why, getattr(struct(), field.name))
    return found


SETTINGS: dict[str, Setting] = _settings()
"""Every key, as `section.key`, in the order of the file."""

RELOADABLE = frozenset({
    "node.key_grace", "node.log_level",
    "scheduler.queued_max", "scheduler.worker_grace_s", "scheduler.prefetch_s", "scheduler.prefetch_max",
    "scheduler.min_replicas", "scheduler.standby_grace_s", "scheduler.hand_over_after_s",
    "scheduler.finished_age_max",
    "worker.slots", "worker.cpus", "worker.memory", "worker.gpus", "worker.resources", "worker.labels", "worker.types",
})  # fmt: skip
"""The keys that SIGHUP may change; the others wait for a restart."""


def load(path: Path | None, environ: Mapping[str, str], overrides: Mapping[str, object]) -> Config:
    """The settings from a file (None: the usual one, if it exists), the environment, and flags by `section.key`.

    Raises ConfigError, one line for each thing that is wrong: where, key, value, and what is allowed.
    """
    sources = Sources(SETTINGS)
    usual = Path(paths.places(environ).config, paths.CONFIG_NAME)
    sources.read_file(path or usual, must_exist=path is not None)
    sources.read_environment(environ)
    sources.read_flags(overrides)
    sources.check()
    config = Config(
        NodeSettings(**sources.section("node")),
        NetworkSettings(**sources.section("network")),
        SchedulerSettings(**sources.section("scheduler")),
        WorkerSettings(**sources.section("worker")),
        ApiSettings(**sources.section("api")),
    )
    heartbeat_s, timeout_s = config.network.heartbeat_s, config.network.peer_timeout_s
    if timeout_s < 2 * heartbeat_s:
        sources.disagree(
            {"network.heartbeat_s": heartbeat_s, "network.peer_timeout_s": timeout_s},
            "the time-out must be at least twice the heartbeat, or one late heartbeat is taken for a lost node",
        )
        sources.check()
    if bool(config.api.certificate) != bool(config.api.certificate_key):
        sources.disagree(
            {"api.certificate": config.api.certificate, "api.certificate_key": config.api.certificate_key},
            "name both the certificate and its key, or neither",
        )
        sources.check()
    return config


def key_path(config: Config) -> Path:
    """Where the cluster key is."""
    return Path(config.node.key_file or paths.key_file())


def tokens_path(config: Config) -> Path:
    """Where the digests of tokens are."""
    return Path(config.api.tokens_file or key_path(config).with_name(TOKENS_NAME))


def changes(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """The keys that differ: those that take effect by a reload, and those that need a restart."""
    changed = [key for key in SETTINGS if value_of(old, key) != value_of(new, key)]
    return [key for key in changed if key in RELOADABLE], [key for key in changed if key not in RELOADABLE]


def value_of(config: Config, key: str) -> Any:
    """The value of a key given as `section.key`."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)
