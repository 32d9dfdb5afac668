"""Expiry: what is over by the ledger's clock is over, whenever its entry is written.

A hold's time comes without an entry. From that instant on it reserves nothing, in every answer and
in every decision; the entry that says so may follow at any later time. There are two ways to it.

* **As of now** (`book_at`, `hold_at`): the book and the hold as the clock has them, no entry made.
  Answers are given from these, and so is every refusal.
* **On the record** (`expire`): the `hold_released` entries of all that is over. A command that
  enters anything into a book enters these first (`decisions.decide`), so that no entry ever stands
  on what was still reserved by a hold that was over. Books that nobody writes to are left to a
  sweep (`jobs`): it makes entries, and changes no answer.

Both come to the same book but for `seq`, head and `recorded_at`. An expiry is effective when the
hold's time came, and recorded when it is written. A lot needs none of this: its window says when it
is open, and every taker asks (`Lot.is_open`).

Refuses nothing. `InvariantBroken` when what a hold reserves is not reserved in the book.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from hisab_contracts.entries import Entry
from ledger.core.book import Book, Books, DueHolds, evolve, next_entry, with_reservations
from ledger.core.holds import Draw, Hold, ReleaseHold, ended_detail


def holds_over(holds: Iterable[Hold], now_ms: int) -> list[Hold]:
    """Return the holds that are over and not ended yet, in the order in which their time came."""
    over = [hold for hold in holds if hold.is_over(now_ms)]
    over.sort(key=lambda hold: (hold.expires_ms, hold.hold_id))
    return over


def hold_at(hold: Hold, now_ms: int) -> Hold:
    """Return a hold as it stands at an instant: over, it has expired and reserves nothing."""
    return replace(hold, ended_by="expired", reserved=()) if hold.is_over(now_ms) else hold


def book_at(book: Book, over: Iterable[Draw]) -> Book:
    """Return a book as it stands now: what holds that are over still reserve is free.

    `over` are their reservations, each place once or many times.
    """
    sums: dict[str, int] = {}
    for place, micro in over:
        sums[place] = sums.get(place, 0) + micro
    return with_reservations(book, sums.items(), sign=-1) if sums else book


def due_of(book: Book, holds: Iterable[Hold], now_ms: int) -> DueHolds:
    """Return what is over in a book, and the book as it stands now, for many commands to ask."""
    over = holds_over(holds, now_ms)
    reserved = (draw for hold in over for draw in hold.reserved)
    return DueHolds(tuple(over), book_at(book, reserved))


def books_at(books: Books, due: DueHolds, now_ms: int) -> Books:
    """Return what a command touches as it stands now, without what is due."""
    return _without_due(books, due.book, now_ms)


def expire(books: Books, due: DueHolds, now_ms: int) -> tuple[tuple[Entry, ...], Books]:
    """End on the record all that is over; return the entries, and the books that they leave."""
    book = books.book
    entries: list[Entry] = []
    for hold in due.holds:
        entry = release_entry(book, hold, expiry_of(hold), now_ms)
        book = evolve(Books(book, hold=hold), entry).book
        entries.append(entry)
    return tuple(entries), _without_due(books, book, now_ms)


def expiry_of(hold: Hold) -> ReleaseHold:
    """Return the command by which the ledger itself ends a hold that is over."""
    return ReleaseHold(hold_id=hold.hold_id, ended_by="expired", caused_by="clock", actor="ledger")


def release_entry(book: Book, hold: Hold, command: ReleaseHold, now_ms: int) -> Entry:
    """Make the entry that ends a hold. An expiry is effective when the hold's time came."""
    return next_entry(
        book,
        "hold_released",
        now_ms,
        effective_ms=hold.expires_ms if command.ended_by == "expired" else None,
        caused_by=command.caused_by,
        actor=command.actor,
        hold=ended_detail(hold, command),
    )


def _without_due(books: Books, book: Book, now_ms: int) -> Books:
    """Return the same books around a book in which nothing that is over reserves anything."""
    hold = None if books.hold is None else hold_at(books.hold, now_ms)
    return replace(books, book=book, hold=hold, due=None)
