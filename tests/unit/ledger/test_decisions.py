"""What a command enters into a book, and why it is refused."""

from __future__ import annotations

from typing import ClassVar

import pytest

from hisab_contracts.charges import AllocationFinal, BucketTotal
from hisab_contracts.entries import GENESIS_HASH, Entry, entry_hash
from hisab_contracts.ids import AllocationId, HoldId, HubCode, TenantId
from hisab_contracts.invariants import InvariantBroken
from hisab_contracts.units import MAX_MICRO
from ledger.core.book import BookedBucket, BookKind, Books
from ledger.core.charges import RefundAboveTotal, TotalOutOfRange, is_newer, may_return_credit
from ledger.core.decisions import (
    BookCommand,
    Footprint,
    NotFound,
    UnitOfWork,
    decide,
    footprint_of,
)
from ledger.core.expiry import ExpireLots
from ledger.core.grants import BudgetExceeded
from ledger.core.holds import Hold, HoldClosed, HoldOver, InsufficientCredit
from ledger.core.movements import AlreadyInvoiced, NotReceivable, SetBudget
from unit.ledger.values import (
    DAY_MS,
    HOUR_MS,
    CoreLedger,
    approve,
    at,
    book,
    grant,
    held,
    hold,
    invoiced,
    release,
    total,
)

BUDGET_OF_ONE = SetBudget(budget_micro=1, actor="key:operator")


def funded(grant_micro: int, *, kind: BookKind = "startup", limit_micro: int = 0) -> CoreLedger:
    """A ledger with one lot `g`."""
    ledger = CoreLedger(book(kind, limit_micro=limit_micro))
    ledger.do(approve(grant("g", grant_micro)))
    return ledger


def only(decided: object) -> Entry:
    """The one entry that was decided."""
    assert isinstance(decided, tuple)
    (entry,) = decided
    assert isinstance(entry, Entry)
    return entry


def amounts(entry: Entry) -> list[tuple[str, int]]:
    """Postings without balances."""
    return [(posting.account, posting.posting_micro) for posting in entry.postings]


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
    assert 0 == ledger.available()


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
    ledger.do(approve(window))
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
    assert TotalOutOfRange(MAX_MICRO) == ledger.do(total(1, bucket="3"))


def test_a_hold_reserves_on_lots_in_draw_order_then_on_the_limit() -> None:
    """All of it or nothing."""
    ledger = CoreLedger(book(limit_micro=50))
    ledger.do(approve(grant("b", 10, priority=2)))
    ledger.do(approve(grant("a", 10, priority=1)))
    entry = only(ledger.do(hold("h", 25)))
    assert entry.hold is not None
    assert [("lot:a", 10), ("lot:b", 10), ("limit", 5)] == entry.hold.reserved
    assert [] == entry.postings
    assert 45 == ledger.available()


def test_a_hold_is_refused_with_what_is_available_and_what_is_missing() -> None:
    """And nothing is reserved."""
    ledger = funded(100)
    ledger.do(hold("h", 60))
    refused = ledger.do(hold("i", 50))
    assert InsufficientCredit(available_micro=40, shortfall_micro=10) == refused
    assert 40 == ledger.available()


def test_a_lot_takes_no_hold_once_it_has_expired() -> None:
    """Its remainder is not available either."""
    ledger = CoreLedger(book("startup"))
    ledger.do(approve(grant("g", 100, expires_ms=at(11))))
    refused = ledger.do(hold("h", 1), now_ms=at(11))
    assert InsufficientCredit(available_micro=0, shortfall_micro=1) == refused
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
    ledger.do(approve(grant("g", 100, effective_ms=at(10))))
    ledger.do(hold("h", 100), now_ms=at(10))
    ledger.do(total(40, hold_id="h", hour_ms=at(9)), now_ms=at(10))
    assert (40, 100) == (ledger.book.unfunded_micro, ledger.holds[HoldId("h")].open_micro)


@pytest.mark.defect("F43")
def test_a_hold_that_is_there_is_not_placed_a_second_time() -> None:
    """Its id is its command's: after a restore the entry may be known and the key forgotten."""
    ledger = funded(100)
    ledger.do(hold("h", 60))
    assert () == ledger.do(hold("h", 60))
    assert 40 == ledger.available()
    ledger.release("h", "released")
    assert () == ledger.do(hold("h", 60))
    assert 100 == ledger.available()


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


