"""Decisions: what a command enters into books, or why it is refused. Pure, time is an argument.

`decide(books, command, now_ms) -> entries | refusal` decides whatever is written into books: what
somebody asks for, and what metering states. It never looks anything up: `Books` are the book, and
the one bucket, the one hold and the programme's book that the command speaks of (see `book`).
A `UnitOfWork` holds the books of one transaction and decides commands on them one after another, at
one instant: it folds what each enters, so that the next one sees it, and collects what has to be
written. It does no I/O: a store opens it and saves its changes (`store/books.py`).

**What is over is over.** Holds whose time has come reserve nothing in any decision, though no entry
says so yet. A command that enters something enters the ends of those holds before it; one that is
refused or books nothing leaves them to the next (see `expiry`).

What each command enters is decided in a module of its own subject: `charges`, `reservations`,
`movements`, `withdrawals`, `expiry`.

Refusals, in order of precedence; of any command first `NotFound` (no such book). Charge:
`RefundAboveTotal`, `TotalOutOfRange`. Hold placed: `HoldOver`, `TenantSuspended`,
`InsufficientCredit`. Hold extended: `NotFound` (no such hold), `HoldClosed`, `HoldOver`,
`TenantSuspended`, `InsufficientCredit`. Hold released: `NotFound` (no such hold), `HoldClosed`.
Grant approved: `GrantExpired`, `OutcomeMissing`, `BudgetExceeded`. Invoiced: `AlreadyInvoiced`,
`NotReceivable`. Budget added: `BudgetOutOfRange`. Credit limit changed: `NotCommercial`. Entry
reversed: `NotReversible`, `AlreadyReversed`, `AlreadyDrawn`, `Reserved`, `AlreadyReclaimed`. Grant
revoked: `GrantNotApproved`, `GrantExpired`. Expired credit reclaimed: `AlreadyReclaimed`,
`NotExpired`. Topped up: `PaymentDiffers`, `TopUpExpired`. Lots expired: none. Who may approve what
is decided before (`proposals`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import assert_never

from msgspec import Struct
from msgspec.structs import replace

from hisab_contracts.charges import AllocationFinal, BucketTotal
from hisab_contracts.entries import Entry
from hisab_contracts.ids import HoldId, ProgrammeId, TenantId
from ledger.core.adjustments import (
    AddBudget,
    BudgetOutOfRange,
    ChangeCreditLimit,
    NotCommercial,
    ResumeTenant,
    SuspendTenant,
    add_budget,
    change_credit_limit,
    resume_tenant,
    suspend_tenant,
)
from ledger.core.book import (
    INVOICED,
    PROGRAMME_BOOK,
    Book,
    BookedBucket,
    Books,
    PlacedHold,
    evolve,
    hold_id_of,
)
from ledger.core.charges import ChargeRefusal, charge
from ledger.core.expiry import (
    ExpireLots,
    books_at,
    due_of,
    expire,
    expire_lots,
    expiry_of,
)
from ledger.core.grants import ApprovalRefusal, ApproveGrant
from ledger.core.holds import (
    ExtendHold,
    Hold,
    HoldClosed,
    HoldOver,
    InsufficientCredit,
    PlaceHold,
    ReleaseHold,
    TenantSuspended,
)
from ledger.core.lots import Lot, UsageTerms
from ledger.core.movements import (
    AlreadyInvoiced,
    NotReceivable,
    RecordInvoiced,
    SetBudget,
    approve_grant,
    funding_account,
    granted_account,
    record_invoiced,
    set_budget,
)
from ledger.core.prepayments import PREPAID, TopUp, TopUpRefusal, top_up
from ledger.core.reservations import extend_hold, place_hold, release_hold
from ledger.core.withdrawals import (
    ReclaimExpired,
    ReclaimRefusal,
    ReversalRefusal,
    ReverseEntry,
    RevocationRefusal,
    RevokeGrant,
    reclaim_expired,
    reverse_entry,
    revoke_grant,
)

BookCommand = (
    PlaceHold
    | ExtendHold
    | ReleaseHold
    | ApproveGrant
    | RecordInvoiced
    | SetBudget
    | AddBudget
    | ChangeCreditLimit
    | SuspendTenant
    | ResumeTenant
    | ReverseEntry
    | RevokeGrant
    | ReclaimExpired
    | TopUp
    | ExpireLots
)
"""The closed union of what is asked of a book. Charges come from metering besides."""


class NotFound(Struct, frozen=True):
    """What the command names does not exist, or not for who asks: a tenant, a hold, a grant."""

    what: str


BookRefusal = (
    NotFound
    | ChargeRefusal
    | HoldOver
    | TenantSuspended
    | InsufficientCredit
    | HoldClosed
    | ApprovalRefusal
    | AlreadyInvoiced
    | NotReceivable
    | ReversalRefusal
    | RevocationRefusal
    | ReclaimRefusal
    | TopUpRefusal
    | BudgetOutOfRange
    | NotCommercial
)
"""The closed union of why a command is refused; precedence stands in the module's docstring."""


