"""What a restored ledger compares, and what it takes back: as values."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from hisab_contracts.charges import BucketTotal
from hisab_contracts.entries import Entry
from hisab_contracts.ids import ProgrammeId, TenantId
from ledger.core.adjustments import AddBudget
from ledger.core.book import Book, Books, evolve
from ledger.core.decisions import BookCommand
from ledger.core.directory import book_of_programme
from ledger.core.movements import SetBudget
from ledger.core.restoration import (
    BookUnknown,
    BudgetTooSmall,
    EntriesMissing,
    EntryDiffers,
    EntryForged,
    EntryLacking,
    ProgrammeUnknown,
    RecordsRemoved,
    RestoredBooks,
    budget_change_of,
    compare_published,
    counterpart_of,
    first_to_compare,
    give_budget,
    placing_of,
    programme_book_of,
    refuse_budget,
    refuse_taking_back,
    reversed_grant_of,
)
from unit.ledger.values import DAY_MS, CoreLedger, approve, grant, hold, release, total

OPENING = Book(tenant_id=TenantId("t"), kind="startup", currency="PKR", credit_limit_micro=0)
IGNITE = book_of_programme(ProgrammeId("p"))


def unit_of(*books: Book) -> RestoredBooks:
    """These books, opened."""
    return RestoredBooks({book.tenant_id: book for book in books}, DAY_MS)


def entered(
    unit: RestoredBooks, command: BookCommand | BucketTotal, book_id: str = "t"
) -> tuple[Entry, ...]:
    """Enter a command that is not refused."""
    decided = unit.enter(book_id, command)
    assert isinstance(decided, tuple)
    return decided


def history() -> tuple[RestoredBooks, list[Entry]]:
    """A programme that grants, a hold, a charge under it, a release; the tenant's entries."""
    unit = unit_of(OPENING, IGNITE)
    entered(unit, SetBudget(budget_micro=1_000, actor="key:operator"), IGNITE.tenant_id)
    entries = [entered(unit, approve(grant("g1", 100)))[1]]
    entries += entered(unit, hold("h1", 50))
    entries += entered(unit, total(30, hold_id="h1"))
    entries += entered(unit, release("h1"))
    return unit, entries


@pytest.mark.parametrize(
    ("known", "first", "end", "accepted", "expected"),
    [
        (None, 0, 0, None, 0),
        (None, 0, 9, None, 0),
        (None, 3, 9, None, RecordsRemoved(0, 3)),
        (7, 0, 9, None, 7),
        (9, 0, 9, None, 9),
        (7, 8, 9, None, RecordsRemoved(7, 8)),
        (7, 9, 9, None, RecordsRemoved(7, 9)),
        (7, 8, 9, 8, 8),
        (7, 8, 9, 7, RecordsRemoved(7, 8)),
        (7, 0, 9, 9, 7),
        (50, 2, 9, None, 2),
    ],
)
def test_comparing_begins_where_this_database_last_knew_the_topic(
    known: int | None, first: int, end: int, accepted: int | None, expected: object
) -> None:
    """An operator excuses what was removed, and never a record that is there."""
    assert expected == first_to_compare(known, first, end, accepted)


def test_a_published_entry_is_here_lacking_or_another() -> None:
    """By its hash, which covers all of it."""
    _, (entry, *_) = history()
    assert None is compare_published(entry, entry.hash)
    assert EntryLacking(entry.entry_id) == compare_published(entry, None)
    assert EntryDiffers(entry.entry_id) == compare_published(entry, "0" * 64)


def test_taking_back_ends_where_the_lost_book_ended() -> None:
    """Totals, lots, holds and buckets, and the programme's side of a grant, to the last bit."""
    before, entries = history()
    unit = unit_of(OPENING, IGNITE)
    entered(unit, SetBudget(budget_micro=1_000, actor="key:operator"), IGNITE.tenant_id)
    for entry in entries:
        assert None is refuse_taking_back(entry, unit.book_or_none(entry.tenant_id))
        change = budget_change_of(entry)
        if change is not None:
            programme = unit.book_or_none(programme_book_of(change[0]))
            counterpart = counterpart_of(entry, change, programme)
            assert isinstance(counterpart, Entry)
            unit.take_back(counterpart, None)
        unit.take_back(entry, placing_of(entry))
    assert before.book("t") == unit.book("t")
    assert before.book(IGNITE.tenant_id) == unit.book(IGNITE.tenant_id)
    assert before.hold("t", "h1") == unit.hold("t", "h1")
    assert before.changes().buckets == unit.changes().buckets
    assert ["h1"] == [command.hold_id for _, command, _ in unit.changes().placed]


