"""Who leads: one scheduler's view."""

from __future__ import annotations

import pytest

from taskd.core.election import EPOCH_JUMP_MAX, JOIN_S, Election
from taskd.protocol.messages import Term
from tests.core.world import info


@pytest.fixture
def election() -> Election:
    """Of node 5, which began to look around at 100."""
    election = Election(info(5, "scheduler", boot=7))
    election.join(100.0)
    return election


LATER = 100.0 + JOIN_S


def test_nobody_claims_before_it_has_looked_around(election: Election) -> None:
    assert not Election(info(5, "scheduler")).may_claim(1e9), "its disk has not been read yet"
    assert not election.may_claim(LATER - 0.01)
    assert election.next_deadline(100.0) == LATER
    assert election.may_claim(LATER)
    assert election.next_deadline(LATER) is None


def test_a_claim_is_above_everything_seen(election: Election) -> None:
    assert election.claim() == Term(1, 5, 7)
    assert not election.may_claim(LATER)
    other = Election(info(5, "scheduler", boot=8))
    other.greatest = Term(41, 9, 1)
    assert other.claim() == Term(42, 5, 8)


def test_a_lower_id_goes_first_and_a_higher_one_does_not(election: Election) -> None:
    election.peer_up(info(6, "scheduler"))
    election.peer_up(info(5, "scheduler"))  # Ourselves.
    assert election.standbys == 1
    assert election.may_claim(LATER)
    election.peer_up(info(4, "scheduler"))
    assert not election.may_claim(LATER)
    election.peer_down(4)
    assert election.may_claim(LATER)


def test_who_led_last_does_not_wait_for_a_lower_id(election: Election) -> None:
    election.peer_up(info(4, "scheduler"))
    election.greatest = Term(3, 5, 1)
    assert election.may_claim(LATER)
    election.greatest = Term(3, 6, 1)
    assert not election.may_claim(LATER)


def test_a_leader_is_followed_and_not_replaced(election: Election) -> None:
    term = Term(1, 9, 1)
    assert not election.heard(9, term)
    assert election.followed == (9, term)
    assert not election.may_claim(LATER)
    election.peer_down(9)
    assert election.followed is None
    assert not election.may_claim(LATER), "what it has accepted is on its disk alone"


def test_what_a_leader_no_longer_says_no_longer_holds(election: Election) -> None:
    election.heard(9, Term(1, 9, 1))
    election.heard(8, None)
    assert election.followed is not None
    election.heard(9, None)
    assert election.followed is None


def test_hearsay_raises_the_epoch_and_makes_no_leader(election: Election) -> None:
    assert not election.heard(9, Term(7, 4, 1))
    assert election.followed is None
    assert election.claim().epoch == 8


def test_a_leader_steps_down_for_a_greater_term_only(election: Election) -> None:
    election.greatest = Term(4, 1, 1)
    assert election.claim() == Term(5, 5, 7)
    assert not election.heard(9, Term(4, 9, 1))
    assert not election.heard(9, Term(5, 9, 1)), "at equal epochs the lower id is greater"
    assert election.heard(4, Term(5, 4, 1))
    assert election.heard(9, Term(6, 9, 1))


@pytest.mark.parametrize("seen", [0, 10])
def test_an_epoch_far_above_all_seen_is_refused(election: Election, seen: int) -> None:
    election.greatest = Term(seen, 9, 1) if seen else None
    with pytest.raises(ValueError, match="too far above"):
        election.heard(9, Term(seen + EPOCH_JUMP_MAX + 1, 9, 1))
    assert election.followed is None
    assert not election.heard(9, Term(seen + EPOCH_JUMP_MAX, 9, 1))
