"""Who leads: one scheduler's view."""

from __future__ import annotations

import msgspec
import pytest

from taskd.core.election import (
    DENIED_WAIT_S,
    EPOCH_JUMP_MAX,
    EPOCH_MAX,
    EPOCH_TOP,
    GRANT_S,
    JOIN_S,
    LOST_WAIT_S,
    SPEAK_WAIT_S,
    Election,
)
from taskd.protocol.messages import Leading, Role, Term
from tests.core.world import info

LATER = 100.0 + JOIN_S


@pytest.fixture
def election() -> Election:
    """Of node 5, which began to look around at 100."""
    election = Election(info(5, "scheduler", boot=7))
    election.join(100.0)
    return election


def meet(
    election: Election, node_id: int, says: Term | None = None, *, may_lead: bool = True, role: Role = "scheduler"
) -> None:
    """A node comes and says whom it follows."""
    election.peer_up(info(node_id, role), 100.0)
    election.heard(node_id, Leading(says, may_lead and role == "scheduler"), is_proven=True)


def test_nobody_claims_before_it_has_looked_around(election: Election) -> None:
    assert not Election(info(5, "scheduler")).may_claim(1e9), "its disk has not been read yet"
    assert not election.may_claim(LATER - 0.01)
    assert election.next_deadline(100.0) == LATER
    assert election.may_claim(LATER)
    assert election.next_deadline(LATER) is None


def test_an_empty_disk_is_why_nobody_leads(election: Election) -> None:
    assert "looking for each other" in election.why_not(100.0)
    election.join(100.0, 10.0)
    assert "disk is empty or was restored: it leads in 8 s" in election.why_not(102.0)
    assert "looking for each other" in election.why_not(109.9)


def test_who_stood_still_looks_around_again(election: Election) -> None:
    election.join(200.0)
    assert not election.is_ready(200.0)
    assert election.may_claim(200.0 + JOIN_S)


def test_a_claim_is_above_everything_seen(election: Election) -> None:
    assert election.next_term() == Term(1, 5, 7)
    other = Election(info(5, "scheduler", boot=8))
    other.greatest = Term(41, 9, 1)
    assert other.next_term() == Term(42, 5, 8)


def test_a_lower_id_goes_first_and_a_higher_one_does_not(election: Election) -> None:
    meet(election, 6)
    election.peer_up(info(5, "scheduler"), 100.0)  # Ourselves.
    assert [node.node_id for node in election.schedulers()] == [6]
    assert election.may_claim(LATER)
    meet(election, 4)
    assert not election.may_claim(LATER)
    election.peer_down(4, LATER, is_orderly=False)
    assert election.may_claim(LATER)


def test_a_lower_id_that_may_not_lead_is_not_waited_for(election: Election) -> None:
    meet(election, 4, may_lead=False)
    assert election.may_claim(LATER)


def test_a_lower_worker_is_not_waited_for(election: Election) -> None:
    meet(election, 4, role="worker")
    assert election.may_claim(LATER)


def test_a_peer_is_heard_out_first(election: Election) -> None:
    election.peer_up(info(9, "worker"), LATER)
    assert not election.may_claim(LATER)
    election.heard(9, Leading(None), is_proven=True)
    assert election.may_claim(LATER)


@pytest.mark.parametrize("role", ["scheduler", "worker"])
def test_while_a_peer_hears_a_leader_nobody_claims(election: Election, role: Role) -> None:
    meet(election, 9, Term(3, 1, 1), role=role)
    assert not election.may_claim(LATER)
    election.heard(9, Leading(Term(2, 5, 1)), is_proven=True)
    assert election.may_claim(LATER), "it hears us"


def test_a_leader_is_followed_and_after_its_loss_given_a_moment_to_come_back(election: Election) -> None:
    term = Term(1, 9, 1)
    meet(election, 9, term)
    assert election.followed == election.standing == term
    assert not election.may_claim(LATER)
    election.peer_down(9, LATER, is_orderly=False)
    assert election.followed is None
    assert not election.may_claim(LATER)
    assert election.may_claim(LATER + LOST_WAIT_S)


def test_a_leader_that_said_goodbye_is_not_waited_for(election: Election) -> None:
    meet(election, 9, Term(1, 9, 1))
    election.peer_down(9, LATER, is_orderly=True)
    assert election.may_claim(LATER)


