"""Terms, draw order, the waterfall over lots, and who may approve."""

from __future__ import annotations

import pytest

from hisab_contracts.ids import GrantId, KeyId, ProgrammeId
from ledger.grants import (
    BudgetExceeded,
    GrantExpired,
    GrantNotProposed,
    Lot,
    MakerIsChecker,
    approve,
    fault_of_terms,
    id_from_command,
    in_draw_order,
    take_from_lots,
    unsupported_terms,
    within_budget,
)
from unit.ledger.values import HOUR_MS, at, grant

APPROVER = KeyId("approver")


def lot(
    grant_id: str,
    remaining_micro: int = 10,
    *,
    priority: int = 0,
    effective_ms: int = 0,
    expires_ms: int | None = None,
    reserved_micro: int = 0,
) -> Lot:
    return Lot(
        grant_id=GrantId(grant_id),
        programme_id=ProgrammeId("p"),
        priority=priority,
        effective_ms=effective_ms,
        expires_ms=expires_ms,
        granted_micro=remaining_micro,
        remaining_micro=remaining_micro,
        reserved_micro=reserved_micro,
    )


def test_lots_pay_by_priority_then_expiry_then_effective_instant_then_id() -> None:
    """One comparator, golden: it decides who pays on every statement."""
    lots = [
        lot("z", priority=1),
        lot("b"),
        lot("a"),
        lot("late", effective_ms=HOUR_MS),
        lot("soon", expires_ms=at(1)),
        lot("later", expires_ms=at(2)),
    ]
    expected = ["soon", "later", "a", "b", "late", "z"]
    assert expected == [each.grant_id for each in in_draw_order(reversed(lots))]


def test_a_lot_is_open_from_its_effective_instant_until_just_before_it_expires() -> None:
    """Half-open, like every window."""
    window = lot("g", effective_ms=at(10), expires_ms=at(11))
    actual = [window.is_open(instant) for instant in (at(10) - 1, at(10), at(11) - 1, at(11))]
    assert [False, True, True, False] == actual


def test_a_taker_gets_what_is_free_and_what_it_reserved_itself() -> None:
    """What others reserved stays theirs; what no lot gives is left."""
    lots = [lot("a", 10, reserved_micro=8), lot("b", 5, reserved_micro=5), lot("c", 1)]
    taken, left_micro = take_from_lots(lots, 0, 20, {"lot:a": 3})
    assert [("lot:a", 5), ("lot:c", 1)] == taken
    assert 14 == left_micro


def test_a_taker_leaves_the_later_lots_alone_once_it_has_enough() -> None:
    """Draw order is strict: a later lot pays nothing before an earlier one is empty."""
    assert ([("lot:a", 4)], 0) == take_from_lots([lot("a"), lot("b")], 0, 4, {})


def test_an_approval_needs_a_second_key() -> None:
    """Maker is not checker, whatever the state."""
    assert MakerIsChecker() == approve(grant("g", 1, state="approved"), KeyId("officer"), 0)


def test_a_grant_is_approved_once() -> None:
    """The second approval is refused."""
    proposed = grant("g", 1, state="proposed")
    approved = approve(proposed, APPROVER, 0)
    assert not isinstance(approved, MakerIsChecker | GrantNotProposed | GrantExpired)
    assert ("approved", "approver") == (approved.state, approved.approved_by)
    assert GrantNotProposed("approved") == approve(approved, KeyId("another"), 0)


def test_a_grant_whose_window_has_ended_is_not_approved() -> None:
    """It would grant nothing."""
    proposed = grant("g", 1, state="proposed", expires_ms=at(11))
    assert GrantExpired(at(11)) == approve(proposed, APPROVER, at(11))


def test_a_grant_fits_a_budget_to_the_last_micro_unit() -> None:
    """The programme can never promise more than it has."""
    assert within_budget(5, 5) is None
    assert BudgetExceeded(5, 1) == within_budget(5, 6)


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


def test_terms_of_later_issues_are_refused_never_ignored() -> None:
    """Scope, coverage and tax effect have one value each for now."""
    assert unsupported_terms({}, 10_000, "tender") is None
    assert "scope" in (unsupported_terms({"skus": ["x"]}, 10_000, "tender") or "")
    assert "coverage_bps" in (unsupported_terms({}, 4_000, "tender") or "")
    assert "tax_effect" in (unsupported_terms({}, 10_000, "reduces_base") or "")


def test_ids_come_from_the_command_that_makes_the_thing() -> None:
    """A repeat names the same thing; scope and key cannot run into each other."""
    assert id_from_command("g", "t", "k") == id_from_command("g", "t", "k")
    assert id_from_command("g", "t", "k") != id_from_command("h", "t", "k")
    assert id_from_command("g", "a", "bc") != id_from_command("g", "ab", "c")
    assert 21 == len(id_from_command("g", "t", "k"))
