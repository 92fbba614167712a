"""What every store must do, whichever database is behind it."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskd.core.events import Loaded
from taskd.core.task import Attempt, Outcome, Record, TaskState, encode
from taskd.errors import StoreError
from taskd.protocol.messages import NodeRow, TaskRow, Term
from taskd.store.base import Query, Store
from tests.store.conftest import OpenStore
from tests.store.samples import commit, numbers, task_id, task_row, unfinished

S = TaskState
UNFINISHED = [state for state in S if not state.is_final]


def finished(number: int, state: TaskState = S.SUCCEEDED, **columns):
    return task_row(number, state, finished_s=2.0, **columns)


# -- What was committed is there ---------------------------------------------------------------------------------------


def test_a_new_store_is_empty(store: Store):
    loaded = store.load()
    assert loaded == Loaded(None, [], [], None, is_empty=True)
    assert len(store.store_id) == 16
    assert store.newest_id() == bytes(16)
    assert store.get([task_id(1)]) == []


def test_the_store_id_is_made_once(open_store: OpenStore, tmp_path):
    first = open_store()
    first.close()
    assert open_store().store_id == first.store_id


async def test_a_row_comes_back_as_it_was(open_store: OpenStore):
    attempt = Attempt(1, Term(7, 5, 3), 9, 12, 1.25, 2.5, 3.75, Outcome.EXIT_NONZERO, b"\x00report\xff", "lost")
    row = task_row(
        1, S.FAILED, priority=-1_000_000, queue="ünï", type="çall", name="", owner="user\x01", finished_s=1e-9,
        epoch=(1 << 63) - 1, lsn=0, spec=b"\x00" * 100_000, record=encode(Record([attempt], True, 4.0, "why")),
    )  # fmt: skip
    store = open_store()
    await store.commit(commit([row]))
    store.close()
    assert open_store().get([row.id]) == [row]


async def test_an_update_changes_the_task_and_leaves_what_was_asked_for(store: Store):
    row = task_row(1, S.QUEUED, labels={"a": "b"})
    changed = msgspec.structs.replace(
        row, state=int(S.SUCCEEDED), changed_s=2.0, finished_s=3.0, epoch=2, node_id=6, boot=7, lsn=8, record=b"new",
        spec=row.spec,
    )  # fmt: skip
    await store.commit(commit([row, task_row(2)]))
    await store.commit(commit(updated=[changed]))
    assert store.get([row.id, task_id(2)]) == [changed, task_row(2)]


async def test_insert_and_update_in_one_commit(store: Store):
    await store.commit(commit([task_row(1)]))
    await store.commit(commit([task_row(2)], [task_row(1, S.RUNNING)]))
    assert [row.state for row in store.get([task_id(1), task_id(2)])] == [S.RUNNING, S.QUEUED]


async def test_a_start_gives_the_unfinished_the_nodes_and_the_term(open_store: OpenStore):
    store = open_store()
    rows = [task_row(number, state) for number, state in enumerate(S)]
    nodes = [NodeRow(3, "b", ("worker",), None, 1.5), NodeRow(2, "a", ("scheduler", "worker"), "", 2.5)]
    await store.commit(commit(rows, nodes=nodes, term=Term(4, 2, (1 << 63) - 1)))
    await store.commit(commit(nodes=[NodeRow(3, "c", (), "kernel update", 9.0)]))
    store.close()
    store = open_store()
    assert await unfinished(store) == [row for row in rows if row.state in UNFINISHED]
    loaded = store.load()
    assert loaded.nodes == [nodes[1], NodeRow(3, "c", (), "kernel update", 9.0)]
    assert loaded.term == Term(4, 2, (1 << 63) - 1)


async def test_a_task_that_ends_is_no_longer_unfinished(store: Store):
    await store.commit(commit([task_row(1), task_row(2)]))
    await store.commit(commit(updated=[finished(1)]))
    assert numbers(await unfinished(store)) == [2]


async def test_commits_larger_than_any_buffer(store: Store):
    rows = [task_row(number, spec=bytes(3000), record=number.to_bytes(4) * 500) for number in range(3000)]
    await store.commit(commit(rows))
    assert store.get([row.id for row in rows]) == rows
    assert await store.list(Query(limit=10_000)) == rows[::-1]


# -- All or nothing ----------------------------------------------------------------------------------------------------


async def test_a_failed_commit_leaves_nothing_and_the_next_one_works(store: Store):
    await store.commit(commit([task_row(1)]))
    with pytest.raises(StoreError):
        await store.commit(
            commit([task_row(2), task_row(1)], nodes=[NodeRow(1, "n", (), None, 0.0)], term=Term(9, 9, 9))
        )
    loaded = store.load()
    assert (numbers(await unfinished(store)), loaded.nodes, loaded.term) == ([1], [], None)
    await store.commit(commit([task_row(2)]))
    assert numbers(await unfinished(store)) == [1, 2]


async def test_changing_a_task_that_is_not_there_fails(store: Store):
    with pytest.raises(StoreError, match="1 of 2"):
        await store.commit(commit([task_row(1)], [task_row(1, S.RUNNING), task_row(2, S.RUNNING)]))
    assert await unfinished(store) == []


async def test_a_number_no_database_holds_fails(store: Store):
    with pytest.raises(StoreError):
        await store.commit(commit([task_row(1, lsn=1 << 63)]))
    await store.commit(commit([task_row(1)]))


async def test_a_commit_goes_on_when_nobody_waits_for_it_any_more(store: Store):
    asking = asyncio.ensure_future(store.commit(commit([task_row(1)])))
    await asyncio.sleep(0)  # It is on its way now.
    asking.cancel()
    await asyncio.wait([asking])
    await store.commit(commit(updated=[task_row(1, S.RUNNING)]))
    assert [row.state for row in await unfinished(store)] == [S.RUNNING]


async def test_a_closed_store_refuses(store: Store):
    await store.commit(commit([task_row(1)]))
    store.close()
    store.close()
    with pytest.raises(StoreError):
        await store.commit(commit([task_row(2)]))
    with pytest.raises(StoreError):
        await store.counts()


# -- Reading by id -----------------------------------------------------------------------------------------------------


async def test_rows_come_in_the_order_asked_and_unknown_ones_are_left_out(store: Store):
    await store.commit(commit([task_row(number) for number in range(10)]))
    assert numbers(store.get([task_id(number) for number in (7, 99, 0, 9, 3)])) == [7, 0, 9, 3]
    assert store.get([]) == []


async def test_which_ids_are_taken_for_any_number_of_ids(store: Store):
    await store.commit(commit([task_row(number) for number in range(0, 2000, 2)]))
    asked = [task_id(number) for number in range(40_000)]
    assert store.existing(asked) == {task_id(number) for number in range(0, 2000, 2)}
    assert store.existing([]) == set()


async def test_the_newest_id_is_the_greatest(store: Store):
    await store.commit(commit([task_row(5), task_row(3)]))
    assert store.newest_id() == task_id(5)


# -- Lists -------------------------------------------------------------------------------------------------------------

PAGE = [
    task_row(1, S.QUEUED, queue="a", owner="ann", type="x", name="one", labels={"team": "red"}),
    finished(2, S.FAILED, queue="b", owner="bob", type="x", name="two", labels={"team": "red", "size": "big"}),
    finished(3, S.SUCCEEDED, queue="a", owner="bob", type="y", name="one"),
    task_row(4, S.RUNNING, queue="c", owner="ann", type="z", name="", labels={"team": "blue"}),
    finished(5, S.FAILED, queue="a", owner="eve", type="x", name="two", labels={"TEAM": "red"}),
]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (Query(), [5, 4, 3, 2, 1]),
        (Query(limit=2), [5, 4]),
        (Query(before=task_id(4)), [3, 2, 1]),
        (Query(before=task_id(4), limit=1), [3]),
        (Query(before=task_id(1)), []),
        (Query(states=(S.FAILED,)), [5, 2]),
        (Query(states=(S.QUEUED,)), [1]),
        (Query(states=(S.QUEUED, S.RUNNING), limit=1), [4]),
        (Query(states=(S.RUNNING, S.FAILED)), [5, 4, 2]),
        (Query(states=(99,)), []),
        (Query(queues=("a",)), [5, 3, 1]),
        (Query(queues=("b", "c")), [4, 2]),
        (Query(types=("x",), owners=("bob", "eve")), [5, 2]),
        (Query(names=("one",)), [3, 1]),
        (Query(names=("",)), [4]),
        (Query(names=("' OR 1 --",)), []),
        (Query(names=("\0",)), []),
        (Query(queues=("a\0",), states=(S.FAILED,)), []),
        (Query(types=("x\0", "y")), [3]),
        (Query(labels=(("team", "red\0"),)), []),
        (Query(labels=(("team", "red"),)), [2, 1]),
        (Query(labels=(("team", "red"), ("size", "big"))), [2]),
        (Query(labels=(("team", "re"),)), []),
        (Query(labels=(("team", ""),)), []),
        (Query(states=(S.FAILED,), labels=(("team", "red"),), queues=("b",)), [2]),
    ],
)
async def test_lists(store: Store, query: Query, expected: list[int]):
    await store.commit(commit(PAGE))
    assert numbers(await store.list(query)) == expected


LABELS = {1: {"team": "red"}, 2: {"team": "red", "size": "big"}, 4: {"team": "blue"}, 5: {"TEAM": "red"}}
TEXTS = st.sampled_from(["a", "b", "x", "one", "ann", "team", "red", ""]) | st.text(st.characters(), max_size=5)
QUERIES = st.builds(
    Query,
    states=st.lists(st.sampled_from(S) | st.integers(-(1 << 65), 1 << 65), max_size=2).map(tuple),
    queues=st.lists(TEXTS, max_size=2).map(tuple),
    types=st.lists(TEXTS, max_size=2).map(tuple),
    owners=st.lists(TEXTS, max_size=2).map(tuple),
    names=st.lists(TEXTS, max_size=2).map(tuple),
    labels=st.lists(st.tuples(TEXTS, TEXTS), max_size=1).map(tuple),
    before=st.binary(max_size=20) | st.integers(0, 6).map(task_id),
    limit=st.integers(1, 6),
)
ANY_INPUT = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def can_be_said(query: Query) -> bool:
    """Whether a query is made of Unicode and of numbers of 64 bits."""
    try:
        "".join((*query.queues, *query.types, *query.owners, *query.names, *sum(query.labels, ()))).encode()
    except UnicodeEncodeError:
        return False
    return all(-(1 << 63) <= state < 1 << 63 for state in query.states)


def is_match(number: int, row: TaskRow, query: Query) -> bool:
    return (
        all(
            not wanted or value in wanted
            for value, wanted in (
                (row.state, query.states), (row.queue, query.queues), (row.type, query.types),
                (row.owner, query.owners), (row.name, query.names),
            )
        )
        and all(LABELS.get(number, {}).get(key) == value for key, value in query.labels)
        and (not query.before or row.id < query.before)
    )  # fmt: skip


def test_any_query_is_answered_and_none_ends_the_store(store: Store):
    with asyncio.Runner() as runner:
        runner.run(store.commit(commit(PAGE)))

        @ANY_INPUT
        @given(QUERIES)
        def check(query: Query) -> None:
            try:
                found = numbers(runner.run(store.list(query)))
            except StoreError:
                assert not can_be_said(query)
                return
            expected = [number for number, row in enumerate(PAGE, start=1) if is_match(number, row, query)]
            assert found == expected[::-1][: query.limit]

        check()
        assert numbers(runner.run(store.list(Query()))) == [5, 4, 3, 2, 1]


def test_any_end_of_an_id_is_looked_for_and_none_ends_the_store(store: Store):
    with asyncio.Runner() as runner:
        runner.run(store.commit(commit(PAGE)))

        @ANY_INPUT
        @given(st.text(st.characters(), min_size=1, max_size=40), st.integers(1, 3))
        def check(suffix: str, limit: int) -> None:
            try:
                found = runner.run(store.ending_in(suffix, limit))
            except StoreError:
                with pytest.raises(UnicodeEncodeError):
                    suffix.encode()
                return
            expected = [row.id for row in reversed(PAGE) if row.id.hex().upper().endswith(suffix.upper())]
            assert found == expected[:limit]

        check()
        assert runner.run(store.ending_in("05")) == [task_id(5)]


@pytest.mark.parametrize("length", [0, 1, 31, 32, 255, 256, 70_000])
async def test_labels_of_any_length_are_found(store: Store, length: int):
    key, value = "k" * max(1, min(length, 255)), "v" * length
    rows = [task_row(1, labels={"a": "b", key: value, "z": ""}), task_row(2, labels={key: value + "x"}), task_row(3)]
    await store.commit(commit(rows))
    assert numbers(await store.list(Query(labels=((key, value),)))) == [1]


async def test_what_only_looks_like_a_label_is_none(store: Store):
    pair = {"team": "red"}
    await store.commit(
        commit([task_row(1, env=pair), task_row(2, labels=pair), task_row(3, env=pair, labels={"a": "b"})])
    )
    assert numbers(await store.list(Query(labels=(("team", "red"),)))) == [2]


async def test_pages_follow_each_other_without_gap_or_repetition(store: Store):
    await store.commit(commit([task_row(number, queue="ab"[number % 2]) for number in range(500)]))
    seen: list[int] = []
    query = Query(queues=("b",), limit=37)
    while page := await store.list(query):
        seen += numbers(page)
        query = msgspec.structs.replace(query, before=page[-1].id)
    assert seen == list(range(499, 0, -2))


async def test_a_few_tasks_among_many_are_found_however_deep(store: Store):
    many = 45_000  # More than two slices.
    rows = [finished(number) for number in range(many)]
    rows[3] = finished(3, S.FAILED, labels={"rare": "yes"}, owner="eve")
    rows[many // 2] = task_row(many // 2)
    await store.commit(commit(rows))
    assert numbers(await store.list(Query(states=(S.FAILED,)))) == [3]
    assert numbers(await store.list(Query(labels=(("rare", "yes"),), limit=1))) == [3]
    assert numbers(await store.list(Query(states=(S.QUEUED,)))) == [many // 2]
    assert await store.newest("eve") == task_id(3)
    assert await store.newest("nobody") is None
    assert await store.ending_in(task_id(2).hex()[-12:]) == [task_id(2)]
    assert await store.counts() == {
        (S.SUCCEEDED, "default"): many - 2, (S.FAILED, "default"): 1, (S.QUEUED, "default"): 1,
    }  # fmt: skip


async def test_a_list_of_large_tasks_is_whole(store: Store):
    rows = [task_row(number, record=bytes(1 << 20)) for number in range(12)]
    await store.commit(commit(rows))
    assert await store.list(Query()) == rows[::-1]


async def test_many_readers_at_once(store: Store):
    await store.commit(commit([task_row(number) for number in range(100)]))
    pages = await asyncio.gather(*(store.list(Query(limit=number)) for number in range(1, 50)))
    assert [len(page) for page in pages] == list(range(1, 50))


async def test_a_reader_that_gave_up_takes_nobody_elses_answer(store: Store):
    await store.commit(commit([task_row(number) for number in range(10)]))
    gone = asyncio.ensure_future(store.list(Query(limit=3)))
    stays = asyncio.ensure_future(store.list(Query(limit=4)))
    await asyncio.sleep(0)
    gone.cancel()
    assert len(await stays) == 4


@pytest.mark.parametrize(
    ("suffix", "limit", "expected"),
    [
        ("00000f", 5, [15]),
        ("00000F", 5, [15]),
        ("f", 5, [31, 15]),
        ("0000f", 1, [15]),
        ("f", 1, [31]),
        ("00" * 16, 5, [0]),
        ("0" * 33, 5, []),
        ("xyz", 5, []),
        ("'--", 5, []),
    ],
)
async def test_ids_by_their_end(store: Store, suffix: str, limit: int, expected: list[int]):
    await store.commit(commit([task_row(number) for number in range(40)]))
    assert await store.ending_in(suffix, limit) == [task_id(number) for number in expected]


async def test_the_newest_task_of_a_user(store: Store):
    await store.commit(commit([task_row(1, owner="ann"), task_row(2, owner="bob"), task_row(3, owner="ann")]))
    assert await store.newest("ann") == task_id(3)
    assert await store.newest("bob") == task_id(2)


async def test_counts(store: Store):
    assert await store.counts() == {}
    await store.commit(commit(PAGE))
    assert await store.counts() == {
        (S.QUEUED, "a"): 1, (S.FAILED, "b"): 1, (S.SUCCEEDED, "a"): 1, (S.RUNNING, "c"): 1, (S.FAILED, "a"): 1,
    }  # fmt: skip


async def test_sizes(store: Store):
    before = store.size_bytes()
    await store.commit(commit([task_row(number, record=bytes(100_000)) for number in range(20)]))
    assert store.size_bytes() > before + 2_000_000
    assert store.free_bytes() > 0
