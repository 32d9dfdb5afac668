"""How a hold shrinks by what its charges draw."""

from __future__ import annotations

from hisab_contracts.ids import AllocationId, HoldId
from ledger.holds import LIMIT, Hold, detail_of, held, shrink


def hold(*reserved: tuple[str, int]) -> Hold:
    return Hold(HoldId("h"), 100, AllocationId("a"), 5, reserved=reserved)


def test_a_draw_shrinks_the_reservation_where_it_drew() -> None:
    """Same lot first."""
    after, given_up = shrink(hold(("lot:a", 4), ("lot:b", 4)), [("lot:a", 3)])
    assert (("lot:a", 1), ("lot:b", 4)) == after.reserved
    assert [("lot:a", 3)] == given_up


def test_a_draw_elsewhere_shrinks_the_last_reservations_the_limit_first() -> None:
    """Then the last in order: the limit, then the last lot."""
    before = hold(("lot:a", 4), ("lot:b", 4), (LIMIT, 4))
    after, given_up = shrink(before, [("lot:c", 6)])
    assert (("lot:a", 4), ("lot:b", 2)) == after.reserved
    assert [("lot:b", 2), (LIMIT, 4)] == given_up


def test_a_draw_beyond_the_hold_leaves_it_empty_and_open() -> None:
    """It gives up what it has; only an end closes it."""
    after, given_up = shrink(hold(("lot:a", 4)), [("lot:a", 9)])
    assert ((), 0, None) == (after.reserved, after.open_micro, after.end)
    assert [("lot:a", 4)] == given_up


def test_an_entry_describes_a_hold_and_its_end() -> None:
    """Placed and ended holds are read back from their entries."""
    standing = hold(("lot:a", 4), (LIMIT, 1))
    ended = held(detail_of(standing, "final"))
    assert 5 == standing.open_micro
    assert ("final", ()) == (ended.end, ended.reserved)
    assert (standing.hold_micro, standing.allocation_id) == (ended.hold_micro, ended.allocation_id)
