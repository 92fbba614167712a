"""What tasks write: read while they run, read afterwards, bounded, and removed in time."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from taskd.core.task import OUTPUT_TAIL_BYTES, Outcome
from taskd.protocol.messages import AttemptKey
from taskd.runner import bundle, capture, command
from taskd.runner.archive import Archive
from taskd.runner.output import Output
from tests.runner.stage import WAIT_S, Stage, child, new_key, until

HOUR_S = 3600.0


@pytest.fixture
async def output(tmp_path: Path) -> AsyncIterator[Output]:
    output = Output(tmp_path)
    await output.open()
    yield output
    await output.close()


def _write(output: Output, key: AttemptKey, text: bytes) -> None:
    """An attempt that writes this and ends."""
    lent = output.begin(key)
    os.write(lent.stdout_fd, text)
    lent.close_descriptors()
    output.end(lent)


def _leave_files(directory: str) -> None:
    """As a task may, in a directory that it has locked."""
    deep = Path(directory, "a", "b")
    deep.mkdir(parents=True)
    (deep / "c").touch()
    deep.chmod(0)


async def _all(parts: AsyncIterator[bytes]) -> bytes:
    async with asyncio.timeout(WAIT_S):
        return b"".join([part async for part in parts])


async def test_output_is_read_while_it_grows_and_afterwards(stage: Stage, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "words")
    key = stage.start(shell=f"while read word; do echo got $word; done < {tmp_path}/words; echo end; echo bad >&2")
    await stage.start_of(key)
    follower = stage.follow(key)
    with open(tmp_path / "words", "w", buffering=1) as words:  # noqa: ASYNC230 - opens at once: the task reads it
        for word in ("one", "two"):
            words.write(f"{word}\n")
            assert await follower.line() == f"got {word}"
        assert stage.read(key) == b"got one\ngot two\n"
        assert stage.read(key, offset=8, length=3) == b"got"
        assert stage.output.size(key.task_id, 1, "stdout") == 16
        assert key not in stage.ended
    assert await follower.rest() == b"end\n"
    await stage.end_of(key)
    assert stage.read(key) == b"got one\ngot two\nend\n"
    assert stage.read(key, "stderr") == b"bad\n"
    assert await _all(stage.output.stream(key.task_id, 1, "stdout", 16, follow=True)) == b"end\n"
    assert stage.output.size(key.task_id, 1, "stderr") == 4


async def test_follower_gets_everything_up_to_the_end(stage: Stage) -> None:
    for _ in range(10):
        key = stage.start(shell="seq 1 30000")
        follower = stage.follow(key)
        whole, end = await asyncio.gather(follower.rest(), stage.end_of(key))
        assert whole == "".join(f"{number}\n" for number in range(1, 30001)).encode()
        assert end.report.stdout_bytes == len(whole)


async def test_follower_of_a_silent_attempt_ends_with_it(stage: Stage) -> None:
    key = stage.start("sleep", "1000")
    await stage.start_of(key)
    follower = stage.follow(key, "stderr")
    rest = asyncio.ensure_future(follower.rest())
    stage.kind.kill(key)
    assert await rest == b""


async def test_silence_leaves_no_files_and_reads_as_nothing(stage: Stage, tmp_path: Path) -> None:
    key = stage.start("true")
    await stage.end_of(key)
    assert list((tmp_path / "output").iterdir()) == []
    assert stage.read(key) == b""
    assert stage.output.size(key.task_id, 1, "stdout") is None
    assert await _all(stage.output.stream(key.task_id, 1, "stdout", 0, follow=True)) == b""


async def test_follower_is_not_shown_what_the_next_attempt_writes(output: Output) -> None:
    first, second = new_key(), new_key()
    lent = output.begin(first)
    parts = output.stream(first.task_id, 1, "stdout", follow=True)
    reading = asyncio.ensure_future(_all(parts))
    await asyncio.sleep(0)  # Now it has the file open and waits.
    lent.close_descriptors()
    output.end(lent)
    again = output.begin(second)
    assert again.slot is lent.slot
    os.write(again.stdout_fd, b"secret")
    assert await reading == b""
    again.close_descriptors()
    output.end(again)


async def test_file_that_somebody_still_holds_serves_nobody_else(output: Output) -> None:
    lent = output.begin(new_key())
    survivor = os.dup(lent.stdout_fd)
    lent.close_descriptors()
    output.end(lent)
    key = new_key()
    again = output.begin(key)
    assert again.slot is lent.slot
    os.write(survivor, b"late words of another task")
    os.close(survivor)
    os.write(again.stdout_fd, b"own words")
    again.close_descriptors()
    assert output.end(again).stdout_tail == b"own words"
    assert output.read(key.task_id, 1, "stdout", 0, 100) == (0, b"own words")


async def test_opening_a_file_under_lease_does_no_harm(output: Output) -> None:
    lent = output.begin(new_key())
    lent.close_descriptors()
    file = lent.slot.files["stdout"]
    fcntl.fcntl(file.read_fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    with child(f": > {file.path}"):
        await until(lambda: fcntl.fcntl(file.read_fd, fcntl.F_GETLEASE) == fcntl.F_UNLCK)
        fcntl.fcntl(file.read_fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    output.end(lent)


async def test_task_that_cuts_off_its_output_starts_again(stage: Stage, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    key = stage.start(shell=f"echo a long first line; read x < {tmp_path}/go; echo second > /dev/stdout")
    await stage.start_of(key)
    follower = stage.follow(key)
    assert await follower.line() == "a long first line"
    (tmp_path / "go").write_text("\n")
    assert await follower.rest() == b"second\n"


async def test_long_output_keeps_its_end_and_says_so(tmp_path: Path) -> None:
    limit, size = 256 << 10, 4 << 20
    async with Stage(tmp_path, stream_bytes_max=limit) as stage:
        os.mkfifo(tmp_path / "go")
        script = f"yes | head -c {size}; echo written >&2; read x < {tmp_path}/go; echo the end"
        key = stage.start(shell=script)
        await stage.start_of(key)
        assert await stage.follow(key, "stderr").line() == "written"
        assert stage.output.bound() == []
        (tmp_path / "go").write_text("\n")
        end = await stage.end_of(key)
        assert (end.outcome, end.report.error) == (Outcome.OK, None)
        assert end.report.stdout_bytes == size + len("the end\n")
        assert end.stdout.endswith("y\ny\nthe end\n")
        dropped = size - limit // 2
        kept = await _all(stage.output.stream(key.task_id, 1, "stdout"))
        notice, _, rest = kept.partition(b"\n")
        assert notice.startswith(b"[taskd: %d bytes were dropped" % dropped)
        assert rest == b"y\n" * (limit // 4) + b"the end\n"
        assert stage.output.read(key.task_id, 1, "stdout", 10, 4) == (dropped, b"y\ny\n")
        [path] = (tmp_path / "output").glob(f"*/{key.task_id.hex()}.1.stdout")
        assert path.stat().st_blocks * 512 < limit


async def test_nothing_more_is_dropped_before_the_limit_is_reached_again(tmp_path: Path) -> None:
    output, key, part = Output(tmp_path, 64 << 10), new_key(), b"x" * (16 << 10)
    await output.open()
    lent = output.begin(key)
    first_kept = []
    for _ in range(9):
        os.write(lent.stdout_fd, part)
        assert output.bound() == []
        first_kept.append(output.read(key.task_id, 1, "stdout", 0, 1)[0] >> 10)
    assert first_kept == [0, 0, 0, 0, 48, 48, 48, 96, 96]
    os.ftruncate(lent.stdout_fd, 0)
    os.write(lent.stdout_fd, part)
    assert output.bound() == []
    assert output.read(key.task_id, 1, "stdout", 0, 1) == (0, b"x")
    lent.close_descriptors()
    output.end(lent)
    await output.close()


async def test_stream_that_cannot_be_bounded_ends_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_holes(*_: object) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    monkeypatch.setattr(command, "WATCH_S", 0.005)
    monkeypatch.setattr(capture, "_fallocate", no_holes)
    async with Stage(tmp_path, stream_bytes_max=4096) as stage:
        end = await stage.run(shell="seq 1 10000; exec sleep 1000")
    assert end.outcome is Outcome.SIGNAL
    assert end.error.type == "OutputTooLarge"
    assert "more than 4096 bytes" in end.error.message
    assert "not supported" in end.error.message


async def test_output_of_a_killed_daemon_is_taken_in(tmp_path: Path) -> None:
    dead = Output(tmp_path)
    await dead.open()
    keys = [new_key(number) for number in (1, 2, 3)]
    for key in keys:
        lent = dead.begin(key)
        if key.number != 3:
            os.write(lent.stderr_fd, b"words of %d" % key.number)
        lent.close_descriptors()
        _leave_files(lent.directory)
    output = Output(tmp_path)
    await output.open()
    assert [output.read(key.task_id, key.number, "stderr", 0, 100)[1] for key in keys] == [
        b"words of 1",
        b"words of 2",
        b"",
    ]
    assert sorted(os.listdir(tmp_path / "slots")) == ["table", "trash"]
    await output.close()
    await dead.close()


async def test_what_tasks_leave_is_removed_without_stopping_the_loop(output: Output, tmp_path: Path) -> None:
    for _ in range(3):
        lent = output.begin(new_key())
        lent.close_descriptors()
        _leave_files(lent.directory)
        output.end(lent)
        assert os.listdir(lent.directory) == []
    await output.close()
    assert os.listdir(tmp_path / "slots" / "trash") == []


async def test_lending_fails_cleanly(output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", full)
        with pytest.raises(OSError, match="No space"):
            output.begin(new_key())
    key = new_key()
    _write(output, key, b"fine again")
    assert output.read(key.task_id, 1, "stdout", 0, 100) == (0, b"fine again")


async def test_output_that_cannot_be_kept_leaves_its_tail(
    output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    lent = output.begin(new_key())
    os.write(lent.stdout_fd, b"words")
    lent.close_descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(os, "makedirs", full)
        assert output.end(lent).stdout_tail == b"words"
    key = new_key()
    _write(output, key, b"next")
    assert output.read(key.task_id, 1, "stdout", 0, 100) == (0, b"next")


# -- The archive -------------------------------------------------------------------------------------------------------


async def test_short_outputs_share_a_file_and_long_ones_do_not(output: Output, tmp_path: Path) -> None:
    keys = [new_key(number) for number in range(1, 51)]
    for key in keys:
        _write(output, key, b"output of %d" % key.number)
    long = new_key()
    _write(output, long, b"x" * (OUTPUT_TAIL_BYTES + 1))
    for key in keys:
        text = b"output of %d" % key.number
        assert output.read(key.task_id, key.number, "stdout", 0, 100) == (0, text)
        assert output.read(key.task_id, key.number, "stdout", 7, 2) == (7, text[7:9])
        assert output.read(key.task_id, key.number, "stdout", 1000, 2) == (1000, b"")
        assert output.read(key.task_id, key.number, "stderr", 0, 100) == (0, b"")
        assert await _all(output.stream(key.task_id, key.number, "stdout", 3)) == text[3:]
        assert output.size(key.task_id, key.number, "stdout") == len(text)
    assert output.size(long.task_id, 1, "stdout") == OUTPUT_TAIL_BYTES + 1
    names = sorted(path.name for path in (tmp_path / "output").rglob("*") if path.is_file())
    assert names == sorted(["1", "1.index", f"{long.task_id.hex()}.1.stdout"])


async def test_follower_gets_a_short_output_whose_file_serves_the_next(output: Output) -> None:
    first, second = new_key(), new_key()
    lent = output.begin(first)
    reading = asyncio.ensure_future(_all(output.stream(first.task_id, 1, "stdout", 2, follow=True)))
    await asyncio.sleep(0)  # Now it has the file open and waits.
    os.write(lent.stdout_fd, b"first")
    lent.close_descriptors()
    output.end(lent)
    again = output.begin(second)
    os.write(again.stdout_fd, b"second, and longer")
    assert await reading == b"rst"
    again.close_descriptors()
    output.end(again)


def test_bundles_are_found_after_a_restart_and_begun_anew(tmp_path: Path) -> None:
    keys = [new_key() for _ in range(3)]
    for key in keys:
        archive = Archive(tmp_path / "output")
        archive.open()
        archive.keep_bytes(key.task_id, key.task_id, key.number, "stderr")
        archive.close()
    kept = [archive.find(key.task_id, 1, "stderr") for key in keys]
    assert [Path(it.path).name for it in kept if it is not None] == ["1", "2", "3"]
    assert [(it.start, it.size) for it in kept if it is not None] == [(0, 16)] * 3


def test_bundle_that_is_full_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "BUNDLE_BYTES_MAX", 100)
    archive = Archive(tmp_path / "output")
    archive.open()
    keys = [new_key() for _ in range(5)]
    for key in keys:
        archive.keep_bytes(b"x" * 60, key.task_id, 1, "stdout")
    kept = [archive.find(key.task_id, 1, "stdout") for key in keys]
    assert [(Path(it.path).name, it.start) for it in kept if it is not None] == [
        ("1", 0), ("1", 60), ("2", 0), ("2", 60), ("3", 0)
    ]  # fmt: skip
    archive.close()


def test_half_written_bundle_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    writer = bundle.BundleWriter(str(tmp_path))
    first, second, third = (new_key().task_id for _ in range(3))
    for task_id in (first, second, third):
        writer.add(b"0123456789", task_id, 1, 0)
    writer.close()
    os.truncate(writer.path, 19)
    os.truncate(writer.path + ".index", os.stat(writer.path + ".index").st_size - 1)
    assert bundle.find_bundled(str(tmp_path), first, 1, 0) == bundle.Kept(writer.path, 0, 10)
    assert bundle.find_bundled(str(tmp_path), second, 1, 0) is None
    assert bundle.find_bundled(str(tmp_path), third, 1, 0) is None


def test_name_across_two_records_is_passed_over(tmp_path: Path) -> None:
    writer = bundle.BundleWriter(str(tmp_path))
    second = bytes(range(16, 32))
    # What the index will hold from the offset of its second record to the middle of its third: it looks like a name.
    across = (2).to_bytes(8)[5:] + (2).to_bytes(4) + second + (1).to_bytes(8)[:2]
    task_id, number, stream = across[:16], int.from_bytes(across[16:24]), across[24]
    writer.add(b"ab", task_id, number, stream)
    writer.add(b"cd", bytes(range(16)), 1, 0)
    writer.add(b"ef", second, 1, 1)
    writer.close()
    assert Path(writer.path + ".index").read_bytes().rfind(across) == 37 + 30
    assert bundle.find_bundled(str(tmp_path), task_id, number, stream) == bundle.Kept(writer.path, 0, 2)


def test_short_write_ends_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = Archive(tmp_path / "output")
    archive.open()
    keys = [new_key() for _ in range(3)]
    archive.keep_bytes(b"first", keys[0].task_id, 1, "stdout")
    whole_write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: whole_write(fd, data[:2]))
        with pytest.raises(OSError, match="No space"):
            archive.keep_bytes(b"second", keys[1].task_id, 1, "stdout")
    archive.keep_bytes(b"third", keys[2].task_id, 1, "stdout")
    found = [archive.find(key.task_id, 1, "stdout") for key in keys]
    assert [it and (Path(it.path).name, it.start, it.size) for it in found] == [("1", 0, 5), None, ("2", 0, 5)]
    archive.close()


def _keep(archive: Archive, tmp_path: Path, key: AttemptKey, size: int, ended_s: float) -> None:
    source = tmp_path / "new"
    source.write_bytes(b"x" * size)
    os.utime(source, (ended_s, ended_s))
    archive.keep_file(str(source), key.task_id, key.number, "stdout")


def test_old_output_is_swept_by_the_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = Archive(tmp_path / "output")
    archive.open()
    keys = [new_key() for _ in range(5)]
    start_s = 1_800_000_000.0
    for hour, key in enumerate(keys):
        monkeypatch.setattr(time, "time", lambda hour=hour: start_s + hour * HOUR_S)
        _keep(archive, tmp_path, key, 1000, start_s + hour * HOUR_S)
    now_s = start_s + 4 * HOUR_S
    assert archive.sweep(now_s, 100 * HOUR_S, 1 << 30).files == 0
    swept = archive.sweep(now_s, 2 * HOUR_S, 1 << 30)
    assert swept.files == 2
    assert [archive.find(key.task_id, 1, "stdout") is not None for key in keys] == [False, False, True, True, True]
    assert archive.sweep(now_s + 100 * HOUR_S, 2 * HOUR_S, 1 << 30).files == 3
    assert os.listdir(tmp_path / "output") == []


@pytest.mark.parametrize("is_restarted", [False, True])
def test_oldest_output_goes_when_there_is_too_much(tmp_path: Path, is_restarted: bool) -> None:
    archive = Archive(tmp_path / "output")
    archive.open()
    now_s = time.time()
    keys = [new_key() for _ in range(10)]
    for age, key in enumerate(keys):
        _keep(archive, tmp_path, key, 40_960, now_s - age)
    if is_restarted:
        archive = Archive(tmp_path / "output")
    swept = archive.sweep(now_s, 10 * HOUR_S, 4 * 40_960)
    assert (swept.files, swept.bytes, swept.bytes_kept) == (6, 6 * 40_960, 4 * 40_960)
    assert [archive.find(key.task_id, 1, "stdout") is not None for key in keys] == [True] * 4 + [False] * 6
    assert archive.sweep(now_s, 10 * HOUR_S, 4 * 40_960).files == 0
    assert archive.sweep(now_s, 10 * HOUR_S, 0).bytes_kept == 0
    key = new_key()
    _keep(archive, tmp_path, key, 40_960, now_s)
    assert archive.find(key.task_id, 1, "stdout") is not None


def test_bundles_are_swept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "BUNDLE_BYTES_MAX", 60_000)
    archive = Archive(tmp_path / "output")
    archive.open()
    keys = [new_key() for _ in range(4)]
    for key in keys:
        archive.keep_bytes(b"x" * 60_000, key.task_id, 1, "stdout")
        os.utime(archive.find(key.task_id, 1, "stdout").path, (1000.0 + key.number, 1000.0))  # type: ignore[union-attr]
    swept = archive.sweep(time.time(), HOUR_S, 150_000)
    assert swept.bytes_kept <= 150_000
    assert [archive.find(key.task_id, 1, "stdout") is not None for key in keys] == [False, False, True, True]
    assert archive.sweep(time.time(), HOUR_S, 0).bytes_kept == 0
    assert os.listdir(tmp_path / "output") == []
    archive.keep_bytes(b"new", keys[0].task_id, 2, "stdout")
    assert archive.find(keys[0].task_id, 2, "stdout") is not None
    archive.close()


def test_bundle_that_is_swept_while_it_is_written_is_followed_by_another(tmp_path: Path) -> None:
    archive = Archive(tmp_path / "output")
    archive.open()
    short, long = new_key(), new_key()
    archive.keep_bytes(b"x" * 50_000, short.task_id, 1, "stdout")
    _keep(archive, tmp_path, long, 40_960, time.time() + 60)
    archive.sweep(time.time(), HOUR_S, 50_000)
    assert archive.find(short.task_id, 1, "stdout") is None
    assert archive.find(long.task_id, 1, "stdout") is not None
    archive.keep_bytes(b"new", short.task_id, 2, "stdout")
    assert archive.find(short.task_id, 2, "stdout") is not None
    archive.close()


def test_index_without_its_bundle_is_in_nobodys_way(tmp_path: Path) -> None:
    archive = Archive(tmp_path / "output")
    archive.open()
    first, second = new_key().task_id, new_key().task_id
    archive.keep_bytes(b"first", first, 1, "stdout")
    archive.close()
    kept = archive.find(first, 1, "stdout")
    assert kept is not None
    os.unlink(kept.path)
    assert archive.find(first, 1, "stdout") is None
    archive.keep_bytes(b"second", second, 1, "stdout")
    assert archive.find(second, 1, "stdout") is not None
    assert archive.sweep(time.time() + 9 * HOUR_S, HOUR_S, 1 << 30).bytes_kept == 0
    assert os.listdir(tmp_path / "output") == []
    archive.close()
