"""Who may decide what somebody else proposed, and what comes of it."""

from __future__ import annotations

import itertools

import pytest

from hisab_contracts.entries import Entry
from hisab_contracts.ids import KeyId, ProgrammeId, ProposalId, TenantId
from ledger.core.adjustments import AddBudget, ChangeCreditLimit
from ledger.core.grants import ApproveGrant
from ledger.core.proposals import (
    AboveLimit,
    AlreadyDecided,
    Approval,
    BudgetTerms,
    ConflictOfInterest,
    CreditLimitTerms,
    DecisionForbidden,
    GrantTerms,
    MakerIsChecker,
    Proposal,
    ProposalState,
    Terms,
    entry_ids_of,
    proposal_id_of,
    proposal_of,
    reclaim_of,
    refuse_approver,
    refuse_decision,
    refuse_rejecter,
    refuse_rejection,
    reversal_of,
    revocation_of,
)
from ledger.core.withdrawals import ReclaimExpired, ReverseEntry, RevokeGrant
from unit.ledger.values import CoreLedger, approve, at, book, grant, hold, total

OTHERS = (KeyId("k-chief"),)
BUDGET = BudgetTerms(programme_id=ProgrammeId("p"), add_micro=50)
LIMIT = CreditLimitTerms(tenant_id=TenantId("t"), credit_limit_micro=50, reason="grows")
GRANT = GrantTerms(grant("g", 50))


def granted() -> Entry:
    """The entry of that grant in the tenant's book."""
    made = CoreLedger(book("startup")).do(approve(GRANT.grant))
    assert isinstance(made, tuple)
    return made[-1]


GRANTED = granted()
REVERSAL = reversal_of(GRANTED, "twice")
REVOCATION = revocation_of(GRANT.grant, "closed")
RECLAIM = reclaim_of(GRANT.grant)
EVERY_KIND = (GRANT, BUDGET, LIMIT, REVERSAL, REVOCATION, RECLAIM)


def proposal(terms: Terms = BUDGET, state: ProposalState = "proposed") -> Proposal:
    """A proposal of the officer's."""
    return Proposal(
        proposal_id=ProposalId("p1"), terms=terms, state=state, proposed_by=KeyId("officer")
    )


def approval(
    key_id: str = "approver",
    role: str = "approver",
    *,
    conflict: str = "none",
    up_to_micro: int | None = None,
) -> Approval:
    """An approval as a key asks for it."""
    return Approval(
        key_id=KeyId(key_id),
        role=role,
        conflict_of_interest=conflict,
        up_to_micro=up_to_micro,
        others=OTHERS,
    )


@pytest.mark.parametrize("terms", EVERY_KIND, ids=lambda terms: terms.kind)
def test_refusals_of_an_approval_come_in_one_order_whatever_the_kind(terms: Terms) -> None:
    """Every combination of faults: the first of the order is the answer."""
    faults = ("maker", "role", "decided", "conflict", "limit")
    answers = {
        "maker": MakerIsChecker(),
        "role": DecisionForbidden("approving takes an approver"),
        "decided": AlreadyDecided("rejected"),
        "conflict": ConflictOfInterest(),
        "limit": AboveLimit(up_to_micro=49, needed_micro=50, may_approve=OTHERS),
    }
    for present in itertools.product((False, True), repeat=len(faults)):
        wrong = {fault for fault, there in zip(faults, present, strict=True) if there}
        asked = approval(
            "officer" if "maker" in wrong else "approver",
            "officer" if "role" in wrong else "approver",
            conflict="my cousin" if "conflict" in wrong else "none",
            up_to_micro=49 if "limit" in wrong else 50,
        )
        state: ProposalState = "rejected" if "decided" in wrong else "proposed"
        expected = next((answers[fault] for fault in faults if fault in wrong), None)
        assert expected == refuse_decision(proposal(terms, state), asked), wrong


@pytest.mark.parametrize("declared", ["", "None", "NONE", " none", "my cousin works there"])
def test_any_declaration_but_none_is_a_conflict(declared: str) -> None:
    """Nobody has to guess what an approver meant."""
    assert ConflictOfInterest() == refuse_decision(proposal(), approval(conflict=declared))


def test_a_key_without_a_limit_approves_any_amount() -> None:
    """And one whose limit is the amount approves it."""
    limits = [(None, None), (50, None), (49, AboveLimit), (0, AboveLimit)]
    for up_to_micro, refusal in limits:
        refused = refuse_decision(proposal(), approval(up_to_micro=up_to_micro))
        assert refusal is (None if refused is None else type(refused))