def test_a_release_names_a_hold_of_its_book() -> None:
    """Another is not found."""
    assert NotFound("hold") == funded(100).release("nobody")


def test_an_invoice_moves_receivable_to_its_own_account_once() -> None:
    """The limit still counts it. Asked again, its key forgotten, it is entered: nothing to do."""
    ledger = CoreLedger(book(limit_micro=1000))
    ledger.do(total(980))
    entry = only(ledger.do(invoiced("d", 980)))
    assert [("receivable", 980), ("invoiced:d", -980)] == amounts(entry)
    assert (0, 980, 20) == (
        ledger.book.receivable_micro,
        ledger.book.invoiced_micro,
        ledger.available(),
    )
    assert () == ledger.do(invoiced("d", 980))
    assert AlreadyInvoiced(980) == ledger.do(invoiced("d", 979))
    assert NotReceivable(0) == ledger.do(invoiced("e", 1))


def test_a_programme_opens_with_its_budget() -> None:
    """A programme is a book: its authority gives what it may promise."""
    programme = CoreLedger(book("fund", tenant_id="/programmes/q"))
    entry = only(programme.do(SetBudget(budget_micro=100, actor="key:operator")))
    assert [("authority", -100), ("budget", 100)] == amounts(entry)
    assert ("programme:q", "budget_set") == (entry.caused_by, entry.kind)


def test_an_approval_enters_both_books_at_once() -> None:
    """Budget of the programme becomes a lot of the tenant."""
    ledger = CoreLedger(book("startup"), budget_micro=100)
    decided = ledger.do(approve(grant("g", 70)))
    assert isinstance(decided, tuple)
    committed, received = decided
    assert ("/programmes/p", "budget_granted") == (committed.tenant_id, committed.kind)
    assert [("budget", -70), ("granted:t", 70)] == amounts(committed)
    assert ("t", "grant") == (received.tenant_id, received.kind)
    assert [("funding:p", -70), ("lot:g", 70)] == amounts(received)
    assert {("grant:g", "key:approver")} == {(entry.caused_by, entry.actor) for entry in decided}
    assert (30, 70) == (ledger.programme.accounts["budget"], ledger.available())


def test_a_programme_never_promises_more_than_its_budget() -> None:
    """To the last micro-unit; a refusal changes neither book."""
    ledger = CoreLedger(book("startup"), budget_micro=100)
    ledger.do(approve(grant("g", 70)))
    exceeded = BudgetExceeded(budget_left_micro=30, shortfall_micro=1)
    assert exceeded == ledger.do(approve(grant("h", 31)))
    assert (1, 1) == (ledger.programme.seq, ledger.book.seq)
    ledger.do(approve(grant("h", 30)))
    assert 100 == ledger.programme.accounts["granted:t"]


def test_a_grant_that_is_decided_is_never_entered_again() -> None:
    """Whoever asks has refused it before (`proposals`): here it is a defect of ours."""
    ledger = CoreLedger(book("startup"))
    with pytest.raises(InvariantBroken):
        ledger.do(approve(grant("g", 1, state="approved")))
    assert (0, 0) == (ledger.programme.seq, ledger.book.seq)


def test_an_approval_without_the_programmes_book_is_a_defect_of_ours() -> None:
    """Whoever opens the books must open both."""
    with pytest.raises(InvariantBroken):
        decide(Books(book()), approve(grant("g", 1)), 0)


@pytest.mark.parametrize(
    ("kind", "command"),
    [("startup", BUDGET_OF_ONE), ("fund", hold("h", 1)), ("fund", total(1))],
)
def test_a_programmes_book_takes_its_budget_and_nothing_else(
    kind: BookKind, command: BookCommand | BucketTotal
) -> None:
    """And a tenant's never takes one: there is no such book for it."""
    ledger = CoreLedger(book(kind))
    assert NotFound("tenant") == ledger.do(command)


def test_nothing_is_entered_into_a_book_that_is_not_open() -> None:
    """Metering may name a tenant that the ledger does not have."""
    unit = UnitOfWork({"t": book()}, DAY_MS)
    assert NotFound("tenant") == unit.enter("nobody", total(1, tenant_id="nobody"))
    assert [] == list(unit.changes().entries)


def test_a_refund_above_the_total_is_refused_whole() -> None:
    """Metering never states one; booked, the bucket would owe its tenant money."""
    ledger = funded(100)
    assert RefundAboveTotal(11) == ledger.do(total(10, refunded_micro=11))
    assert 0 == ledger.book.charged_micro


