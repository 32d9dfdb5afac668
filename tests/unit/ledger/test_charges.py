"""Who pays for a charge, and who gets back: scopes, shares, expired lots, holds that grow again."""

from __future__ import annotations

import pytest

from hisab_contracts.entries import Entry, GrantScope
from hisab_contracts.ids import HoldId, HubCode, PriceClass, ProjectId, Sku
from ledger.core.holds import InsufficientCredit
from unit.ledger.values import CoreLedger, approve, at, book, grant, hold, total


def entered(decided: object) -> tuple[Entry, ...]:
    """The entries that were decided."""
    assert isinstance(decided, tuple)
    return decided


def moves(decided: object) -> list[tuple[str, dict[str, int]]]:
    """Each entry's kind, and what it posted."""
    return [
        (entry.kind, {posting.account: posting.posting_micro for posting in entry.postings})
        for entry in entered(decided)
    ]


def lots(ledger: CoreLedger) -> dict[str, tuple[int, int, int]]:
    """What is left of each lot, reserved on it, and expired of it."""
    return {
        lot.grant_id: (lot.remaining_micro, lot.reserved_micro, lot.expired_micro)
        for lot in ledger.book.lots
    }


@pytest.mark.parametrize(
    ("scope", "pays"),
    [
        (GrantScope(hubs=(HubCode("lhr"),)), 10),
        (GrantScope(hubs=(HubCode("khi"), HubCode("isb"))), 0),
        (GrantScope(skus=(Sku("h100-sxm-80"),)), 10),
        (GrantScope(skus=(Sku("a100-80"),)), 0),
        (GrantScope(projects=(ProjectId("main"),)), 10),
        (GrantScope(projects=(ProjectId("other"),)), 0),
        (GrantScope(price_classes=(PriceClass("on_demand"),)), 10),
        (GrantScope(price_classes=(PriceClass("reserved"),)), 0),
        (GrantScope(hubs=(HubCode("lhr"),), skus=(Sku("a100-80"),)), 0),
    ],
)
def test_a_lot_pays_only_where_every_member_of_its_scope_matches(
    scope: GrantScope, pays: int
) -> None:
    """What it does not pay is nobody else's gift: it is owed."""
    ledger = CoreLedger(book())
    ledger.do(approve(grant("g", 100, scope=scope)))
    ledger.do(total(10))
    assert (pays, 10 - pays) == (ledger.book.funded_micro, ledger.book.receivable_micro)


def test_a_share_is_of_the_whole_bucket_and_not_of_each_message() -> None:
    """40 % of 1, 2, 3, ... rounded down each time would pay nothing of 9 messages."""
    ledger = CoreLedger(book("startup"))
    ledger.do(approve(grant("g", 100, coverage_bps=4_000)))
    for micro in range(1, 10):
        ledger.do(total(micro))
        assert micro * 4 // 10 == ledger.book.funded_micro


@pytest.mark.defect("L16")
def test_the_charge_that_crosses_the_cap_of_a_subsidy_is_split_exactly() -> None:
    """Its lot has 30 left of the 40 that would be its share; the next lot pays the rest."""
    ledger = CoreLedger(book("startup"))
    ledger.do(approve(grant("cap", 30, coverage_bps=4_000)))
    ledger.do(approve(grant("full", 50, priority=1)))
    (charge,) = moves(ledger.do(total(100)))
    assert ("charge", {"usage": 100, "lot:cap": -30, "lot:full": -50, "unfunded": -20}) == charge


def test_what_returns_comes_first_from_a_lot_above_its_share() -> None:
    """Of 100 it paid 40; of 50 it may pay 20: the other 30 come from what was drawn last."""
    ledger = CoreLedger(book())
    ledger.do(approve(grant("s", 100, coverage_bps=4_000)))
    ledger.do(total(100))
    (charge,) = moves(ledger.do(total(50, revision=1)))
    assert ("charge", {"usage": -50, "lot:s": 20, "receivable": 30}) == charge
    assert (("lot:s", 20), ("receivable", 30)) == next(iter(ledger.buckets.values())).draws


@pytest.mark.defect("L25")
def test_late_usage_takes_back_what_expired_and_no_more() -> None:
    """By an entry of its own, effective when the lot's window ended."""
    ledger = CoreLedger(book())
    ledger.do(approve(grant("g", 100, expires_ms=at(2))))
    assert () == ledger.expire_lots(at(2) - 1, at(5))
    (expiry,) = entered(ledger.expire_lots(at(2), at(5)))
    assert ("expiry", at(2)) == (expiry.kind, expiry.effective_ms)
    assert ({"g": (0, 0, 100)}, 100) == (lots(ledger), ledger.book.breakage_micro)
    late = ledger.do(total(30, hour_ms=at(1)), at(6))
    assert [
        ("expiry_reversed", {"breakage": -30, "lot:g": 30}),
        ("charge", {"usage": 30, "lot:g": -30}),
    ] == moves(late)
    ledger.do(total(100, bucket="c", hour_ms=at(1)), at(6))
    assert ({"g": (0, 0, 0)}, 0, 30) == (
        lots(ledger),
        ledger.book.breakage_micro,
        ledger.book.receivable_micro,
    )
    # An hour after its window is not its business.
    ledger.do(total(5, bucket="d", hour_ms=at(2)), at(6))
    assert 35 == ledger.book.receivable_micro


