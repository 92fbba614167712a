"""The worker's journal: what survives a crash, a torn or damaged file, a failing disk, and being written anew."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskd.core.effects import Journal as JournalEffect
from taskd.errors import StoreError
from taskd.protocol.messages import AttemptEnded, AttemptKey, Term
from taskd.store import journal as journal_module
from taskd.store.journal import Journal
from taskd.store.records import MAGIC

TERM = Term(3, 5, 7)


def key(number: int) -> AttemptKey:
    return AttemptKey(number.to_bytes(16), 1, TERM, number)


def outcome(number: int, report: bytes = b"report") -> AttemptEnded:
    return AttemptEnded(key(number), 0, 1.5, 2.5, report)


def entry(begun=(), ended=(), acknowledged=(), term: Term | None = None, report: bytes = b"report") -> JournalEffect:
    return JournalEffect(
        term, [key(n) for n in begun], [outcome(n, report) for n in ended], [key(n) for n in acknowledged]
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Journal]:
    with contextlib.closing(Journal.open(path)) as journal:
        yield journal


def loaded(path: Path) -> tuple[Term | None, list[int], list[int]]:
    """The term, the interrupted and the unacknowledged attempts, as the next process finds them."""
    with opened(path) as journal:
        found = journal.load()
    return found.term, [k.lsn for k in found.interrupted], [ended.key.lsn for ended in found.unacknowledged]


def write(path: Path, *entries: JournalEffect) -> None:
    with opened(path) as journal:
        for one in entries:
            journal.append(one)


# -- What it remembers -------------------------------------------------------------------------------------------------


def test_a_new_journal_is_empty_and_private(path: Path):
    assert loaded(path) == (None, [], [])
    assert path.read_bytes() == MAGIC
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([entry(begun=[1, 2])], (None, [1, 2], [])),
        ([entry(begun=[1, 2]), entry(ended=[1])], (None, [2], [1])),
        ([entry(begun=[1], ended=[1, 2])], (None, [], [1, 2])),
        ([entry(ended=[1, 2]), entry(acknowledged=[1])], (None, [], [2])),
        ([entry(begun=[1]), entry(acknowledged=[1])], (None, [], [])),
        ([entry(ended=[1], acknowledged=[1])], (None, [], [])),
        ([entry(acknowledged=[9])], (None, [], [])),
        ([entry(term=Term(1, 1, 1)), entry(term=Term(2, 9, 1)), entry(term=Term(2, 3, 1))], (Term(2, 3, 1), [], [])),
        ([entry(term=Term(2, 3, 1)), entry(term=Term(2, 4, 1))], (Term(2, 3, 1), [], [])),
    ],
)
def test_what_the_next_process_finds(path: Path, entries: list[JournalEffect], expected):
    write(path, *entries)
    assert loaded(path) == expected
    assert loaded(path) == expected  # Looking changes nothing.


def test_outcomes_come_back_whole(path: Path):
    write(path, entry(ended=[1], report=bytes(range(256)) * 5000))
    with opened(path) as journal:
        assert journal.load().unacknowledged == [outcome(1, bytes(range(256)) * 5000)]


def test_appending_goes_on_after_reopening(path: Path):
    write(path, entry(begun=[1, 2]))
    write(path, entry(ended=[1]))
    write(path, entry(ended=[2], acknowledged=[1]))
    assert loaded(path) == (None, [], [2])


WORKER = """
import os, signal, sys
from tests.store.test_journal import *
journal = Journal.open(sys.argv[1])
for number in range(50):
    journal.append(entry(begun=[number]))
    journal.append(entry(ended=[number]))
