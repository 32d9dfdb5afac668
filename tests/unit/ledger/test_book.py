"""The fold: what follows from entries, and what refuses to follow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from hisab_contracts.entries import ChargeDetail, Entry, Posting
from hisab_contracts.ids import BucketId, HoldId
from hisab_contracts.invariants import InvariantBroken, invariant
from ledger.core.book import (
    BookedBucket,
    Books,
    RebuiltBook,
    balance_micro,
    evolve,
    fold,
    hold_state,
)
from ledger.core.holds import Hold, HoldState
from unit.ledger.values import DAY_MS, CoreLedger, approve, book, grant, hold, invoiced, total


def lived() -> CoreLedger:
    """A book with some of everything."""
    ledger = CoreLedger(book(limit_micro=1000))
    ledger.do(approve(grant("g", 100)))
    ledger.do(hold("h", 90))
    ledger.do(total(50, hold_id="h"))
    ledger.do(total(300, hold_id="h"))
    ledger.do(total(40, bucket="c", revision=1))
    ledger.do(total(10, bucket="c", revision=2))
    ledger.release("h")
    ledger.do(invoiced("d", 100))
    return ledger


def test_the_fold_of_the_entries_is_the_live_state() -> None:
    """Book, buckets and holds: O8."""
    ledger = lived()
    folded = fold(RebuiltBook(ledger.opening), ledger.entries)
    assert ledger.book == folded.book
    assert ledger.buckets == folded.buckets
    assert ledger.holds == folded.holds


@pytest.mark.defect("L19")
def test_the_balance_on_each_posting_is_the_fold_of_the_book_to_that_entry() -> None:
    """The answer to a write is never another balance than the book's."""
    ledger = lived()
    books = Books(ledger.opening)
    buckets: dict[BucketId, BookedBucket] = {}
    holds: dict[HoldId, Hold] = {}
    for entry in ledger.entries:
        bucket = buckets.get(entry.charge.bucket_id) if entry.charge else None
        held = holds.get(HoldId("h")) if entry.hold or entry.charge else None
        books = evolve(Books(books.book, bucket, held), entry)
        if books.bucket:
            buckets[books.bucket.bucket_id] = books.bucket
        if books.hold:
            holds[HoldId("h")] = books.hold
        for posting in entry.postings:
            assert posting.balance_micro == balance_micro(books.book, posting.account)


def test_accounts_sum_to_zero_over_the_book() -> None:
    """Also those that are summed nowhere else."""
    state = lived().book
    accounts = {"usage", "receivable", "unfunded", "lot:g", *state.accounts}
    assert {"funding:p", "invoiced:d"} == set(state.accounts)
    assert 0 == sum(balance_micro(state, account) for account in accounts)


def test_an_account_never_posted_to_holds_nothing() -> None:
    """Whatever its name."""
    assert (0, 0) == (balance_micro(book(), "lot:none"), balance_micro(book(), "funding:none"))


def charge_of(entry: Entry) -> ChargeDetail:
    """The charge of a charge entry."""
    assert entry.charge is not None
    return entry.charge


def with_posting(entry: Entry, place: int, **changes: object) -> Entry:
    """The entry with one of its postings changed."""
    postings: list[Posting] = list(entry.postings)
    postings[place] = replace(postings[place], **changes)
    return replace(entry, postings=postings)


@pytest.mark.defect("L13")
@pytest.mark.parametrize(
    "broken",
    [
        lambda entry: replace(entry, tenant_id="another"),
        lambda entry: replace(entry, seq=entry.seq + 1),
        lambda entry: replace(entry, prev_hash="0" * 64),
        lambda entry: replace(entry, recorded_ms=0),
        lambda entry: with_posting(entry, 0, balance_micro=7),
        lambda entry: with_posting(entry, 1, balance_micro=1),
        lambda entry: with_posting(entry, 1, posting_micro=-500, balance_micro=-400),
        lambda entry: with_posting(entry, 1, account="lot:unknown"),
        lambda entry: with_posting(entry, 1, account="unfunded"),
        lambda entry: with_posting(entry, 2, account="settled"),
        lambda entry: with_posting(entry, 2, balance_micro=-1),
        lambda entry: replace(entry, charge=replace(charge_of(entry), charge_micro=1)),
    ],
)
def test_an_entry_that_does_not_follow_is_never_folded(broken: Callable[[Entry], Entry]) -> None:
    """Each seeded contradiction is caught by itself."""
    ledger = CoreLedger(book(limit_micro=1000))
    ledger.do(approve(grant("g", 100)))
    before = ledger.book
    ledger.do(total(150))
    entry = ledger.entries[-1]
    assert ledger.book == evolve(Books(before), entry).book
    with pytest.raises(InvariantBroken):
        evolve(Books(before), broken(entry))


def test_a_hold_cannot_reserve_what_a_lot_does_not_have() -> None:
    """Neither on a lot, nor on one the book has not loaded, nor less than nothing on the limit."""
    ledger = CoreLedger(book(limit_micro=10))
    ledger.do(approve(grant("g", 100)))
    before = ledger.book
    ledger.do(hold("h", 105))
    entry = ledger.entries[-1]
    assert entry.hold is not None
    for reserved in ([("lot:g", 101)], [("lot:unknown", 1)], [("limit", -1)]):
        with pytest.raises(InvariantBroken):
            evolve(Books(before), replace(entry, hold=replace(entry.hold, reserved=reserved)))


def test_credit_returns_to_nothing_but_the_buckets_newest_draw() -> None:
    """A forged return names another account."""
    ledger = CoreLedger(book("startup"))
    ledger.do(approve(grant("g", 100)))
    ledger.do(total(50))
    before = Books(ledger.book, ledger.buckets[total(0).bucket_id])
    ledger.do(total(40, revision=1))
    entry = with_posting(ledger.entries[-1], 1, account="unfunded", balance_micro=10)
    with pytest.raises(InvariantBroken):
        evolve(before, entry)


def test_a_grant_opens_a_lot_of_its_own() -> None:
    """A second lot of the same grant does not follow."""
    ledger = CoreLedger(book("startup"))
    ledger.do(approve(grant("g", 100)))
    with pytest.raises(InvariantBroken):
        ledger.do(approve(grant("g", 100)))


def test_what_a_hold_says_of_itself_is_what_its_tenant_has_beside_it() -> None:
    """Open or ended, with what is available then."""
    ledger = CoreLedger(book(limit_micro=100))
    ledger.do(hold("h", 60))
    standing = hold_state(ledger.book, ledger.holds[HoldId("h")], DAY_MS)
    assert standing == HoldState(
        hold_id=HoldId("h"),
        ended_by=None,
        hold_micro=60,
        open_micro=60,
        short_micro=0,
        drawn_micro=0,
        available_micro=40,
    )
    ledger.release("h")
    ended = hold_state(ledger.book, ledger.holds[HoldId("h")], DAY_MS)
    assert ended == HoldState(
        hold_id=HoldId("h"),
        ended_by="released",
        hold_micro=60,
        open_micro=0,
        short_micro=0,
        drawn_micro=0,
        available_micro=100,
    )


def test_an_invariant_names_what_broke() -> None:
    """Also under `python -O`."""
    with pytest.raises(InvariantBroken, match="it holds"):
        invariant(False, "it holds")
