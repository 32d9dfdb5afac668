"""A unit of work: the books of one transaction, and all that is decided on them.

A unit decides commands one after another, at one instant: it opens the books that a command
touches, has `decisions.decide` decide, folds what is entered, so that the next command sees it, and
collects what has to be written. It does no I/O: a store opens it and saves its changes
(`store/books.py`).

Refusals: `NotFound` for a book that does not exist; all others as `decisions` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from hisab_contracts.charges import AllocationFinal, BucketTotal
from hisab_contracts.entries import Entry
from hisab_contracts.ids import HoldId
from ledger.core.book import Book, BookedBucket, Books, Lot, evolve, hold_named_by
from ledger.core.decisions import (
    BookCommand,
    BookRefusal,
    NotFound,
    SetBudget,
    decide,
    footprint_of,
)
from ledger.core.expiry import expiry_of
from ledger.core.holds import Hold, PlaceHold, ReleaseHold


class BookChanges(Struct, frozen=True, kw_only=True):
    """What a unit of work has to write: new entries, and every projection that they changed."""

    entries: Sequence[Entry]
    traces: Sequence[str | None]
    """The trace of each entry, where it has one: telemetry, no fact."""
    books: Sequence[Book]
    lots: Sequence[tuple[str, Lot]]
    """(tenant, lot), here and below."""
    buckets: Sequence[tuple[str, BookedBucket]]
    placed: Sequence[tuple[str, PlaceHold, Hold]]
    """New holds: what was asked, and what is left of it at the end of the unit."""
    holds: Sequence[tuple[str, Hold]]
    """Older holds that changed."""
    accounts: Sequence[tuple[str, str, int]]
    """(tenant, account, balance)."""


class UnitOfWork:
    """The books of one transaction, and all that was decided on them so far.

    Whoever makes one holds the locks of its books: then `seq` has no gap, `recorded_at` never falls
    and the hash chain has one head. Loaded are the lots and accounts that its commands can move,
    and the buckets and holds that they name; of holds those that a final can end as well, and all
    that are due.
    """

    def __init__(
        self,
        books: Mapping[str, Book],
        now_ms: int,
        *,
        buckets: Mapping[tuple[str, str], BookedBucket] | None = None,
        holds: Mapping[tuple[str, str], Hold] | None = None,
        holds_of_allocations: Mapping[tuple[str, str, str], Sequence[str]] | None = None,
        due: Iterable[tuple[str, Hold]] = (),
    ) -> None:
        """Take what was loaded; buckets and holds by (tenant, id).

        `now_ms` is the instant of every decision of this unit. `holds_of_allocations` lists open
        holds by the (tenant, hub, allocation) whose final ends them: a hub numbers its allocations
        by itself, so two hubs may use one id. `due` are open holds, with their tenants, whose time
        has come: what this unit enters into their books ends them first.
        """
        self.now_ms = now_ms
        self._books = dict(books)
        self._buckets = dict(buckets or {})
        self._holds = dict(holds or {})
        self._due: dict[str, list[str]] = {}
        for tenant_id, hold in due:
            self._holds[tenant_id, hold.hold_id] = hold
            self._due.setdefault(tenant_id, []).append(hold.hold_id)
        self._holds_of_allocations = dict(holds_of_allocations or {})
        self._lots_before = {book_id: book.lots for book_id, book in books.items()}
        self._entries: list[Entry] = []
        self._traces: list[str | None] = []
        self._placed: dict[tuple[str, str], PlaceHold] = {}
        self._changed_buckets: set[tuple[str, str]] = set()
        self._changed_holds: set[tuple[str, str]] = set()

    def book(self, book_id: str) -> Book:
        """Return a book as it stands now."""
        return self._books[book_id]

    def hold(self, tenant_id: str, hold_id: str) -> Hold:
        """Return a hold as it stands now."""
        return self._holds[tenant_id, hold_id]

    def enter(
        self,
        book_id: str,
        command: BucketTotal | BookCommand,
        *,
        trace_id: str | None = None,
    ) -> tuple[Entry, ...] | BookRefusal:
        """Decide a command on its books as they stand now, and fold what it enters.

        A refusal changes nothing. The command's own entry is the last.
        """
        books = self._opened(book_id, command)
        if books is None:
            return NotFound("tenant")
        decided = decide(books, command, self.now_ms)
        if isinstance(decided, tuple) and decided:
            self._fold(books, decided, trace_id)
            if isinstance(command, PlaceHold):
                self._placed[book_id, command.hold_id] = command
        return decided

    def release_final(self, final: AllocationFinal) -> None:
        """End the open holds that an allocation's final ends; one that is over has expired."""
        tenant_id = final.tenant_id
        allocation = (tenant_id, final.hub, final.allocation_id)
        for hold_id in self._holds_of_allocations.get(allocation, ()):
            hold = self._holds[tenant_id, hold_id]
            # A final that comes twice in one batch finds the hold ended by the first.
            if hold.ended_by is None:
                command = ReleaseHold(
                    hold_id=hold.hold_id,
                    ended_by="final",
                    caused_by=f"final:{final.hub}/{final.allocation_id}",
                    actor="metering",
                )
                self.enter(tenant_id, command)

    def release_expired(self) -> None:
        """End, of the holds that were loaded, those that are over, in the order of their ids."""
        for tenant_id, hold_id in sorted(self._holds):
            hold = self._holds[tenant_id, hold_id]
            # They were looked for before the locks: a final or a release may have ended one since.
            if hold.is_over(self.now_ms):
                self.enter(tenant_id, expiry_of(hold))

    def changes(self) -> BookChanges:
        """Collect what has to be written; no entries: nothing has."""
        changed = sorted({entry.tenant_id for entry in self._entries})
        books = [self._books[book_id] for book_id in changed]
        return BookChanges(
            entries=self._entries,
            traces=self._traces,
            books=books,
            lots=self._changed_lots(books),
            buckets=[(key[0], self._buckets[key]) for key in self._changed_buckets],
            placed=[(key[0], command, self._holds[key]) for key, command in self._placed.items()],
            holds=[
                (key[0], self._holds[key]) for key in self._changed_holds if key not in self._placed
            ],
            accounts=[
                (book.tenant_id, account, micro)
                for book in books
                for account, micro in book.accounts.items()
            ],
        )

    def _opened(self, book_id: str, command: BucketTotal | BookCommand) -> Books | None:
        """Open a book where a command touches it; None when there is no such book."""
        book = self._books.get(book_id)
        # A programme's book takes its budget and nothing else; a tenant's never takes one.
        if book is None or (book.kind == "fund") != isinstance(command, SetBudget):
            return None
        due = tuple(self._holds[book_id, hold_id] for hold_id in self._due.get(book_id, ()))
        if isinstance(command, BucketTotal):
            bucket = self._buckets.get((book_id, command.bucket_id))
            return Books(book, bucket, self._hold_or_none(book_id, command.hold_id), due=due)
        footprint = footprint_of(command)
        second = footprint.programme_book_id
        return Books(
            book,
            hold=self._hold_or_none(book_id, footprint.hold_id),
            programme=None if second is None else self._books.get(second),
            due=due,
        )

    def _hold_or_none(self, tenant_id: str, hold_id: HoldId | None) -> Hold | None:
        return None if hold_id is None else self._holds.get((tenant_id, hold_id))

    def _fold(self, books: Books, entries: tuple[Entry, ...], trace_id: str | None) -> None:
        """Fold what a command entered, keep what it left behind, and note what it changed."""
        book_id = books.book.tenant_id
        # At once, so that the next command of this transaction is decided on what this one left.
        for entry in entries:
            # Each entry with the hold that it speaks of: those that are over end before the
            # command's own entry.
            hold = self._hold_or_none(book_id, hold_named_by(entry))
            books = evolve(replace(books, hold=hold), entry)
            self._entries.append(entry)
            # Only a charge came with a trace; what the clock ended has none.
            self._traces.append(None if entry.charge is None else trace_id)
            if books.hold is not None:
                hold_key = book_id, books.hold.hold_id
                self._holds[hold_key] = books.hold
                self._changed_holds.add(hold_key)
        self._books[book_id] = books.book
        if books.bucket is not None:
            bucket_key = book_id, books.bucket.bucket_id
            self._buckets[bucket_key] = books.bucket
            self._changed_buckets.add(bucket_key)
        if books.programme is not None:
            self._books[books.programme.tenant_id] = books.programme
        due = self._due.pop(book_id, [])
        still_due = [hold_id for hold_id in due if self._holds[book_id, hold_id].ended_by is None]
        if still_due:
            self._due[book_id] = still_due

    def _changed_lots(self, books: Iterable[Book]) -> list[tuple[str, Lot]]:
        changed: list[tuple[str, Lot]] = []
        for book in books:
            before = self._lots_before[book.tenant_id]
            # Most books of a batch of unfunded or owed usage move no lot: their tuple is the same.
            if book.lots is not before:
                loaded = set(before)
                changed += [(book.tenant_id, lot) for lot in book.lots if lot not in loaded]
        return changed