journal.append(entry(begun=[99]))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_outlives_its_process_without_any_sync(path: Path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", WORKER, str(path)], env=environment, check=False)
    assert done.returncode == -9
    assert loaded(path) == (None, [99], list(range(50)))


# -- Torn and damaged files --------------------------------------------------------------------------------------------

HISTORY = [entry(begun=[n], ended=[n - 1] if n else [], acknowledged=[n - 2] if n > 1 else []) for n in range(6)]
STATES = [
    (None, [n] if n >= 0 else [], [n - 1] if n > 0 else []) for n in range(-1, len(HISTORY))
]  # after none, one, two … records


@pytest.fixture(scope="module")
def history(tmp_path_factory) -> bytes:
    """The bytes of a journal with HISTORY in it."""
    path = tmp_path_factory.mktemp("history") / "journal"
    write(path, *HISTORY)
    return path.read_bytes()


def reopened(directory: Path, content: bytes) -> tuple[tuple, Path]:
    """What is found in a journal of this content; it is appended to afterwards, and what was found is still there."""
    path = directory / "journal"
    path.write_bytes(content)
    found = loaded(path)
    write(path, entry(begun=[77]))
    assert loaded(path) == (found[0], [*found[1], 77], found[2])
    return found, path.with_name("journal.damaged")


def test_cut_anywhere_it_loads_what_was_whole(tmp_path: Path, history: bytes):
    reached = set()
    for length in range(len(history) + 1):
        found, damaged = reopened(tmp_path, history[:length])
        assert found in STATES
        assert not damaged.exists()  # A torn end is no damage.
        reached.add(STATES.index(found))
    assert reached == set(range(len(STATES)))


@settings(max_examples=150)
@given(data=st.data())
def test_any_flipped_bit_costs_at_most_what_follows(tmp_path_factory, history: bytes, data: st.DataObject):
    at = data.draw(st.integers(0, len(history) - 1))
    bit = data.draw(st.integers(0, 7))
    content = bytearray(history)
    content[at] ^= 1 << bit
    directory = tmp_path_factory.mktemp("flipped")
    found, damaged = reopened(directory, bytes(content))
    assert found in STATES[:-1]
    assert content.endswith(damaged.read_bytes())
    assert len(damaged.read_bytes()) >= len(content) - at


@settings(max_examples=100)
@given(content=st.binary(max_size=300), keeps_magic=st.booleans())
def test_garbage_never_raises(tmp_path_factory, content: bytes, keeps_magic: bool):
    reopened(tmp_path_factory.mktemp("garbage"), MAGIC * keeps_magic + content)


def test_damage_is_set_aside_and_told(path: Path, history: bytes):
    garbage = b"\x01garbage" * 200_000
    path.write_bytes(history + garbage)
    with opened(path) as journal:
        assert journal.damage is not None
        assert journal.damage.moved_to == path.with_name("journal.damaged")
        assert journal.damage.size_bytes == len(garbage)
    assert path.with_name("journal.damaged").read_bytes() == garbage
    assert stat.S_IMODE(path.with_name("journal.damaged").stat().st_mode) == 0o600
    assert loaded(path) == STATES[-1]
    with opened(path) as journal:
        assert journal.damage is None


def test_zeros_at_the_end_are_what_a_dead_machine_leaves(path: Path, history: bytes):
    path.write_bytes(history + bytes(3 << 20))
    with opened(path) as journal:
        assert journal.damage is None
    assert path.read_bytes() == history


def test_a_record_of_another_form_is_damage(path: Path):
    from taskd.store.records import pack

    path.write_bytes(MAGIC + pack(b"\x93\x01\x02\x03"))
    with opened(path) as journal:
        assert journal.damage is not None


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.parent.rmdir()])
def test_a_journal_that_cannot_be_opened(tmp_path: Path, make):
    path = tmp_path / "state" / "journal"
    path.parent.mkdir()
    make(path)
    with pytest.raises(StoreError, match="journal"):
        Journal.open(path)


# -- Syncing and writing anew ------------------------------------------------------------------------------------------


@pytest.fixture
def fsyncs(monkeypatch) -> list[str]:
    """The names of the files synced, in order."""
    names: list[str] = []

    def noting(real):
        def call(fd: int) -> None:
            real(fd)
            names.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)

        return call

    monkeypatch.setattr(os, "fsync", noting(os.fsync))
    monkeypatch.setattr(os, "fdatasync", noting(os.fdatasync))
    return names


