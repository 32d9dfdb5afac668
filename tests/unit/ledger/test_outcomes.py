"""Who puts outcomes on record, who accepts them, and what they cost."""

from __future__ import annotations

import pytest

from hisab_contracts.ids import GrantId, KeyId, OutcomeId, TenantId
from hisab_contracts.invariants import InvariantBroken
from ledger.core.grants import GrantState
from ledger.core.outcomes import (
    MOST_OUTCOMES,
    AcceptanceRefusal,
    GrantOutcome,
    NotApproved,
    OutcomesExceeded,
    OutcomeState,
    SubmissionRefusal,
    ThemeCost,
    has_accepted,
    refuse_acceptance,
    refuse_accepter,
    refuse_submission,
)
from ledger.core.proposals import AlreadyDecided, DecisionForbidden, MakerIsChecker
from unit.ledger.values import grant

FORBIDDEN = DecisionForbidden("accepting an outcome takes an approver")


def outcome(state: OutcomeState = "submitted") -> GrantOutcome:
    """An outcome that the officer submitted."""
    return GrantOutcome(
        outcome_id=OutcomeId("o"),
        grant_id=GrantId("g"),
        tenant_id=TenantId("t"),
        kind="pilot",
        evidence_sha256="0" * 64,
        note="",
        state=state,
        submitted_by=KeyId("officer"),
        accepted_by=None if state == "submitted" else KeyId("approver"),
    )


def cost(drawn_micro: int, outcome_count: int, grant_count: int = 0) -> ThemeCost:
    """What outcomes of health cost."""
    return ThemeCost(
        theme="health",
        currency="PKR",
        grant_count=grant_count,
        outcome_count=outcome_count,
        drawn_micro=drawn_micro,
    )


@pytest.mark.parametrize(
    ("state", "count", "refusal"),
    [
        ("approved", 0, None),
        ("revoked", 0, None),
        ("approved", MOST_OUTCOMES - 1, None),
        ("approved", MOST_OUTCOMES, OutcomesExceeded(MOST_OUTCOMES)),
        ("proposed", 0, NotApproved("proposed")),
        ("rejected", 0, NotApproved("rejected")),
        ("reversed", MOST_OUTCOMES, NotApproved("reversed")),
    ],
)
def test_an_outcome_is_of_a_grant_that_gave_credit(
    state: GrantState, count: int, refusal: SubmissionRefusal | None
) -> None:
    """And of no more than can be shown with it."""
    assert refusal == refuse_submission(grant("g", 1, state=state), count)


@pytest.mark.parametrize(
    ("key_id", "role", "state", "refusal"),
    [
        ("approver", "approver", "submitted", None),
        ("approver", "approver", "accepted", AlreadyDecided("accepted")),
        ("officer", "officer", "submitted", MakerIsChecker()),
        ("officer", "approver", "accepted", MakerIsChecker()),
        ("second-officer", "officer", "submitted", FORBIDDEN),
        ("second-officer", "officer", "accepted", FORBIDDEN),
    ],
)
def test_an_outcome_is_accepted_once_by_an_approver_with_another_key(
    key_id: str, role: str, state: OutcomeState, refusal: AcceptanceRefusal | None
) -> None:
    """The submitter hears it first, whatever its role and the outcome's state."""
    approved = grant("g", 1, state="approved")
    assert refusal == refuse_acceptance(outcome(state), approved, KeyId(key_id), role)


def test_an_outcome_of_a_grant_that_was_reversed_since_is_not_accepted() -> None:
    """It should not have been made, so it opens no tranche; a revoked one gave credit."""
    states: tuple[GrantState, ...] = ("reversed", "revoked")
    refused = [
        refuse_acceptance(
            outcome("submitted"), grant("g", 1, state=state), KeyId("approver"), "approver"
        )
        for state in states
    ]
    assert [NotApproved("reversed"), None] == refused


def test_of_an_outcome_that_is_not_there_only_the_role_is_told() -> None:
    """Whether it is missing is found after."""
    assert FORBIDDEN == refuse_accepter(None, KeyId("officer"), "officer")
    assert None is refuse_accepter(None, KeyId("approver"), "approver")


def test_one_accepted_outcome_is_enough() -> None:
    """And none, or submitted ones, are not."""
    assert [False, False, True] == [
        has_accepted(found)
        for found in ([], [outcome(), outcome()], [outcome(), outcome("accepted")])
    ]


@pytest.mark.parametrize(
    ("drawn_micro", "outcome_count", "each_micro"),
    [
        (0, 0, None),
        (0, 3, 0),
        (10, 1, 10),
        (10, 3, 3),  # 3.33
        (11, 3, 4),  # 3.67
        (5, 2, 3),  # 2.5: half-up
        (2**63 - 1, 2, 2**62),
    ],
)
def test_an_outcome_costs_its_share_of_what_was_drawn(
    drawn_micro: int, outcome_count: int, each_micro: int | None
) -> None:
    """Half-up to the micro-unit; nothing where nothing is accepted."""
    assert each_micro == cost(drawn_micro, outcome_count).micro_per_outcome


def test_a_grant_counts_once_however_many_outcomes_it_has() -> None:
    """More grants than outcomes are a defect of ours."""
    with pytest.raises(InvariantBroken):
        assert cost(10, 2, grant_count=3).micro_per_outcome