class Footprint(Struct, frozen=True, kw_only=True):
    """What a command touches besides its own book.

    Whoever opens books for it loads this, locked; the unit of work decides the command on this, and
    on nothing else.
    """

    hold_id: HoldId | None = None
    programme_book_id: TenantId | None = None
    """The second book of a command that moves something between two."""
    accounts: tuple[str, ...] = ()
    """Those that are neither a lot nor a total of a book."""
    spent_lots: bool = False
    """Lots with nothing left are needed too."""
    needs_completeness: bool = False
    """It is decided by until when the tenant's usage has been heard of."""


def footprint_of(command: BookCommand) -> Footprint:
    """Say what a command touches besides its own book."""
    match command:
        case PlaceHold() | ExtendHold() | ReleaseHold():
            return Footprint(hold_id=command.hold_id)
        case ApproveGrant(grant=grant):
            return Footprint(
                programme_book_id=TenantId(PROGRAMME_BOOK + grant.programme_id),
                accounts=_accounts_of_grant(grant.programme_id, grant.tenant_id),
                needs_completeness=True,
            )
        case ReverseEntry(entry=reversed_entry):
            reversed_grant = reversed_entry.grant
            if reversed_grant is None:
                return Footprint()
            programme_id = reversed_grant.programme_id
            if programme_id == PREPAID:
                return Footprint(accounts=(funding_account(PREPAID),), spent_lots=True)
            return Footprint(
                programme_book_id=TenantId(PROGRAMME_BOOK + programme_id),
                accounts=_accounts_of_grant(programme_id, reversed_entry.tenant_id),
                spent_lots=True,
            )
        case TopUp():
            return Footprint(accounts=(funding_account(PREPAID),), spent_lots=True)
        case RevokeGrant():
            return Footprint(spent_lots=True)
        case ReclaimExpired(grant=grant):
            return Footprint(
                programme_book_id=TenantId(PROGRAMME_BOOK + grant.programme_id),
                accounts=_accounts_of_grant(grant.programme_id, grant.tenant_id),
                spent_lots=True,
            )
        case ExpireLots():
            return Footprint()
        case RecordInvoiced():
            return Footprint(accounts=(INVOICED + command.document_id,))
        case SetBudget() | AddBudget():
            return Footprint(accounts=("authority", "budget"))
        case ChangeCreditLimit() | SuspendTenant() | ResumeTenant():
            return Footprint()
        case _:
            assert_never(command)


