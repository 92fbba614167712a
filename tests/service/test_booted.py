"""The Debian package on a Debian with a real systemd: installed, started, watched, restarted, stopped, purged.

One machine for all tests, in the order of a package's life. It takes what `make binary` has built, which .ci/run does
before the tests.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.machine import Machine, debian_root, why_impossible

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "dist" / "taskd-folder"
UNITS = ("taskd@scheduler", "taskd@worker")
# No process of the package is left: the pattern does not find itself.
PROCESSES = "grep -lsz '[t]askd' /proc/[0-9]*/cmdline"
# Whatever has the name of the package, beside the journal, and systemd's own files of units that ran.
TRACES = (
    "find / -xdev \\( -path /proc -o -path /mnt -o -path /run/systemd -o -path /var/log \\) -prune "
    "-o -name '*taskd*' -print"
)
CONFIG = "/etc/taskd/taskd.toml"


def why_not() -> str:
    """Why the tests cannot run here; empty where they can."""
    if not (PROGRAM / "taskd").exists():
        return "there is no dist/taskd-folder: make binary"
    sources = (path for path in (ROOT / "taskd").rglob("*") if path.is_file() and path.suffix != ".pyc")
    if (PROGRAM / "taskd").stat().st_mtime < max(path.stat().st_mtime for path in sources):
        return "dist/taskd-folder is older than the code: make binary"
    return why_impossible()


pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
    pytest.mark.timeout(1200),  # The first time, a Debian is fetched.
]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Booted, with the package installed and nothing started."""
    root = debian_root()
    if isinstance(root, str):
        pytest.skip(root)
    shared = tmp_path_factory.mktemp("machine") / "shared"
    subprocess.run(
        [sys.executable, "packaging/deb.py", "--program", str(PROGRAM), "--output", str(shared), "--compression=none"],
        cwd=ROOT, check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    booted = Machine(root, shared)
    try:
        booted.run("dpkg -i /mnt/taskd_*.deb")
        booted.run("useradd --groups taskd anna && useradd bert")
        yield booted
    finally:
        booted.power_off()


def shown(machine: Machine, unit: str, name: str) -> str:
    """A property of a unit."""
    return machine.run(f"systemctl show {unit} --property={name} --value")


def test_nothing_runs_before_somebody_starts_it(machine: Machine) -> None:
    assert machine.fails("systemctl is-active taskd@scheduler taskd@worker taskd-launcher.socket").split() == [
        "inactive"
    ] * 3  # fmt: skip
    assert machine.run("taskd --version").startswith("taskd ")
    assert machine.run("stat -c '%U:%G %a' /var/lib/taskd /run/taskd").split("\n") == [
        "taskd:taskd 700",
        "taskd:taskd 755",
    ]


def test_started_means_that_it_serves(machine: Machine) -> None:
    machine.run("systemctl enable --now taskd@scheduler")
    assert '"epoch"' not in machine.run("taskd cluster status")
    assert shown(machine, "taskd@scheduler", "StatusText").startswith("scheduler: leads; 0 workers")
    machine.run("systemctl enable --now taskd@worker")
    assert shown(machine, "taskd@worker", "StatusText").startswith("worker: follows ")
    for unit in UNITS:
        assert shown(machine, unit, "NRestarts") == "0"


def test_a_task_runs_as_a_user_who_may_nothing(machine: Machine) -> None:
    assert "(taskd-task)" in machine.run("taskd run -- id")
    assert "Permission denied" in machine.fails("taskd run -- cat /var/lib/taskd/cluster.key")
    assert machine.run("taskd run -- sh -c 'echo $((6 * 7)) > made && cat made'") == "42"


def test_the_group_may_use_it_and_nobody_else(machine: Machine) -> None:
    assert machine.run("runuser -u anna -- taskd run -- echo hello") == "hello"
    assert "group taskd" in machine.fails("runuser -u bert -- taskd run -- echo hello")


def test_who_may_submit_cannot_read_secrets(machine: Machine) -> None:
    secrets = "/etc/taskd/secrets"
    assert machine.run(f"stat -c '%U:%G %a' {secrets}") == "taskd:taskd 700"
    machine.run(f"cd {secrets} && umask 077 && echo hunter2 > token && echo 'users = [\"root\"]' > token.access")
    machine.run(f"chown taskd: {secrets}/*")
    assert machine.run("taskd run --secret TOKEN=token -- sh -c 'echo $TOKEN'") == "hunter2"
    assert "Permission denied" in machine.fails(f"runuser -u anna -- cat {secrets}/token")
    assert "may not use" in machine.fails("runuser -u anna -- taskd run --secret TOKEN=token -- true")


def test_the_journal_has_levels_and_no_times_of_its_own(machine: Machine) -> None:
    lines = machine.run("journalctl -u taskd@scheduler -u taskd@worker -o cat").splitlines()
    assert any(line.startswith("info leading epoch=1") for line in lines)
    machine.run("journalctl -u taskd@scheduler -o json | grep 'info leading' | grep -q '\"PRIORITY\":\"6\"'")
    assert machine.run("journalctl -u taskd@scheduler -u taskd@worker -u taskd-launcher -q -p warning -o cat") == ""


def test_a_reload_takes_what_it_can_and_refuses_what_is_wrong(machine: Machine) -> None:
    machine.run(f"sed -i 's/^#slots = 0/slots = 3/; s/^#stop_grace_s = .*/stop_grace_s = 1.0/' {CONFIG}")
    machine.run("systemctl reload taskd@worker")
    assert '"slots":3' in machine.run("taskd node list --json").replace(" ", "")
    machine.run(f"cp {CONFIG} /tmp/good && echo 'slotz = 3' >> {CONFIG}")
    machine.fails("systemctl reload taskd@worker")
    assert "slotz" in machine.run("journalctl -u taskd@worker -o cat | tail -5")
    assert machine.run("taskd run -- echo still here") == "still here"


def test_a_wrong_setting_is_not_tried_again_and_again(machine: Machine) -> None:
    machine.fails("systemctl restart taskd@worker")
    assert shown(machine, "taskd@worker", "ActiveState") == "failed"
    assert shown(machine, "taskd@worker", "NRestarts") == "0"
    assert "slotz" in machine.run("systemctl status taskd@worker --no-pager; true")
    machine.run(f"cp /tmp/good {CONFIG} && systemctl start taskd@worker")


def test_daemons_that_hang_are_restarted(machine: Machine) -> None:
    machine.run("mkdir -p /run/systemd/system/taskd@.service.d")
    machine.run("printf '[Service]\\nWatchdogSec=3s\\n' > /run/systemd/system/taskd@.service.d/short.conf")
    machine.run(f"systemctl daemon-reload && systemctl restart {' '.join(UNITS)}")
    before = [shown(machine, unit, "MainPID") for unit in UNITS]
    machine.run(f"kill -STOP {' '.join(before)}")
    for unit, pid in zip(UNITS, before, strict=True):
        machine.until(f"test $(systemctl show {unit} -p NRestarts --value) -ge 1 && systemctl is-active {unit}")
        assert shown(machine, unit, "MainPID") != pid
        assert "Watchdog timeout" in machine.run(f"journalctl -u {unit} -o cat")
    assert machine.until("taskd run -- echo again") == "again"
    machine.run("rm -r /run/systemd/system/taskd@.service.d && systemctl daemon-reload")


def test_tasks_outlive_a_scheduler_that_is_killed(machine: Machine) -> None:
    task = machine.run("taskd submit -q -- sh -c 'while ! test -e /srv/go; do sleep 0.1; done; echo $TASKD_ATTEMPT'")
    machine.until(f"taskd show {task} | grep -q running")
    machine.run("systemctl kill --signal=KILL --kill-who=main taskd@scheduler")
    machine.until("systemctl is-active taskd@scheduler")
    machine.run("touch /srv/go")
    machine.run(f"taskd wait {task}")
    assert machine.run(f"taskd logs {task}") == "1"


def test_a_stop_ends_tasks_that_do_not_want_to_and_leaves_no_process(machine: Machine) -> None:
    stubborn = 'trap "" TERM; sleep 1000 & setsid sleep 1001 & setsid sh -c "sleep 1002 & sleep 1003" & wait'
    task = machine.run(f"taskd submit -q -- sh -c '{stubborn}'")
    machine.until("grep -qsxz 1003 /proc/[0-9]*/cmdline")
    machine.run("systemctl stop taskd@worker")
    assert shown(machine, "taskd@worker", "Result") == "success"
    # What has left its session is ended by the launcher, at the same time.
    uid = machine.run("id -u taskd-task")
    machine.until(f"! grep -ls '^Uid:.*\\b{uid}\\b' /proc/[0-9]*/status")
    assert machine.fails("grep -lsxz '100[0-3]' /proc/[0-9]*/cmdline") == ""
    machine.run("systemctl stop taskd@scheduler taskd-launcher.socket taskd-launcher.service")
    assert machine.fails(PROCESSES) == ""
    assert machine.run("ls /run/taskd | grep -v lock; true") == ""
    machine.run("systemctl start taskd@scheduler taskd@worker")
    machine.run(f"taskd cancel {task}")


def test_an_upgrade_goes_on_with_the_new_program(machine: Machine) -> None:
    before = [shown(machine, unit, "MainPID") for unit in UNITS]
    machine.run("cd /etc/taskd && chown -R root:taskd secrets && chmod 750 secrets && chmod 640 secrets/*")
    machine.run("dpkg -i /mnt/taskd_*.deb")
    assert set(machine.run("cd /etc/taskd/secrets && stat -c '%U %a' . *").split("\n")) == {"taskd 700", "taskd 600"}
    after = [shown(machine, unit, "MainPID") for unit in UNITS]
    assert not set(before) & set(after)
    assert "slots = 3" in machine.run(f"cat {CONFIG}"), "settings are the user's"
    assert machine.run("taskd run -- echo new") == "new"


def test_the_command_for_installing_finds_all_done(machine: Machine) -> None:
    said = machine.run("taskd service install --role worker --now").splitlines()
    assert sum("the system's package has it" in line for line in said) == 6
    assert not any(line.startswith(("write", "replace")) for line in said)


def test_a_purge_leaves_no_trace_but_the_users(machine: Machine) -> None:
    machine.run("dpkg --purge taskd")
    assert machine.fails(PROCESSES) == ""
    assert machine.run(TRACES) == ""
    assert machine.fails("systemctl cat taskd@worker") != ""
    assert machine.run("getent passwd taskd") != ""


def test_without_the_package_a_command_installs_and_removes_the_same(machine: Machine) -> None:
    machine.run("mkdir /opt/taskd && dpkg-deb --fsys-tarfile /mnt/taskd_*.deb | tar -x -C /opt/taskd ./usr/lib/taskd")
    taskd = "/opt/taskd/usr/lib/taskd/taskd"
    for unit in UNITS:
        role = unit.partition("@")[2]
        said = machine.run(f"{taskd} service install --role {role} --now").splitlines()
        assert said[-1] in (f"run      systemctl {verb} {unit}.service" for verb in ("start", "restart"))
    assert machine.run(f"{taskd} run -- echo installed") == "installed"
    again = machine.run(f"{taskd} service install --role worker --now").splitlines()
    assert {line.split()[0] for line in again} == {"keep", "run"}
    machine.run(f"{taskd} service remove --role worker")
    assert machine.run("systemctl is-active taskd@scheduler") == "active"
    machine.run(f"{taskd} service remove --role scheduler --purge")
    machine.run(f"ls /var/lib/taskd/worker && {taskd} service remove --role worker --purge && rm -r /opt/taskd")
    assert machine.fails(PROCESSES) == ""
    assert machine.run(TRACES) == ""
