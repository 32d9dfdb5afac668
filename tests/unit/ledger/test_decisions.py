"""What a command enters into a book, and why it is refused."""

from __future__ import annotations

import pytest

from hisab_contracts.entries import GENESIS_HASH, Entry, entry_hash
from hisab_contracts.ids import HoldId
from hisab_contracts.units import MAX_MICRO
from ledger.book import BookKind, InvariantBroken, Page
from ledger.decisions import (
    AlreadyInvoiced,
    CommitBudget,
    GrantCredit,
    NotReceivable,
    OutOfRange,
    ReleaseHold,
    SetBudget,
    decide,
    is_newer,
)
from ledger.grants import BudgetExceeded
from ledger.holds import HoldClosed, HoldOver, InsufficientCredit
from unit.ledger.values import DAY_MS, HOUR_MS, CoreLedger, at, book, grant, hold, invoiced, total


def funded(grant_micro: int, *, kind: BookKind = "startup", limit_micro: int = 0) -> CoreLedger:
    """A ledger with one lot `g`."""
    ledger = CoreLedger(book(kind, limit_micro=limit_micro))
    ledger.do(GrantCredit(grant("g", grant_micro), "key:approver"))
    return ledger


def only(decided: object) -> Entry:
    """The one entry that was decided."""
    assert isinstance(decided, tuple)
    (entry,) = decided
    assert isinstance(entry, Entry)
    return entry


def amounts(entry: Entry) -> list[tuple[str, int]]:
    """Postings without balances."""
    return [(each.account, each.posting_micro) for each in entry.postings]


def test_a_charge_beyond_grants_becomes_receivable_for_a_commercial_tenant() -> None:
    """Lots first, then the tenant owes."""
    entry = only(funded(30, kind="commercial", limit_micro=70).do(total(100)))
    assert [("usage", 100), ("lot:g", -30), ("receivable", -70)] == amounts(entry)
    assert entry.charge is not None
    assert not entry.charge.over_limit


def test_a_charge_beyond_grants_becomes_unfunded_for_all_others() -> None:
    """Never billed, but shown."""
    entry = only(funded(30).do(total(100)))
    assert [("usage", 100), ("lot:g", -30), ("unfunded", -70)] == amounts(entry)


def test_a_charge_beyond_the_credit_limit_is_booked_and_flagged() -> None:
    """Usage is a fact; the limit counts what is invoiced too."""
    ledger = CoreLedger(book(limit_micro=100))
    first = only(ledger.do(total(60, bucket="1")))
    ledger.do(invoiced("d", 60))
    second = only(ledger.do(total(40, bucket="2")))
    third = only(ledger.do(total(1, bucket="3")))
    flags = [entry.charge.over_limit for entry in (first, second, third) if entry.charge]
    assert [False, False, True] == flags
    assert -1 == ledger.available()


def test_a_charge_is_the_difference_to_what_was_booked() -> None:
    """Totals come in; differences are entered."""
    ledger = funded(1000)
    ledger.do(total(100))
    entry = only(ledger.do(total(140)))
    assert entry.charge is not None
    assert (40, 40) == (entry.charge.charge_micro, entry.charge.gpu_ns)
    assert 140 == ledger.book.charged_micro


@pytest.mark.defect("M29")
@pytest.mark.parametrize(
    ("charge_micro", "gpu_ns", "revision", "newer"),
    [
        (100, 100, 1, False),
        (99, 99, 1, False),
        (101, 100, 1, True),
        (100, 101, 1, True),
        (99, 101, 1, False),
        (101, 99, 1, False),
        (500, 500, 0, False),
        (7, 7, 2, True),
        (100, 100, 2, True),
    ],
)
def test_only_a_state_newer_than_the_booked_one_is_entered(
    charge_micro: int, gpu_ns: int, revision: int, newer: bool
) -> None:
    """A higher revision is newer; within one, totals only grow; all else is a duplicate."""
    ledger = funded(1000)
    ledger.do(total(100, revision=1))
    stated = total(charge_micro, gpu_ns=gpu_ns, revision=revision)
    assert newer == is_newer(stated, ledger.buckets[stated.bucket_id])
    decided = ledger.do(stated)
    assert isinstance(decided, tuple)
    assert int(newer) == len(decided)


def test_an_empty_total_of_an_unknown_bucket_books_nothing() -> None:
    """There is nothing to say about it."""
    assert () == funded(1).do(total(0))


def test_gpu_time_without_an_amount_is_an_entry_without_postings() -> None:
    """A reserved price is 0, yet bills count its GPU time."""
    ledger = funded(1000)
    entry = only(ledger.do(total(0, gpu_ns=5)))
    assert [] == entry.postings
    assert entry.charge is not None
    assert 5 == entry.charge.gpu_ns
    assert () == ledger.do(total(0, gpu_ns=5))