async def test_the_first_sync_makes_the_name_durable_too(path: Path, fsyncs: list[str]):
    with opened(path) as journal:
        journal.append(entry(begun=[1]))
        assert fsyncs == []
        await journal.sync()
        assert fsyncs == ["journal", path.parent.name]
        await journal.sync()
        assert fsyncs == ["journal", path.parent.name, "journal"]


async def settle(journal: Journal) -> None:
    """Until the thread has nothing to do."""
    while journal._work is not None:
        await asyncio.wait([journal._work])
    await asyncio.sleep(0)


@pytest.fixture
def small(monkeypatch) -> int:
    """The journal is written anew from so many bytes on."""
    monkeypatch.setattr(journal_module, "COMPACT_BYTES", 20_000)
    return 20_000


async def test_a_large_journal_is_written_anew(path: Path, small: int, fsyncs: list[str]):
    with opened(path) as journal:
        journal.append(entry(begun=[1000, 1001], term=TERM))
        journal.append(entry(ended=[2000, 2001]))
        await journal.sync()
        fsyncs.clear()
        for number in range(1000):
            journal.append(entry(ended=[number], acknowledged=[number - 1] if number else []))
            await settle(journal)
        assert os.stat(path).st_size < small + 200
        assert set(fsyncs) == {"journal.new"}  # Durable before it took the place of the old one.
        await journal.sync()
        assert fsyncs[-2:] == ["journal", path.parent.name]  # And its name with it.
    assert os.listdir(path.parent) == ["journal"]
    assert loaded(path) == (TERM, [1000, 1001], [2000, 2001, 999])


async def test_what_is_appended_meanwhile_is_in_the_new_file(path: Path, small: int):
    with opened(path) as journal:
        journal.append(entry(ended=[1]))
        journal.append(entry(ended=[2], report=bytes(small)))
        assert journal._work is not None  # It is being written anew.
        journal.append(entry(ended=[3], acknowledged=[1]))
        journal.append(entry(begun=[4], acknowledged=[2]))
        await settle(journal)
        journal.append(entry(ended=[5]))
    assert os.stat(path).st_size < 2 * small
    assert loaded(path) == (None, [4], [3, 5])


async def test_much_that_waits_is_not_written_anew_again_and_again(path: Path, small: int, fsyncs: list[str]):
    with opened(path) as journal:
        for number in range(200):
            journal.append(entry(ended=[number], report=bytes(1000)))
            await settle(journal)
        assert len(fsyncs) <= 5  # At 20,000 bytes, then whenever it has doubled.
    assert loaded(path) == (None, [], list(range(200)))


async def test_a_large_state_is_written_anew_in_several_records(path: Path, monkeypatch):
    monkeypatch.setattr(journal_module, "COMPACT_BYTES", 1 << 20)
    monkeypatch.setattr(journal_module, "RECORD_BYTES", 1 << 16)
    with opened(path) as journal:
        journal.append(entry(ended=range(30), report=bytes(40_000)))
        await settle(journal)
        journal.append(entry(acknowledged=[3]))
    assert loaded(path) == (None, [], [number for number in range(30) if number != 3])


async def test_closing_while_it_is_written_anew_keeps_the_old_file(path: Path, small: int):
    with opened(path) as journal:
        journal.append(entry(ended=[1], report=bytes(small)))
        assert journal._work is not None
    assert os.listdir(path.parent) == ["journal"]
    assert loaded(path) == (None, [], [1])


async def test_a_left_over_new_file_is_of_no_importance(path: Path, small: int):
    path.with_name("journal.new").write_bytes(b"half of it")
    with opened(path) as journal:
        journal.append(entry(ended=[1, 2], report=bytes(small)))
        await settle(journal)
    assert os.listdir(path.parent) == ["journal"]
    assert loaded(path) == (None, [], [1, 2])


# -- A disk that fails -------------------------------------------------------------------------------------------------