def test_only_what_is_drawn_of_an_expired_lot_is_taken_back() -> None:
    """The lot before it has enough left for its part."""
    ledger = CoreLedger(book())
    ledger.do(approve(grant("open", 20)))
    ledger.do(approve(grant("old", 20, priority=1, expires_ms=at(2))))
    ledger.expire_lots(at(2), at(5))
    assert ["expiry_reversed", "charge"] == [
        kind for kind, _ in moves(ledger.do(total(25, hour_ms=at(1)), at(6)))
    ]
    assert {"open": (0, 0, 0), "old": (0, 0, 15)} == lots(ledger)


@pytest.mark.defect("L25")
def test_what_returns_to_a_lot_that_is_closed_for_good_expires_again() -> None:
    """In the same transaction; also to one that had nothing left when its window ended."""
    ledger = CoreLedger(book())
    ledger.do(approve(grant("g", 100, expires_ms=at(2))))
    ledger.do(total(100, hour_ms=at(1)), at(1))
    assert () == ledger.expire_lots(at(3), at(5))
    returned = ledger.do(total(100, hour_ms=at(1), refunded_micro=40), at(6))
    assert [
        ("charge", {"usage": -40, "lot:g": 40}),
        ("expiry", {"lot:g": -40, "breakage": 40}),
    ] == moves(returned)
    assert {"g": (0, 0, 40)} == lots(ledger)


def test_what_returns_to_a_lot_that_waits_for_its_expiry_expires_with_the_rest() -> None:
    """The sweep has not come yet: one expiry for all of it, and holds may reserve there."""
    ledger = CoreLedger(book())
    ledger.do(approve(grant("g", 100, expires_ms=at(2))))
    ledger.do(total(60, hour_ms=at(1)), at(1))
    ledger.complete_until_ms = at(3)
    assert [("charge", {"usage": -10, "lot:g": 10})] == moves(
        ledger.do(total(50, hour_ms=at(1), revision=1), at(5))
    )
    assert [("expiry", {"lot:g": -50, "breakage": 50})] == moves(ledger.expire_lots(at(3), at(5)))


def test_a_refund_lets_an_open_hold_grow_where_it_returned() -> None:
    """First it makes good what was drawn past the hold."""
    ledger = CoreLedger(book(limit_micro=100))
    ledger.do(approve(grant("g", 40)))
    ledger.do(hold("h", 60))
    ledger.do(total(70, hold_id="h"))
    held = ledger.holds[HoldId("h")]
    assert ((), 70, 60) == (held.reserved, held.drawn_micro, held.given_up_micro)
    ledger.do(total(70, hold_id="h", refunded_micro=55))
    held = ledger.holds[HoldId("h")]
    # 30 of the limit and 25 of the lot came back; the first 10 had been drawn past the hold.
    assert ((("lot:g", 25), ("limit", 20)), 15) == (held.reserved, held.drawn_micro)
    assert (25, 20) == (ledger.book.lots[0].reserved_micro, ledger.book.reserved_micro)


def test_nothing_grows_on_what_was_never_funded_nor_on_what_expires_at_once() -> None:
    """A hold that could reserve there would keep what nobody can use: it is short instead."""
    ledger = CoreLedger(book("startup"))
    ledger.do(approve(grant("g", 10, expires_ms=at(2))))
    ledger.do(approve(grant("other", 10, effective_ms=at(2))), at(1))
    ledger.do(hold("h", 10), at(1))
    ledger.do(total(15, hour_ms=at(1), hold_id="h"), at(1))
    ledger.complete_until_ms = at(3)
    assert (10, 5) == (ledger.book.funded_micro, ledger.book.unfunded_micro)
    ledger.do(total(15, hour_ms=at(1), hold_id="h", refunded_micro=15), at(4))
    held = ledger.holds[HoldId("h")]
    assert ((), 0, 10) == (held.reserved, held.drawn_micro, held.short_micro)
    assert {"g": (0, 0, 10), "other": (10, 0, 0)} == lots(ledger)


def test_a_hold_reserves_no_more_of_a_subsidy_than_its_share_of_the_hold() -> None:
    """40 % of it; the rest on the limit, or it is refused with the largest hold there could be."""
    ledger = CoreLedger(book(limit_micro=60))
    ledger.do(approve(grant("s", 1_000, coverage_bps=4_000)))
    refused = ledger.do(hold("h", 101))
    assert InsufficientCredit(available_micro=100, shortfall_micro=1) == refused
    ledger.do(hold("h", 100))
    assert (("lot:s", 40), ("limit", 60)) == ledger.holds[HoldId("h")].reserved


def test_a_hold_without_a_class_reserves_on_no_lot_that_is_for_some() -> None:
    """What is not known is not matched."""
    ledger = CoreLedger(book("startup"))
    ledger.do(approve(grant("g", 9, scope=GrantScope(price_classes=(PriceClass("on_demand"),)))))
    refused = ledger.do(hold("h", 5))
    assert InsufficientCredit(available_micro=0, shortfall_micro=5) == refused
    assert isinstance(ledger.do(hold("h", 5, price_class="on_demand")), tuple)