def test_usage_outside_a_lots_window_does_not_draw_on_it() -> None:
    """The hour of the usage counts, not the clock: effective <= hour < expires."""
    ledger = CoreLedger(book("startup"))
    window = grant("g", 100, effective_ms=at(10), expires_ms=at(11))
    ledger.do(GrantCredit(window, "key:approver"))
    for number, hour_ms in enumerate((at(9), at(10), at(11))):
        ledger.do(total(10, bucket=str(number), hour_ms=hour_ms), now_ms=at(20))
    assert (10, 20) == (ledger.book.funded_micro, ledger.book.unfunded_micro)


def test_a_total_that_went_down_returns_credit_to_its_own_draws_newest_first() -> None:
    """Lot g paid 30, then 50 became unfunded: the unfunded part goes first."""
    ledger = funded(30)
    ledger.do(total(80))
    entry = only(ledger.do(total(70, revision=1)))
    assert [("usage", -10), ("unfunded", 10)] == amounts(entry)
    entry = only(ledger.do(total(20, revision=2)))
    assert [("usage", -50), ("unfunded", 40), ("lot:g", 10)] == amounts(entry)
    assert (("lot:g", 20),) == ledger.buckets[total(0).bucket_id].draws
    entry = only(ledger.do(total(0, revision=3)))
    assert [("usage", -20), ("lot:g", 20)] == amounts(entry)
    assert 30 == ledger.book.lots[0].remaining_micro


def test_credit_may_return_to_a_receivable_that_is_invoiced_already() -> None:
    """A credit is owed until its credit note (worked example, step 14)."""
    ledger = CoreLedger(book(limit_micro=1000))
    ledger.do(total(630))
    ledger.do(invoiced("d", 630))
    ledger.do(total(420, revision=1))
    assert (-210, 630) == (ledger.book.receivable_micro, ledger.book.invoiced_micro)
    assert 580 == ledger.available()


@pytest.mark.defect("L14", "L15", "F63")
def test_amounts_up_to_the_last_of_64_bits_are_exact_and_beyond_it_refused() -> None:
    """Nothing wraps and nothing is rounded."""
    ledger = CoreLedger(book(limit_micro=MAX_MICRO))
    ledger.do(total(2**53 + 1, bucket="1"))
    assert 2**53 + 1 == ledger.book.charged_micro
    ledger.do(total(MAX_MICRO - 2**53 - 1, bucket="2"))
    assert MAX_MICRO == ledger.book.charged_micro
    assert OutOfRange(MAX_MICRO) == ledger.do(total(1, bucket="3"))


def test_a_hold_reserves_on_lots_in_draw_order_then_on_the_limit() -> None:
    """All of it or nothing."""
    ledger = CoreLedger(book(limit_micro=50))
    ledger.do(GrantCredit(grant("b", 10, priority=2), "key:approver"))
    ledger.do(GrantCredit(grant("a", 10, priority=1), "key:approver"))
    entry = only(ledger.do(hold("h", 25)))
    assert entry.hold is not None
    assert [("lot:a", 10), ("lot:b", 10), ("limit", 5)] == entry.hold.reserved
    assert [] == entry.postings
    assert 45 == ledger.available()


def test_a_hold_is_refused_with_what_is_available_and_what_is_missing() -> None:
    """And nothing is reserved."""
    ledger = funded(100)
    ledger.do(hold("h", 60))
    assert InsufficientCredit(40, 10) == ledger.do(hold("i", 50))
    assert 40 == ledger.available()


def test_a_lot_takes_no_hold_once_it_has_expired() -> None:
    """Its remainder is not available either."""
    ledger = CoreLedger(book("startup"))
    ledger.do(GrantCredit(grant("g", 100, expires_ms=at(11)), "key:approver"))
    assert InsufficientCredit(0, 1) == ledger.do(hold("h", 1), now_ms=at(11))
    assert isinstance(ledger.do(hold("h", 1), now_ms=at(11) - 1), tuple)


def test_a_hold_that_is_over_before_it_begins_is_refused() -> None:
    """Its expiry is compared first, whatever is available."""
    refused = funded(0).do(hold("h", 1, expires_ms=at(9)), now_ms=at(9))
    assert HoldOver(at(9)) == refused


def test_drawing_under_a_hold_leaves_the_available_amount_as_it_was() -> None:
    """What the charge takes, the hold gives up."""
    ledger = funded(100, kind="commercial", limit_micro=100)
    ledger.do(hold("h", 150))
    before = ledger.available()
    ledger.do(total(120, hold_id="h"))
    assert before == ledger.available()
    assert (("limit", 30),) == ledger.holds[HoldId("h")].reserved
    ledger.do(total(160, hold_id="h"))
    assert before - 10 == ledger.available()


def test_a_charge_does_not_take_what_another_hold_reserved() -> None:
    """A hold guarantees its amount."""
    ledger = funded(100)
    ledger.do(hold("h", 80))
    ledger.do(total(50))
    assert (20, 30) == (ledger.book.funded_micro, ledger.book.unfunded_micro)
    ledger.do(total(80, bucket="c", hold_id="h"))
    assert (100, 30) == (ledger.book.funded_micro, ledger.book.unfunded_micro)