def test_a_refund_is_entered_as_what_the_bucket_costs_less() -> None:
    """Also where nothing else changed; stated again it books nothing, and less of it is old."""
    ledger = funded(100)
    first = only(ledger.do(total(10, refunded_micro=4)))
    assert first.charge is not None
    assert (6, 4) == (first.charge.charge_micro, first.charge.refunded_micro)
    assert () == ledger.do(total(10, refunded_micro=4))
    assert () == ledger.do(total(10, refunded_micro=3))
    more = only(ledger.do(total(10, refunded_micro=10)))
    assert more.charge is not None
    assert (-6, 6) == (more.charge.charge_micro, more.charge.refunded_micro)
    assert (0, 0) == (ledger.book.charged_micro, ledger.book.funded_micro)


def test_only_a_correction_may_return_credit() -> None:
    """So spent lots need not be loaded for anything else."""
    booked = BookedBucket(bucket_id=total(0).bucket_id, hour_ms=DAY_MS, revision=1)
    actual = [
        may_return_credit(total(1, revision=revision), bucket)
        for revision, bucket in ((2, booked), (1, booked), (1, None))
    ]
    assert [True, False, False] == actual


@pytest.mark.defect("L11")
def test_a_final_ends_the_open_holds_of_its_allocation_at_its_hub() -> None:
    """Once, and no other hub's."""
    lot = funded(100).book
    opened = {("t", name): held(name, 10, allocation_id="a") for name in ("h", "i", "j")}
    of_allocations = {("t", "lhr", "a"): ["h", "i"], ("t", "khi", "a"): ["j"]}
    unit = UnitOfWork({"t": lot}, DAY_MS, holds=opened, holds_of_allocations=of_allocations)
    final = AllocationFinal(
        tenant_id=TenantId("t"),
        hub=HubCode("lhr"),
        allocation_id=AllocationId("a"),
        ended_ms=0,
    )
    unit.release_final(final)
    unit.release_final(final)
    assert ["final", "final", None] == [unit.hold("t", name).ended_by for name in ("h", "i", "j")]
    assert ["final:lhr/a"] * 2 == [entry.caused_by for entry in unit.changes().entries]


@pytest.mark.defect("L11", "F41")
def test_a_hold_whose_time_has_come_ends_by_the_clock_unless_it_has_ended_before() -> None:
    """At its very instant; a later one stands."""
    opened = {
        ("t", "due"): held("due", 10, expires_ms=at(10)),
        ("t", "later"): held("later", 10, expires_ms=at(10) + 1),
        ("t", "over"): held("over", 10, expires_ms=at(9), ended_by="released"),
    }
    unit = UnitOfWork({"t": book()}, at(10), holds=opened)
    unit.release_expired()
    ends = [unit.hold("t", name).ended_by for name in ("due", "later", "over")]
    assert ["expired", None, "released"] == ends
    assert [("clock", "ledger")] == [(e.caused_by, e.actor) for e in unit.changes().entries]


@pytest.mark.defect("L11", "F41")
def test_a_unit_ends_what_is_due_once_and_only_in_books_that_it_writes_to() -> None:
    """Before the first entry of a book; a final or a release comes too late for what is over."""
    due = [(name, held(f"due-{name}", 0, allocation_id="a", expires_ms=at(9))) for name in "tu"]
    unit = UnitOfWork(
        {name: book(tenant_id=name, limit_micro=50) for name in "tu"},
        at(10),
        due=due,
        holds_of_allocations={("t", "lhr", "a"): ["due-t"]},
    )
    final = AllocationFinal(
        tenant_id=TenantId("t"),
        hub=HubCode("lhr"),
        allocation_id=AllocationId("a"),
        ended_ms=0,
    )
    unit.release_final(final)
    assert HoldClosed("expired") == unit.enter("t", release("due-t"))
    assert [] == list(unit.changes().entries)
    for bucket in ("1", "2"):
        charge = total(10, bucket=bucket, hold_id="due-t")
        assert isinstance(unit.enter("t", charge, trace_id="f" * 32), tuple)
    changes = unit.changes()
    assert ["hold_released", "charge", "charge"] == [entry.kind for entry in changes.entries]
    assert [None, "f" * 32, "f" * 32] == list(changes.traces)
    assert ["expired", None] == [unit.hold(name, f"due-{name}").ended_by for name in "tu"]
    assert [("t", "due-t")] == [(tenant_id, hold.hold_id) for tenant_id, hold in changes.holds]


