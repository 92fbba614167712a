"""The units as systemd itself judges them: nothing unknown in them, and not more exposed than promised."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from taskd import config
from taskd.errors import ConfigError
from taskd.service.files import PROGRAM, check_reachable, check_trusted, files, settings_file

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")

EXPOSURE_MAX = {"taskd@scheduler.service": 1.5, "taskd@worker.service": 2.0, "taskd-launcher.service": 4.5}


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """A directory with the units, whose program exists."""
    for file in files([sys.executable, "-m", "taskd"], is_package=True):
        _, found, name = file.path.partition("systemd/system/")
        if found:
            path = tmp_path / "usr/lib/systemd/system" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(file.text)
    return tmp_path / "usr/lib/systemd/system"


def ran(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False)


@needs_systemd
def test_systemd_knows_every_word(units: Path) -> None:
    names = [*EXPOSURE_MAX, "taskd-launcher.socket"]
    done = ran("systemd-analyze", "verify", "--man=no", *(str(units / name) for name in names))
    ours = [line for line in done.stdout.splitlines() if "taskd" in line]
    assert ours == []
    assert done.returncode == 0, done.stdout


@needs_systemd
def test_a_wrong_word_is_found(units: Path) -> None:
    path = units / "taskd@.service"
    path.write_text(path.read_text().replace("[Install]", "KeepsBees=yes\n[Install]"))
    assert "KeepsBees" in ran("systemd-analyze", "verify", "--man=no", str(units / "taskd@worker.service")).stdout


@needs_systemd
@pytest.mark.parametrize(("name", "most"), EXPOSURE_MAX.items())
def test_exposure(units: Path, tmp_path: Path, name: str, most: float) -> None:
    command = ["systemd-analyze", f"--root={tmp_path}", "security", "--offline=true", "--no-pager"]
    done = ran(*command, f"--threshold={most * 10:.0f}", name)
    assert done.returncode == 0, done.stdout
    exposure = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert exposure is not None, done.stdout
    assert 0 < float(exposure[1]) <= most
    assert ran(*command, "--threshold=1", name).returncode != 0, "a threshold that is not looked at"


def test_the_settings_of_a_service_differ_where_they_must_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "taskd.toml"
    path.write_text(settings_file().text)
    loaded = config.load(path, {}, {})
    values = {key: config.value_of(loaded, key) for key in config.SETTINGS}
    changed = {key: value for key, value in values.items() if value != config.SETTINGS[key].default}
    assert changed == {
        "node.key_file": "/var/lib/taskd/cluster.key",
        "worker.task_user": "taskd-task",
        "worker.launcher": "/run/taskd/launcher.sock",
    }


def test_every_unit_starts_the_program_that_is_named() -> None:
    for file in files(["/opt/my tools/100%/python", "-m", "taskd"], is_package=False):
        assert PROGRAM not in file.text
        for line in file.text.splitlines():
            if line.startswith(("ExecStart=", "ExecReload=")) and "/bin/sh" not in line:
                assert '="/opt/my tools/100%%/python" -m taskd ' in line


@pytest.mark.parametrize("path", ["/root/bin/taskd", "/home/anna/venv/bin/python", "/tmp/taskd", "/run/user/0/taskd"])
def test_a_program_that_the_units_hide_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="cannot reach"):
        check_reachable([path, "-m", "taskd"])


def test_other_places_are_fine() -> None:
    check_reachable(["/opt/taskd/bin/python", "-m", "taskd"])
    check_reachable(["/homestead/taskd"])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_program_that_somebody_else_could_replace_is_refused(tmp_path: Path) -> None:
    program = tmp_path / "venv" / "bin" / "taskd"
    program.parent.mkdir(parents=True, mode=0o755)
    program.touch(0o755)
    check_trusted([program, Path("/no/such/program")])
    for path, change, undo in (
        (program.parent.parent, lambda path: os.chown(path, 65534, -1), lambda path: os.chown(path, 0, -1)),
        (program.parent, lambda path: path.chmod(0o777), lambda path: path.chmod(0o755)),
        (program, lambda path: os.chown(path, 65534, -1), lambda path: os.chown(path, 0, -1)),
    ):
        change(path)
        with pytest.raises(ConfigError, match=f"{path} can be changed by others"):
            check_trusted([program])
        undo(path)
    program.parent.chmod(0o1777)
    check_trusted([program])
