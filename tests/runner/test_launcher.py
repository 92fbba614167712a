"""Tasks as another user: what they are and have, and that nothing of them gets away."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from taskd.core.task import Outcome, TaskSpec
from taskd.core.task import encode as encode_spec
from taskd.errors import ConfigError
from taskd.runner.launch_messages import Launch, Prepare, Prepared, decode_to_worker, encode
from taskd.runner.launch_stream import FRAME_BYTES_MAX, LaunchStream
from taskd.runner.task_user import TaskUser
from tests.runner.launch_stage import LaunchStage, needs_root, open_directory, user
from tests.runner.stage import is_there, new_key, until
from tests.runner.test_ending import FAMILY

pytestmark = needs_root
PYTHON = "/usr/bin/python3"
needs_python = pytest.mark.skipif(not os.path.exists(PYTHON), reason="needs a Python that every user may run")

# Signals 32 and 33 are the C library's own: where its handlers are installed, its posix_spawn has children ignore them,
# and no program can ask it to change that. What uses them sets them.
LIBC_SIGNALS = 1 << 31 | 1 << 32


@pytest.fixture
async def stage() -> AsyncIterator[LaunchStage]:
    with open_directory() as directory:
        async with LaunchStage(directory) as stage:
            yield stage


async def test_a_task_is_the_user_and_nothing_more(stage: LaunchStage) -> None:
    end = await stage.run(
        shell="id -u; id -g; id -G; umask; cat /proc/self/oom_score_adj; grep -E '^(Cap|NoNew|Sig)' /proc/self/status"
    )
    assert end.outcome is Outcome.OK, end.report
    uid, gid, groups, umask, score, *status = end.stdout.splitlines()
    who = user()
    assert (int(uid), int(gid), {int(it) for it in groups.split()}) == (who.uid, who.gid, set(who.groups))
    assert umask == "0022"
    assert int(score) >= 0
    facts = dict(line.split(":\t") for line in status)
    assert facts["NoNewPrivs"] == "1"
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb", "SigBlk"):
        assert int(facts[name], 16) == 0, name
    assert int(facts["SigIgn"], 16) & ~LIBC_SIGNALS == 0


async def test_a_task_has_its_variables_its_directory_and_no_other_files(stage: LaunchStage) -> None:
    script = "pwd; stat -c '%a %u' .; echo $HOME $USER; test $PWD = $TMPDIR -a $PWD = $TASKD_TASK_DIR; echo $?"
    script += "; ls /proc/self/fd"
    end = await stage.run(shell=script, env={"COLOUR": "red"})
    directory, mode, names, is_same, *descriptors = end.stdout.splitlines()
    assert mode == f"700 {user().uid}"
    assert names == f"{user().home} {user().name}"
    assert is_same == "0"
    assert descriptors == ["0", "1", "2", "3"], "3 is what ls reads"
    assert (await stage.run(shell="touch left; mkdir -p a/b; chmod 0 a")).outcome is Outcome.OK
    await until(lambda: not os.path.exists(directory))
    assert (await stage.run(shell="ls -A; setsid true")).stdout == ""


async def test_its_end_is_told_as_ever(stage: LaunchStage) -> None:
    end = await stage.run(shell="echo out; echo bad >&2; echo 'too bad' > $TASKD_ERROR_FILE; exit 7")
    assert (end.outcome, end.report.exit_code, end.stdout) == (Outcome.EXIT_NONZERO, 7, "out\n")
    assert (end.report.stderr_tail, end.error.message) == (b"bad\n", "too bad")
    assert end.told.started_s > 0
    missing = await stage.run("no-such-program", env={"PATH": "/usr/bin:/bin"})
    assert missing.outcome is Outcome.SPAWN_FAILED
    assert "no program 'no-such-program'" in missing.error.message
    forbidden = await stage.run("true", cwd="/root")
    assert (forbidden.outcome, "cannot enter the working directory" in forbidden.error.message) == (
        Outcome.SPAWN_FAILED, True,
    )  # fmt: skip
    key = stage.start("sleep", "1000")
    await stage.start_of(key)
    stage.kind.terminate(key)
    assert (await stage.end_of(key)).report.signal == signal.SIGTERM


async def test_streams_can_be_opened_by_their_names(stage: LaunchStage) -> None:
    end = await stage.run(shell="echo one >> /dev/stdout; echo two >> /dev/stderr; cat < /dev/stdin")
    assert (end.outcome, end.stdout, end.report.stderr_tail) == (Outcome.OK, "one\n", b"two\n")
    assert (await stage.run(shell="cat /dev/stdout")).outcome is Outcome.EXIT_NONZERO, "but not read"


async def test_an_error_file_that_is_not_its_own_is_not_read(stage: LaunchStage) -> None:
    end = await stage.run(shell="ln -s /etc/shadow $TASKD_ERROR_FILE; exit 1")
    assert end.report.error is None
    secret = stage.place.directory / "secret"
    secret.write_text("root's own")
    secret.chmod(0o600)
    # As where the kernel lets anybody link anything: root does it for the task.
    key = stage.start(shell="echo $TASKD_ERROR_FILE; while ! [ -e $TASKD_ERROR_FILE ]; do sleep 0.01; done; exit 1")
    follower = stage.follow(key)
    os.link(secret, await follower.line())
    await follower.close()
    assert (await stage.end_of(key)).report.error is None


@needs_python
async def test_whoever_forks_twice_and_ignores_term_is_killed(stage: LaunchStage) -> None:
    key = stage.start(PYTHON, "-c", FAMILY.replace("sys.executable", repr(PYTHON)) + "\ntime.sleep(1000)")
    follower = stage.follow(key)
    pids = [int(await follower.line()) for _ in range(3)]
    assert await follower.line() == "ready"
    assert all(os.stat(f"/proc/{pid}").st_uid == user().uid for pid in pids)
    stage.kind.kill(key)
    assert (await stage.end_of(key)).outcome is Outcome.SIGNAL
    assert not any(map(is_there, pids))
    await follower.close()


async def test_a_task_cannot_touch_the_daemon_or_the_launcher(stage: LaunchStage) -> None:
    for pid in (os.getpid(), stage.launcher_pid):
        files = f"cat /proc/{pid}/environ; cat /proc/{pid}/mem; ls /proc/{pid}/fd"
        script = f"kill -9 {pid}; {files}; echo 1 > /proc/{pid}/oom_score_adj"
        end = await stage.run(shell=script)
        assert end.outcome is Outcome.EXIT_NONZERO
        assert end.stdout == ""
        assert is_there(pid)


async def test_when_the_launcher_is_killed_its_tasks_are_lost_and_it_comes_back(stage: LaunchStage) -> None:
    key = stage.start(shell="setsid sleep 1000 & echo $!; sleep 1000")
    follower = stage.follow(key)
    pid = int(await follower.line())
    os.kill(stage.launcher_pid, signal.SIGKILL)
    end = await stage.end_of(key)
    assert (end.outcome, end.error.type) == (Outcome.LOST, "LauncherLost")
    await until(lambda: not is_there(pid))
    assert (await stage.run("true")).outcome is Outcome.OK, "what is wanted meanwhile waits for the next launcher"
    await follower.close()


async def test_when_the_worker_goes_its_tasks_go() -> None:
    with open_directory() as directory:
        async with LaunchStage(directory) as stage:
            key = stage.start(shell="setsid sleep 1000 & echo $!; trap '' TERM; sleep 1000")
            follower = stage.follow(key)
            pid = int(await follower.line())
            launcher = stage.launcher_pid
            await follower.close()
            stage.launches._stream.close()  # type: ignore[union-attr]
            await until(lambda: not is_there(pid) and not is_there(launcher))
            assert (await stage.end_of(key)).outcome is Outcome.LOST
        assert not list((directory / "tasks").rglob("*"))


async def test_a_directory_that_the_user_cannot_come_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o700)
    stage = LaunchStage(tmp_path / "closed" / "worker")
    await stage.reaper.open()
    with pytest.raises(ConfigError, match=r"'nobody' cannot come to .*/closed/worker/tasks: let others search"):
        await stage.launches.open()
    await stage.launches.close()
    await stage.reaper.close()


def test_root_and_strangers_cannot_be_the_task_user() -> None:
    for name in ("root", "no-such-user"):
        with pytest.raises(ConfigError):
            TaskUser.named(name)


# -- As a service ------------------------------------------------------------------------------------------------------


@pytest.fixture
async def service() -> AsyncIterator[tuple[Path, subprocess.Popen[bytes]]]:
    with open_directory() as directory:
        path = directory / "launcher.sock"
        command = [sys.executable, "-m", "taskd", "launcher", "--user", "nobody", "--directory", str(directory / "own")]
        process = subprocess.Popen(  # noqa: ASYNC220  # only started here
            [*command, "--socket", str(path), "--allow-user", "daemon"]
        )
        try:
            await until(path.exists)
            yield path, process
        finally:
            process.terminate()
            assert process.wait(20) == 0


async def test_a_service_serves_one_worker_after_the_other(service: tuple[Path, subprocess.Popen[bytes]]) -> None:
    path, _ = service
    for _ in range(2):
        with open_directory() as directory:
            async with LaunchStage(directory, socket=str(path)) as stage:
                end = await stage.run(shell="id -un; pwd")
                assert end.stdout.split()[0] == "nobody"
                assert end.stdout.split()[1].startswith(str(path.parent / "own"))


async def test_a_service_with_another_user_is_refused(service: tuple[Path, subprocess.Popen[bytes]]) -> None:
    with open_directory() as directory:
        stage = LaunchStage(directory, socket=str(service[0]), user="daemon")
        with pytest.raises(ConfigError, match="task_user is 'daemon'"):
            await stage.launches.open()


async def test_strangers_and_noise_are_refused_and_harm_nobody(service: tuple[Path, subprocess.Popen[bytes]]) -> None:
    path, process = service
    path.chmod(0o777)
    stranger = (
        "import socket; s = socket.socket(socket.AF_UNIX); s.settimeout(20);"
        f"s.connect({str(path)!r}); print(s.recv(1000))"
    )
    said = await asyncio.to_thread(
        subprocess.run, [PYTHON, "-c", stranger], user="nobody", group="nogroup", extra_groups=[], capture_output=True,
        check=False,
    )  # fmt: skip
    assert b"may not have tasks started" in said.stdout
    for noise in (b"\xff" * 64, (FRAME_BYTES_MAX + 1).to_bytes(4, "big"), b"\0\0\0\1\xc0", b""):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20)
            connection.connect(str(path))
            connection.sendall(noise)
            connection.shutdown(socket.SHUT_WR)
            assert await asyncio.to_thread(connection.recv, 100) == b""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    stream = LaunchStream(connection)
    stream.send(encode(Prepare("0" * 32, "", {}, False, True, "root")))
    assert "starts tasks as 'nobody'" in str(decode_to_worker(await stream.receive()))
    stream.close()
    assert process.poll() is None


async def test_nothing_is_launched_twice_by_one_name(service: tuple[Path, subprocess.Popen[bytes]]) -> None:
    path, process = service
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    stream = LaunchStream(connection)
    stream.send(encode(Prepare("1" * 32, "", {}, False, True, "")))
    assert isinstance(decode_to_worker(await stream.receive()), Prepared)
    null_fd = os.open(os.devnull, os.O_RDWR)
    spec = encode_spec(TaskSpec("command", shell="setsid sleep 1000 & sleep 1000"))
    launch = encode(Launch(new_key(), spec, False, 2))
    for _ in range(2):
        stream.send(launch, (os.dup(null_fd), os.dup(null_fd)))
    os.close(null_fd)
    with contextlib.suppress(EOFError):
        while True:
            await stream.receive()
    stream.close()
    assert process.poll() is None
    await until(lambda: not _children_of(process.pid))


def _children_of(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text()
