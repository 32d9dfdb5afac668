"""What a tenant paid beforehand is a lot, once per payment."""

from __future__ import annotations

from hisab_contracts.ids import GrantId, PaymentId
from ledger.core.decisions import Footprint, footprint_of
from ledger.core.prepayments import PREPAID, PaymentDiffers, TopUp, TopUpExpired
from ledger.core.restoration import budget_change_of
from ledger.core.withdrawals import AlreadyReversed
from unit.ledger.test_charges import entered, moves
from unit.ledger.values import CoreLedger, approve, at, book, grant, total


def payment(micro: int = 50, *, expires_ms: int | None = None) -> TopUp:
    """A payment as finance credits it."""
    return TopUp(
        grant_id=GrantId("t1"),
        payment_id=PaymentId("bank-1"),
        topup_micro=micro,
        expires_ms=expires_ms,
        actor="key:finance",
    )


def test_a_payment_is_a_lot_from_the_hour_begun_that_pays_after_grants() -> None:
    """Priority 100, for everything, and no programme's budget moves."""
    ledger = CoreLedger(book(), budget_micro=100)
    (entry,) = entered(ledger.do(payment(), at(9, 40)))
    assert ("top_up", at(9), "payment:bank-1") == (entry.kind, entry.effective_ms, entry.caused_by)
    assert {"funding:prepaid": -50, "lot:t1": 50} == {
        posting.account: posting.posting_micro for posting in entry.postings
    }
    assert entry.grant is not None
    assert (PREPAID, "prepaid") == (entry.grant.programme_id, entry.grant.source)
    assert None is budget_change_of(entry)
    ledger.do(approve(grant("g", 10)), at(9, 40))
    ledger.do(total(30, hour_ms=at(9)), at(9, 50))
    assert [("g", 0), ("t1", 30)] == [(x.grant_id, x.remaining_micro) for x in ledger.book.lots]


def test_a_payment_is_credited_once_and_other_content_is_refused() -> None:
    """Told again it enters nothing, whether or not its credit is spent."""
    ledger = CoreLedger(book())
    ledger.do(payment(), at(9))
    ledger.do(total(50, hour_ms=at(9)), at(9))
    assert () == ledger.do(payment(), at(10))
    assert PaymentDiffers(50) == ledger.do(payment(60), at(10))
    assert PaymentDiffers(50) == ledger.do(payment(expires_ms=at(20)), at(10))


def test_credit_that_could_never_be_used_is_not_opened() -> None:
    """Its payment can still be credited with another end."""
    ledger = CoreLedger(book())
    assert TopUpExpired(at(9)) == ledger.do(payment(expires_ms=at(9)), at(9, 40))
    assert isinstance(ledger.do(payment(expires_ms=at(10)), at(9, 40)), tuple)


def test_a_top_up_is_reversed_without_a_programme() -> None:
    """A payment that bounced, before anything was drawn of it."""
    ledger = CoreLedger(book(), budget_micro=100)
    (entry,) = entered(ledger.do(payment(), at(9)))
    made = ledger.reverse(entry, at(10))
    assert [("reversal", {"lot:t1": -50, "funding:prepaid": 50})] == moves(made)
    assert 100 == ledger.programme.accounts["budget"]
    assert AlreadyReversed() == ledger.reverse(entry, at(10))
    assert PaymentDiffers(0) == ledger.do(payment(), at(11))


def test_a_top_up_opens_no_programme() -> None:
    """Whoever loads its book needs the spent lots: one of them may be of the same payment."""
    wanted = Footprint(accounts=("funding:prepaid",), spent_lots=True)
    assert wanted == footprint_of(payment())
