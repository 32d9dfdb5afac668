"""What a programme comes to, out of its own book and the lots of its tenants."""

from __future__ import annotations

import pytest

from hisab_contracts.ids import ProgrammeId
from hisab_contracts.invariants import InvariantBroken
from ledger.core.programmes import LotSums, ProgrammeReport, report_of, standing_of
from unit.ledger.values import at, grant

LOTS = LotSums(granted_micro=70, remaining_micro=30, reserved_micro=5, expired_micro=8)


def report(
    *,
    authority_micro: int = -100,
    left_micro: int = 30,
    promised_micro: int = 70,
    lots: LotSums = LOTS,
) -> ProgrammeReport:
    """The report of a programme."""
    return report_of(
        ProgrammeId("p"),
        "P",
        theme="health",
        ends_ms=None,
        currency="PKR",
        authority_micro=authority_micro,
        left_micro=left_micro,
        promised_micro=promised_micro,
        lots=lots,
        seq=2,
        recorded_ms=5,
    )


def test_granted_is_drawn_remaining_and_expired() -> None:
    """What was drawn is neither left nor gone."""
    assert 32 == LOTS.drawn_micro
    assert 0 == LotSums().drawn_micro


def test_a_grant_has_expired_once_its_window_is_complete() -> None:
    """By watermarks, never by the clock; or something of it went to breakage already."""
    over, for_ever = (
        grant("g", 1, state="approved", expires_ms=at(11)),
        grant("g", 1, state="approved"),
    )
    assert ["approved", "approved", "expired"] == [
        standing_of(over, LotSums(), until_ms) for until_ms in (None, at(11) - 1, at(11))
    ]
    assert "approved" == standing_of(for_ever, LotSums(), at(11))
    assert "expired" == standing_of(over, LotSums(granted_micro=1, expired_micro=1), None)
    rejected = grant("g", 1, state="rejected", expires_ms=at(11))
    assert "rejected" == standing_of(rejected, LotSums(), at(11))


def test_a_budget_is_what_is_left_and_what_was_granted() -> None:
    """Nothing was reclaimed: promises and lots are the same."""
    found = report()
    assert (100, 30, 0) == (found.budget_micro, found.left_micro, found.reclaimed_micro)


def test_what_came_back_to_the_budget_is_reclaimed() -> None:
    """budget = left + granted - reclaimed."""
    found = report(left_micro=38, promised_micro=62)
    assert (100, 8) == (found.budget_micro, found.reclaimed_micro)


@pytest.mark.parametrize(("left_micro", "promised_micro"), [(29, 70), (31, 70), (20, 80)])
def test_books_that_do_not_agree_are_a_defect_of_ours(left_micro: int, promised_micro: int) -> None:
    """Nothing is reported that does not add up."""
    with pytest.raises(InvariantBroken):
        report(left_micro=left_micro, promised_micro=promised_micro)