def test_what_a_leader_no_longer_says_no_longer_holds(election: Election) -> None:
    meet(election, 9, Term(1, 9, 1))
    meet(election, 8)
    assert election.followed is not None
    election.heard(9, Leading(None, may_lead=True), is_proven=True)
    assert election.followed is None


def test_hearsay_raises_the_epoch_and_makes_no_leader(election: Election) -> None:
    meet(election, 9, Term(7, 4, 1))
    assert election.followed is None
    assert election.next_term().epoch == 8


def test_a_leader_of_a_lesser_term_is_not_followed(election: Election) -> None:
    election.greatest = Term(4, 3, 1)
    meet(election, 9, Term(4, 9, 1))
    assert election.followed is None
    assert election.is_stale(Term(4, 9, 1))
    election.heard(9, Leading(Term(5, 9, 1), may_lead=True), is_proven=True)
    assert election.followed == Term(5, 9, 1)


def test_a_greater_term_ends_following_the_lesser(election: Election) -> None:
    meet(election, 9, Term(4, 9, 1))
    election.learn(Term(5, 3, 1))
    assert election.followed is None


def test_whose_claim_was_granted_is_given_time(election: Election) -> None:
    meet(election, 9)
    election.grant(Term(4, 9, 1), LATER)
    assert not election.may_claim(LATER)
    election.heard(9, Leading(None, may_lead=True), is_proven=True)
    assert election.may_claim(LATER), "it gave up"


def test_whose_claim_was_granted_and_comes_to_nothing_is_not_waited_for_for_ever(election: Election) -> None:
    meet(election, 9)
    election.grant(Term(4, 9, 1), LATER)
    assert election.next_deadline(LATER) == LATER + GRANT_S
    assert not election.may_claim(LATER + GRANT_S - 0.01)
    assert election.may_claim(LATER + GRANT_S)


def test_whose_claim_was_denied_tries_again_later(election: Election) -> None:
    election.denied(LATER)
    assert not election.may_claim(LATER)
    assert election.is_ready(LATER), "others need not take its place"
    assert election.may_claim(LATER + DENIED_WAIT_S)


def test_an_epoch_far_above_all_seen_is_refused(election: Election) -> None:
    election.greatest = Term(10, 9, 1)
    meet(election, 9)
    with pytest.raises(ValueError, match="too far above"):
        election.heard(9, Leading(Term(10 + EPOCH_JUMP_MAX + 1, 9, 1)), is_proven=True)
    assert election.followed is None
    election.heard(9, Leading(Term(10 + EPOCH_JUMP_MAX, 9, 1)), is_proven=True)
    assert election.followed is not None


def test_who_has_never_heard_of_any_epoch_believes_what_can_be(election: Election) -> None:
    meet(election, 9)
    with pytest.raises(ValueError, match="too far above"):
        election.heard(9, Leading(Term(EPOCH_MAX + 1, 9, 1)), is_proven=True)
    election.heard(9, Leading(Term(EPOCH_MAX - 9, 9, 1)), is_proven=True)
    assert election.followed is not None


def test_there_is_always_a_term_above(election: Election) -> None:
    election.greatest = Term(EPOCH_TOP - 1, 9, 1)
    meet(election, 9)
    with pytest.raises(ValueError, match="too far above"):
        election.heard(9, Leading(Term(EPOCH_TOP + 1, 9, 1)), is_proven=True)
    assert msgspec.convert(msgspec.to_builtins(election.next_term()), Term).epoch == EPOCH_TOP


def test_a_worker_without_a_seal_neither_raises_the_epoch_nor_stands_in_the_way(election: Election) -> None:
    election.peer_up(info(11, "worker"), LATER)
    with pytest.raises(ValueError, match="no seal"):
        election.heard(11, Leading(Term(3, 1, 1)), is_proven=False)
    assert election.greatest is None
    assert election.may_claim(LATER)


def test_who_says_nothing_is_waited_for_no_longer_than_a_moment(election: Election) -> None:
    election.peer_up(info(11, "worker"), LATER)
    assert not election.may_claim(LATER + SPEAK_WAIT_S - 0.01)
    assert election.next_deadline(LATER) == LATER + SPEAK_WAIT_S
    assert election.may_claim(LATER + SPEAK_WAIT_S)
