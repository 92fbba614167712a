"""A worker's room: what fits beside what runs."""

from __future__ import annotations

from taskd.core.room import Room
from taskd.core.task import TaskSpec
from taskd.protocol import messages as msg


def key(number: int) -> msg.AttemptKey:
    return msg.AttemptKey(number.to_bytes(16), 1, msg.Term(1, 1, 1), 1)


def test_of_short_calls_a_slot_has_about_ten_milliseconds_of_work() -> None:
    room = Room(msg.Offer(1, {"cpus": 1000}, {}, (), (msg.HandlerInfo("echo", b"{}"),)))
    for mean_s, count in ((0.00001, 256), (0.0001, 85), (0.001, 9), (0.0049, 2), (0.006, 1)):  # s, calls
        for _ in range(100):
            room.ran("echo", mean_s)
        for number in range(300):
            room.add(key(number), TaskSpec("echo"))
        begins = room.take_fitting(0)
        assert len(begins) == count
        for _, _, place in begins:
            room.release(place)
        for waiting in list(room):
            room.discard(waiting)
