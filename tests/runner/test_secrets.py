"""Secrets: who gets them, where they arrive, and what is refused."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from taskd.core.effects import Begin
from taskd.core.task import HttpCall, Outcome, TaskSpec
from taskd.runner.base import Kind
from taskd.runner.http import HttpKind
from taskd.runner.runner import Runner
from taskd.runner.secrets import VALUE_BYTES_MAX, SecretRefused, Secrets
from tests.runner.handler_stage import HandlerStage, result_of
from tests.runner.launch_stage import LaunchStage, needs_root, open_directory
from tests.runner.stage import Audience, Stage, new_key

VALUE = "hunter2-hunter2"


class Vault:
    """A directory of secrets."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(mode=0o700)
        self.secrets = Secrets(path)

    def add(self, name: str, value: str | bytes = VALUE + "\n", access: str | None = 'users = ["alice"]') -> Path:
        path = self.path / name
        path.write_bytes(value.encode() if isinstance(value, str) else value)
        path.chmod(0o600)
        if access is not None:
            (self.path / f"{name}.access").write_text(access)
            (self.path / f"{name}.access").chmod(0o600)
        return path

    def refusal(self, name: str, owner: str = "alice", type: str = "command") -> str:
        with pytest.raises(SecretRefused) as caught:
            self.secrets.values(TaskSpec(type, owner=owner, secrets={"KEY": name}))
        assert VALUE not in str(caught.value)
        return str(caught.value)

    def value(self, name: str, owner: str = "alice", type: str = "command") -> str:
        return self.secrets.values(TaskSpec(type, owner=owner, secrets={"KEY": name}))["KEY"]


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault(tmp_path / "secrets")


def test_a_secret_is_for_those_who_may(vault: Vault) -> None:
    vault.add("key", access='users = ["alice", "bob"]\ntypes = ["command"]')
    vault.add("open", "a\nb\n\n", access='users = ["*"]')
    vault.add("closed", access=None)
    vault.add("nobody", access="users = []")
    assert (vault.value("key"), vault.value("key", "bob")) == (VALUE, VALUE)
    assert vault.value("open", "anyone", "resize") == "a\nb\n", "one newline at the end is the editor's"
    assert "tasks of 'eve' may not use" in vault.refusal("key", "eve")
    assert "tasks of type 'resize' may not use" in vault.refusal("key", type="resize")
    assert "nobody may use the secret 'closed': name its users in closed.access" in vault.refusal("closed")
    assert "may not use" in vault.refusal("nobody")
    assert "no secret 'other' on this worker" in vault.refusal("other")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../secrets/key", "/etc/shadow", "a/b", ".hidden", "key\0", "key\n", "a" * 65, "key.access", "-x",
     "ключ"],
)  # fmt: skip
def test_names_that_lead_elsewhere_are_refused(vault: Vault, name: str) -> None:
    vault.add("key")
    assert "cannot be the name of a secret" in vault.refusal(name)


@pytest.mark.parametrize(
    "text",
    [
        "", "users", 'users = "alice"', "users = [1]", 'user = ["alice"]', "\xff",
        'users = ["alice"]\ntypes = "command"', 'users = ["alice"]\nmore = 1',
    ],
)  # fmt: skip
def test_what_cannot_be_understood_allows_nothing(vault: Vault, text: str) -> None:
    vault.add("key")
    (vault.path / "key.access").write_bytes(text.encode("latin-1"))
    assert "cannot be used: key.access must say" in vault.refusal("key")


def test_files_that_others_can_touch_are_refused(vault: Vault, tmp_path: Path) -> None:
    path = vault.add("key")
    for mode in (0o604, 0o602, 0o660, 0o644, 0o640, 0o610):
        path.chmod(mode)
        assert "key must belong to root or taskd, and be open to nobody else and no group" in vault.refusal("key")
        assert "give it the mode 600" in vault.refusal("key")
    path.chmod(0o600)
    for mode in (0o602, 0o640):
        (vault.path / "key.access").chmod(mode)
        assert "key.access must belong to root or taskd, and be open to nobody else" in vault.refusal("key")
    (vault.path / "key.access").chmod(0o600)
    for mode in (0o755, 0o750, 0o710):
        vault.path.chmod(mode)
        assert "give it the mode 700" in vault.refusal("key"), "its group is everybody who may submit"
    vault.path.chmod(0o700)
    assert vault.value("key") == VALUE
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
        assert "must belong to root or taskd" in vault.refusal("key")


def test_what_is_no_small_text_in_a_file_is_refused(vault: Vault, tmp_path: Path) -> None:
    outside = vault.add("real")
    os.symlink(outside, vault.path / "link")
    os.mkfifo(vault.path / "pipe")
    os.mkdir(vault.path / "directory")
    vault.add("binary", b"\xff\xfe")
    vault.add("nul", b"a\0b")
    vault.add("large", b"x" * (VALUE_BYTES_MAX + 1))
    assert "cannot be read" in vault.refusal("link")
    assert "is no file" in vault.refusal("pipe")
    assert "is no file" in vault.refusal("directory")
    assert "is no text" in vault.refusal("binary")
    assert "NUL" in vault.refusal("nul")
    assert "larger than" in vault.refusal("large")
    assert stat.S_ISFIFO(os.stat(vault.path / "pipe").st_mode)


def test_a_worker_without_secrets_says_so(tmp_path: Path) -> None:
    with pytest.raises(SecretRefused, match="this worker has no secrets: there is no directory"):
        Secrets(tmp_path / "none").values(TaskSpec("command", secrets={"A": "b"}))
    assert Secrets(tmp_path / "none").values(TaskSpec("command")) == {}


