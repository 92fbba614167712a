"""Group commit: nothing leaves before the rows that it stands on, and nothing waits longer than for those."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from taskd.core import effects as fx
from taskd.core.outbox import Outbox
from taskd.core.task import Attempt, Outcome, Record, Task, TaskSpec, TaskState
from taskd.errors import Unavailable
from taskd.protocol.messages import Dot, NodeRow, Term

TERM = Term(4, 1, 9)


def task(number: int = 1) -> Task:
    return Task(number.to_bytes(16, "big"), TaskSpec("command"), b"", TaskState.QUEUED, Record([]))


def node(number: int) -> NodeRow:
    return NodeRow(number, f"node{number}", ("worker",), None, 0.0)


def reply(number: int) -> fx.Reply:
    return fx.Reply(number, None, promises=True)


def leading() -> Outbox:
    """One that has begun a term."""
    outbox = Outbox()
    outbox.begin(TERM)
    outbox.committed(only_commit(outbox.release()).seq)
    return outbox


def only_commit(effects: list[fx.Effect]) -> fx.Commit:
    (commit,) = effects
    assert isinstance(commit, fx.Commit)
    return commit


def test_without_rows_nothing_waits() -> None:
    outbox = Outbox()
    outbox.then(reply(1))
    assert answers(outbox.release()) == [(1, "local")]
    assert outbox.release() == []
    assert outbox.is_idle


@given(st.lists(st.sampled_from(("row", "effect", "release", "committed")), max_size=60))
def test_an_effect_leaves_in_order_and_when_all_earlier_rows_are_durable(operations: list[str]) -> None:
    outbox = Outbox()
    asked: list[tuple[int, set[int]]] = []  # effects in order, each with the rows before it
    rows: set[int] = set()
    durable: set[int] = set()
    in_flight: fx.Commit | None = None
    left: list[int] = []

    def carry_out(effects: list[fx.Effect]) -> None:
        nonlocal in_flight
        for effect in effects:
            if isinstance(effect, fx.Commit):
                assert in_flight is None, "two commits at once"
                in_flight = effect
            else:
                assert isinstance(effect, fx.Reply)
                assert asked[effect.call][1] <= durable
                left.append(effect.call)

    def commit() -> None:
        nonlocal in_flight
        if in_flight is not None:
            durable.update(row.node_id for row in in_flight.nodes)
            seq, in_flight = in_flight.seq, None
            carry_out(outbox.committed(seq))

    for number, operation in enumerate(operations):
        if operation == "row":
            rows.add(number)
            outbox.node(node(number))
        elif operation == "effect":
            outbox.then(reply(len(asked)))
            asked.append((number, set(rows)))
        elif operation == "release":
            carry_out(outbox.release())
        else:
            commit()
    while not outbox.is_idle or len(left) < len(asked):
        carry_out(outbox.release())
        commit()
    assert left == list(range(len(asked)))
    assert durable == rows


def test_a_commit_carries_the_state_as_it_is_when_it_leaves() -> None:
    outbox = Outbox()
    outbox.begin(TERM)
    it = task()
    outbox.insert(it)
    it.move(TaskState.CANCELLED, 7.0)
    outbox.update(it)
    commit = only_commit(outbox.release())
    assert (commit.term, [row.state for row in commit.inserted], commit.updated) == (TERM, [TaskState.CANCELLED], [])
    assert (commit.inserted[0].epoch, commit.inserted[0].lsn) == (4, 1)


def test_a_task_changed_twice_is_written_once_and_later_changes_later() -> None:
    outbox = leading()
    it = task()
    outbox.update(it)
    outbox.update(it)
    assert len(only_commit(outbox.release()).updated) == 1
    outbox.update(it)
    assert outbox.release() == []
    (announce,) = outbox.committed(2)
    assert isinstance(announce, fx.Announce)
    assert len(only_commit(outbox.release()).updated) == 1


def test_commits_of_one_term_are_counted_and_a_new_term_counts_anew() -> None:
    outbox = Outbox()
    outbox.begin(TERM)
    assert (outbox.term, outbox.lsn) == (TERM, 1)
    seq = only_commit(outbox.release()).seq
    assert outbox.lsn == 2
    outbox.committed(seq)
    outbox.begin(Term(5, 1, 9))
    assert outbox.lsn == 1
    assert only_commit(outbox.release()).seq == seq + 1


def test_a_task_is_known_until_its_row_is_durable() -> None:
    outbox = leading()
    it = task()
    outbox.insert(it)
    assert it.id in outbox
    outbox.release()
    assert it.id in outbox
    outbox.committed(2)
    assert it.id not in outbox


def test_a_term_that_was_only_heard_of_is_written_without_a_new_count() -> None:
    outbox = Outbox()
    outbox.note(TERM)
    assert not outbox.is_idle
    commit = only_commit(outbox.release())
    assert commit.term == TERM
    assert not commit.seen
    assert outbox.lsn == 0


def test_what_is_dropped_is_returned_and_nothing_follows() -> None:
    outbox = leading()
    outbox.insert(task())
    outbox.then(reply(1))
    outbox.release()
    outbox.insert(task(2))
    outbox.then(reply(2))
    dropped = outbox.drop()
    assert [effect for effect in dropped if isinstance(effect, fx.Reply)] == [reply(1), reply(2)]
    outbox.insert(task(3))
    outbox.then(reply(3))
    assert outbox.release() == []


def test_a_change_tells_waiters_what_the_last_attempt_left_and_only_at_the_end() -> None:
    outbox = leading()
    it = task()
    it.move(TaskState.ASSIGNED, 6.0)
    attempt = Attempt(1, TERM, 1, 11, 6.0, outcome=Outcome.EXCEPTION, report=b"report", reason="why")
    it.record.attempts.append(attempt)
    for state, report in ((TaskState.RETRYING, b""), (TaskState.QUEUED, b""), (TaskState.CANCELLED, b"report")):
        it.move(state, 7.0)
        outbox.update(it)
        commit = only_commit(outbox.release())
        (announce,) = outbox.committed(commit.seq)
        assert announce == fx.Announce([fx.Change(it.id, state, 7.0, 1, 11, report, "why")])


# -- Copies ------------------------------------------------------------------------------------------------------------


def answers(effects: list[fx.Effect]) -> list[tuple[int, str]]:
    return [(effect.call, effect.durability) for effect in effects if isinstance(effect, fx.Reply)]


def promise(outbox: Outbox, number: int) -> None:
    outbox.insert(task(number))
    outbox.then(reply(number))


def test_while_a_standby_is_in_sync_answers_wait_for_its_copy_and_commits_do_not() -> None:
    outbox = leading()
    outbox.needs_copy = True
    promise(outbox, 1)
    assert outbox.committed(only_commit(outbox.release()).seq) == []
    promise(outbox, 2)
    second = only_commit(outbox.release())
    assert answers(outbox.copied(2)) == [(1, "replicated")]
    assert answers(outbox.copied(3)) == [], "it is not durable here"
    assert answers(outbox.committed(second.seq)) == [(2, "replicated")]
    assert outbox.is_idle


def test_an_effect_without_rows_stays_behind_those_that_wait_for_a_copy() -> None:
    outbox = leading()
    outbox.needs_copy = True
    promise(outbox, 1)
    outbox.committed(only_commit(outbox.release()).seq)
    outbox.then(reply(2))
    assert outbox.release() == []
    assert [call for call, _ in answers(outbox.copied(2))] == [1, 2]


def test_an_answer_without_rows_says_how_durable_is_what_left_before() -> None:
    # A task is submitted a second time while the commit with it is on its way.
    outbox = leading()
    promise(outbox, 1)
    commit = only_commit(outbox.release())
    outbox.then(reply(2))
    assert answers(outbox.committed(commit.seq)) == [(1, "local")]
    assert answers(outbox.release()) == [(2, "local")]
    outbox.needs_copy = True
    promise(outbox, 3)
    commit = only_commit(outbox.release())
    assert outbox.committed(commit.seq) == []
    assert answers(outbox.copied(outbox.lsn - 1)) == [(3, "replicated")]
    outbox.then(reply(4))
    assert answers(outbox.release()) == [(4, "replicated")]


def test_without_standbys_what_waited_is_answered_as_local_or_refused() -> None:
    for refuses, expected in ((False, [(1, "local")]), (True, [(1, "")])):
        outbox = leading()
        outbox.needs_copy, outbox.refuses_local = True, refuses
        promise(outbox, 1)
        outbox.committed(only_commit(outbox.release()).seq)
        effects = outbox.do_without_copies()
        assert answers(effects) == expected
        (answer,) = (effect.answer for effect in effects if isinstance(effect, fx.Reply))
        assert isinstance(answer, Unavailable) is refuses


def test_who_resigns_answers_nobody_and_finishes_the_commit_in_flight() -> None:
    outbox = leading()
    outbox.needs_copy = True
    promise(outbox, 1)
    outbox.committed(only_commit(outbox.release()).seq)
    promise(outbox, 2)
    in_flight = only_commit(outbox.release())
    promise(outbox, 3)
    assert [call for call, _ in answers(outbox.resign())] == [1, 2, 3]
    assert not outbox.is_durable
    assert answers(outbox.committed(in_flight.seq)) == []
    assert outbox.is_idle
    assert outbox.seen.lsn_of(TERM) == 3


def test_a_page_that_was_overtaken_does_not_take_back_what_was_seen() -> None:
    outbox = Outbox()
    other = Term(3, 7, 7)
    outbox.see([Dot(other, 5)])
    first = only_commit(outbox.release())
    outbox.see([Dot(other, 4)])
    outbox.note(other)
    outbox.committed(first.seq)
    assert only_commit(outbox.release()).seen == []


def test_strays_stay_expected_where_what_was_to_make_up_for_them_is_dropped() -> None:
    outbox = Outbox()
    outbox.load([], None, has_strays=True)
    outbox.begin(TERM)
    outbox.expect_strays(has_strays=False)
    outbox.resign()
    assert outbox.has_strays
    assert only_commit(outbox.release()).has_strays is True
