"""Fifty thousand hostile frames: none crashes a session or a core, none hangs, none that a worker sends moves a leader.
`make fuzz N=1000000` plays more."""

from __future__ import annotations

from random import Random

import pytest

from taskd.core.leadership import Leadership
from taskd.protocol import messages as msg
from tests.fuzz.__main__ import run
from tests.fuzz.targets import Tally, play_world

FRAMES = 50_000


def test_no_frame_breaks_anything() -> None:
    tally = run(seed=7_000_000, count=FRAMES)
    assert tally.frames >= FRAMES
    assert tally.refused > FRAMES / 10, "nothing was hostile"
    assert set(tally.taken) == {kind.__name__ for kind in msg.MAY_SEND} - {"Hello", "Ping", "Pong", "Goodbye"}


def test_the_fuzzer_notices_a_core_that_believes_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was a known weakness once: a worker names a term, and the leader gives way."""
    refused = Leadership._term_refused

    def believe(self: Leadership, sender: int, error: ValueError) -> None:
        refused(self, sender, error)
        if self.leader is not None:
            self._step_down("a worker says so", 0.0)

    monkeypatch.setattr(Leadership, "_term_refused", believe)

    def play() -> None:
        for seed in range(20):
            play_world(Random(seed), Tally(), 300, with_scheduler=False)

    with pytest.raises(AssertionError, match=r"leads|change of leaders"):
        play()
