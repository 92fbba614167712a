"""From another machine: the command line and both clients over HTTPS, with the file that `taskd token create` wrote."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from taskd import AsyncClient, Client
from taskd.cli.session import Session
from taskd.client import calls
from taskd.errors import ConfigError, NoDaemon, TaskdError
from tests.integration.cluster import LOOPBACK, Daemon, eventually, free_port

Taskd = Callable[..., subprocess.CompletedProcess[str]]
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the daemon's settings are, while it runs."""
    home = tmp_path_factory.mktemp("remote")
    port = free_port()
    (home / "taskd.toml").write_text(
        f'[node]\nkey_file = "{home}/key"\n[api]\nlisten = ["127.0.0.1:{port}"]\n[worker]\nslots = 2\n'
    )
    options = ("--config", str(home / "taskd.toml"))
    daemon = Daemon(home / "node", home / "key", "scheduler,worker", *options, env=LOOPBACK)
    daemon.start()
    yield home
    daemon.stop()


@pytest.fixture
def taskd(home: Path) -> Taskd:
    """Runs a command line that knows of no local daemon."""

    def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        clean = {name: text for name, text in os.environ.items() if not name.startswith("TASKD_")}
        return subprocess.run(
            [sys.executable, "-m", "taskd", *args], env={**clean, **env}, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip

    return run


@pytest.fixture
def access(taskd: Taskd, home: Path) -> Iterator[Path]:
    """An access file of a token for this test."""
    name = f"token{next(_numbers)}"
    path = home / f"{name}.access"
    made = taskd("token", "create", name, "--user", "ana", "--output", str(path), "--config", str(home / "taskd.toml"))
    assert (made.returncode, made.stdout) == (0, f"{path}\n"), made.stderr
    yield path
    taskd("token", "revoke", name, "--config", str(home / "taskd.toml"))


def change(access: Path, script: str) -> None:
    """Have sed edit an access file."""
    subprocess.run(["sed", "-i", script, str(access)], check=True)


def test_the_command_line_works_from_elsewhere(taskd: Taskd, access: Path) -> None:
    ran = taskd("run", "--access", str(access), "--", "sh", "-c", "echo hi; echo there >&2; exit 7")
    assert (ran.returncode, ran.stdout, ran.stderr) == (7, "hi\n", "there\n")
    long = taskd("run", "--", "sh", "-c", "seq 200000", TASKD_ACCESS=str(access))
    assert long.stdout.splitlines()[-1] == "200000"
    assert len(long.stdout) == sum(len(str(number)) + 1 for number in range(1, 200_001))
    listed = taskd("list", "--owner", "ana", TASKD_ACCESS=str(access))
    assert "seq 200000" in listed.stdout


def test_a_session_beside_another_asks_the_same_daemon(access: Path) -> None:
    """Events ask for the names of nodes so."""
    with Session(None, str(access)) as session, session.beside() as other:
        assert other.ask(calls.cluster())["name"] == session.ask(calls.cluster())["name"]


def test_the_doctor_says_what_can_be_seen_from_elsewhere(taskd: Taskd, access: Path) -> None:
    ran = taskd("doctor", "--json", "--access", str(access))
    assert ran.returncode == 0, ran.stderr
    found = {item["what"]: item["level"] for item in json.loads(ran.stdout)}
    assert found == dict.fromkeys(("daemon", "leader", "workers", "clocks", "versions", "keys"), "ok")
    wrong = taskd("doctor", "--state-dir", "/tmp", "--access", str(access))
    assert (wrong.returncode, "of this machine" in wrong.stderr) == (2, True)


def test_a_token_that_was_revoked_is_refused_at_once(taskd: Taskd, access: Path, home: Path) -> None:
    config = ("--config", str(home / "taskd.toml"))
    assert taskd("list", "--access", str(access)).returncode == 0
    assert taskd("token", "revoke", access.stem, *config).returncode == 0
    refused = taskd("list", "--access", str(access))
    assert refused.returncode == 1
    assert refused.stderr == "taskd: the token is not known here, or was revoked\n"
    again = taskd("token", "revoke", access.stem, *config)
    assert again.returncode == 1
    assert "there is no token" in again.stderr


def test_tokens_are_listed_and_have_names_of_their_own(taskd: Taskd, access: Path, home: Path) -> None:
    config = ("--config", str(home / "taskd.toml"))
    listed = taskd("token", "list", *config).stdout
    assert f"{access.stem}  ana   user" in listed
    twice = taskd("token", "create", access.stem, *config)
    assert (twice.returncode, twice.stdout) == (1, "")
    assert "already" in twice.stderr
    assert taskd("token", "create", "a b", *config).returncode == 2
    assert taskd("token", "create", "ab", "--url", "http://x", *config).returncode == 2


def test_the_python_client_works_from_elsewhere(access: Path) -> None:
    with Client(access=access) as client:
        handles = [client.submit_command(["sh", "-c", f"echo {number}"]) for number in range(20)]
        assert not client.wait(handles, timeout=60).pending
        assert handles[7].output() == b"7\n"
        assert client.cluster().health == "ok"
        assert {task.owner for task in client.tasks()} == {"ana"}


async def test_the_asyncio_client_works_from_elsewhere(access: Path) -> None:
    client = AsyncClient(access=access)
    try:
        handles = [await client.submit_command(["true"]) for _ in range(20)]
        assert not (await client.wait(handles, timeout=60)).pending
    finally:
        await client.close()


async def test_a_burst_of_one_client_is_no_attack(access: Path) -> None:
    client = AsyncClient(access=access)
    try:
        found = await asyncio.gather(*(client.cluster() for _ in range(200)))
        assert {cluster.health for cluster in found} == {"ok"}
    finally:
        await client.close()


async def test_the_asyncio_client_talks_to_nobody_else(access: Path) -> None:
    change(access, 's/fingerprint = "..../fingerprint = "0000/')
    client = AsyncClient(access=access)
    try:
        with pytest.raises(NoDaemon, match="not the daemon that the token is for"):
            await client.cluster()
    finally:
        await client.close()


def test_the_second_daemon_of_a_machine_takes_the_port_when_the_first_is_gone(tmp_path: Path, taskd: Taskd) -> None:
    port = free_port()
    (tmp_path / "taskd.toml").write_text(f'[node]\nkey_file = "{tmp_path}/key"\n[api]\nlisten = ["127.0.0.1:{port}"]\n')
    config = ("--config", str(tmp_path / "taskd.toml"))
    peers = free_port()
    head = Daemon(
        tmp_path / "a", tmp_path / "key", "scheduler", *config, "--listen", f"127.0.0.1:{peers}", env=LOOPBACK
    )
    other = Daemon(tmp_path / "b", tmp_path / "key", "worker", *config, "--join", f"127.0.0.1:{peers}", env=LOOPBACK)
    path = tmp_path / "access"
    head.start()
    try:
        assert taskd("token", "create", "laptop", "--output", str(path), *config).returncode == 0
        other.start()
        assert "until the port is free" in other.log.read_text()
        assert taskd("list", "--access", str(path)).returncode == 0
        head.kill()
        with Client(access=path) as client:
            eventually(lambda: _names_no_leader(client))
    finally:
        other.stop()


def _names_no_leader(client: Client) -> bool:
    """Whether the worker answers: it knows that nobody leads."""
    try:
        return client.cluster().leader is None
    except NoDaemon:
        return False


@pytest.mark.parametrize(
    ("script", "error", "says"),
    [
        ("s/fingerprint = \"..../fingerprint = \"0000/", NoDaemon, "not the daemon that the token is for"),
        ("/fingerprint/d", NoDaemon, "cannot be trusted"),
        ("s/127.0.0.1:[0-9]*/127.0.0.1:1/", NoDaemon, "no daemon answers at https://127.0.0.1:1 "),
        ("s/https/http/", ConfigError, "url is not of the form"),
        ("/token/d", ConfigError, "names no token"),
        ("s/^url/uri/", ConfigError, "names no url"),
        ("s/taskd_/taskd_ä/", ConfigError, "characters that no token has"),
        ("$a colour = \"red\"", ConfigError, "holds more than url, token and fingerprint"),
        ("$a [", ConfigError, "access: "),
    ],
)  # fmt: skip
def test_a_file_that_does_not_lead_there_says_why(
    script: str, error: type[TaskdError], says: str, taskd: Taskd, access: Path
) -> None:
    change(access, script)
    with Client(access=access) as client, pytest.raises(error, match=says):
        client.cluster()
