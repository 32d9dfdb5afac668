"""The draw order of lots, and the waterfall over them."""

from __future__ import annotations

from msgspec.structs import replace

from hisab_contracts.ids import GrantId, ProgrammeId
from ledger.core.lots import Lot, in_draw_order, largest_hold, take_from_lots
from unit.ledger.values import HOUR_MS, at


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
    assert expected == [found.grant_id for found in in_draw_order(reversed(lots))]


def test_a_lot_is_open_from_its_effective_instant_until_just_before_it_expires() -> None:
    """Half-open, like every window."""
    window = lot("g", effective_ms=at(10), expires_ms=at(11))
    actual = [window.is_open(instant) for instant in (at(10) - 1, at(10), at(11) - 1, at(11))]
    assert [False, True, True, False] == actual


def test_a_taker_gets_what_is_free_and_what_it_reserved_itself() -> None:
    """What others reserved stays theirs; what no lot gives is left."""
    lots = [lot("a", 10, reserved_micro=8), lot("b", 5, reserved_micro=5), lot("c", 1)]
    taken, left_micro = take_from_lots(lots, 20, total_micro=20, own={"lot:a": 3})
    assert [("lot:a", 5), ("lot:c", 1)] == taken
    assert 14 == left_micro


def test_a_taker_leaves_the_later_lots_alone_once_it_has_enough() -> None:
    """Draw order is strict: a later lot pays nothing before an earlier one is empty."""
    assert ([("lot:a", 4)], 0) == take_from_lots([lot("a"), lot("b")], 4, total_micro=4)


def test_the_largest_hold_is_found_also_where_shares_together_pass_the_whole() -> None:
    """Below the root without rounding both shares are below 1 micro: nothing can be reserved."""
    shared = [
        replace(lot("a", 9), coverage_bps=3_500),
        replace(lot("b", 1), coverage_bps=7_000),
    ]
    assert 0 == largest_hold(shared, 0)
    # Of 3, one reserves 1 and the other 1, and the limit the rest.
    assert 3 == largest_hold(shared, 1)
