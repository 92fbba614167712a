"""The simulator itself: it finds nothing in what is right, finds each planted bug, and replays the same world."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.sim.coincidences import COINCIDENCES, play_script
from tests.sim.plants import PLANTS, planted
from tests.sim.run import run
from tests.sim.teeth import COMMON_SEEDS, catch

SEEDS = 100


@pytest.mark.parametrize("first", range(0, SEEDS, 10))
def test_every_promise_holds_in_these_worlds(first: int) -> None:
    for seed in range(first, first + 10):
        result = run(seed)
        assert not result.invariant, f"python -m tests.sim --seed {seed} --trace: {result.text}"


@pytest.mark.parametrize("seed", [3, 17, 62])
def test_a_seed_replays_the_same_world_whatever_the_order_of_hashes(seed: int) -> None:
    command = [sys.executable, "-m", "tests.sim", "--seed", str(seed), "--digest"]
    digests = {
        subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": hash_seed}, check=True, capture_output=True, text=True
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1
    assert len(digests.pop().split()[-1]) >= 32


@pytest.mark.parametrize("name", [name for name in PLANTS if name not in COINCIDENCES])
def test_a_planted_bug_is_noticed(name: str) -> None:
    result = catch(name)
    assert result is not None, f"{COMMON_SEEDS} worlds do not notice it: write one that does, in coincidences.py"
    assert result.invariant != "core", f"the plant does not fit the core any more: {result.text}"


@pytest.mark.parametrize("name", COINCIDENCES)
@pytest.mark.parametrize("seed", range(3))
def test_a_rare_coincidence_breaks_no_promise_unless_its_bug_is_planted(name: str, seed: int) -> None:
    result = play_script(name, seed)
    assert not result.invariant, f"python -m tests.sim --script {name} --seed {seed} --trace: {result.text}"
    with planted(COINCIDENCES[name].plant):
        result = play_script(name, seed)
    assert result.invariant == COINCIDENCES[name].invariant, (result.invariant, result.text)
