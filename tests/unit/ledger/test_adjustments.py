"""More budget for a programme, another credit limit for a tenant, and a tenant suspended."""

from __future__ import annotations

import pytest

from hisab_contracts.ids import HoldId, TenantId
from hisab_contracts.units import MAX_MICRO
from ledger.core.adjustments import (
    AddBudget,
    BudgetOutOfRange,
    ChangeCreditLimit,
    NotCommercial,
    ResumeTenant,
    SuspendTenant,
)
from ledger.core.book import PROGRAMME_BOOK, Book, BookKind, Books, RebuiltBook, evolve, fold
from ledger.core.decisions import NotFound, UnitOfWork, decide
from ledger.core.holds import InsufficientCredit, TenantSuspended
from unit.ledger.test_charges import entered as entries_of
from unit.ledger.test_reservations import extend
from unit.ledger.values import DAY_MS, CoreLedger, approve, book, grant, hold, total

RAISE = ChangeCreditLimit(
    credit_limit_micro=300, reason="grows", caused_by="proposal:p1", actor="key:approver"
)


def lowered(micro: int) -> ChangeCreditLimit:
    """Another limit."""
    return ChangeCreditLimit(
        credit_limit_micro=micro, reason="owes", caused_by="proposal:p2", actor="key:a"
    )


def test_a_new_limit_is_an_entry_without_postings_that_states_it() -> None:
    """Whoever folds the entries has the limit, and available follows at once."""
    ledger = CoreLedger(book(limit_micro=100))
    entered = ledger.do(RAISE)
    assert isinstance(entered, tuple)
    (entry,) = entered
    assert ("limit_changed", [], "proposal:p1", "grows") == (
        entry.kind,
        entry.postings,
        entry.caused_by,
        entry.reason,
    )
    assert entry.limit is not None
    assert (300, 300, 300) == (
        entry.limit.credit_limit_micro,
        ledger.book.credit_limit_micro,
        ledger.available(),
    )


def test_a_limit_below_what_is_owed_is_legal_and_stops_holds() -> None:
    """Holds that stand keep what they were guaranteed; usage is booked and flagged."""
    ledger = CoreLedger(book(limit_micro=100))
    ledger.do(total(60))
    ledger.do(hold("h", 30))
    ledger.do(lowered(10))
    assert (0, -80) == (ledger.available(), ledger.book.headroom_micro)
    refused = ledger.do(hold("h2", 1))
    assert InsufficientCredit(available_micro=0, shortfall_micro=1) == refused
    assert 30 == ledger.holds[hold("h", 30).hold_id].open_micro
    charged = ledger.do(total(70))
    assert isinstance(charged, tuple)
    assert charged[-1].charge is not None
    assert charged[-1].charge.over_limit
    ledger.do(lowered(200))
    assert 200 - 70 - 30 == ledger.available()


@pytest.mark.parametrize("kind", ["startup", "university", "programme"])
def test_only_a_commercial_tenant_has_a_limit(kind: BookKind) -> None:
    """What nobody owes cannot be limited."""
    ledger = CoreLedger(book(kind))
    assert NotCommercial(kind) == ledger.do(lowered(0))


def test_the_fold_of_all_entries_has_the_limit_that_stands() -> None:
    """A rebuild begins with the limit as it was registered."""
    ledger = CoreLedger(book(limit_micro=100))
    for micro in (300, 0, 70):
        ledger.do(lowered(micro))
        ledger.do(total(micro, bucket=f"b{micro}"))
    rebuilt = fold(RebuiltBook(ledger.opening), ledger.entries)
    assert ledger.book == rebuilt.book


def programme(given_micro: int = 100) -> Book:
    """The book of a programme with a budget."""
    return Book(
        tenant_id=TenantId(PROGRAMME_BOOK + "p"),
        kind="fund",
        currency="PKR",
        credit_limit_micro=0,
        accounts={"authority": -given_micro, "budget": given_micro},
    )


def more(micro: int) -> AddBudget:
    """More budget."""
    return AddBudget(add_micro=micro, caused_by="proposal:p1", actor="key:approver")


def test_what_is_added_to_a_budget_can_be_promised() -> None:
    """The authority gives it; every entry sums to zero."""
    decided = decide(Books(programme()), more(50), DAY_MS)
    assert isinstance(decided, tuple)
    (entry,) = decided
    moved = [(posting.account, posting.posting_micro) for posting in entry.postings]
    assert ("budget_added", [("authority", -50), ("budget", 50)]) == (entry.kind, moved)
    after = evolve(Books(programme()), entry).book
    assert {"authority": -150, "budget": 150} == after.accounts


def test_a_budget_stays_within_64_bits() -> None:
    """To the last micro-unit; what was promised already counts."""
    full = decide(Books(programme(MAX_MICRO - 5)), more(6), DAY_MS)
    assert BudgetOutOfRange(MAX_MICRO - 5) == full
    assert isinstance(decide(Books(programme(MAX_MICRO - 5)), more(5), DAY_MS), tuple)


def test_budgets_are_added_to_programmes_and_limits_changed_of_tenants() -> None:
    """Each command finds a book of its own kind only."""
    programme_book, tenant_book = programme(), book(limit_micro=5)
    unit = UnitOfWork(
        {programme_book.tenant_id: programme_book, tenant_book.tenant_id: tenant_book}, DAY_MS
    )
    assert NotFound("tenant") == unit.enter(tenant_book.tenant_id, more(1))
    assert NotFound("tenant") == unit.enter(programme_book.tenant_id, RAISE)


def test_added_budget_is_promised_like_the_first() -> None:
    """A grant that did not fit fits afterwards."""
    ledger = CoreLedger(book("startup"), budget_micro=10)
    unit = UnitOfWork({ledger.programme_id: ledger.programme}, DAY_MS)
    unit.enter(ledger.programme_id, more(90))
    richer = CoreLedger(book("startup"), budget_micro=10)
    assert 100 == unit.book(ledger.programme_id).accounts["budget"]
    assert not isinstance(richer.do(approve(grant("g", 100))), tuple)


def test_a_suspended_tenant_gets_no_new_hold_and_its_usage_is_booked() -> None:
    """What it had been promised stays promised, and can be extended by nothing."""
    ledger = CoreLedger(book(limit_micro=100))
    ledger.do(hold("h", 30))
    (suspended,) = entries_of(ledger.do(SuspendTenant(reason="abuse", actor="key:operator")))
    assert ("tenant_suspended", "abuse") == (suspended.kind, suspended.reason)
    assert () == ledger.do(SuspendTenant(reason="again", actor="key:operator"))
    assert TenantSuspended() == ledger.do(hold("new", 1))
    assert TenantSuspended() == ledger.do(extend("h", 1))
    ledger.do(total(20, hold_id="h"))
    assert (20, 10) == (ledger.book.receivable_micro, ledger.holds[HoldId("h")].open_micro)
    (resumed,) = entries_of(ledger.do(ResumeTenant(actor="key:operator")))
    assert "tenant_resumed" == resumed.kind
    assert () == ledger.do(ResumeTenant(actor="key:operator"))
    assert isinstance(ledger.do(hold("new", 1)), tuple)
    folded = fold(RebuiltBook(ledger.opening), ledger.entries)
    assert ledger.book == folded.book