def test_what_does_not_follow_is_not_taken_back() -> None:
    """A message that was written by somebody else, a tenant nobody knows, a gap before it."""
    _, (first, second, *_) = history()
    forged = replace(first, actor="key:nobody")
    assert EntryForged(first.entry_id) == refuse_taking_back(forged, OPENING)
    assert BookUnknown(first.tenant_id) == refuse_taking_back(first, None)
    assert EntriesMissing(second.entry_id, 0) == refuse_taking_back(second, OPENING)
    elsewhere = replace(OPENING, seq=1, head_hash="1" * 64)
    assert EntriesMissing(second.entry_id, 1) == refuse_taking_back(second, elsewhere)


def test_a_grant_is_not_taken_back_without_its_programme() -> None:
    """Whose budget is in no topic, and must cover what it granted."""
    _, (granted, *_) = history()
    change = budget_change_of(granted)
    assert change is not None
    assert ProgrammeUnknown(change[0]) == counterpart_of(granted, change, None)
    # Below 0 on the way, and refused only if it still is with everything taken back.
    counterpart = counterpart_of(granted, change, IGNITE)
    assert isinstance(counterpart, Entry)
    overdrawn = evolve(Books(IGNITE), counterpart).book
    assert BudgetTooSmall(change[0], change[1]) == refuse_budget(overdrawn)
    assert None is refuse_budget(IGNITE)


def test_only_an_entry_that_placed_a_hold_places_one() -> None:
    """What a scheduler said of the job is not known any more."""
    _, (granted, placed, charged, released) = history()
    command = placing_of(placed)
    assert command is not None
    assert ("h1", 50, "-") == (command.hold_id, command.hold_micro, command.hub)
    assert [None, None, None] == [placing_of(e) for e in (granted, charged, released)]


def test_a_reversal_is_taken_back_with_its_side_in_the_programmes_book() -> None:
    """Out of its postings: which programme has how much back, and whose lot is gone."""
    ledger = CoreLedger(OPENING)
    ledger.do(approve(grant("g", 40)))
    ledger.reverse(ledger.entries[-1])
    granted, reversal = ledger.entries
    assert (("p", -40), ("p", 40)) == (budget_change_of(granted), budget_change_of(reversal))
    assert "g" == reversed_grant_of(reversal)
    change = budget_change_of(reversal)
    assert change is not None
    programme = replace(IGNITE, accounts={"budget": 60, "granted:t": 40, "authority": -100})
    counterpart = counterpart_of(reversal, change, programme)
    assert isinstance(counterpart, Entry)
    assert "budget_returned" == counterpart.kind
    assert [("budget", 40, 100), ("granted:t", -40, 0)] == [
        (posting.account, posting.posting_micro, posting.balance_micro)
        for posting in counterpart.postings
    ]


def test_a_programme_is_given_what_an_operator_names_and_nothing_twice() -> None:
    """Opened with it, raised to it, or left: what it was given is never taken away."""
    unit = unit_of(IGNITE)
    first = give_budget(unit.book(IGNITE.tenant_id), 1_000, actor="a")
    assert SetBudget(budget_micro=1_000, actor="a") == first
    entered(unit, first, IGNITE.tenant_id)
    raised = give_budget(unit.book(IGNITE.tenant_id), 1_050, actor="a")
    assert AddBudget(add_micro=50, caused_by="a", actor="a") == raised
    entered(unit, raised, IGNITE.tenant_id)
    for budget_micro in (1_050, 1_000):
        assert None is give_budget(unit.book(IGNITE.tenant_id), budget_micro, actor="a")
