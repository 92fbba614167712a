"""The pure parts of the clients: ids, windows, lines, patience; and what importing them costs."""

from __future__ import annotations

import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from taskd.client.call import ANSWER_S, ENDLESS, Call, Deadline, Patience, error_from, is_worth_repeating
from taskd.client.errors import ApiError, ConnectionLost, NoDaemon, ProtocolError
from taskd.client.ids import new_id
from taskd.client.lines import LINE_BYTES_MAX, LineSplitter
from taskd.client.results import MapWindow, ResultReader
from taskd.client.submission import Chunk, chunks, groups_of
from taskd.client.views import Result


def test_ids_are_uuids_of_version_7_in_order() -> None:
    ids = [new_id() for _ in range(10_000)]
    assert ids == sorted(set(ids))
    first = uuid.UUID(ids[0])
    assert (first.version, first.variant, str(first)) == (7, uuid.RFC_4122, ids[0])


def test_threads_never_make_the_same_id() -> None:
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: [new_id() for _ in range(2000)], range(4)))
    assert len(set().union(*made)) == 8000
    assert all(ids == sorted(ids) for ids in made)


def test_lines_come_whole_however_they_are_cut() -> None:
    splitter = LineSplitter()
    found = [line for piece in (b"a", b"b\nc", b"\n\n", b"d") for line in splitter.feed(piece)]
    assert found == [b"ab", b"c"]
    with pytest.raises(ProtocolError):
        splitter.feed(b"x" * (LINE_BYTES_MAX + 1))


def test_a_reader_asks_for_what_is_left() -> None:
    reader = ResultReader(Chunk(["a", "b"], b"[1,2]"))
    endless = Deadline(None)
    assert reader.next_call(endless).target == "/v1/tasks?stream=1"
    assert reader.feed(b'{"id":"a","state":"succeeded"}\n{"id":"a","state":"failed"}\n') == [Result("a", "succeeded")]
    assert reader.next_call(endless).target == "/v1/tasks?stream=1", "it was not heard that the tasks were taken"
    assert reader.feed(b'{"ids":["a","b"],"durability":"local"}\n{"pending":1}\n{"id":"c","state":"failed"}\n') == []
    call = reader.next_call(endless)
    assert (call.target, call.body) == ("/v1/tasks/wait", b'{"ids":["b"],"timeout":86400.0,"stream":true}')
    with pytest.raises(TimeoutError):
        reader.next_call(Deadline(0))
    with pytest.raises(ApiError) as caught:
        reader.feed(b'{"error":{"code":"no_leader","message":"gone","field":null}}\n')
    assert caught.value.code == "no_leader"


def test_a_reader_asks_once_even_where_the_time_is_up() -> None:
    reader = ResultReader(Chunk(["a"], None))
    assert reader.next_call(Deadline(-1)).body == b'{"ids":["a"],"timeout":0.0,"stream":true}'
    with pytest.raises(TimeoutError):
        reader.next_call(Deadline(-1))
    with pytest.raises(TimeoutError):
        ResultReader(Chunk(["a"], b"[1]")).next_call(Deadline(0))


def test_a_window_hands_out_in_order_and_closes_when_full() -> None:
    window = MapWindow(chunks(b'{"type":"x"', ({"n": n} for n in range(20_000))), is_ordered=True)
    sent: list[str] = []
    while window.has_room:
        chunk = window.next_chunk()
        assert chunk is not None
        sent += chunk.ids
    assert len(sent) == 8000
    assert window.on_results([Result(sent[1])]) == []
    assert window.on_results([Result(sent[0])]) == [Result(sent[0]), Result(sent[1])]
    assert window.has_room


def test_a_window_does_not_hold_results_without_bound() -> None:
    window = MapWindow(groups_of(str(n) for n in range(150_000)), is_ordered=True)
    first = window.next_chunk()
    assert first is not None
    window.on_results([Result(task_id) for task_id in first.ids[1:]])
    assert not window.has_room, "what waits for the first one is too much already"
    assert len(window.on_results([Result(first.ids[0])])) == 100_000
    assert window.has_room


def test_patience_ends_and_starts_anew() -> None:
    patience = Patience(0.3)
    delays = []
    now = 100.0
    while (delay := patience.next_delay_s(now)) is not None:
        delays.append(delay)
        now += delay
    assert delays == pytest.approx([0.05, 0.1, 0.15])
    patience.restore()
    assert patience.next_delay_s(now) == pytest.approx(0.05)
    assert Patience(0).next_delay_s(0) is None


def test_only_what_passes_by_itself_is_tried_again() -> None:
    gone, lost, full = NoDaemon(), ConnectionLost(), ApiError(429, "overloaded", "full")
    leaderless = ApiError(503, "no_leader", "wait")
    assert all(is_worth_repeating(error, True, True) for error in (gone, lost, leaderless))
    assert not is_worth_repeating(full, True, True)
    assert is_worth_repeating(gone, False, True), "nothing was sent"
    assert not any(is_worth_repeating(error, False, True) for error in (lost, leaderless))
    assert not is_worth_repeating(gone, True, False), "a daemon that never answered is missing, not restarting"


def test_deadlines() -> None:
    assert Deadline(None).left_s() is None
    left = Deadline(60).left_s()
    assert left is not None
    assert 0 < left <= 60
    with pytest.raises(TimeoutError):
        Deadline(0).left_s()


def test_a_deadline_bounds_the_silence_of_a_call() -> None:
    call = Call("GET", "/", timeout_s=30.0)
    assert ENDLESS.bounded(call) is call
    assert Deadline(60).bounded(call) is call
    assert Deadline(-1).bounded(call).timeout_s == ANSWER_S
    for unbounded in (call, call._replace(timeout_s=None)):
        timeout_s = Deadline(5).bounded(unbounded).timeout_s
        assert timeout_s is not None
        assert timeout_s <= 5
    assert Deadline(5).pause_s(60.0) <= 5
    assert ENDLESS.pause_s(60.0) == 60.0
    with pytest.raises(TimeoutError):
        Deadline(0).pause_s(0.1)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error": "x"}', b'{"detail": 1}'])
def test_an_answer_that_is_none_of_ours_is_told_as_it_is(body: bytes) -> None:
    error = error_from(502, body)
    assert (error.status, error.code) == (502, "http_502")
    assert "status 502" in error.message


def test_the_blocking_client_loads_neither_asyncio_nor_http_libraries() -> None:
    code = (
        "import sys; from taskd.client import Client\n"
        "found = {'asyncio', 'aiohttp', 'http.client', 'ssl', 'rich', 'taskd.api', 'taskd.core'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(found)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
