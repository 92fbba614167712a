"""Settings: what counts over what, what is refused and how that is said, and that file, docs and code agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd import paths
from taskd.config import PORT_DEFAULT, RELOADABLE, SETTINGS, Config, changes, load
from taskd.core.settings import SchedulerSettings as CoreSettings
from taskd.errors import ConfigError
from taskd.net.mesh import PORT_DEFAULT as MESH_PORT_DEFAULT

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "config" / "taskd.toml"
DOCUMENT = ROOT / "docs" / "configuration.md"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "taskd.toml"
        path.write_text(text)
        return path

    return write


def problems(path: Path | None = None, environ: dict[str, str] | None = None, **flags: object) -> list[str]:
    """What load complains of; flags are written section__key."""
    with pytest.raises(ConfigError) as caught:
        load(path, environ or {}, {key.replace("__", "."): value for key, value in flags.items()})
    return caught.value.message.split("\n")


# -- Where values come from --------------------------------------------------------------------------------------------


def test_without_anything_the_defaults_count(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "SYSTEM", paths.Places(str(tmp_path), str(tmp_path), str(tmp_path)))
    assert load(None, {"HOME": str(tmp_path)}, {}) == Config()


def test_flags_count_over_environment_over_file(write):
    path = write('[worker]\nslots = 2\ncpus = 2\nmemory = "2GiB"\n')
    config = load(path, {"TASKD_WORKER_CPUS": "3", "TASKD_WORKER_MEMORY": "3GiB"}, {"worker.memory": "4GiB"})
    assert (config.worker.slots, config.worker.cpus, config.worker.memory) == (2, 3.0, 4 << 30)
    assert config.node == Config().node


@pytest.mark.parametrize("is_root", [True, False])
def test_the_usual_file_is_the_users_own_or_as_root_the_systems(tmp_path, monkeypatch, is_root):
    monkeypatch.setattr(paths.os, "geteuid", lambda: 0 if is_root else 1000)
    monkeypatch.setattr(paths, "SYSTEM", paths.Places(str(tmp_path / "etc"), "", ""))
    for directory, cluster in (("etc", "of-root"), ("xdg/taskd", "of-user")):
        (tmp_path / directory).mkdir(parents=True)
        (tmp_path / directory / "taskd.toml").write_text(f'[node]\ncluster = "{cluster}"\n')
    config = load(None, {"XDG_CONFIG_HOME": str(tmp_path / "xdg")}, {})
    assert config.node.cluster == ("of-root" if is_root else "of-user")


def test_every_kind_of_value_is_read_from_toml_and_from_text(write):
    from_file = load(
        write("""
