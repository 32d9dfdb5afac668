"""What it takes to place, extend and end a hold; placing and ending are in `test_decisions` too."""

from __future__ import annotations

from hisab_contracts.ids import HoldId
from ledger.core.decisions import NotFound
from ledger.core.holds import (
    ExtendHold,
    Hold,
    HoldClosed,
    HoldOver,
    InsufficientCredit,
)
from unit.ledger.test_charges import entered
from unit.ledger.values import CoreLedger, approve, at, book, grant, hold, total


def extend(hold_id: str, add_micro: int = 0, expires_ms: int | None = None) -> ExtendHold:
    """More for a hold, or longer."""
    return ExtendHold(
        hold_id=HoldId(hold_id),
        add_micro=add_micro,
        expires_ms=expires_ms,
        terms=hold("h", 1).terms,
        actor="key:scheduler",
    )


def standing(ledger: CoreLedger) -> Hold:
    """How the hold stands."""
    return ledger.holds[HoldId("h")]


def test_an_extension_reserves_more_where_its_hold_would() -> None:
    """On the lots first, in draw order; what was drawn stays drawn."""
    ledger = CoreLedger(book(limit_micro=100))
    ledger.do(hold("h", 30, expires_ms=at(12)), at(9))
    ledger.do(total(10, hour_ms=at(9), hold_id="h"), at(9))
    ledger.do(approve(grant("g", 25)), at(9))
    (entry,) = entered(ledger.do(extend("h", 50, at(15)), at(10)))
    assert entry.hold is not None
    assert ("hold_extended", "extended", 80) == (
        entry.kind,
        entry.hold.cause,
        entry.hold.hold_micro,
    )
    after = standing(ledger)
    assert (80, at(15), (("lot:g", 25), ("limit", 45))) == (
        after.hold_micro,
        after.expires_ms,
        after.reserved,
    )
    assert (10, 10) == (after.drawn_micro, after.given_up_micro)
    assert (25, 45) == (ledger.book.lots[0].reserved_micro, ledger.book.reserved_micro)


def test_an_extension_is_reserved_whole_or_refused_and_a_refusal_changes_nothing() -> None:
    """Time alone costs nothing."""
    ledger = CoreLedger(book(limit_micro=100))
    ledger.do(hold("h", 30, expires_ms=at(12)), at(9))
    before = standing(ledger)
    refused = ledger.do(extend("h", 71), at(10))
    assert InsufficientCredit(available_micro=70, shortfall_micro=1) == refused
    assert before == standing(ledger)
    ledger.do(extend("h", 0, at(14)), at(10))
    assert ((("limit", 30),), at(14)) == (standing(ledger).reserved, standing(ledger).expires_ms)


def test_of_a_subsidy_a_longer_hold_reserves_its_share_of_the_whole() -> None:
    """40 % of 100, of which it had 20."""
    ledger = CoreLedger(book(limit_micro=100))
    ledger.do(approve(grant("s", 1_000, coverage_bps=4_000)))
    ledger.do(hold("h", 50))
    ledger.do(extend("h", 50))
    assert (("lot:s", 40), ("limit", 60)) == standing(ledger).reserved


def test_only_an_open_hold_is_extended_and_only_into_the_future() -> None:
    """One that is over by the clock has ended, though no entry says so."""
    ledger = CoreLedger(book(limit_micro=100))
    assert NotFound("hold") == ledger.do(extend("h"))
    ledger.do(hold("h", 30, expires_ms=at(12)), at(9))
    assert HoldOver(at(9)) == ledger.do(extend("h", 0, at(9)), at(10))
    assert HoldClosed("expired") == ledger.do(extend("h", 0, at(15)), at(12))
    ledger.release("h", now_ms=at(10))
    assert HoldClosed("released") == ledger.do(extend("h", 0, at(15)), at(10))