# -- Where they arrive -------------------------------------------------------------------------------------------------


def begin(type: str, **spec: Any) -> Begin:
    return Begin(new_key(), TaskSpec(type, owner="alice", secrets={"KEY": "key"}, **spec))


async def test_a_command_has_it_in_a_variable_and_nowhere_else(vault: Vault, tmp_path: Path) -> None:
    vault.add("key")
    async with Stage(tmp_path) as stage:
        known = vault.secrets.into(begin("command", shell='test "$KEY" = "$WANTED"; tr "\\0" " " < /proc/$$/cmdline',
                                         env={"WANTED": VALUE}))  # fmt: skip
        assert isinstance(known, Begin)
        stage.kind.start([known])
        end = await stage.end_of(known.key)
    assert end.outcome is Outcome.OK
    assert VALUE not in end.stdout
    assert VALUE.encode() not in end.told.report


async def of_no_program(vault: Vault, stage: Stage) -> None:
    """Start what is not there, with a secret as its PATH."""
    vault.add("key")
    spec = TaskSpec("command", owner="alice", argv=("no-such-program",), secrets={"PATH": "key"})
    known = vault.secrets.into(Begin(new_key(), spec))
    assert isinstance(known, Begin)
    stage.kind.start([known])
    end = await stage.end_of(known.key)
    assert end.outcome is Outcome.SPAWN_FAILED
    assert b"there is no program 'no-such-program' on this worker (PATH is a secret)" in end.told.report
    assert VALUE.encode() not in end.told.report


async def test_a_program_that_is_not_found_tells_no_secret(vault: Vault, tmp_path: Path) -> None:
    async with Stage(tmp_path) as stage:
        await of_no_program(vault, stage)


@needs_root
async def test_nor_does_one_that_a_launcher_does_not_find(vault: Vault) -> None:
    with open_directory() as directory:
        async with LaunchStage(directory) as stage:
            await of_no_program(vault, stage)


@needs_root
async def test_a_launched_command_has_it_too(vault: Vault) -> None:
    vault.add("key")
    with open_directory() as directory:
        async with LaunchStage(directory) as stage:
            known = vault.secrets.into(begin("command", shell='test "$KEY" = "$WANTED"', env={"WANTED": VALUE}))
            assert isinstance(known, Begin)
            stage.kind.start([known])
            assert (await stage.end_of(known.key)).outcome is Outcome.OK


async def test_a_handler_asks_for_it_and_the_next_call_cannot(vault: Vault, tmp_path: Path) -> None:
    vault.add("key", access='users = ["alice"]\ntypes = ["tell_secret"]')
    async with HandlerStage(tmp_path / "stage") as stage:
        known = vault.secrets.into(begin("tell_secret", params=b'{"name": "KEY"}'))
        assert isinstance(known, Begin)
        stage.pool.start([known])
        assert result_of(await stage.end_of(known.key)) == [VALUE, False, False]
        after = await stage.run("tell_secret", name="KEY")
        assert (after.outcome, after.error.type) == (Outcome.EXCEPTION, "LookupError")
        assert "the task has no secret 'KEY'" in after.error.message


class _Kinds:
    """Stands for kinds that are not asked."""

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    def start(self, begins: list[Begin]) -> None:
        raise AssertionError(begins)

    def terminate(self, key: Any) -> None: ...
    def kill(self, key: Any) -> None: ...


async def test_an_attempt_that_may_not_is_told_as_not_started(vault: Vault, tmp_path: Path) -> None:
    audience = Audience()
    stage = Stage(tmp_path / "stage")
    kind: Kind = _Kinds()
    runner = Runner(
        stage.output, stage.reaper, kind, kind, kind, on_progress=audience.on_progress, secrets=vault.secrets
    )
    await runner.open()
    refused = begin("command", argv=("true",))
    runner.start([refused])
    end = await audience.end_of(refused.key)
    assert (end.outcome, end.error.type) == (Outcome.SPAWN_FAILED, "SecretRefused")
    assert "no secret 'key' on this worker" in end.error.message
    await runner.close()


async def test_headers_have_it_where_they_refer_to_it(vault: Vault) -> None:
    seen: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        await writer.drain()
        writer.close()

    vault.add("key", access='users = ["alice"]')
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    headers = {"Authorization": "Bearer ${KEY}", "X-Other": "${OTHER} $KEY {KEY}"}
    call = HttpCall(f"http://127.0.0.1:{port}/x", headers=headers)
    audience = Audience()
    kind = HttpKind(audience.on_progress)
    await kind.open()
    known = vault.secrets.into(begin("http", http=call))
    assert isinstance(known, Begin)
    kind.start([known])
    assert (await audience.end_of(known.key)).outcome is Outcome.OK
    assert f"Authorization: Bearer {VALUE}\r\n" in seen[0]
    assert "X-Other: ${OTHER} $KEY {KEY}\r\n" in seen[0]
    await kind.close()
    server.close()
    await server.wait_closed()


async def test_a_header_that_a_secret_would_break_is_not_sent(vault: Vault) -> None:
    vault.add("key", "one\r\nX-Injected: two", access='users = ["alice"]')
    audience = Audience()
    kind = HttpKind(audience.on_progress)
    await kind.open()
    known = vault.secrets.into(begin("http", http=HttpCall("http://127.0.0.1:9/", headers={"A": "${KEY}"})))
    assert isinstance(known, Begin)
    kind.start([known])
    end = await audience.end_of(known.key)
    assert end.outcome is not Outcome.OK
    assert "X-Injected" not in end.error.message
    await kind.close()
