"""Task ids: unique, in order, and carrying their time."""

from __future__ import annotations

from uuid import RFC_4122, UUID

from taskd.daemon.ids import NO_ID, IdSource, text_of

NOW_S = 1_767_225_600.123


def test_an_id_is_a_uuid_of_version_7_with_its_millisecond() -> None:
    made = UUID(bytes=IdSource().next(NOW_S))
    assert (made.version, made.variant) == (7, RFC_4122)
    assert made.int >> 80 == int(NOW_S * 1000)


def test_ids_of_one_source_only_rise_whatever_the_clock_does() -> None:
    source = IdSource()
    times_s = [NOW_S] * 5000 + [NOW_S - 3600, NOW_S - 1, NOW_S + 0.001, NOW_S + 1, 0.0] + [NOW_S + 1] * 5000
    ids = [source.next(now_s) for now_s in times_s]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert all(UUID(bytes=made).version == 7 for made in ids)
    assert min(ids) > NO_ID


def test_two_sources_do_not_meet() -> None:
    one, other = IdSource(), IdSource()
    assert not {one.next(NOW_S) for _ in range(5000)} & {other.next(NOW_S) for _ in range(5000)}


def test_users_see_the_usual_form() -> None:
    made = IdSource().next(NOW_S)
    assert text_of(made) == str(UUID(bytes=made))
