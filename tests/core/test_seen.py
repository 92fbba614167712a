"""What somebody holds of each term, and which tasks changed last."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from taskd.core.recent import Recent
from taskd.core.seen import Seen
from taskd.core.task import Record, Task, TaskSpec, TaskState
from taskd.protocol.messages import Dot, Term

TERMS = [Term(1, 1, 5), Term(2, 2, 6), Term(3, 1, 7)]
dots = st.builds(Dot, st.sampled_from(TERMS), st.integers(1, 6))


def task_id(number: int) -> bytes:
    return number.to_bytes(16, "big")


@given(st.lists(dots))
def test_what_is_seen_only_grows_and_covers_what_came_before(some: list[Dot]) -> None:
    seen = Seen()
    for dot in some:
        before = seen.copy()
        seen.advance(dot)
        assert seen.covers(dot)
        assert seen.covers_all(before)
    assert all(not seen.covers(Dot(term, seen.lsn_of(term) + 1)) for term in TERMS)
    assert Seen(seen.dots()).dots() == seen.dots() == Seen(reversed(some)).dots()


@given(st.lists(dots), st.lists(dots))
def test_everything_is_covered_if_each_term_is(ours: list[Dot], theirs: list[Dot]) -> None:
    seen, other = Seen(ours), Seen(theirs)
    assert seen.covers_all(other) == all(seen.covers(dot) for dot in theirs)


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), max_size=30), st.data())
def test_what_changed_beyond_somebodys_knowledge_is_remembered_or_admitted_to_be_forgotten(
    ids_max: int, changes: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Each change is a task and how far the term advances with it."""
    recent, ours, truth = Recent(Seen(), ids_max), Seen(), {}
    term, lsn = TERMS[0], 0
    for number, step in changes:
        lsn += step
        if not lsn:
            continue
        dot = Dot(term, lsn)
        recent.note(dot, [task_id(number)])
        ours.advance(dot)
        truth[task_id(number)] = dot
    theirs = Seen([Dot(term, data.draw(st.integers(0, lsn)))]) if lsn else Seen()
    found = recent.beyond(theirs, ours)
    lacking = {known for known, dot in truth.items() if not theirs.covers(dot)}
    assert found is None or set(found) == lacking
    assert found is not None or len(truth) > ids_max


def test_what_was_seen_before_it_began_is_not_remembered() -> None:
    seen = Seen([Dot(TERMS[0], 5)])
    recent = Recent(seen)
    assert recent.beyond(Seen(), seen) is None
    assert recent.beyond(seen, seen) == []
    recent.note(Dot(TERMS[0], 6), [])
    assert recent.beyond(seen, Seen([Dot(TERMS[0], 6)])) == [], "a commit without tasks"


def test_a_row_that_was_read_before_a_change_is_outdated() -> None:
    task = Task(task_id(1), TaskSpec("command"), b"", TaskState.QUEUED, Record([]))
    old, new = task.row(Dot(TERMS[0], 1)), task.row(Dot(TERMS[0], 2))
    recent = Recent(Seen())
    assert not recent.is_outdated(task.id, None)
    recent.note(new.dot, [task.id])
    assert recent.is_outdated(task.id, old)
    assert recent.is_outdated(task.id, None)
    assert not recent.is_outdated(task.id, new)
    recent.forget([task.id])
    assert not recent.is_outdated(task.id, None), "it was purged"


def test_where_unknown_tasks_were_purged_everything_is_forgotten() -> None:
    recent = Recent(Seen())
    recent.note(Dot(TERMS[0], 2), [task_id(1)])
    recent.forget_all()
    assert not recent.is_outdated(task_id(1), None)
    assert recent.beyond(Seen(), Seen([Dot(TERMS[0], 2)])) is None
    assert recent.beyond(Seen([Dot(TERMS[0], 2)]), Seen([Dot(TERMS[0], 2)])) == []