class CountedHold(Hold, frozen=True, kw_only=True):
    """A hold that counts how often it is asked whether it is over."""

    asked: ClassVar[list[str]] = []

    def is_over(self, now_ms: int) -> bool:
        """Say so, and count."""
        self.asked.append(self.hold_id)
        return Hold.is_over(self, now_ms)


def test_what_is_due_is_looked_at_once_however_many_commands_enter_nothing() -> None:
    """A batch that comes again, or is refused, costs no more with many holds due than with none."""
    due = [
        (
            "t",
            CountedHold(
                hold_id=HoldId(str(number)),
                hold_micro=0,
                allocation_id=None,
                expires_ms=at(9),
                placed_seq=number,
            ),
        )
        for number in range(5)
    ]
    bucket = BookedBucket(bucket_id=total(9).bucket_id, hour_ms=DAY_MS, gpu_ns=9, charged_micro=9)
    opened = {"t": book(limit_micro=10)}
    unit = UnitOfWork(opened, at(10), buckets={("t", bucket.bucket_id): bucket}, due=due)
    for _ in range(3):
        assert () == unit.enter("t", total(9))
        assert InsufficientCredit(available_micro=10, shortfall_micro=1) == unit.enter(
            "t", hold("new", 11)
        )
    assert [str(number) for number in range(5)] == sorted(CountedHold.asked)


def test_a_unit_names_everything_that_it_changed_and_nothing_else() -> None:
    """A hold that was placed in it is new, however often it changed after."""
    ledger = funded(100, kind="commercial", limit_micro=50)
    ledger.do(approve(grant("idle", 5, priority=9)))
    unit = UnitOfWork(
        {"t": ledger.book, "other": book(tenant_id="other")},
        DAY_MS,
        holds={("t", "old"): held("old", 1)},
    )
    placed = hold("new", 30)
    unit.enter("t", placed)
    unit.enter("t", total(10, hold_id="new"), trace_id="f" * 32)
    unit.enter("t", release("old"))
    changes = unit.changes()
    assert [None, "f" * 32, None] == list(changes.traces)
    assert ["t"] == [changed.tenant_id for changed in changes.books]
    assert [("t", "g")] == [(tenant_id, lot.grant_id) for tenant_id, lot in changes.lots]
    assert [("t", 10)] == [(tenant_id, b.charged_micro) for tenant_id, b in changes.buckets]
    assert [("t", placed, 20)] == [(t, command, h.open_micro) for t, command, h in changes.placed]
    assert [("t", "old")] == [(tenant_id, older.hold_id) for tenant_id, older in changes.holds]
    assert [("t", "funding:p", -105)] == list(changes.accounts)
    assert unit.book("t") == changes.books[0]
    assert 20 == unit.hold("t", "new").open_micro


@pytest.mark.parametrize(
    ("command", "footprint"),
    [
        (hold("h", 1), Footprint(hold_id=HoldId("h"))),
        (release("h"), Footprint(hold_id=HoldId("h"))),
        (invoiced("d", 1), Footprint(accounts=("invoiced:d",))),
        (BUDGET_OF_ONE, Footprint(accounts=("authority", "budget"))),
        (
            approve(grant("g", 1)),
            Footprint(
                programme_book_id=TenantId("/programmes/p"),
                accounts=("funding:p", "budget", "granted:t"),
                needs_completeness=True,
            ),
        ),
        (ExpireLots(), Footprint()),
    ],
)
def test_a_command_says_what_has_to_be_opened_for_it(
    command: BookCommand, footprint: Footprint
) -> None:
    """Whoever loads books needs to know nothing about commands."""
    assert footprint == footprint_of(command)


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
    ledger.do(approve(grant("g", 9, effective_ms=HOUR_MS)))
    ledger.do(total(1, hour_ms=at(3)), now_ms=at(4))
    ledger.do(hold("h", 1), now_ms=at(5))
    first, second, third = ledger.entries
    assert (HOUR_MS, at(3), at(5)) == tuple(entry.effective_ms for entry in ledger.entries)
    assert (GENESIS_HASH, first.hash, second.hash) == tuple(e.prev_hash for e in ledger.entries)
    assert all(entry.hash == entry_hash(entry) for entry in ledger.entries)
    assert ("t.3", DAY_MS + 5 * HOUR_MS) == (third.entry_id, third.recorded_ms)