def test_the_proposer_is_told_so_before_anything_is_read() -> None:
    """What does not exist is refused by role alone, so nothing is told about it."""
    asked = [("officer", "officer"), ("other", "officer"), ("approver", "approver")]
    forbidden = DecisionForbidden("approving takes an approver")
    found = [refuse_approver(proposal(), KeyId(key), role) for key, role in asked]
    assert [MakerIsChecker(), forbidden, None] == found
    missing = [refuse_approver(None, KeyId(key), role) for key, role in asked]
    assert [forbidden, forbidden, None] == missing


def test_a_proposal_is_rejected_by_its_proposer_or_by_an_approver_once() -> None:
    """Nobody else, and not after it was decided."""
    forbidden = DecisionForbidden("rejecting takes an approver, or the key that proposed it")
    asked = [("officer", "officer"), ("approver", "approver"), ("other", "officer")]
    open_, decided = proposal(), proposal(state="approved")
    found = [refuse_rejection(open_, KeyId(key), role) for key, role in asked]
    assert [None, None, forbidden] == found
    late = [refuse_rejection(decided, KeyId(key), role) for key, role in asked]
    assert [AlreadyDecided("approved"), AlreadyDecided("approved"), forbidden] == late
    missing = [refuse_rejecter(None, KeyId(key), role) for key, role in asked]
    assert [forbidden, None, forbidden] == missing


def test_each_kind_says_whose_it_is_what_is_limited_and_what_is_entered() -> None:
    """One row per kind."""
    proposal_id, actor = ProposalId("p1"), "key:approver"
    facts = [
        (terms.kind, terms.tenant_id, terms.book_id, terms.limited_micro) for terms in EVERY_KIND
    ]
    assert [
        ("grant", "t", "t", 50),
        ("budget", None, "/programmes/p", 50),
        ("credit-limit", "t", "t", 50),
        ("reverse", "t", "t", 50),
        ("revoke", "t", "t", 50),
        ("reclaim", "t", "t", 50),
    ] == facts
    assert [
        ApproveGrant(grant=GRANT.grant, actor=actor),
        AddBudget(add_micro=50, caused_by="proposal:p1", actor=actor),
        ChangeCreditLimit(
            credit_limit_micro=50, reason="grows", caused_by="proposal:p1", actor=actor
        ),
    ] == [
        GRANT.command(actor),
        *(terms.command(proposal_id, actor) for terms in (BUDGET, LIMIT)),
    ]
    opened = GRANT.command(actor, is_earlier_accepted=True)
    assert ApproveGrant(grant=GRANT.grant, actor=actor, is_earlier_accepted=True) == opened
    assert [
        ReverseEntry(entry=GRANTED, actor=actor, reason="twice"),
        RevokeGrant(grant=GRANT.grant, actor=actor, reason="closed"),
        ReclaimExpired(grant=GRANT.grant, actor=actor),
    ] == [
        REVERSAL.command(GRANTED, actor),
        REVOCATION.command(GRANT.grant, actor),
        RECLAIM.command(GRANT.grant, actor),
    ]


def test_what_grants_nothing_is_proposed_for_reversal_without_an_amount() -> None:
    """Whether it can be reversed is decided with the books."""
    ledger = CoreLedger(book())
    charged = ledger.do(total(5))
    assert isinstance(charged, tuple)
    assert 0 == reversal_of(charged[-1], "wrong").limited_micro


def test_an_entry_names_the_proposal_that_caused_it() -> None:
    """Or something else: a grant, a bucket, the clock."""
    ledger = CoreLedger(book(limit_micro=5))
    changed = ledger.do(LIMIT.command(ProposalId("p:1"), "key:a"))
    assert isinstance(changed, tuple)
    assert "p:1" == proposal_id_of(changed[-1])
    assert None is proposal_id_of(GRANTED)


def test_a_grant_is_a_proposal_under_its_own_id() -> None:
    """Both doors lead to the same."""
    found = proposal_of(grant("g", 50, state="rejected"))
    assert ("g", "rejected", "officer") == (found.proposal_id, found.state, found.proposed_by)


def test_an_approval_names_the_entries_that_it_made_where_they_can_be_read() -> None:
    """Of a tenant's the ones in its book; not what the clock ended before them."""
    ledger = CoreLedger(book("startup"))
    ledger.do(ApproveGrant(grant=grant("old", 10), actor="key:approver"))
    ledger.do(hold("h", 5, expires_ms=at(1)), at(0))
    approved = grant("g", 50)
    made = ledger.do(ApproveGrant(grant=approved, actor="key:approver"), at(2))
    assert isinstance(made, tuple)
    kinds = [entry.kind for entry in made]
    assert ["hold_released", "budget_granted", "grant"] == kinds
    named = entry_ids_of(proposal_of(approved), made, "key:approver")
    assert (made[-1].entry_id,) == named