[node]
id = 7
state_dir = "/var/lib/elsewhere/"
[network]
listen = ["10.0.0.1", "[fe80::1%eth0]:7711", ":0"]
mdns = false
heartbeat_s = 1
[worker]
resources = { tape = 2, licence = 0.5 }
labels = { room = "b12", disk = "fast=yes" }
types = ["http"]
handlers = ["myapp.tasks", "myapp.more"]
output_age_max = "1d12h"
output_bytes_max = 104857600
[api]
socket_mode = "0600"
"""),
        {},
        {},
    )
    from_text = load(
        write(""),
        {
            "TASKD_NODE_ID": "7",
            "TASKD_NODE_STATE_DIR": "/var/lib/elsewhere",
            "TASKD_NETWORK_LISTEN": "10.0.0.1, [fe80::1%eth0]:7711, :0",
            "TASKD_NETWORK_MDNS": "no",
            "TASKD_NETWORK_HEARTBEAT_S": "1.0",
            "TASKD_WORKER_RESOURCES": "tape=2,licence=0.5",
            "TASKD_WORKER_LABELS": "room=b12,disk=fast=yes",
            "TASKD_WORKER_TYPES": "http",
            "TASKD_WORKER_HANDLERS": "myapp.tasks,myapp.more,",
            "TASKD_WORKER_OUTPUT_AGE_MAX": "36h",
            "TASKD_WORKER_OUTPUT_BYTES_MAX": "100MiB",
            "TASKD_API_SOCKET_MODE": "600",
        },
        {},
    )
    assert from_file == from_text
    assert from_file.network.listen == ("10.0.0.1:7710", "[fe80::1%eth0]:7711", ":0")
    assert from_file.worker.output_age_max == 36 * 3600
    assert from_file.worker.output_bytes_max == 100 << 20
    assert from_file.worker.resources == {"tape": 2.0, "licence": 0.5}
    assert from_file.worker.labels == {"room": "b12", "disk": "fast=yes"}
    assert from_file.api.socket_mode == 0o600
    assert from_file.node.state_dir == "/var/lib/elsewhere"


def test_flags_may_be_text_or_values():
    config = load(None, {}, {"node.id": "5", "network.join": ("a:1", "a:1", "b"), "network.mdns": False})
    assert (config.node.id, config.network.join, config.network.mdns) == (5, ("a:1", "b:7710"), False)


def test_relative_paths_start_here_on_the_command_line_and_are_refused_in_the_file(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    environ = {"TASKD_NODE_KEY_FILE": "~/key", "TASKD_WORKER_HANDLER_PATH": "a,/b"}
    config = load(write(""), environ, {"node.state_dir": "../state"})
    assert config.node.state_dir == str(tmp_path.parent / "state")
    assert config.node.key_file == "/home/someone/key"
    assert config.worker.handler_path == (str(tmp_path / "a"), "/b")
    (problem,) = problems(write('[node]\nstate_dir = "state"\n'))
    assert "[node] state_dir" in problem
    assert 'must be an absolute path, or one that begins with "~/"' in problem


def test_variables_of_tasks_and_clients_are_passed_over():
    from taskd.sources import OTHER_VARIABLES

    own = ("TASKD_JOB_ID", "TASKD_BACKUP_DIR", "TASKD_HOME", "TASKD_VERSION", "TASKD_NODE", "TASKD_PORT", "TASKD_")
    environ = dict.fromkeys((*OTHER_VARIABLES, *own), "1")
    assert load(None, environ, {"node.id": 1}) == load(None, {}, {"node.id": 1})


# -- What is refused ---------------------------------------------------------------------------------------------------


def test_the_errors_are_those_of_the_document(write):
    path = write('[worker]\nslots = "many"\nslot = 3\n')
    found = problems(path, {"TASKD_NODE_LOG_LEVEL": "warn"})
    shown = "\n".join(found).replace(str(path), "/etc/taskd/taskd.toml")
    assert f"```\n{shown}\n```" in DOCUMENT.read_text()


def test_the_first_wrong_key_is_named_for_programs(write):
    with pytest.raises(ConfigError) as caught:
        load(write("[worker]\nslots = -1\n"), {}, {"node.id": -1})
    assert caught.value.field == "worker.slots"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("slots = 3", "slots belongs in a section: write it below [worker]"),
        ("worker = 3", "worker must be a section: write [worker] above its keys"),
        ("[workers]", "[workers]: there is no such section; did you mean worker?"),
        ("[zzz]", "[zzz]: there is no such section; there are node, network, scheduler, worker, api"),
        ("[node]\nslots = 3", "[node] slots: there is no such key; it belongs in [worker]"),
        (
            "[api]\nzzz = 3",
            "[api] zzz: there is no such key; there are socket_mode, socket_group, body_bytes_max, "
            "requests_per_s_max, audit_bytes_max, listen, certificate, certificate_key, tokens_file",
        ),
        ("[worker]\nslots = true", "slots = true: must be a whole number from 0 to 10_000"),
        ("[worker]\nslots = 2.0", "slots = 2.0: must be a whole number from 0 to 10_000"),
        ("[worker]\nslots = 10001", "slots = 10001: must be a whole number from 0 to 10_000"),
        ("[node]\nid = -1", "id = -1: must be a whole number from 0 up"),
        ("[worker]\ncpus = nan", "cpus = NaN: must be a number from 0 to 1000000"),
        ('[worker]\ncpus = "2"', 'cpus = "2": must be a number from 0 to 1000000'),
        ("[network]\nmdns = 1", "mdns = 1: must be true or false"),
        ('[worker]\nmemory = "lots"', 'memory = "lots": must be a size such as "512MiB"'),
        ("[worker]\noutput_age_max = 1", 'output_age_max = 1: must be a duration such as "7d"'),
        ('[worker]\noutput_age_max = "7 parsecs"', "must be a duration such as"),
        ("[api]\nsocket_mode = 0o660", "socket_mode = 432: must be octal permissions in quotes"),
        ('[api]\nsocket_mode = "0060"', "must be octal permissions in quotes"),
        ('[api]\nsocket_mode = "0888"', "must be octal permissions in quotes"),
        ('[worker]\ntypes = "http"', "must be a list of at most 64, each one of command, http"),
        ('[worker]\ntypes = ["comand"]', "'comand' is wrong: did you mean command?"),
        ('[worker]\nresources = ["a=1"]', "must be a table of at most 64"),
        ("[worker]\nresources = { memory = 1 }", "memory is a setting of its own"),
        ("[worker]\nresources = { tape = -1 }", "'tape' is wrong"),
        ('[worker]\nlabels = { "a b" = "x" }', "'a b' is wrong"),
        ('[worker]\nlabels = { a = "x\\ny" }', "'a' is wrong"),
        ('[worker]\nhandlers = ["my-app"]', "'my-app' is wrong"),
        ('[worker]\nhandlers = ["os; x"]', "the name of a Python module such as myapp.tasks"),
        ('[network]\nlisten = ["::1"]', "IPv6 in brackets"),
        ('[network]\nlisten = ["a:70000"]', "'a:70000' is wrong"),
        ('[network]\njoin = [":7710"]', "':7710' is wrong"),
        ('[network]\njoin = ["a:0"]', "'a:0' is wrong"),
        ('[network]\njoin = [""]', "'' is wrong"),
        ('[network]\njoin = ["http://a"]', "must be a list of at most 256, each HOST:PORT or HOST"),
        ('[node]\nname = "a b"', "up to 63 letters, digits"),
        ('[node]\ncluster = ""', "up to 63 letters, digits"),
        ('[node]\nstate_dir = "/a\\u0000b"', "must be an absolute path"),
        ("[node", "is not valid TOML: Expected ']'"),
    ],
)
def test_what_is_wrong_is_said(write, text, expected):
    path = write(text)
    (problem,) = problems(path)
    assert problem.startswith(f"{path}: ")
    assert expected in problem


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("TASKD_WORKER_SLOTS", "", "TASKD_WORKER_SLOTS = \"\": must be a whole number from 0 to 10_000"),
        ("TASKD_WORKER_SLOT", "3", "TASKD_WORKER_SLOT: there is no such key; did you mean slots?"),
        ("TASKD_WORKERS_SLOTS", "3", "TASKD_WORKERS_SLOTS: there is no such setting; did you mean the section worker?"),
        ("TASKD_SCHED_QUEUED_MAX", "3", "did you mean the section scheduler?"),
        ("TASKD_NODES_\x1bX", "3", "did you mean the section node?"),
        ("TASKD_LOG_LEVEL", "debug", "TASKD_LOG_LEVEL: there is no such setting; did you mean TASKD_NODE_LOG_LEVEL?"),
        ("TASKD_SLOTS", "3", "did you mean TASKD_WORKER_SLOTS?"),
        ("TASKD_NETWORK_MDNS", "maybe", "must be true or false"),
        ("TASKD_WORKER_LABELS", "a=b,c", "'c' is not name=value"),
        ("TASKD_WORKER_LABELS", "a=\x1b[2J", "TASKD_WORKER_LABELS = \"a=\\u001b[2J\""),
        ("TASKD_WORKER_CPUS", "1e400", "must be a number from 0 to 1000000"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_the_environment_is_said(variable, text, expected):
    (problem,) = problems(None, {variable: text})
    assert problem.startswith("the environment: ")
    assert expected in problem
    assert problem.isprintable()


def test_a_heartbeat_that_the_timeout_cannot_wait_for_is_refused(write):
    (problem,) = problems(write("[network]\npeer_timeout_s = 1.5\n"), network__heartbeat_s="1")
    assert "network.heartbeat_s = 1.0 (the command line), network.peer_timeout_s = 1.5 (" in problem
    assert "at least twice the heartbeat" in problem


def test_a_key_in_place_of_its_file_is_refused_and_not_shown(write):
    key = "taskd-worker-key-v1:c2VjcmV0"
    for found in (
        problems(write(f'[node]\nkey_file = "{key}"\n')),
        problems(environ={"TASKD_NODE_KEY_FILE": key}),
        problems(node__key_file=key),
    ):
        assert "put it into a file" in found[0]
        assert "c2VjcmV0" not in found[0]


def test_a_file_that_cannot_be_read_is_named(tmp_path, write):
    assert problems(tmp_path / "none") == [f"{tmp_path / 'none'}: there is no such file"]
    assert problems(tmp_path) == [f"{tmp_path}: cannot be read: Is a directory"]
    assert "is no configuration" in problems(write("#" * (1 << 20) + "\n"))[0]
    path = write("")
    path.write_bytes(b"[node]\nname = '\xff'\n")
    assert f"{path}: is not valid TOML" in problems(path)[0]
    assert "is not valid TOML" in problems(write("[node]\nid = " + "[" * 100_000))[0]


def test_very_many_problems_are_counted_not_listed(write):
    found = problems(write("[node]\n" + "".join(f"x{number} = 1\n" for number in range(50))))
    assert len(found) == 21
    assert found[-1] == "and 30 more"


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(key=st.sampled_from(list(SETTINGS)), value=JUNK)
def test_any_value_is_taken_or_refused_in_words(key, value):
    try:
        config = load(Path("/dev/null"), {}, {key: value})
    except ConfigError as error:
        assert key in error.message  # noqa: PT017  # either outcome is right
    else:
        assert isinstance(config, Config)


# -- Reloading ---------------------------------------------------------------------------------------------------------


def test_changes_are_sorted_into_those_that_need_a_restart_and_those_that_do_not():
    old = load(None, {}, {"worker.slots": 1, "node.id": 1, "node.log_level": "info"})
    new = load(None, {}, {"worker.slots": 2, "node.id": 2, "node.log_level": "info"})
    assert changes(old, new) == (["worker.slots"], ["node.id"])
    assert changes(new, new) == ([], [])
    assert set(SETTINGS) >= RELOADABLE


def test_the_core_has_the_same_settings_of_the_scheduler():
    ours = Config().scheduler
    for name, default in msgspec.structs.asdict(CoreSettings()).items():
        if name == "window":
            continue  # Of no concern to operators.
        # Of durations that may be written as text the key does not name the unit.
        key = name if hasattr(ours, name) else name.removesuffix("_s")
        assert getattr(ours, key) == default, name


def test_the_mesh_has_the_same_port():
    assert PORT_DEFAULT == MESH_PORT_DEFAULT


# -- The file and the document -----------------------------------------------------------------------------------------


def test_the_shipped_file_changes_nothing(write):
    assert load(SHIPPED, {}, {}) == load(write(""), {}, {})


def test_the_shipped_file_has_every_setting_with_its_default_and_reason():
    found: list[str] = []
    section = why = ""
    for line in SHIPPED.read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line.startswith("# "):
            why = line.removeprefix("# ")
        elif line.startswith("#") and "=" in line:
            name, value = next(iter(tomllib.loads(line.removeprefix("#")).items()))
            key = f"{section}.{name}"
            found.append(key)
            assert SETTINGS[key].rule.read(value) == SETTINGS[key].default, key
            assert SETTINGS[key].why == why, key
    assert found == list(SETTINGS)


def test_the_document_has_every_setting_as_it_is():
    found: list[str] = []
    section = ""
    for line in DOCUMENT.read_text().splitlines():
        if heading := re.fullmatch(r"## \[(\w+)\]", line):
            section = heading[1]
        elif section and (row := re.fullmatch(r"\| `(\w+)` \| `(.*)` \| (.*) \| (.*) \| (yes|no) \|", line)):
            name, default, allowed, why, reload = row.groups()
            key = f"{section}.{name}"
            setting = SETTINGS[key]
            found.append(key)
            assert setting.rule.read(tomllib.loads(f"x = {default}")["x"]) == setting.default, key
            assert (setting.rule.allowed, setting.why) == (allowed, why), key
            assert (key in RELOADABLE) == (reload == "yes"), key
    assert found == list(SETTINGS)
