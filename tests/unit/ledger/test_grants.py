"""Terms of a grant, and when it can be proposed and approved."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from hisab_contracts.entries import GrantScope
from hisab_contracts.ids import GrantId, HubCode
from ledger.core.grants import (
    BudgetExceeded,
    CurrencyDiffers,
    GrantExpired,
    OutcomeMissing,
    fault_of_terms,
    refuse_approval,
    refuse_proposal,
    scope_of,
)
from unit.ledger.values import approve, at, grant


def test_a_grant_whose_window_has_ended_is_not_approved() -> None:
    """It would grant nothing; but only once all usage of its window has been heard of."""
    over = approve(grant("g", 9, expires_ms=at(11)))
    assert GrantExpired(at(11)) == refuse_approval(
        over, budget_left_micro=0, complete_until_ms=at(11)
    )
    for until_ms in (at(11) - 1, None):
        assert None is refuse_approval(over, budget_left_micro=9, complete_until_ms=until_ms)
    for_ever = approve(grant("g", 9))
    assert None is refuse_approval(for_ever, budget_left_micro=9, complete_until_ms=at(11))


def test_a_grant_fits_a_budget_to_the_last_micro_unit() -> None:
    """The programme can never promise more than it has."""
    proposed = approve(grant("g", 6))
    assert None is refuse_approval(proposed, budget_left_micro=6, complete_until_ms=0)
    exceeded = BudgetExceeded(budget_left_micro=5, shortfall_micro=1)
    assert exceeded == refuse_approval(proposed, budget_left_micro=5, complete_until_ms=0)


def test_a_tranche_is_approved_once_an_outcome_of_the_earlier_one_is_accepted() -> None:
    """After its window is looked at, before the budget is; an outcome frees no other condition."""
    waiting = approve(grant("g2", 6, expires_ms=at(11), after_grant="g1"))
    earned = replace(waiting, is_earlier_accepted=True)
    missing = OutcomeMissing(GrantId("g1"))
    rows = [
        # command, budget left, complete until, refusal
        (waiting, 6, at(10), missing),
        (waiting, 5, at(10), missing),
        (waiting, 6, at(11), GrantExpired(at(11))),
        (earned, 6, at(10), None),
        (earned, 5, at(10), BudgetExceeded(budget_left_micro=5, shortfall_micro=1)),
        (earned, 6, at(11), GrantExpired(at(11))),
        # A grant that comes after no other waits for no outcome.
        (approve(grant("g", 6)), 6, at(10), None),
    ]
    for command, left_micro, until_ms, refusal in rows:
        found = refuse_approval(command, budget_left_micro=left_micro, complete_until_ms=until_ms)
        assert refusal == found


def test_a_grant_is_proposed_in_the_programmes_currency_before_its_window_ends() -> None:
    """The currency is compared first."""
    proposed = grant("g", 1, expires_ms=at(11))
    actual = [
        refuse_proposal(
            proposed,
            tenant_currency=currency,
            programme_currency="PKR",
            complete_until_ms=until_ms,
        )
        for currency, until_ms in (("USD", at(11)), ("PKR", at(11)), ("PKR", at(11) - 1))
    ]
    assert [CurrencyDiffers("PKR"), GrantExpired(at(11)), None] == actual


@pytest.mark.parametrize(
    ("effective_ms", "expires_ms", "word"),
    [
        (at(10), None, None),
        (at(10), at(11), None),
        (at(10, 30), None, "effective_at"),
        (at(10), at(11, 30), "expires_at"),
        (at(10), at(10), "after"),
    ],
)
def test_windows_lie_on_whole_hours_and_are_not_empty(
    effective_ms: int, expires_ms: int | None, word: str | None
) -> None:
    """An hour bucket is wholly inside or outside every window."""
    fault = fault_of_terms(effective_ms, expires_ms)
    assert fault is None if word is None else word in (fault or "")


def test_a_scope_is_kept_with_each_name_once_and_in_order() -> None:
    """So two scopes that mean the same are the same; one that names nothing is none."""
    said = GrantScope(hubs=(HubCode("lhr"), HubCode("isb"), HubCode("lhr")))
    assert GrantScope(hubs=(HubCode("isb"), HubCode("lhr"))) == scope_of(said)
    assert None is scope_of(GrantScope())
