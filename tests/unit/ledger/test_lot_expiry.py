"""Lots expire when all usage of their windows has been heard of; what holds reserve moves first."""

from __future__ import annotations

import pytest

from hisab_contracts.entries import GrantScope
from hisab_contracts.ids import HoldId, HubCode
from hisab_contracts.invariants import InvariantBroken
from ledger.core.decisions import UnitOfWork
from ledger.core.expiry import expire_lot
from unit.ledger.test_charges import entered, lots
from unit.ledger.values import CoreLedger, approve, at, book, grant, hold, total


def kinds(decided: object) -> list[str]:
    """The kinds of the entries that were decided."""
    return [entry.kind for entry in entered(decided)]


def test_reservations_move_in_order_of_placing_to_lots_then_the_limit_else_they_are_short() -> None:
    """H1 takes the lot that is left, H2 the limit and is short of the rest."""
    ledger = CoreLedger(book(limit_micro=5))
    ledger.do(approve(grant("old", 30, expires_ms=at(2))))
    ledger.do(hold("h1", 10), at(1))
    ledger.do(hold("h2", 20), at(1))
    ledger.do(approve(grant("new", 12, priority=3)), at(1))
    ledger.do(approve(grant("khi", 99, scope=GrantScope(hubs=(HubCode("khi"),)))), at(1))
    made = ledger.expire_lots(at(2), at(3))
    assert ["hold_moved", "hold_moved", "expiry"] == kinds(made)
    first, second = ledger.holds[HoldId("h1")], ledger.holds[HoldId("h2")]
    assert ((("lot:new", 10),), 0) == (first.reserved, first.short_micro)
    assert ((("lot:new", 2), ("limit", 5)), 13) == (second.reserved, second.short_micro)
    assert {"khi": (99, 0, 0), "new": (12, 12, 0), "old": (0, 0, 30)} == lots(ledger)
    # New credit does not heal what is short, and an end frees what is still reserved.
    ledger.do(approve(grant("more", 50)), at(3))
    assert 13 == ledger.holds[HoldId("h2")].short_micro
    ledger.release("h2", now_ms=at(3))
    assert 13 == ledger.holds[HoldId("h2")].short_micro
    assert (10, 0) == (lots(ledger)["new"][1], ledger.book.reserved_micro)


def test_a_reservation_moves_to_a_subsidy_up_to_its_share_of_the_hold() -> None:
    """What it reserves there already counts."""
    ledger = CoreLedger(book())
    ledger.do(approve(grant("old", 80, priority=1, expires_ms=at(2))))
    ledger.do(approve(grant("s", 1_000, coverage_bps=3_000)))
    ledger.do(hold("h", 100), at(1))
    assert (("lot:s", 30), ("lot:old", 70)) == ledger.holds[HoldId("h")].reserved
    ledger.expire_lots(at(2), at(3))
    moved = ledger.holds[HoldId("h")]
    assert ((("lot:s", 30),), 70) == (moved.reserved, moved.short_micro)


def test_lots_that_close_together_are_no_refuge_for_each_other() -> None:
    """Each expires with nothing reserved; what is left of the hold is short, once."""
    ledger = CoreLedger(book())
    for name, hour in (("a", 2), ("b", 3)):
        ledger.do(approve(grant(name, 10, expires_ms=at(hour))))
    ledger.do(hold("h", 15), at(1))
    # A clock that is behind the hubs': at 1:30 both are still open by it.
    made = ledger.expire_lots(at(3), at(1, 30))
    assert ["hold_moved", "expiry", "hold_moved", "expiry"] == kinds(made)
    assert 15 == ledger.holds[HoldId("h")].short_micro
    assert 20 == ledger.book.breakage_micro


def test_a_hold_that_is_over_ends_before_the_lot_expires_and_one_elsewhere_stays() -> None:
    """What is over moves nowhere."""
    ledger = CoreLedger(book(limit_micro=9))
    ledger.do(approve(grant("g", 10, expires_ms=at(2))))
    ledger.do(hold("over", 10, expires_ms=at(2)), at(1))
    ledger.do(hold("elsewhere", 9), at(1))
    assert ["hold_released", "expiry"] == kinds(ledger.expire_lots(at(2), at(3)))
    assert (("limit", 9),) == ledger.holds[HoldId("elsewhere")].reserved


def test_a_lot_with_nothing_left_expires_without_an_entry() -> None:
    """And nothing is due when nothing is closed for good."""
    ledger = CoreLedger(book())
    ledger.do(approve(grant("g", 10, expires_ms=at(2))))
    ledger.do(approve(grant("ever", 10)))
    ledger.do(total(10, hour_ms=at(1)), at(1))
    assert () == ledger.expire_lots(at(9), at(9))


def test_a_lot_with_reservations_does_not_expire() -> None:
    """Whoever opens a book for it has to bring the holds that reserve there."""
    ledger = CoreLedger(book())
    ledger.do(approve(grant("g", 10)))
    ledger.do(hold("h", 5))
    with pytest.raises(InvariantBroken, match="reserved"):
        expire_lot(ledger.book, "lot:g", at(1))


def test_a_unit_of_work_expires_the_lots_of_every_book_that_was_opened() -> None:
    """Each by its own tenant's completeness."""
    opened = {}
    for tenant_id in ("t", "u"):
        ledger = CoreLedger(book(tenant_id=tenant_id))
        ledger.do(approve(grant("g", 10, expires_ms=at(2), tenant_id=tenant_id)))
        opened[tenant_id] = ledger.book
    unit = UnitOfWork(opened, at(5), complete_until_ms={"t": at(2), "u": at(1)})
    unit.expire_lots()
    assert [("t", "expiry")] == [(e.tenant_id, e.kind) for e in unit.changes().entries]