def _accounts_of_grant(programme_id: ProgrammeId, tenant_id: TenantId) -> tuple[str, ...]:
    return (funding_account(programme_id), "budget", granted_account(tenant_id))


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
        terms: Mapping[tuple[str, str], UsageTerms] | None = None,
        complete_until_ms: Mapping[str, int | None] | None = None,
    ) -> None:
        """Take what was loaded; buckets and holds by (tenant, id).

        `now_ms` is the instant of every decision of this unit. `holds_of_allocations` lists open
        holds by the (tenant, hub, allocation) whose final ends them: a hub numbers its allocations
        by itself, so two hubs may use one id. `due` are open holds, with their tenants, whose time
        has come: what this unit enters into their books ends them first. `terms` says of holds,
        where a lot they reserve on may expire, what they are for. `complete_until_ms` says by
        tenant until when all usage has been heard of, where anything hangs on it.
        """
        self.now_ms = now_ms
        self._books = dict(books)
        self._buckets = dict(buckets or {})
        self._holds = dict(holds or {})
        over: dict[str, list[Hold]] = {}
        for tenant_id, hold in due:
            self._holds[tenant_id, hold.hold_id] = hold
            over.setdefault(tenant_id, []).append(hold)
        # Once for all commands: thousands may be due, and a batch may have as many messages that
        # enter nothing. Until something is folded into its book this stands.
        self._due = {
            tenant_id: due_of(self._books[tenant_id], found, now_ms)
            for tenant_id, found in over.items()
        }
        self._holds_of_allocations = dict(holds_of_allocations or {})
        self._terms = dict(terms or {})
        self._complete_until_ms = dict(complete_until_ms or {})
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

    def expire_lots(self) -> None:
        """Expire, in every book that was opened, the lots whose windows are complete."""
        for tenant_id in sorted(self._books):
            self.enter(tenant_id, ExpireLots())

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
        if book is None or (book.kind == "fund") != isinstance(command, SetBudget | AddBudget):
            return None
        due = self._due.get(book_id)
        if isinstance(command, BucketTotal):
            bucket = self._buckets.get((book_id, command.bucket_id))
            return Books(
                book,
                bucket,
                self._hold_or_none(book_id, command.hold_id),
                due=due,
                complete_until_ms=self._complete_until_ms.get(book_id),
            )
        footprint = footprint_of(command)
        second = footprint.programme_book_id
        return Books(
            book,
            hold=self._hold_or_none(book_id, footprint.hold_id),
            programme=None if second is None else self._books.get(second),
            due=due,
            complete_until_ms=self._complete_until_ms.get(book_id),
            placed=self._placed_holds(book_id) if isinstance(command, ExpireLots) else (),
        )

    def _placed_holds(self, tenant_id: str) -> tuple[PlacedHold, ...]:
        return tuple(
            PlacedHold(self._holds[key], terms)
            for key, terms in self._terms.items()
            if key[0] == tenant_id
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
            hold = self._hold_or_none(book_id, hold_id_of(entry))
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
        # Whatever was due in this book ended before the command's own entry.
        self._due.pop(book_id, None)

    def _changed_lots(self, books: Iterable[Book]) -> list[tuple[str, Lot]]:
        changed: list[tuple[str, Lot]] = []
        for book in books:
            before = self._lots_before[book.tenant_id]
            # Most books of a batch of unfunded or owed usage move no lot: their tuple is the same.
            if book.lots is not before:
                loaded = set(before)
                changed += [(book.tenant_id, lot) for lot in book.lots if lot not in loaded]
        return changed


def decide(
    books: Books, command: BucketTotal | BookCommand, now_ms: int
) -> tuple[Entry, ...] | BookRefusal:
    """Decide a command: the entries it makes, in order, or why it is refused.

    No entries: there is nothing to book (a total not newer than the booked one). Entries of holds
    that are over come first, the command's own last. Conserves: every entry's postings sum to zero.
    """
    due = books.due
    if due is None:
        return _decide(books, command, now_ms)
    # First as of now, without making an entry: a refusal needs none, and thousands may be over.
    decided = _decide(books_at(books, due, now_ms), command, now_ms)
    if not isinstance(decided, tuple) or not decided:
        return decided
    expiries, after = expire(books, due, now_ms)
    decided = _decide(after, command, now_ms)
    return (*expiries, *decided) if isinstance(decided, tuple) else decided


def _decide(
    books: Books, command: BucketTotal | BookCommand, now_ms: int
) -> tuple[Entry, ...] | BookRefusal:
    """Decide a command on books in which nothing is due."""
    match command:
        case BucketTotal():
            return charge(books, command, now_ms)
        case PlaceHold():
            # Its id comes from the command's key. It is there already when that key was forgotten,
            # by a restore whose entries were taken back: it is not placed a second time.
            return () if books.hold is not None else place_hold(books.book, command, now_ms)
        case ExtendHold():
            if books.hold is None:
                return NotFound("hold")
            return extend_hold(books.book, books.hold, command, now_ms)
        case ReleaseHold():
            if books.hold is None:
                return NotFound("hold")
            return release_hold(books.book, books.hold, command, now_ms)
        case ApproveGrant():
            return approve_grant(books, command, now_ms)
        case RecordInvoiced():
            return record_invoiced(books.book, command, now_ms)
        case SetBudget():
            return set_budget(books.book, command, now_ms)
        case ReverseEntry():
            return reverse_entry(books, command, now_ms)
        case RevokeGrant():
            return revoke_grant(books, command, now_ms)
        case ReclaimExpired():
            return reclaim_expired(books, command, now_ms)
        case TopUp():
            return top_up(books.book, command, now_ms)
        case ExpireLots():
            return expire_lots(books, now_ms)
        case AddBudget():
            return add_budget(books.book, command, now_ms)
        case ChangeCreditLimit():
            return change_credit_limit(books.book, command, now_ms)
        case SuspendTenant():
            return suspend_tenant(books.book, command, now_ms)
        case ResumeTenant():
            return resume_tenant(books.book, command, now_ms)
        case _:
            assert_never(command)