def test_what_no_lot_pays_does_not_shrink_a_hold() -> None:
    """Unfunded usage draws on nothing."""
    ledger = CoreLedger(book("startup"))
    ledger.do(GrantCredit(grant("g", 100, effective_ms=at(10)), "key:approver"))
    ledger.do(hold("h", 100), now_ms=at(10))
    ledger.do(total(40, hold_id="h", hour_ms=at(9)), now_ms=at(10))
    assert (40, 100) == (ledger.book.unfunded_micro, ledger.holds[HoldId("h")].open_micro)


@pytest.mark.defect("L11", "F41")
def test_a_hold_ends_once() -> None:
    """Whatever comes second learns how it ended."""
    ledger = funded(100)
    ledger.do(hold("h", 60))
    entry = only(ledger.release("h", "final"))
    assert entry.hold is not None
    assert ("final", 60, [("lot:g", 60)]) == (
        entry.hold.cause,
        entry.hold.open_micro,
        entry.hold.reserved,
    )
    assert 100 == ledger.available()
    assert HoldClosed("final") == ledger.release("h", "expired")


def test_a_charge_after_the_end_of_its_hold_is_booked_without_it() -> None:
    """Usage is a fact."""
    ledger = funded(100)
    ledger.do(hold("h", 60))
    ledger.release("h")
    ledger.do(hold("i", 90))
    ledger.do(total(20, hold_id="h"))
    assert (10, 10) == (ledger.book.funded_micro, ledger.book.unfunded_micro)


def test_a_charge_under_an_unknown_hold_is_booked_without_hold() -> None:
    """The scheduler may never have asked."""
    ledger = funded(100)
    entry = only(ledger.do(total(20, hold_id="nobody")))
    assert entry.charge is not None
    assert "nobody" == entry.charge.hold_id
    assert 20 == ledger.book.funded_micro


def test_a_release_without_its_hold_is_a_defect_of_ours() -> None:
    """Whoever loads the page must load the hold."""
    with pytest.raises(InvariantBroken):
        decide(Page(book()), ReleaseHold("final", "x", "ledger"), 0)


def test_an_invoice_moves_receivable_to_its_own_account_once() -> None:
    """The limit still counts it."""
    ledger = CoreLedger(book(limit_micro=1000))
    ledger.do(total(980))
    entry = only(ledger.do(invoiced("d", 980)))
    assert [("receivable", 980), ("invoiced:d", -980)] == amounts(entry)
    assert (0, 980, 20) == (
        ledger.book.receivable_micro,
        ledger.book.invoiced_micro,
        ledger.available(),
    )
    assert AlreadyInvoiced(980) == ledger.do(invoiced("d", 980))
    assert NotReceivable(0) == ledger.do(invoiced("e", 1))


def test_a_programme_never_promises_more_than_its_budget() -> None:
    """A programme is a book: authority gives, tenants are granted."""
    ledger = CoreLedger(book("fund", tenant_id="/programmes/p"))
    first = only(ledger.do(SetBudget(100, "key:operator")))
    assert [("authority", -100), ("budget", 100)] == amounts(first)
    assert "programme:p" == first.caused_by
    second = only(ledger.do(CommitBudget(grant("g", 70), "key:approver")))
    assert [("budget", -70), ("granted:t", 70)] == amounts(second)
    assert BudgetExceeded(30, 1) == ledger.do(CommitBudget(grant("h", 31), "key:approver"))
    ledger.do(CommitBudget(grant("h", 30), "key:approver"))
    assert 100 == ledger.book.accounts["granted:t"]


@pytest.mark.defect("L21", "F59")
def test_recorded_at_never_falls_when_the_clock_does() -> None:
    """Order is `seq`; the clock may step back."""
    ledger = funded(100)
    ledger.do(total(1), now_ms=at(12))
    entry = only(ledger.do(total(2), now_ms=at(11)))
    assert at(12) == entry.recorded_ms


def test_entries_are_chained_by_hash_and_carry_their_effective_instant() -> None:
    """A charge is effective in its hour, a grant from its window, the rest when recorded."""
    ledger = CoreLedger(book("startup"))
    ledger.do(GrantCredit(grant("g", 9, effective_ms=HOUR_MS), "key:approver"))
    ledger.do(total(1, hour_ms=at(3)), now_ms=at(4))
    ledger.do(hold("h", 1), now_ms=at(5))
    first, second, third = ledger.entries
    assert (HOUR_MS, at(3), at(5)) == tuple(each.effective_ms for each in ledger.entries)
    assert (GENESIS_HASH, first.hash, second.hash) == tuple(e.prev_hash for e in ledger.entries)
    assert all(each.hash == entry_hash(each) for each in ledger.entries)
    assert ("t.3", DAY_MS + 5 * HOUR_MS) == (third.entry_id, third.recorded_ms)
