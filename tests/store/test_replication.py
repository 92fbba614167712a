"""What every store must do so that schedulers can tell each other what they have."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskd.core.backlog import Backlog, entry_of
from taskd.core.effects import Purge
from taskd.core.events import Loaded
from taskd.core.task import Record, TaskSpec, TaskState, encode
from taskd.errors import StoreError
from taskd.protocol.messages import Dot, NodeRow, TaskRow, Term
from taskd.store.base import Store
from tests.store.conftest import OpenStore
from tests.store.samples import backlog, commit, dot, numbers, task_id, task_row, unfinished

S = TaskState
GREATEST = (1 << 63) - 1
SUBMITTED_S = task_row(0).submitted_s


def version(number: int, at: Dot) -> TaskRow:
    """Task `number` as a commit left it: each commit leaves something else."""
    what = repr(at.rank()).encode()
    state = S.SUCCEEDED if at.lsn % 2 else S.RUNNING
    term = at.term
    return task_row(
        number, state, epoch=term.epoch, node_id=term.node_id, boot=term.boot, lsn=at.lsn, changed_s=float(at.lsn),
        finished_s=float(at.lsn % 2), priority=at.lsn, name=str(at.rank()), spec=encode(what), record=encode(what * 2),
    )  # fmt: skip


async def walk(
    read: Callable[[bytes], Awaitable[tuple[list[TaskRow], bytes | None]]],
) -> tuple[list[TaskRow], int]:
    """All rows, slice by slice, and how many slices there were."""
    rows: list[TaskRow] = []
    after: bytes | None = b""
    for slices in itertools.count(1):
        assert after is not None
        more, going_on = await read(after)
        assert all(row.id > after for row in more)
        assert going_on is None or going_on > after
        rows += more
        after = going_on
        if after is None:
            return rows, slices
    raise AssertionError


async def lacking(store: Store, *seen: Dot) -> list[int]:
    rows, _ = await walk(lambda after: store.lacking(seen, after))
    return numbers(rows)


async def all_ids(store: Store) -> list[bytes]:
    ids: list[bytes] = []
    after: bytes | None = b""
    while after is not None:
        more, after = await store.ids(after)
        ids += more
    return ids


async def all_numbers(store: Store) -> list[int]:
    return [int.from_bytes(id[10:]) for id in await all_ids(store)]


# -- What a start is told ----------------------------------------------------------------------------------------------


async def test_a_start_is_told_how_far_each_term_has_come_and_of_the_last_purge(open_store: OpenStore):
    store = open_store()
    seen = [dot(2, 7, GREATEST, GREATEST), dot(1, 5, 3, 0), dot(1, 5, 2, 9)]
    term = Term(2, 7, GREATEST)
    await store.commit(commit(term=term, seen=seen, last_purge=seen[0]))
    store.close()
    loaded = open_store().load()
    assert (loaded.term, loaded.purged, loaded.is_empty) == (term, seen[0], False)
    assert sorted(loaded.seen, key=Dot.rank) == sorted(seen, key=Dot.rank)


async def test_whether_there_are_strays_is_remembered(open_store: OpenStore):
    store = open_store()
    assert not store.load().has_strays
    await store.commit(commit(taken=[task_row(1)], has_strays=True))
    assert store.load().has_strays
    await store.commit(commit(taken=[task_row(2)]))
    assert store.load().has_strays
    await store.commit(commit(seen=[dot(1, 1, 1, 9)], has_strays=False))
    store.close()
    assert not open_store().load().has_strays


@pytest.mark.parametrize(
    ("held", "is_empty"),
    [
        ({}, True),
        ({"nodes": [NodeRow(1, "a", (), None, 0.0)]}, True),
        ({"term": Term(1, 1, 1)}, True),
        ({"seen": [dot(1, 1, 1, 0)]}, False),
        ({"inserted": [task_row(1)]}, False),
        ({"taken": [task_row(1, S.SUCCEEDED)]}, False),
        ({"taken": [task_row(1, S.SUCCEEDED)], "has_strays": True}, True),
    ],
)
async def test_empty_is_what_never_held_all_of_a_leader(store: Store, held, is_empty: bool):
    await store.commit(commit(**held))
    assert store.load().is_empty == is_empty


async def test_how_far_a_term_has_come_never_goes_back(store: Store):
    other = dot(1, 6, 1, 50)
    for lsn, expected in ((5, 5), (9, 9), (7, 9), (0, 9), (10, 10)):
        await store.commit(commit(seen=[dot(1, 5, 1, lsn), other]))
        assert sorted(store.load().seen, key=Dot.rank) == [other, dot(1, 5, 1, expected)]
    await store.commit(commit(seen=[dot(1, 5, 1, 11), dot(1, 5, 1, 3)]))
    assert dot(1, 5, 1, 11) in store.load().seen


async def test_a_failed_commit_leaves_none_of_all_that(store: Store):
    await store.commit(commit([task_row(1), task_row(2)]))
    before = store.load()
    with pytest.raises(StoreError):
        await store.commit(
            commit(
                updated=[task_row(99)],
                taken=[task_row(1, S.SUCCEEDED, lsn=9), task_row(3)],
                purged=[task_id(2)],
                purges=[Purge(b"", b"", (), (dot(1, 5, GREATEST, 99),))],
                seen=[dot(1, 5, 1, 7)],
                last_purge=dot(1, 5, 1, 7),
            )
        )
    assert store.load() == before
    assert store.get([task_id(1), task_id(2), task_id(3)]) == [task_row(1), task_row(2)]


# -- Rows of others: the newer dot wins --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        (dot(1, 5, 1, 1), dot(1, 5, 1, 2)),
        (dot(1, 5, 9, 9), dot(2, 5, 1, 1)),
        (dot(1, 6, 9, 9), dot(1, 5, 1, 1)),  # Of one epoch the lower node id is the greater term.
        (dot(1, 5, 1, 9), dot(1, 5, 2, 1)),
        (dot(9, GREATEST, GREATEST, GREATEST), dot(10, GREATEST, 0, 0)),
        (dot(1, GREATEST, GREATEST, GREATEST), dot(1, 0, 0, 0)),
    ],
)
async def test_a_row_is_taken_where_it_is_new_or_newer(store: Store, older: Dot, newer: Dot):
    assert older.rank() < newer.rank()
    await store.commit(commit(taken=[version(1, older), version(2, newer)]))
    await store.commit(commit(taken=[version(1, newer), version(2, older)]))
    assert store.get([task_id(1), task_id(2)]) == [version(1, newer), version(2, newer)]
    await store.commit(commit(taken=[version(1, newer)]))
    assert store.get([task_id(1)]) == [version(1, newer)]


async def test_taken_rows_are_as_good_as_our_own(store: Store):
    await store.commit(commit(taken=[version(1, dot(1, 5, 1, 2)), version(2, dot(1, 5, 1, 3))]))
    assert numbers(await unfinished(store)) == [1]
    ours = version(1, dot(2, 4, 1, 1))
    await store.commit(commit(updated=[task_row(1, S.SUCCEEDED, epoch=2, node_id=4, boot=1, lsn=1)]))
    (row,) = store.get([ours.id])
    assert (row.state, row.dot) == (S.SUCCEEDED, ours.dot)
    assert await unfinished(store) == []


async def test_a_row_can_be_taken_and_changed_in_one_commit(store: Store):
    await store.commit(commit([task_row(2)], [task_row(1, S.SUCCEEDED, lsn=8)], taken=[task_row(1, S.RUNNING, lsn=7)]))
    assert [row.state for row in store.get([task_id(1), task_id(2)])] == [S.SUCCEEDED, S.QUEUED]


small = st.integers(0, 2)
dots = st.builds(dot, small, small, small, small)
groups_of_rows = st.lists(st.lists(st.tuples(st.integers(0, 3), dots), max_size=6), min_size=1, max_size=4)


def test_rows_in_any_order_any_groups_and_repeated_give_the_same_table(store: Store):
    bases = itertools.count(0, 10)  # Each example has tasks of its own, in one database.

    async def outcome(groups: Iterable[Iterable[tuple[int, Dot]]]) -> list[TaskRow]:
        base = next(bases)
        for group in groups:
            await store.commit(commit(taken=[version(base + number, at) for number, at in group]))
        found = store.get([task_id(base + number) for number in range(4)])
        return [msgspec.structs.replace(row, id=task_id(numbers([row])[0] - base)) for row in found]

    with asyncio.Runner() as runner:

        @settings(max_examples=60)
        @given(groups_of_rows, st.data())
        def check(groups, data):
            rows = [row for group in groups for row in group]
            newest: dict[int, Dot] = {}
            for number, at in rows:
                if number not in newest or at.rank() > newest[number].rank():
                    newest[number] = at
            expected = [version(number, at) for number, at in sorted(newest.items())]
            assert runner.run(outcome(groups)) == expected
            assert runner.run(outcome([*groups, *groups])) == expected
            assert runner.run(outcome([data.draw(st.permutations(rows))])) == expected
            assert runner.run(outcome([[row] for row in reversed(rows)])) == expected

        check()


# -- Purges ------------------------------------------------------------------------------------------------------------


async def test_purged_tasks_are_gone_and_unknown_ones_do_no_harm(store: Store):
    await store.commit(commit([task_row(number) for number in range(10)]))
    await store.commit(commit([task_row(20)], purged=[task_id(number) for number in (0, 3, 99, 3, 9)]))
    assert await all_numbers(store) == [1, 2, 4, 5, 6, 7, 8, 20]
    assert numbers(await unfinished(store)) == [1, 2, 4, 5, 6, 7, 8, 20]
    await store.commit(commit(purged=[task_id(number) for number in range(30)]))
    assert await all_ids(store) == []
    assert store.newest_id() == bytes(16)


async def test_a_purge_has_the_last_word_in_a_commit(store: Store):
    await store.commit(commit([task_row(1)]))
    await store.commit(
        commit([task_row(2)], [task_row(1, S.SUCCEEDED)], taken=[task_row(3)], purged=[task_id(n) for n in (1, 2, 3)])
    )
    assert await all_ids(store) == []


@pytest.mark.parametrize(
    ("purge", "left"),
    [
        (Purge(b"", b"", (), ()), [1, 2, 3, 4, 5, 6]),  # Nothing is covered.
        (Purge(b"", b"", (), (dot(1, 5, 1, 6),)), []),
        (Purge(b"", b"", (), (dot(1, 5, 1, 4),)), [5, 6]),
        (Purge(b"", b"", (), (dot(1, 5, 2, 9), dot(1, 4, 1, 9), dot(2, 5, 1, 9))), [1, 2, 3, 4, 5, 6]),
        (Purge(b"", b"", (), (dot(9, 9, 9, 9), dot(1, 5, 1, 2))), [3, 4, 5, 6]),
        (Purge(b"", b"", (task_id(2), task_id(5), task_id(9)), (dot(1, 5, 1, 6),)), [2, 5]),
        (Purge(task_id(2), b"", (), (dot(1, 5, 1, 6),)), [1, 2]),
        (Purge(b"", task_id(4), (), (dot(1, 5, 1, 6),)), [5, 6]),
        (Purge(task_id(2), task_id(4), (task_id(1), task_id(4)), (dot(1, 5, 1, 6),)), [1, 2, 4, 5, 6]),
        (Purge(task_id(2), task_id(5), (task_id(4),), (dot(1, 5, 1, 3),)), [1, 2, 4, 5, 6]),
        (Purge(task_id(4), task_id(2), (), (dot(1, 5, 1, 6),)), [1, 2, 3, 4, 5, 6]),
    ],
)
async def test_what_another_lacks_although_it_saw_it_is_removed(store: Store, purge: Purge, left: list[int]):
    await store.commit(commit([version(number, dot(1, 5, 1, number)) for number in range(1, 7)]))
    await store.commit(commit(purges=[purge]))
    assert await all_numbers(store) == left


async def test_purges_of_all_ranges_and_the_new_seen_in_one_commit(store: Store):
    await store.commit(commit([version(number, dot(1, 5, GREATEST, number)) for number in range(50_000)]))
    ids = [task_id(number) for number in range(50_000)]
    seen = (dot(1, 5, GREATEST, 49_990),)
    halves = [
        Purge(b"", ids[24_999], tuple(ids[:20_000]), seen),
        Purge(ids[24_999], b"", tuple(ids[30_000:49_000]), seen),
    ]
    await store.commit(commit(purges=halves, seen=list(seen), last_purge=seen[0]))
    assert await all_ids(store) == [*ids[:20_000], *ids[30_000:49_000], *ids[49_991:]]
    assert store.load() == Loaded(None, list(seen), [], seen[0])


# -- What others lack --------------------------------------------------------------------------------------------------


async def test_what_is_lacking_depends_on_the_term_and_its_lsn(store: Store):
    first, second, third = dot(1, 5, 1, 2), dot(2, 4, 1, 7), dot(2, 4, GREATEST, GREATEST)
    await store.commit(commit([version(1, first), version(2, second), version(3, third)]))
    assert await lacking(store) == [1, 2, 3]
    assert await lacking(store, first) == [2, 3]
    assert await lacking(store, dot(1, 5, 1, 1)) == [1, 2, 3]
    assert await lacking(store, first, second, third) == []
    assert await lacking(store, third, dot(2, 4, 1, GREATEST), dot(7, 7, 7, 7)) == [1]
    assert await lacking(store, dot(2, 4, GREATEST, GREATEST - 1), first, second) == [3]


def test_what_is_lacking_is_what_is_not_covered(store: Store):
    with asyncio.Runner() as runner:
        versions = [
            version(number, at)
            for number, at in enumerate(dot(*parts) for parts in itertools.product(range(3), repeat=4))
        ]
        runner.run(store.commit(commit(versions)))

        @settings(max_examples=50)
        @given(st.dictionaries(st.tuples(small, small, small), small))
        def check(seen: dict[tuple[int, int, int], int]):
            expected = [
                number
                for number, row in enumerate(versions)
                if row.lsn > seen.get((row.epoch, row.node_id, row.boot), -1)
            ]
            assert runner.run(lacking(store, *(dot(*term, lsn) for term, lsn in seen.items()))) == expected

        check()


async def test_lacking_rows_come_in_bounded_slices_by_id(store: Store):
    await store.commit(commit([version(number, dot(1, 5, 1, number % 100)) for number in range(45_000)]))
    rows, slices = await walk(lambda after: store.lacking((dot(1, 5, 1, 98),), after))
    assert numbers(rows) == list(range(99, 45_000, 100))
    assert slices >= 3  # No slice looks at all of them.
    rows, _ = await store.lacking((), b"")
    assert 0 < len(rows) <= 500
    rows, going_on = await store.lacking((dot(1, 5, 1, 99),), b"")
    assert rows == []
    assert going_on is not None


async def test_large_rows_make_short_slices(store: Store):
    many = [task_row(number, record=bytes(300_000)) for number in range(20)]
    await store.commit(commit(many))
    rows, _ = await store.lacking((), b"")
    assert len(rows) == 4
    assert (await walk(lambda after: store.lacking((), after)))[0] == many
    assert await store.rows([row.id for row in many]) == many


# -- Reading by id -----------------------------------------------------------------------------------------------------


async def test_the_backlog_comes_by_id_in_slices(store: Store):
    states = [S.QUEUED, S.SUCCEEDED, S.RUNNING, S.FAILED]
    await store.commit(commit([task_row(number, states[number % 4]) for number in reversed(range(25_000))]))
    parts, ends = await backlog(store)
    assert ends == [task_id(2 * 9_999)]
    entries = b"".join(part.ready[0].entries for part in parts)
    assert entries == b"".join(entry_of(SUBMITTED_S, task_id(number)) for number in range(0, 25_000, 4))
    assert numbers(row for part in parts for row in part.rows) == list(range(2, 25_000, 4))
    assert await store.backlog(task_id(25_000)) == (Backlog([], [], [], b""), None)


async def test_large_rows_make_short_slices_of_the_backlog(store: Store):
    running = [task_row(number, S.RUNNING, record=encode(Record([], reason="x" * 300_000))) for number in range(20)]
    await store.commit(commit(running))
    parts, ends = await backlog(store)
    assert len(ends) == 1
    assert [row for part in parts for row in part.rows] == running


async def test_who_waits_comes_in_brief(store: Store):
    due = encode(Record([], due_s=5.0))
    rows = [
        task_row(1, priority=7, spec=encode(TaskSpec("noop", priority=7))),
        task_row(2, spec=encode(TaskSpec("noop", constraints=("gpu",), deadline_s=9.0))),
        task_row(3, spec=encode(TaskSpec("noop", resources={"cpus": 500}, params=b"deadline_s"))),
        task_row(4, S.SCHEDULED, record=due, spec=encode(TaskSpec("noop", deadline_s=8.0))),
        task_row(5, S.RETRYING, record=due, queue="night"),
        task_row(6, record=encode(Record([], cancel_wanted=True))),
        task_row(7, S.RETRYING, record=encode(Record([], cancel_wanted=True))),
        task_row(8, priority=7, spec=encode(TaskSpec("noop", priority=7))),
        task_row(9, S.ASSIGNED),
    ]
    await store.commit(commit(rows))
    ((part,), _) = await backlog(store)
    assert numbers(part.rows) == [6, 7, 9]
    one, two, three, eight = (entry_of(SUBMITTED_S, task_id(number)) for number in (1, 2, 3, 8))
    assert sorted(ready.entries for ready in part.ready) == [one + eight, two, three]
    entries = [(delayed.state, delayed.queue, delayed.entries) for delayed in part.delayed]
    assert sorted(entries) == [
        (S.SCHEDULED, "default", entry_of(5.0, task_id(4))), (S.RETRYING, "night", entry_of(5.0, task_id(5))),
    ]  # fmt: skip
    assert part.deadlines == entry_of(9.0, task_id(2)) + entry_of(8.0, task_id(4))


async def test_rows_of_any_number_of_ids(store: Store):
    many = [task_row(number, spec=encode(number)) for number in range(0, 10_000, 2)]
    await store.commit(commit(many))
    asked = [task_id(number) for number in (*range(10_000), 5, 6, 6)]
    assert await store.rows(asked[::-1]) == many
    assert await store.rows([task_id(4), task_id(4), task_id(2)]) == [many[1], many[2]]
    assert await store.rows([task_id(1)]) == []
    assert await store.rows([]) == []


async def test_all_ids_ascend_in_slices(store: Store):
    assert await store.ids(b"") == ([], None)
    await store.commit(commit([task_row(number) for number in reversed(range(45_000))]))
    assert await all_numbers(store) == list(range(45_000))
    first, going_on = await store.ids(b"")
    assert len(first) < 45_000
    assert going_on == first[-1]
    assert await store.ids(task_id(44_998)) == ([task_id(44_999)], None)
    assert await store.ids(task_id(44_999)) == ([], None)


# -- What is old enough to be purged -----------------------------------------------------------------------------------

TODAY_S = 1_790_000_000.0


def id_at(time_s: float, number: int = 0) -> bytes:
    """An id made at that time."""
    return int(time_s * 1000).to_bytes(6) + number.to_bytes(10)


def task_at(number: int, begun_s: float, ended_s: float) -> TaskRow:
    """A task that lasted so long; 0: it goes on."""
    row = task_row(number, S.SUCCEEDED if ended_s else S.RUNNING, submitted_s=begun_s, finished_s=ended_s)
    return msgspec.structs.replace(row, id=id_at(begun_s, number))


async def test_what_had_ended_before_a_time(store: Store):
    rows = [
        task_at(1, TODAY_S - 100, TODAY_S - 90),
        task_at(2, TODAY_S - 99, 0.0),
        task_at(3, TODAY_S - 98, TODAY_S - 50),
        task_at(4, TODAY_S - 97, TODAY_S - 95),
        task_at(5, TODAY_S - 10, TODAY_S - 10),
    ]
    await store.commit(commit(rows))
    ids = [row.id for row in rows]
    assert await store.ended_before(TODAY_S - 95) == []
    assert await store.ended_before(TODAY_S - 94) == [ids[3]]
    assert await store.ended_before(TODAY_S - 60) == [ids[0], ids[3]]
    assert await store.ended_before(TODAY_S) == [ids[0], ids[2], ids[3], ids[4]]
    for never_s in (0.0, -1e9):
        assert await store.ended_before(never_s) == []
    assert len(await store.ended_before(float("inf"))) == 4


async def test_purging_goes_on_until_nothing_old_is_left(store: Store):
    old = [task_at(number, TODAY_S - 1000 + number / 1000, TODAY_S - 500) for number in range(12_000)]
    rest = [task_at(number, TODAY_S - 1000 + number / 1000, 0.0) for number in range(12_000, 12_010)]
    await store.commit(commit(old + rest))
    rounds = []
    while found := await store.ended_before(TODAY_S - 400):
        assert found == await store.ended_before(TODAY_S - 400)  # Asking alone changes nothing.
        assert found == sorted(found)
        rounds.append(len(found))
        await store.commit(commit(purged=found))
    assert sum(rounds) == 12_000
    assert max(rounds) <= 5000
    assert await all_ids(store) == [row.id for row in rest]


async def test_old_tasks_are_found_behind_very_many_that_go_on(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("taskd.store.sqlite.ENDED_SLICES_MAX", 1)
    going_on = [task_at(number, TODAY_S - 1000 + number / 1000, 0.0) for number in range(45_000)]
    (late,) = [task_at(50_000, TODAY_S - 900, TODAY_S - 800)]
    await store.commit(commit([*going_on, late]))
    heard = [await store.ended_before(TODAY_S - 700) for _ in range(4)]
    assert heard == [[], [], [late.id], [late.id]]
    await store.commit(commit(purged=[late.id]))
    # From the begin again: what was passed over may have ended meanwhile.
    await store.commit(commit(updated=[msgspec.structs.replace(going_on[0], state=20, finished_s=TODAY_S - 750)]))
    heard = [await store.ended_before(TODAY_S - 700) for _ in range(2)]
    assert heard == [[], [going_on[0].id]]