class Faults:
    """Makes calls of the system fail: `write` (after that many bytes), `fdatasync`, `fsync`."""

    def __init__(self, monkeypatch) -> None:
        self.write_bytes: int | None = None
        self.fails: set[str] = set()
        self.calls: list[str] = []
        self._write = os.write
        monkeypatch.setattr(os, "write", self.write)
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._sync(name, getattr(os, name)))

    def write(self, fd: int, data: bytes) -> int:
        if self.write_bytes is None:
            return self._write(fd, data)
        if self.write_bytes == 0:
            raise OSError(28, "No space left on device")
        written = self._write(fd, data[: self.write_bytes])
        self.write_bytes -= written
        return written

    def _sync(self, name: str, real):
        def call(fd: int) -> None:
            self.calls.append(name)
            if name in self.fails:
                raise OSError(5, "Input/output error")
            real(fd)

        return call


@pytest.fixture
def faults(monkeypatch) -> Faults:
    return Faults(monkeypatch)


@pytest.mark.parametrize("space_bytes", [0, 1, 11, 12, 30])
def test_what_could_not_be_written_is_written_later(path: Path, faults: Faults, space_bytes: int):
    with opened(path) as journal:
        journal.append(entry(begun=[1, 2]))
        faults.write_bytes = space_bytes
        for number in (1, 2):
            with pytest.raises(StoreError, match="No space left"):
                journal.append(entry(ended=[number]))
        faults.write_bytes = None
        journal.append(entry(acknowledged=[1]))
    assert loaded(path) == (None, [], [2])


def test_a_process_that_dies_after_a_failed_write_leaves_a_good_file(path: Path, faults: Faults):
    with opened(path) as journal:
        journal.append(entry(begun=[1]))
        faults.write_bytes = 20
        with pytest.raises(StoreError):
            journal.append(entry(ended=[1]))
    faults.write_bytes = None
    with opened(path) as journal:
        assert journal.damage is None
        assert journal.load().interrupted == [key(1)]


async def test_a_sync_writes_first_what_could_not_be_written(path: Path, faults: Faults):
    with opened(path) as journal:
        faults.write_bytes = 0
        with pytest.raises(StoreError):
            journal.append(entry(ended=[1]))
        with pytest.raises(StoreError, match="No space left"):
            await journal.sync()
        faults.write_bytes = None
        await journal.sync()
    assert loaded(path) == (None, [], [1])


async def test_a_failed_fsync_is_never_tried_again_on_the_same_file(path: Path, faults: Faults):
    with opened(path) as journal:
        journal.append(entry(ended=[1, 2]))
        file = os.stat(path).st_ino
        faults.fails = {"fdatasync"}
        with pytest.raises(StoreError, match="Input/output error"):
            await journal.sync()
        faults.fails = {"fsync"}
        with pytest.raises(StoreError, match="Input/output error"):
            await journal.sync()
        assert os.stat(path).st_ino == file
        faults.fails = set()
        faults.calls.clear()
        journal.append(entry(acknowledged=[1]))
        await journal.sync()
        assert os.stat(path).st_ino != file
        assert faults.calls == ["fsync", "fdatasync", "fsync"]  # of the new file, of what came after, of the name
        await journal.sync()
    assert loaded(path) == (None, [], [2])


async def test_a_full_disk_puts_off_writing_anew(path: Path, small: int, faults: Faults):
    with opened(path) as journal:
        faults.fails = {"fsync"}
        journal.append(entry(ended=[1], report=bytes(small)))
        await settle(journal)
        journal.append(entry(ended=[2]))
        assert journal._work is None  # Not at every append.
        faults.fails = set()
        journal.append(entry(acknowledged=[1], ended=[3], report=bytes(small)))
        await settle(journal)
        assert os.stat(path).st_size < 2 * small
    assert os.listdir(path.parent) == ["journal"]
    assert loaded(path) == (None, [], [2, 3])


async def test_syncs_at_the_same_time_take_turns(path: Path, small: int):
    with opened(path) as journal:
        journal.append(entry(ended=[1], report=bytes(small)))  # And it is being written anew.
        await asyncio.gather(*(journal.sync() for _ in range(5)))
    assert loaded(path) == (None, [], [1])
