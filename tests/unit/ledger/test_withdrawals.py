"""Credit that was granted is taken back: a grant reversed or revoked, or what expired reclaimed."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from hisab_contracts.entries import Entry
from hisab_contracts.invariants import InvariantBroken
from ledger.core.balance import balance_at
from ledger.core.book import Books
from ledger.core.decisions import Footprint, footprint_of
from ledger.core.grants import Grant, GrantExpired, GrantState
from ledger.core.restoration import budget_change_of
from ledger.core.withdrawals import (
    AlreadyDrawn,
    AlreadyReclaimed,
    AlreadyReversed,
    GrantNotApproved,
    NotExpired,
    NotReversible,
    ReclaimExpired,
    Reserved,
    ReverseEntry,
    RevokeGrant,
    lot_of,
    reverse_entry,
)
from unit.ledger.test_charges import entered, lots, moves
from unit.ledger.values import CoreLedger, approve, at, book, grant, hold, invoiced, total


def granted(
    ledger: CoreLedger, micro: int, *, effective_ms: int = 0, expires_ms: int | None = None
) -> tuple[Grant, Entry]:
    """An approved grant, and its entry."""
    asked = grant("g", micro, effective_ms=effective_ms, expires_ms=expires_ms)
    made = entered(ledger.do(approve(asked)))
    return replace(asked, state="approved"), made[-1]


def revoke(of: Grant) -> RevokeGrant:
    """A revocation, decided by two."""
    return RevokeGrant(grant=of, actor="key:approver", reason="closed down")


def reclaim(of: Grant) -> ReclaimExpired:
    """A reclaim, decided by two."""
    return ReclaimExpired(grant=of, actor="key:approver")


def test_a_grant_that_nothing_was_drawn_from_is_reversed_in_both_books() -> None:
    """The lot is gone, and the programme may promise its amount again; a second time is refused."""
    ledger = CoreLedger(book(), budget_micro=100)
    granted = entered(ledger.do(approve(grant("g", 40))))[-1]
    assert 60 == ledger.programme.accounts["budget"]
    made = entered(ledger.reverse(granted))
    assert ["budget_returned", "reversal"] == [entry.kind for entry in made]
    assert granted.entry_id == made[-1].reverses
    assert (100, 0) == (
        ledger.programme.accounts["budget"],
        ledger.programme.accounts["granted:t"],
    )
    assert ({"g": (0, 0, 0)}, 0) == (lots(ledger), ledger.book.accounts["funding:p"])
    assert () == balance_at(ledger.book, at(1), complete_until_ms=None).lots
    assert AlreadyReversed() == ledger.reverse(granted)
    assert NotReversible("is-reversal") == ledger.reverse(made[-1])


def test_what_expired_of_a_grant_is_taken_back_before_it_is_reversed() -> None:
    """Nothing of it stays in breakage."""
    ledger = CoreLedger(book())
    granted = entered(ledger.do(approve(grant("g", 40, expires_ms=at(2)))))[-1]
    ledger.expire_lots(at(2), at(3))
    kinds_made = [kind for kind, _ in moves(ledger.reverse(granted, at(3)))]
    assert ["expiry_reversed", "budget_returned", "reversal"] == kinds_made
    assert (0, {"g": (0, 0, 0)}) == (ledger.book.breakage_micro, lots(ledger))


def test_what_cannot_be_reversed_says_what_is_done_instead() -> None:
    """A lot that usage drew on or holds reserve on, a charge, a document, anything else."""
    ledger = CoreLedger(book(limit_micro=99))
    granted = entered(ledger.do(approve(grant("g", 40))))[-1]
    placed = entered(ledger.do(hold("h", 30)))[-1]
    assert Reserved(30) == ledger.reverse(granted)
    charged = entered(ledger.do(total(60)))[-1]
    billed = entered(ledger.do(invoiced("d", 20)))[-1]
    assert AlreadyDrawn(10) == ledger.reverse(granted)
    assert [
        NotReversible("correct-in-metering"),
        NotReversible("correct-in-invoicing"),
        NotReversible("not-reversible"),
    ] == [ledger.reverse(entry) for entry in (charged, billed, placed)]
    command = ReverseEntry(entry=charged, actor="key:x", reason="r")
    assert Footprint() == footprint_of(command)


def test_a_reversal_needs_the_lot_and_the_programme() -> None:
    """Whoever opens the books forgot one: a defect of ours, and not a refusal."""
    ledger = CoreLedger(book())
    granted = entered(ledger.do(approve(grant("g", 40))))[-1]
    command = ReverseEntry(entry=granted, actor="key:x", reason="r")
    with pytest.raises(InvariantBroken, match="programme"):
        reverse_entry(Books(ledger.book), command, at(1))
    with pytest.raises(InvariantBroken, match="not opened"):
        lot_of(book(), "g")


def test_a_revoked_grant_ends_with_the_hour_begun_and_expires_like_any_other() -> None:
    """What runs in this hour is still paid; the rest of its money waits for the watermarks."""
    ledger = CoreLedger(book())
    found, _ = granted(ledger, 40)
    (revoked,) = entered(ledger.do(revoke(found), at(9, 20)))
    assert ("grant_revoked", "closed down") == (revoked.kind, revoked.reason)
    assert [(at(10), 40)] == [(lot.expires_ms, lot.remaining_micro) for lot in ledger.book.lots]
    ledger.do(total(30, hour_ms=at(9)), at(9, 30))
    ledger.do(total(5, bucket="c", hour_ms=at(10)), at(10, 30))
    assert (30, 5) == (ledger.book.funded_micro, ledger.book.receivable_micro)
    assert ["expiry"] == [kind for kind, _ in moves(ledger.expire_lots(at(10), at(11)))]
    again = replace(found, state="revoked")
    assert GrantNotApproved("revoked") == ledger.do(revoke(again), at(11))


def test_a_lot_stands_by_its_new_end_among_the_others() -> None:
    """Of equal priority the one that ends first pays first."""
    ledger = CoreLedger(book())
    ledger.do(approve(grant("a", 40, expires_ms=at(12))))
    found, _ = granted(ledger, 40)
    ledger.do(revoke(found), at(9))
    assert ["g", "a"] == [lot.grant_id for lot in ledger.book.lots]


def test_a_grant_revoked_before_its_window_begins_expires_whole_at_once() -> None:
    """Its window is empty: there is no usage to wait for."""
    ledger = CoreLedger(book())
    found, _ = granted(ledger, 40, effective_ms=at(12), expires_ms=at(20))
    made = ledger.do(revoke(found), at(9))
    assert [("grant_revoked", {}), ("expiry", {"lot:g": -40, "breakage": 40})] == moves(made)
    assert [at(12)] == [lot.expires_ms for lot in ledger.book.lots]


@pytest.mark.parametrize("expires_ms", [at(3), at(10)])
def test_a_grant_that_ends_no_later_anyway_is_not_revoked(expires_ms: int) -> None:
    """There is nothing to end early."""
    ledger = CoreLedger(book())
    found, _ = granted(ledger, 40, expires_ms=expires_ms)
    assert GrantExpired(expires_ms) == ledger.do(revoke(found), at(9, 20))


@pytest.mark.parametrize("state", ["proposed", "rejected"])
def test_nothing_is_reclaimed_of_what_was_never_granted(state: GrantState) -> None:
    """It has no lot."""
    ledger = CoreLedger(book())
    assert NotExpired() == ledger.do(reclaim(grant("g", 40, state=state)))


def test_what_expired_goes_back_to_the_programme_once_and_is_never_taken_back() -> None:
    """Late usage is owed then; what returns to the lot expires again and stays."""
    ledger = CoreLedger(book(), budget_micro=100)
    found, _ = granted(ledger, 40, expires_ms=at(2))
    assert NotExpired() == ledger.do(reclaim(found), at(3))
    ledger.do(total(15, hour_ms=at(1)), at(1))
    ledger.expire_lots(at(2), at(3))
    made = entered(ledger.do(reclaim(found), at(4)))
    assert ["budget_returned", "reclaimed"] == [entry.kind for entry in made]
    assert ("p", 25) == budget_change_of(made[-1])
    assert (85, 0) == (ledger.programme.accounts["budget"], ledger.book.breakage_micro)
    assert -15 == ledger.book.accounts["funding:p"]
    assert AlreadyReclaimed() == ledger.do(reclaim(found), at(4))
    ledger.do(total(7, bucket="d", hour_ms=at(1)), at(5))
    assert 7 == ledger.book.receivable_micro
    ledger.do(total(15, hour_ms=at(1), refunded_micro=15), at(6))
    lot = lot_of(ledger.book, "g")
    assert (0, 40, 25, 0) == (
        lot.remaining_micro,
        lot.expired_micro,
        lot.reclaimed_micro,
        lot.drawn_micro,
    )
    assert AlreadyReclaimed() == ledger.reverse(ledger.entries[0], at(7))
