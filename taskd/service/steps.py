"""Installing the service, and undoing that: each step looks first whether it is done already, and says what it does."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from taskd.errors import ConfigError, TaskdError
from taskd.service.files import CONFIG, ROLES, STATE, USERS, File, files, settings_file, unit

COMMAND_TIMEOUT_S = 150.0  # Starting waits for readiness, for 90 s at most.
_UNITS = "etc/systemd/system"
_VENDOR_UNITS = "usr/lib/systemd/system"
_LAUNCHER = ("taskd-launcher.socket", "taskd-launcher.service")


class StepFailed(TaskdError):
    """A step of the installation failed; those before it are done, and doing them again does no harm."""

    code = "step_failed"


class Installation:
    """The service on one machine, or in the image of one below `root`. `say` gets a line for each step."""

    def __init__(self, root: Path, is_dry: bool, say: Callable[[str], None]) -> None:
        self._root = root
        self._is_image = root != Path("/")
        self._is_dry = is_dry
        self._say = say

    def install(self, role: str, program: Sequence[str], is_now: bool) -> None:
        """Have a role start with the machine, and now, where `is_now`. Raises StepFailed, ConfigError."""
        self._check_permitted()
        has_changed = False
        for file in files(program, is_package=False):
            has_changed = self._put(file) or has_changed
        self._put_settings(settings_file())
        root = [f"--root={self._root}"] if self._is_image else []
        self._run("systemd-sysusers", *root, "taskd.conf")
        self._run("systemd-tmpfiles", *root, "--create", "taskd.conf")
        if not self._is_image and has_changed:
            self._run("systemctl", "daemon-reload")
        self._run("systemctl", *root, "enable", "--quiet", unit(role))
        if is_now and not self._is_image:
            self._run("systemctl", "restart" if has_changed else "start", unit(role))

    def remove(self, role: str, is_purge: bool) -> None:
        """Undo that. State, settings and key stay, but where `is_purge`. Raises StepFailed, ConfigError."""
        self._check_permitted()
        others = [other for other in ROLES if other != role and (self._is_enabled(other) or self._is_active(other))]
        if others and is_purge:
            raise ConfigError(
                f"{unit(others[0])} is installed or runs too, and uses the same settings and key: remove it first, "
                f"with `taskd service remove --role {others[0]}`"
            )
        kept = [other for other in ROLES if other != role and self._has_state(other)]
        own = files(["/usr/bin/taskd"], is_package=False)
        has_units = (self._root / _UNITS / "taskd@.service").exists()
        if has_units or self._is_package():
            self._disable(unit(role))
        else:
            self._tell("keep", "nothing: the units are not there")
        if others:
            self._tell("keep", f"the units, which {unit(others[0])} needs")
            return
        if has_units:
            self._disable(*_LAUNCHER)
        has_removed = [self._drop(file.path) for file in own]
        if any(has_removed) and not self._is_image:
            self._run("systemctl", "daemon-reload")
        if is_purge and kept:
            self._drop_tree(f"{STATE[0]}/{role}")
            self._tell("keep", f"/{STATE[0]} and /{CONFIG}, with the state of a {kept[0]}: purge that role too")
        elif is_purge:
            for path in (str(Path(CONFIG).parent), *STATE, "run/taskd"):
                self._drop_tree(path)
            self._tell("keep", f"the users {' and '.join(USERS)}: a file somewhere may still be theirs")
        else:
            self._tell("keep", f"/{CONFIG} and /{STATE[0]}; --purge removes them")

    def _check_permitted(self) -> None:
        if os.geteuid() != 0 and not self._is_dry:
            raise ConfigError("installing a service takes root; --dry-run shows what would be done")

    # -- Steps ---------------------------------------------------------------------------------------------------------

    def _tell(self, verb: str, what: str) -> None:
        self._say(f"{verb:8} {what}")

    def _put(self, file: File) -> bool:
        """Whether the file is new or another one now."""
        path = self._root / file.path
        vendor = self._root / file.path.replace("etc/", "usr/lib/", 1)
        if _read(vendor) == file.text:
            self._tell("keep", f"/{file.path}: the system's package has it")
            return False
        there = _read(path)
        if there == file.text:
            self._tell("keep", f"/{file.path}: it is as it should be")
            return False
        self._write(path, file.text, "write" if there is None else "replace")
        return True

    def _put_settings(self, file: File) -> None:
        if (self._root / file.path).exists():
            self._tell("keep", f"/{file.path}: it is yours")
        else:
            self._write(self._root / file.path, file.text, "write")

    def _write(self, path: Path, text: str, verb: str) -> None:
        if not self._is_dry:
            temporary = path.with_name(f".{path.name}.new")
            try:
                path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                temporary.write_text(text)
                temporary.chmod(0o644)
                temporary.replace(path)
            except OSError as error:
                raise StepFailed(f"{path} cannot be written: {error.strerror}") from None
        self._tell(verb, f"/{path.relative_to(self._root)}")

    def _drop(self, name: str) -> bool:
        path = self._root / name
        if not path.exists():
            return False
        if not self._is_dry:
            path.unlink()
            if path.parent.suffix == ".d" and "@" in path.parent.name and not any(path.parent.iterdir()):
                path.parent.rmdir()
        self._tell("remove", f"/{name}")
        return True

    def _drop_tree(self, name: str) -> None:
        path = self._root / name
        if not path.exists():
            return
        if not self._is_dry:
            shutil.rmtree(path)
        self._tell("remove", f"/{name}")

    def _disable(self, *units: str) -> None:
        root = [f"--root={self._root}"] if self._is_image else ["--now"]
        self._run("systemctl", *root, "disable", "--quiet", *units)

    def _run(self, *command: str) -> None:
        self._tell("run", " ".join(command))
        if self._is_dry:
            return
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
        except FileNotFoundError:
            raise StepFailed(f"there is no {command[0]} on this machine: taskd's service needs systemd") from None
        except subprocess.TimeoutExpired:
            raise StepFailed(f"`{' '.join(command)}` did not end within {COMMAND_TIMEOUT_S:.0f} s") from None
        if done.returncode != 0:
            raise StepFailed(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()}")

    # -- What is there -------------------------------------------------------------------------------------------------

    def _is_enabled(self, role: str) -> bool:
        return any((wants / unit(role)).is_symlink() for wants in (self._root / _UNITS).glob("*.wants"))

    def _is_active(self, role: str) -> bool:
        """Whether its unit runs, or is about to, be it enabled or not."""
        if self._is_image:
            return False
        command = ["systemctl", "is-active", unit(role)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
        except FileNotFoundError:
            return False
        except subprocess.TimeoutExpired:
            raise StepFailed(f"`{' '.join(command)}` did not end within {COMMAND_TIMEOUT_S:.0f} s") from None
        return done.stdout.strip() not in ("inactive", "failed", "unknown", "")

    def _has_state(self, role: str) -> bool:
        return (self._root / STATE[0] / role).exists()

    def _is_package(self) -> bool:
        return (self._root / _VENDOR_UNITS / "taskd@.service").exists()


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None
