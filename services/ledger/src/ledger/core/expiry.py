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
hold's time came, and recorded when it is written.

**Lots.** A lot's window says when it is open, and every taker asks (`Lot.is_open`): nothing has to
be written for that. What is left of it goes to `breakage` only once all usage of its window has
been heard of (`expire_lots`): the watermarks of all hubs have passed its end. What holds had
reserved on it moves first, hold by hold in the order in which they were placed: to the lots open
now that fit, in draw order, then to the credit limit; what fits nowhere the hold is short. A lot
with nothing left expires without an entry. Usage that is heard of all the same takes back what it
needs (`take_back`), and what returns to such a lot expires again (`charges`).

Refuses nothing. `InvariantBroken` when what a hold reserves is not reserved in the book.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from msgspec import Struct
from msgspec.structs import replace

from hisab_contracts.entries import Entry
from hisab_contracts.invariants import invariant
from ledger.core.book import (
    Book,
    Books,
    DueHolds,
    PlacedHold,
    evolve,
    next_entry,
    postings_of,
    with_reservations,
)
from ledger.core.holds import (
    LIMIT,
    Hold,
    ReleaseHold,
    detail_of,
    order_of,
    places_in_order,
)
from ledger.core.lots import Draw, Lot, draw_order, fitting_lots, take_from_lots


class ExpireLots(Struct, frozen=True):
    """Move to breakage what is left of the book's lots whose windows are complete."""


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
    freed = [(place, -micro) for place, micro in over]
    return with_reservations(book, freed) if freed else book


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
        hold=detail_of(hold, command.ended_by),
    )


def _without_due(books: Books, book: Book, now_ms: int) -> Books:
    """Return the same books around a book in which nothing that is over reserves anything."""
    hold = None if books.hold is None else hold_at(books.hold, now_ms)
    return replace(books, book=book, hold=hold, due=None)


def expire_lots(books: Books, now_ms: int) -> tuple[Entry, ...]:
    """Enter the expiry of every lot of the book of which nothing can be used any more."""
    book = books.book
    over = [
        lot
        for lot in book.lots
        if lot.remaining_micro and lot.is_closed_for_good(books.complete_until_ms)
    ]
    over.sort(key=lambda lot: (lot.expires_ms or 0, draw_order(lot)))
    closing = {lot.account for lot in over}
    standing = {
        placed.hold.hold_id: placed
        for placed in sorted(books.placed, key=lambda placed: placed.hold.placed_seq)
        if placed.hold.ended_by is None and not placed.hold.is_over(now_ms)
    }
    entries: list[Entry] = []
    for lot in over:
        for placed in list(standing.values()):
            if lot.account in dict(placed.hold.reserved):
                moved = _moved(book, placed, lot.account, closing, now_ms)
                entry = _entry_of_move(book, moved, lot, now_ms)
                book = evolve(Books(book, hold=placed.hold), entry).book
                entries.append(entry)
                standing[moved.hold_id] = replace(placed, hold=moved)
        expiry = expire_lot(book, lot.account, now_ms)
        book = evolve(Books(book), expiry).book
        entries.append(expiry)
    return tuple(entries)


def expire_lot(book: Book, account: str, now_ms: int) -> Entry:
    """Make the entry that moves to breakage all that is left of a lot on which nobody reserves."""
    (lot,) = [lot for lot in book.lots if lot.account == account]
    invariant(not lot.reserved_micro, "nothing is reserved on a lot that expires")
    movements = [(account, -lot.remaining_micro), ("breakage", lot.remaining_micro)]
    return _entry_of_lot(book, "expiry", lot, movements, now_ms)


def take_back(book: Book, lot: Lot, micro: int, now_ms: int) -> Entry:
    """Make the entry that takes back some of what expired of a lot."""
    movements = [("breakage", -micro), (lot.account, micro)]
    return _entry_of_lot(book, "expiry_reversed", lot, movements, now_ms)


def _entry_of_lot(
    book: Book, kind: str, lot: Lot, movements: list[tuple[str, int]], now_ms: int
) -> Entry:
    """Make an entry that is effective when the lot's window ended."""
    return next_entry(
        book,
        kind,
        now_ms,
        effective_ms=lot.expires_ms,
        postings=postings_of(book, movements),
        caused_by=f"grant:{lot.grant_id}",
        actor="ledger",
    )


def _moved(
    book: Book, placed: PlacedHold, account: str, closing: Collection[str], now_ms: int
) -> Hold:
    """Return a hold whose reservation on a lot has moved to others, or that is short of it."""
    hold = placed.hold
    reserved = dict(hold.reserved)
    moving_micro = reserved.pop(account)
    open_now = fitting_lots(book.lots, now_ms, placed.terms)
    others = [lot for lot in open_now if lot.account not in closing]
    taken, left_micro = take_from_lots(
        others, moving_micro, total_micro=hold.hold_micro, given=reserved
    )
    limit_micro = min(left_micro, max(0, book.headroom_micro))
    if limit_micro:
        taken.append((LIMIT, limit_micro))
    for place, micro in taken:
        reserved[place] = reserved.get(place, 0) + micro
    return replace(
        hold,
        reserved=places_in_order(reserved, order_of(book.lots)),
        short_micro=hold.short_micro + left_micro - limit_micro,
    )


def _entry_of_move(book: Book, moved: Hold, lot: Lot, now_ms: int) -> Entry:
    """Make the entry that says what a hold reserves from now on."""
    return next_entry(
        book,
        "hold_moved",
        now_ms,
        caused_by=f"grant:{lot.grant_id}",
        actor="ledger",
        hold=detail_of(moved, "moved"),
    )
