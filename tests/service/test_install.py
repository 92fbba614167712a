"""`taskd service install|remove` into the image of a machine: what it says and writes, and its undoing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = "/opt/taskd/bin/taskd"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="installing takes root")
needs_systemd = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("systemctl", "systemd-sysusers", "systemd-tmpfiles")),
    reason="there is no systemd here",
)


def taskd(*words: str, code: int = 0) -> list[str]:
    """The lines that a command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "taskd", "service", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return (done.stdout + done.stderr).splitlines()


def tree(root: Path) -> dict[str, str]:
    """All files below a root, with their content, and all links, with where they lead."""
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else path.read_text()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """As little of a machine as systemd's tools need."""
    root = tmp_path / "image"
    for name in ("etc", "usr/lib", "var/lib", "run"):
        (root / name).mkdir(parents=True)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    return root


def test_a_dry_run_says_every_step_and_does_none(image: Path) -> None:
    before = tree(image)
    said = taskd("install", "--role", "worker", "--now", "--dry-run", "--root", str(image), "--program", PROGRAM)
    assert said == [
        "write    /etc/sysusers.d/taskd.conf",
        "write    /etc/tmpfiles.d/taskd.conf",
        "write    /etc/systemd/system/taskd-launcher.service",
        "write    /etc/systemd/system/taskd-launcher.socket",
        "write    /etc/systemd/system/taskd@.service",
        "write    /etc/systemd/system/taskd@worker.service.d/10-worker.conf",
        "write    /etc/taskd/taskd.toml",
        f"run      systemd-sysusers --root={image} taskd.conf",
        f"run      systemd-tmpfiles --root={image} --create taskd.conf",
        f"run      systemctl --root={image} enable --quiet taskd@worker.service",
    ]
    assert tree(image) == before


@needs_root
@needs_systemd
def test_installed_twice_and_removed_leaves_what_is_the_users(image: Path) -> None:
    before = tree(image)
    options = ("--root", str(image), "--program", PROGRAM)
    taskd("install", "--role", "scheduler", *options)
    taskd("install", "--role", "worker", *options)
    installed = tree(image)
    assert f"ExecStart={PROGRAM} start --role %i\n" in installed["etc/systemd/system/taskd@.service"]
    wanted = "etc/systemd/system/multi-user.target.wants/"
    assert installed[wanted + "taskd@scheduler.service"] == installed[wanted + "taskd@worker.service"]
    assert {"taskd", "taskd-task"} <= {line.split(":")[0] for line in installed["etc/passwd"].splitlines()}
    assert {"taskd", "taskd-admin"} <= {line.split(":")[0] for line in installed["etc/group"].splitlines()}
    for private in ("var/lib/taskd", "etc/taskd/secrets"):
        assert (image / private).stat().st_mode & 0o777 == 0o700
        assert (image / private).stat().st_uid != 0, "a worker without rights has to read what is in it"

    (image / "etc/taskd/taskd.toml").write_text("# mine\n")
    (image / "etc/systemd/system/taskd@.service").write_text("# of an older version\n")
    said = taskd("install", "--role", "worker", *options)
    assert [line for line in said if not line.startswith(("keep", "run"))] == [
        "replace  /etc/systemd/system/taskd@.service", "now: systemctl start taskd@worker.service",
    ]  # fmt: skip
    assert tree(image) == {**installed, "etc/taskd/taskd.toml": "# mine\n"}

    assert any("still" in line or "installed or runs too" in line for line in taskd(
        "remove", "--role", "worker", "--purge", "--root", str(image), code=1
    ))  # fmt: skip
    taskd("remove", "--role", "worker", "--root", str(image))
    assert wanted + "taskd@worker.service" not in tree(image)
    assert "etc/systemd/system/taskd@.service" in tree(image), "the scheduler needs it"
    taskd("remove", "--role", "scheduler", "--root", str(image))
    assert tree(image).keys() - before.keys() <= {
        "etc/taskd/taskd.toml", "etc/shadow", "etc/gshadow", "etc/.pwd.lock", "etc/passwd-", "etc/group-"
    }  # fmt: skip
    taskd("remove", "--role", "scheduler", "--purge", "--root", str(image))
    assert not any((image / name).exists() for name in ("etc/taskd", "var/lib/taskd"))
    assert (
        taskd("remove", "--role", "scheduler", "--root", str(image))[0] == "keep     nothing: the units are not there"
    )


@needs_root
@needs_systemd
def test_a_purge_of_one_role_keeps_what_the_other_has(image: Path) -> None:
    taskd("install", "--role", "worker", "--root", str(image), "--program", PROGRAM)
    state = image / "var/lib/taskd"
    for role in ("scheduler", "worker"):
        (state / role).mkdir()
    (state / "cluster.key").write_text("key")
    said = taskd("remove", "--role", "worker", "--purge", "--root", str(image))
    assert "remove   /var/lib/taskd/worker" in said
    assert any("with the state of a scheduler: purge that role" in line for line in said)
    assert sorted(path.name for path in state.iterdir()) == ["cluster.key", "scheduler"]
    assert (image / "etc/taskd/taskd.toml").exists()
    taskd("remove", "--role", "scheduler", "--purge", "--root", str(image))
    assert not state.exists()
    assert not (image / "etc/taskd").exists()


@needs_root
@pytest.mark.parametrize(("state", "is_kept"), [("active", True), ("activating", True), ("inactive", False)])
def test_what_runs_without_being_enabled_is_not_purged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, is_kept: bool
) -> None:
    """A scheduler that `systemctl start` has started. Dry, as this is about the machine itself."""
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f"#!/bin/sh\necho {state}\n")
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said = taskd("remove", "--role", "worker", "--purge", "--dry-run", code=1 if is_kept else 0)
    assert any("taskd@scheduler.service is installed or runs too" in line for line in said) is is_kept


@needs_root
@needs_systemd
def test_what_the_systems_package_has_is_not_written_again(image: Path) -> None:
    from taskd.service.files import files

    for file in files(["/usr/bin/taskd"], is_package=True):
        path = image / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file.text)
    said = taskd("install", "--role", "scheduler", "--root", str(image), "--program", "/usr/bin/taskd")
    assert not (image / "etc/systemd/system/taskd@.service").exists()
    assert sum("the system's package has it" in line for line in said) == 6


def test_a_program_without_its_path_is_a_wrong_call(image: Path) -> None:
    (said,) = taskd("install", "--role", "worker", "--dry-run", "--root", str(image), "--program", "taskd", code=1)
    assert "give the whole path" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may")
def test_who_is_not_root_is_told(image: Path) -> None:
    said = taskd("install", "--role", "worker", "--root", str(image), "--program", PROGRAM, code=1)
    assert "takes root" in said[-1]
